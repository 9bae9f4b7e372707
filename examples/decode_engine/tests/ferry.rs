//! A prefill and a decode engine in one process: loads that arrive completely, partly or not at all.

mod common;

use anyhow::{Context as _, Result};
use common::{Done, Rig, answer, outcome, prompts};
use decode_engine::{engine::Settings, request::Refusal, serve::Role};
use kvferry::{ChunkSize, Config, LaneKind, Offer, scheduler::invalid::Policy};

/// A decode engine whose lanes have these faults.
fn decode(fault: &str, settings: Settings) -> Result<Rig> {
    let mut config = Config::default();
    config.pull.lanes = vec![LaneKind::Tcp];
    // One block per chunk, so that a failure leaves a prefix.
    config.pull.chunk = ChunkSize { min_bytes: 1, max_bytes: 1, ..ChunkSize::default() };
    config.pull.attempts = 1;
    config.pull.faults = if fault.is_empty() { None } else { Some(fault.parse()?) };
    Rig::linked(400, settings, Some(Role::Decode), &config)
}

fn prefill() -> Result<Rig> {
    Rig::linked(400, Settings::default(), Some(Role::Prefill), &Config::default())
}

fn offer(prefill: &Rig, prompt: &[u32]) -> Result<Offer> {
    answer(prefill.submit(prompt, 1, true, None))?.offer.context("no offer was made")
}

fn right(prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
    prompts.iter().map(|p| Ok(Rig::new(128, Settings::default())?.ask(p, tokens)?.tokens)).collect()
}

/// Bytes of this many blocks of the tiny model: 3 layers of 2 heads, K and V, 16 tokens, 16 values of 2 bytes.
const fn bytes(blocks: usize) -> usize {
    blocks * 3 * 2 * 2 * 16 * 16 * 2
}

#[test]
fn pulled_kv_gives_the_same_answer() -> Result<()> {
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
fn exactly_the_missing_tokens_are_computed() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(1, 1, 200, 200, 2));
    let (prompt, tokens) = (&all[0], all[0].len() as u64);
    for sync_loads in [false, true] {
        // Slow enough that the first blocks have arrived when the lane breaks.
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

/// Two requests share a prefix. One loads it, the other counts on it in the same step. Then the lane breaks.
#[test]
fn a_request_adopts_lost_shared_blocks_that_another_one_computes() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(2, 1, 320, 60, 3));
    let right = right(&all, 12)?;
    for sync_loads in [true, false] {
        let decode =
            decode(&format!("throttle=400K,down@{}", bytes(6)), Settings { sync_loads, ..Settings::default() })?;
        let offers = all.iter().map(|p| offer(&prefill, p)).collect::<Result<Vec<_>>>()?;
        // An earlier request keeps the engine busy, so that both are admitted in one step.
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
        // It continues to serve, and its ledger stays exact.
        let again = decode.ask(&all[0], 12)?;
        assert_eq!((&again.tokens, again.parts.external), (&right[0], 0));
        decode.settled()?;
    }
    Ok(())
}

#[test]
fn under_the_policy_fail_exactly_the_requests_that_lost_blocks_fail() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(3, 3, 100, 200, 4));
    let settings = Settings { policy: Policy::Fail, ..Settings::default() };
    let decode = decode(&format!("down@{},lanes=1", bytes(4)), settings)?;
    let failed = outcome(decode.submit(&all[0], 8, false, Some(offer(&prefill, &all[0])?)))?;
    let Err(Refusal::KvLost(reason)) = failed else { panic!("it did not fail: {failed:?}") };
    assert!(reason.contains("did not arrive") && reason.contains("lane_failed"), "{reason}");
    // The second connection of the lane has no fault.
    let right = right(&all, 8)?;
    assert_eq!(answer(decode.submit(&all[1], 8, false, Some(offer(&prefill, &all[1])?)))?.tokens, right[1]);
    assert_eq!(decode.ask(&all[2], 8)?.tokens, right[2]);
    decode.settled()
}

#[test]
fn an_unusable_offer_changes_no_answer() -> Result<()> {
    let (prefill, all) = (prefill()?, prompts(1, 1, 100, 100, 5));
    let right = right(&all, 8)?;
    let good = offer(&prefill, &all[0])?;
    let mut unreachable = good.clone();
    unreachable.ranks[0].addr = "127.0.0.1:1".into();
    let mut broken = good.clone();
    broken.token = kvferry::Token::from_bytes([1; 16]);
    let mut empty = good.clone();
    empty.ranks.clear();
    let mut long = good.clone();
    long.tokens = u64::MAX;
    let settings = Settings { deadline: std::time::Duration::from_secs(2), ..Settings::default() };
    for sync_loads in [false, true] {
        let decode = decode("", Settings { sync_loads, ..settings.clone() })?;
        for offer in [unreachable.clone(), broken.clone(), empty.clone(), long.clone()] {
            let prompt = &all[0];
            let done = answer(decode.submit(prompt, 8, false, Some(offer)))?;
            assert_eq!(done.tokens, right[0]);
        }
        decode.settled()?;
    }
    Ok(())
}

#[test]
fn a_client_that_disconnects_in_mid_pull_leaves_its_blocks_to_the_next_request() -> Result<()> {
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
