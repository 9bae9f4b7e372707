//! A name passes through routers and clients. Whatever happens to it on its way, nothing is loaded, or exactly the offered
//! bytes.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use kvferry::{Cause, Config, LaneKind, Offer, OfferId, Pull, PullError, SealKey, Token};
use kvferry_testkit::rig::{
    Producer, SOON, Spec, all_of, assert_loaded_is_exact, consumer, deadline, ended, local, pull_all, really,
};
use serde_json::{Value, json};

/// A changed name: a text, and what was done to it.
struct Changed(String, String);

/// The name with each byte flipped, removed, and doubled, in turn. `fresh` makes a new name of a new offer.
fn bytes_changed(mut fresh: impl FnMut() -> String) -> Vec<Changed> {
    let length = fresh().len();
    let mut all = Vec::new();
    for at in 0..length {
        for how in ["flipped", "removed", "doubled"] {
            let mut bytes = fresh().into_bytes();
            match how {
                "flipped" => bytes[at] ^= 1,
                "removed" => drop(bytes.remove(at)),
                _ => bytes.insert(at, bytes[at]),
            }
            all.push(Changed(String::from_utf8_lossy(&bytes).into_owned(), format!("byte {at} {how}")));
        }
    }
    all
}

/// The name with each field removed, doubled in value, and taken from the name of another offer; and with an added field.
fn fields_changed(mut fresh: impl FnMut() -> String) -> Vec<Changed> {
    let mut name = || serde_json::from_str::<Value>(&fresh()).expect("a name is JSON");
    let fields: Vec<String> = name().as_object().expect("an object").keys().cloned().collect();
    let mut all = Vec::new();
    for field in fields {
        let mut removed = name();
        removed.as_object_mut().expect("an object").remove(&field);
        all.push(Changed(removed.to_string(), format!("{field} removed")));
        let mut swapped = name();
        swapped[&field] = name()[&field].take();
        all.push(Changed(swapped.to_string(), format!("{field} of another name")));
        for other in [json!(null), json!(""), json!(0), json!([]), json!({}), json!(u64::MAX)] {
            let mut changed = name();
            changed[&field] = other.clone();
            all.push(Changed(changed.to_string(), format!("{field} is {other}")));
        }
    }
    for tokens in [0, 1, 15, 16, 47, 49, 1u64 << 40] {
        let mut changed = name();
        changed["tokens"] = json!(tokens);
        all.push(Changed(changed.to_string(), format!("{tokens} tokens")));
    }
    let mut added = name();
    added["groups"] = json!([{"group": 0, "first_position": 0, "blocks": [0, 1, 2]}]);
    all.push(Changed(added.to_string(), "a block list added".into()));
    let mut twice = name();
    let rank = twice["ranks"][0].clone();
    twice["ranks"].as_array_mut().expect("ranks").push(rank);
    all.push(Changed(twice.to_string(), "its rank twice".into()));
    all
}

/// Whether a pull by this name sends packets to this host only.
fn stays_here(name: &Offer) -> bool {
    let host = |addr: &str| addr.rsplit_once(':').and_then(|(host, _)| host.parse::<IpAddr>().ok());
    name.ranks.iter().all(|r| host(&r.addr).is_some_and(|ip| ip.is_loopback()))
}

fn changed_names_are_harmless(change: impl Fn(&mut dyn FnMut() -> String) -> Vec<Changed>, lane: LaneKind) {
    // 3 blocks an offer: the last one holds 15 tokens less than the others, so that the token count matters.
    let spec = Spec { blocks: 8192, regions: 1, block_size: 512, early_grace_ms: 50, ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let mut next = 0;
    let mut fresh = || {
        next += 3;
        let mut name = producer.offer(&[next % 8000 + 1, next % 8000, next % 8000 + 2]);
        name.request = "request".into();
        name.to_json()
    };
    let changed = change(&mut fresh);
    let consumer = consumer(&spec, Config::default());
    let (mut pulls, mut refused) = (HashMap::new(), 0);
    for (n, Changed(text, how)) in changed.into_iter().enumerate() {
        let Ok(name) = Offer::from_json(&text) else {
            refused += 1;
            continue;
        };
        if !stays_here(&name) && name.check().is_ok() {
            continue;
        }
        let first = n as u32 * 3 % 8000;
        let pull = Pull::new(name, local(first..first + 3)).lanes(vec![really(lane)]);
        match consumer.pull(pull.deadline(deadline(lane, Duration::from_secs(3)))) {
            Ok(pull) => drop(pulls.insert(pull, how)),
            Err(PullError::Offer(_)) => refused += 1,
            Err(e) => panic!("{how}: {e}"),
        }
    }
    let started = pulls.len();
    let mut loaded = 0;
    while !pulls.is_empty() {
        let end = ended(&consumer);
        let how = pulls.remove(&end.pull).expect("each pull ends once");
        println!("{how}: {} loaded, {:?}", end.outcome.loaded(), end.outcome.cause());
        if end.outcome.loaded() > 0 {
            assert_eq!(assert_loaded_is_exact(&end, &consumer, &spec, producer.seed), 3, "{how}");
            assert_eq!(end.offer.tokens, 48, "{how}: the engine would take the tokens for loaded");
            loaded += 1;
        }
    }
    assert!(refused > 0 && started > loaded && loaded > 0, "{refused} refused, {loaded} of {started} loaded");
}

#[test]
fn a_name_with_any_byte_changed_loads_nothing_or_exactly_what_was_offered() {
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        changed_names_are_harmless(|fresh| bytes_changed(fresh), lane);
    }
}

#[test]
fn a_name_with_any_field_changed_loads_nothing_or_exactly_what_was_offered() {
    for lane in [LaneKind::Local, LaneKind::Tcp] {
        changed_names_are_harmless(|fresh| fields_changed(fresh), lane);
    }
}

/// A thief that has the id from a log, and not the name.
#[test]
fn an_id_without_its_token_neither_reads_nor_releases() {
    let spec = Spec::default();
    let mut producer = Producer::start(&spec);
    let offer = producer.offer_all();
    let mut guessed = offer.clone();
    guessed.token = Token::random();
    let thief = consumer(&spec, Config::default());
    thief.pull(pull_all(&guessed, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&thief);
    assert_eq!((end.outcome.loaded(), end.outcome.cause()), (0, Some(Cause::BadOffer)));
    thief.release(&guessed).unwrap();
    thief.shutdown();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let release = |id: OfferId, token| {
        let limit = Duration::from_secs(5);
        runtime.block_on(kvferry::release(&producer.addr, None, (id, token), None, limit))
    };
    let refused = release(offer.id, guessed.token).unwrap_err().to_string();
    assert!(refused.contains("token"), "{refused}");
    let reader = consumer(&spec, Config::default());
    reader.pull(pull_all(&offer, LaneKind::Tcp, SOON)).unwrap();
    let end = ended(&reader);
    assert!(end.outcome.complete(), "{:?}", end.outcome);
    assert_loaded_is_exact(&end, &reader, &spec, producer.seed);
    assert_eq!(producer.freed(offer.id).0, "Released", "its own reader released it");
}

#[test]
fn an_engine_with_a_seal_key_accepts_sealed_names_only_and_dials_nobody_for_others() {
    let key = |text: &str| SealKey::new(text.repeat(32).as_bytes()).unwrap();
    let spec = Spec { seal: Some("a".repeat(32)), ..Spec::default() };
    let mut producer = Producer::start(&spec);
    let (sealed, other) = (producer.offer_all(), producer.offer(&[1]));
    let mut config = Config::default();
    config.names.seal_keys = vec![key("b"), key("a")];
    let consumer = consumer(&spec, config);
    let mut forged = sealed.clone();
    forged.ranks[0].addr = "127.0.0.1:9".into();
    let mut swapped = sealed.clone();
    (swapped.id, swapped.token) = (other.id, other.token);
    let mut bare = sealed.clone();
    bare.seal = None;
    for bad in [forged, swapped, bare, other.clone().sealed(&key("c"))] {
        let wanted = all_of(&bad);
        assert!(matches!(consumer.pull(Pull::new(bad.clone(), wanted)), Err(PullError::Offer(_))));
        assert!(consumer.release(&bad).is_err());
    }
    assert_eq!((consumer.pulls(), consumer.peers(), producer.count().2), (0, 0, 0));
    consumer.pull(pull_all(&sealed, LaneKind::Tcp, SOON)).unwrap();
    assert!(ended(&consumer).outcome.complete());
}
