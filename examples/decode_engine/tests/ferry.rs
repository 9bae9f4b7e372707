//! Two engines and a ferry between them, in one process: loads that come whole, in part, and not at all.

mod common;

use anyhow::{Context as _, Result};
use common::{Done, Rig, answer, outcome, prompts};
use decode_engine::{engine::Settings, request::Refusal, serve::Role};
use kvferry::{ChunkSize, Config, LaneKind, Offer, scheduler::invalid::Policy};

/// A decode engine whose lanes break as told.
fn decode(fault: &str, settings: Settings) -> Result<Rig> {
    let mut config = Config::default();
    config.pull.lanes = vec![LaneKind::Tcp];
    // A block at a time, so that a break leaves a prefix.
    config.pull.chunk = ChunkSize { min_bytes: 1, max_bytes: 1, ..ChunkSize::default() };
    config.pull.attempts = 1;
    config.pull.faults = if fault.is_empty() { None } else { Some(fault.parse()?) };
    Rig::linked(400, settings, Some(Role::Decode), &config)
}

fn prefill() -> Result<Rig> {
    Rig::linked(400, Settings::default(), Some(Role::Prefill), &Config::default())
}

fn offer(prefill: &Rig, prompt: &[u32]) -> Result<Offer> {
    answer(prefill.submit(prompt, 1, true, None))?.offer.context("nothing was offered")
}

fn right(prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
    prompts.iter().map(|p| Ok(Rig::new(128, Settings::default())?.ask(p, tokens)?.tokens)).collect()
}

/// Bytes of so many blocks of the tiny model: 3 layers of 2 heads, K and V, 16 tokens, 16 values of 2 bytes.
const fn bytes(blocks: usize) -> usize {
    blocks * 3 * 2 * 2 * 16 * 16 * 2
}

#[test]
fn kv_that_was_brought_gives_the_same_answer() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(3, 1, 100, 100, 1));
    for sync_loads in [false, true] {
        let decode = decode("", Settings { sync_loads, ..Settings::default() })?;
        for (prompt, right) in all.iter().zip(right(&all, 12)?) {
            let done = answer(decode.submit(prompt, 12, false, Some(offer(&prefill, prompt)?)))?;
            assert_eq!(done.tokens, right);
            assert_eq!((done.parts.computed(), done.parts.recomputed()), (1, 0), "{:?}", done.parts);
        }
        decode.settled()?;
    }
    prefill.settled()
}

#[test]
fn what_did_not_arrive_is_computed_and_nothing_else() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(1, 1, 200, 200, 2));
    let (prompt, tokens) = (&all[0], all[0].len() as u64);
    for sync_loads in [false, true] {
        // Slow enough that what was asked for first is there when the lane breaks.
        let decode =
            decode(&format!("throttle=400K,down@{}", bytes(10)), Settings { sync_loads, ..Settings::default() })?;
        let done = answer(decode.submit(prompt, 12, false, Some(offer(&prefill, prompt)?)))?;
        assert_eq!(done.tokens, right(&all, 12)?[0]);
        let kept = done.parts.external;
        assert!((16..=160).contains(&kept) && kept.is_multiple_of(16), "a prefix of blocks is kept: {:?}", done.parts);
        assert_eq!(done.parts.own.external, tokens - 1 - kept, "{:?}", done.parts);
        assert_eq!(decode.count("engine_recomputed_rows_total")?, tokens - 1 - kept);
        assert_eq!(decode.count("engine_salvaged_tokens_total")?, kept);
        decode.settled()?;
    }
    prefill.settled()
}

/// The day that this project is for. Two requests share a prefix; one loads it, the other counts on it in the same step;
/// then the lane breaks.
#[test]
fn whoever_shares_what_was_lost_takes_over_what_the_other_computes() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(2, 1, 320, 60, 3));
    let right = right(&all, 12)?;
    for sync_loads in [true, false] {
        let decode =
            decode(&format!("throttle=400K,down@{}", bytes(6)), Settings { sync_loads, ..Settings::default() })?;
        let offers = all.iter().map(|p| offer(&prefill, p)).collect::<Result<Vec<_>>>()?;
        // A request before them keeps the engine at it, so that the two come into one step.
        let busy = decode.submit(&prompts(1, 1, 300, 300, 9)[0], 1, false, None);
        let events: Vec<_> = all.iter().zip(offers).map(|(p, o)| decode.submit(p, 12, false, Some(o))).collect();
        let done: Vec<Done> = events.into_iter().map(answer).collect::<Result<_>>()?;
        answer(busy)?;
        for ((done, right), prompt) in done.iter().zip(&right).zip(&all) {
            assert_eq!(&done.tokens, right);
            assert_eq!(done.parts.prompt(), prompt.len() as u64);
        }
        if sync_loads {
            let [a, b] = [&done[0].parts, &done[1].parts];
            assert!(a.own.external > 0 && b.other.local_cache > 0, "{a:?} {b:?}");
            assert_eq!(b.local_cache % 16, 0);
        }
        decode.settled()?;
        // It goes on serving, and its books stay true.
        let again = decode.ask(&all[0], 12)?;
        assert_eq!((&again.tokens, again.parts.external), (&right[0], 0));
        decode.settled()?;
    }
    Ok(())
}

#[test]
fn under_the_policy_to_fail_exactly_those_fail_who_lost_something() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(3, 3, 100, 200, 4));
    let settings = Settings { policy: Policy::Fail, ..Settings::default() };
    let decode = decode(&format!("down@{},lanes=1", bytes(4)), settings)?;
    let failed = outcome(decode.submit(&all[0], 8, false, Some(offer(&prefill, &all[0])?)))?;
    let Err(Refusal::KvLost(why)) = failed else { panic!("it did not fail: {failed:?}") };
    assert!(why.contains("did not arrive") && why.contains("lane_failed"), "{why}");
    // The lane's second connection is whole.
    let right = right(&all, 8)?;
    assert_eq!(answer(decode.submit(&all[1], 8, false, Some(offer(&prefill, &all[1])?)))?.tokens, right[1]);
    assert_eq!(decode.ask(&all[2], 8)?.tokens, right[2]);
    decode.settled()
}

#[test]
fn an_offer_that_leads_nowhere_costs_time_and_nothing_else() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(1, 1, 100, 100, 5));
    let right = right(&all, 8)?;
    let good = offer(&prefill, &all[0])?;
    let mut nobody = good.clone();
    nobody.ranks[0].addr = "127.0.0.1:1".into();
    let mut broken = good.clone();
    broken.groups[0].blocks[0] = Some(kvferry::BlockId(u32::MAX - 1));
    let mut empty = good.clone();
    empty.ranks.clear();
    let mut long = good.clone();
    long.tokens = u64::MAX;
    let settings = Settings { deadline: std::time::Duration::from_secs(2), ..Settings::default() };
    for sync_loads in [false, true] {
        let decode = decode("", Settings { sync_loads, ..settings.clone() })?;
        for offer in [nobody.clone(), broken.clone(), empty.clone(), long.clone()] {
            let prompt = &all[0];
            let done = answer(decode.submit(prompt, 8, false, Some(offer)))?;
            assert_eq!(done.tokens, right[0]);
        }
        decode.settled()?;
    }
    Ok(())
}

#[test]
fn a_client_that_goes_away_in_mid_pull_leaves_its_blocks_to_the_next() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(2, 1, 300, 60, 6));
    let right = right(&all, 8)?;
    let decode = decode(&format!("throttle={}", bytes(10)), Settings::default())?;
    let offers = all.iter().map(|p| offer(&prefill, p)).collect::<Result<Vec<_>>>()?;
    let mut offers = offers.into_iter();
    let first = decode.submit(&all[0], 8, false, offers.next());
    decode.wait(|s| s.pulls.iter().any(|p| p.loaded >= 2))?;
    let second = decode.submit(&all[1], 8, false, offers.next());
    decode.wait(|s| s.running == 2)?;
    drop(first);
    assert_eq!(answer(second)?.tokens, right[1]);
    decode.settled()?;
    prefill.settled()
}
