//! Offers that grow while their prompts are computed: a prefill and a decode engine in one process.

mod common;

use std::time::Duration;

use anyhow::{Result, ensure};
use common::{Rig, answer, outcome, prompts};
use decode_engine::{engine::Settings, request::Refusal, serve::Role};
use kvferry::{ChunkSize, Config};

fn linked(role: Role, blocks: u32, budget: u64) -> Result<Rig> {
    let mut config = Config::default();
    config.pull.chunk = ChunkSize { min_bytes: 1, ..ChunkSize::default() };
    // Only claims that say so wait for an offer.
    config.lease.early_grace = Duration::ZERO;
    Rig::linked(blocks, Settings { budget, ..Settings::default() }, Some(role), &config)
}

fn prefill(budget: u64) -> Result<Rig> {
    linked(Role::Prefill, 400, budget)
}

fn decode() -> Result<Rig> {
    linked(Role::Decode, 400, 256)
}

/// The answers of an engine that runs alone.
fn right(prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
    prompts.iter().map(|p| Ok(Rig::new(400, Settings::default())?.ask(p, tokens)?.tokens)).collect()
}

/// Blocks that were not loaded because their offer was revoked.
fn revoked(decode: &Rig) -> Result<u64> {
    Ok(decode.metrics()?.sum("kvferry_blocks_invalid_total", &["cause=\"revoked\""]))
}

fn settled(rigs: &[&Rig]) -> Result<()> {
    rigs.iter().try_for_each(|r| r.settled())
}

#[test]
fn a_prompt_is_loaded_while_it_is_computed_and_only_its_last_token_is_computed_again() -> Result<()> {
    let (prefill, decode) = (prefill(1)?, decode()?);
    // With and without a partial last block.
    let all: Vec<_> =
        [400, 401, 415].into_iter().map(|n| prompts(1, 1, 300, 300, n)[0][..n as usize].to_vec()).collect();
    for (prompt, right) in all.iter().zip(right(&all, 12)?) {
        let name = prefill.name(prompt);
        // The claim comes first, and waits.
        let follows = decode.follow(prompt, 12, &name);
        decode.wait(|s| s.waiting == 1)?;
        let computed = prefill.compute(prompt, 1, &name);
        let (done, made) = (answer(follows)?, answer(computed)?);
        assert_eq!((&done.tokens, made.tokens[0]), (&right, right[0]));
        assert_eq!((done.parts.computed(), done.parts.recomputed()), (1, 0), "{:?}", done.parts);
        let (p, d) = (made.times, done.times);
        ensure!(p.queued <= p.admitted && p.admitted < p.first_chunk && p.first_chunk < p.first_token, "{p:?}");
        ensure!(d.queued < p.queued && p.admitted < d.admitted && d.admitted < p.first_token, "{p:?} {d:?}");
        ensure!(d.first_loaded < p.first_token, "nothing was loaded before the end: {p:?} {d:?}");
        ensure!(d.loaded < d.first_token && d.first_token < d.last_token, "{p:?} {d:?}");
    }
    settled(&[&prefill, &decode])
}

#[test]
fn prefix_hits_of_both_engines_are_used_at_once() -> Result<()> {
    let (prefill, decode) = (prefill(5000)?, decode()?);
    // The rest takes one step.
    let all = prompts(2, 1, 320, 2400, 2);
    let (prompt, before) = (&all[1], all[0].iter().zip(&all[1]).take_while(|(a, b)| a == b).count() / 16);
    let right = right(&all, 12)?;
    // Both hold the prefix, the decode engine a shorter one.
    prefill.ask(&all[0], 1)?;
    let short = 160;
    decode.ask(&all[0][..short], 1)?;
    let steps = prefill.count("engine_steps_total")?;
    let name = prefill.name(prompt);
    let follows = decode.follow(prompt, 12, &name);
    decode.wait(|s| s.waiting == 1)?;
    let computed = prefill.compute(prompt, 1, &name);
    let (done, made) = (answer(follows)?, answer(computed)?);
    assert_eq!(done.tokens, right[1]);
    assert_eq!(made.parts.local_cache as usize, before * 16);
    assert_eq!((done.parts.local_cache as usize, done.parts.external as usize), (short, prompt.len() - 1 - short));
    assert_eq!(prefill.count("engine_steps_total")? - steps, 1);
    ensure!(done.times.first_loaded < made.times.first_chunk, "hits were not loaded before the step ended");
    settled(&[&prefill, &decode])
}

/// A block that a step fills is in the prefix cache before it is filled.
#[test]
fn a_hit_on_a_block_that_is_being_filled_is_not_read_before_it_is_filled() -> Result<()> {
    let (prefill, decode) = (linked(Role::Prefill, 600, 5000)?, decode()?);
    let all = prompts(2, 1, 2500, 40, 3);
    let right = right(&all, 12)?;
    // A lane is open when the blocks are listed.
    let other = &all[0][..40];
    let name = prefill.name(other);
    let (follows, computed) = (decode.follow(other, 1, &name), prefill.compute(other, 1, &name));
    answer(follows)?;
    answer(computed)?;
    // Both prompts are in one step: the second one hits what it computes of the first one.
    let held = prefill.pause()?;
    let first = prefill.submit(&all[0], 1, false, None);
    let name = prefill.name(&all[1]);
    let (follows, second) = (decode.follow(&all[1], 12, &name), prefill.compute(&all[1], 1, &name));
    decode.wait(|s| s.waiting == 1)?;
    let steps = prefill.count("engine_steps_total")?;
    drop(held);
    assert_eq!(answer(follows)?.tokens, right[1]);
    answer(first)?;
    ensure!(answer(second)?.parts.local_cache >= 2400, "there was no hit");
    assert_eq!(prefill.count("engine_steps_total")? - steps, 1);
    settled(&[&prefill, &decode])
}

#[test]
fn a_complete_offer_keeps_its_blocks_until_it_is_loaded() -> Result<()> {
    let (prefill, decode) = (linked(Role::Prefill, 60, 64)?, decode()?);
    let all: Vec<_> = prompts(4, 4, 0, 400, 12).iter().map(|p| p[..400].to_vec()).collect();
    let right = right(&all[..1], 12)?;
    let name = prefill.name(&all[0]);
    answer(prefill.compute(&all[0], 1, &name))?;
    // They need all other blocks, again and again.
    all[1..].iter().try_for_each(|p| prefill.ask(p, 100).map(drop))?;
    let done = answer(decode.follow(&all[0], 12, &name))?;
    assert_eq!((&done.tokens, done.parts.external), (&right[0], 399));
    settled(&[&prefill, &decode])
}

#[test]
fn two_decode_engines_load_one_offer() -> Result<()> {
    let prefill = prefill(16)?;
    let decodes = [decode()?, decode()?];
    let all = prompts(1, 1, 200, 300, 4);
    let right = right(&all, 12)?;
    let name = prefill.name(&all[0]);
    let follows: Vec<_> = decodes.iter().map(|d| d.follow(&all[0], 12, &name)).collect();
    decodes.iter().try_for_each(|d| d.wait(|s| s.waiting == 1).map(drop))?;
    let computed = prefill.compute(&all[0], 1, &name);
    for follows in follows {
        let done = answer(follows)?;
        assert_eq!(done.tokens, right[0]);
        assert_eq!(done.parts.computed(), 1, "{:?}", done.parts);
    }
    answer(computed)?;
    settled(&[&prefill, &decodes[0], &decodes[1]])
}

#[test]
fn a_prompt_that_is_aborted_leaves_what_was_computed() -> Result<()> {
    let (prefill, decode) = (prefill(4)?, decode()?);
    let all = prompts(1, 1, 300, 1700, 5);
    let right = right(&all, 12)?;
    let name = prefill.name(&all[0]);
    let follows = decode.follow(&all[0], 12, &name);
    let computed = prefill.compute(&all[0], 1, &name);
    decode.wait(|s| s.pulls.iter().any(|p| p.loaded >= 4))?;
    drop(computed);
    let done = answer(follows)?;
    assert_eq!(done.tokens, right[0]);
    let (kept, asked) = (done.parts.external, all[0].len() as u64 - 1);
    ensure!((32..asked).contains(&kept) && kept.is_multiple_of(16), "{:?}", done.parts);
    assert_eq!(decode.count("engine_recomputed_rows_total")?, asked - kept);
    assert_eq!(revoked(&decode)?, (asked - kept).div_ceil(16), "blocks of an aborted request may be used again");
    settled(&[&prefill, &decode])
}

#[test]
fn a_request_that_is_aborted_ends_its_offer_and_the_prompt_is_still_computed() -> Result<()> {
    let (prefill, decode) = (prefill(4)?, decode()?);
    let all = prompts(1, 1, 300, 1700, 6);
    let right = right(&all, 12)?;
    let name = prefill.name(&all[0]);
    let follows = decode.follow(&all[0], 12, &name);
    let computed = prefill.compute(&all[0], 1, &name);
    decode.wait(|s| s.pulls.iter().any(|p| p.loaded >= 4))?;
    drop(follows);
    assert_eq!(answer(computed)?.tokens[0], right[0][0]);
    settled(&[&prefill, &decode])?;
    // The next request is not harmed.
    assert_eq!(decode.ask(&all[0], 12)?.tokens, right[0]);
    decode.settled()
}

#[test]
fn a_prompt_that_is_refused_or_never_admitted_ends_the_wait_for_it() -> Result<()> {
    let (prefill, decode) = (linked(Role::Prefill, 40, 16)?, decode()?);
    let all = prompts(2, 2, 300, 400, 7);
    let right = right(&all, 12)?;
    // It has more tokens than the prefill engine has room for.
    let name = prefill.name(&all[0]);
    let follows = decode.follow(&all[0], 12, &name);
    decode.wait(|s| s.waiting == 1)?;
    let refused = outcome(prefill.compute(&all[0], 1, &name))?;
    assert!(matches!(refused, Err(Refusal::Bad(_))), "{refused:?}");
    let done = answer(follows)?;
    assert_eq!((&done.tokens, done.parts.external), (&right[0], 0));
    assert_eq!(revoked(&decode)?, 0, "no pull holds blocks for it");
    // It waits for blocks that another request holds, and its client disconnects.
    let busy = prefill.compute(&all[0][..400], 200, &prefill.name(&all[0][..400]));
    prefill.wait(|s| s.running == 1)?;
    let prompt = &all[1][..500];
    let name = prefill.name(prompt);
    let follows = decode.follow(prompt, 12, &name);
    let waits = prefill.compute(prompt, 1, &name);
    prefill.wait(|s| s.waiting == 1)?;
    decode.wait(|s| s.waiting == 1)?;
    drop(waits);
    let done = answer(follows)?;
    assert_eq!((done.tokens, done.parts.external), (Rig::new(400, Settings::default())?.ask(prompt, 12)?.tokens, 0));
    drop(busy);
    prefill.wait(|s| s.running + s.waiting == 0)?;
    decode.settled()
}

#[test]
fn a_prompt_that_is_preempted_leaves_what_was_computed() -> Result<()> {
    // The first request generates, and needs the blocks of the second one.
    let (prefill, decode) = (linked(Role::Prefill, 165, 4)?, decode()?);
    let all = prompts(2, 2, 0, 2000, 8);
    let [first, second] = [&all[0][..100], &all[1][..2000]];
    let right = right(&[second.to_vec()], 12)?;
    let name = prefill.name(second);
    let follows = decode.follow(second, 12, &name);
    decode.wait(|s| s.waiting == 1)?;
    let generates = prefill.submit(first, 700, false, None);
    let computed = prefill.compute(second, 1, &name);
    let done = answer(follows)?;
    ensure!(prefill.count("engine_preemptions_total")? > 0, "it was not preempted");
    assert_eq!(done.tokens, right[0]);
    ensure!((16..1999).contains(&done.parts.external), "{:?}", done.parts);
    ensure!(revoked(&decode)? > 0, "blocks of a preempted request may be used again");
    assert_eq!(answer(computed)?.tokens[0], right[0][0]);
    answer(generates)?;
    settled(&[&prefill, &decode])
}

#[test]
fn thirty_two_prompts_at_once_are_answered_like_one_by_one() -> Result<()> {
    let all = prompts(32, 5, 200, 200, 9);
    let right = right(&all, 8)?;
    // Room for five prompts: the others wait, and so do their claims.
    let (prefill, decode) = (linked(Role::Prefill, 160, 64)?, linked(Role::Decode, 1200, 64)?);
    let mut both = Vec::new();
    for p in &all {
        let name = prefill.name(p);
        both.push((decode.follow(p, 8, &name), prefill.compute(p, 1, &name)));
    }
    let mut loaded = 0;
    for ((follows, computed), right) in both.into_iter().zip(&right) {
        let done = answer(follows)?;
        assert_eq!(&done.tokens, right);
        assert_eq!(done.parts.recomputed(), 0, "{:?}", done.parts);
        loaded += done.parts.external;
        answer(computed)?;
    }
    ensure!(loaded > 0, "nothing was loaded");
    settled(&[&prefill, &decode])
}

#[test]
fn a_request_does_not_wait_for_the_load_of_another_ones_prompt() -> Result<()> {
    let (slow, quick, decode) = (prefill(4)?, prefill(64)?, decode()?);
    let all: Vec<_> = [1700, 100].iter().map(|own| prompts(1, 1, 400, *own, 11).remove(0)).collect();
    let right = right(&all, 8)?;
    let names = [slow.name(&all[0]), quick.name(&all[1])];
    let (first, computed) = (decode.follow(&all[0], 8, &names[0]), slow.compute(&all[0], 1, &names[0]));
    decode.wait(|s| s.pulls.len() == 1)?;
    let held = slow.pause()?;
    decode.wait(|s| s.pulls.len() == 1)?;
    // They have the same beginning.
    let (second, also) = (decode.follow(&all[1], 8, &names[1]), quick.compute(&all[1], 1, &names[1]));
    let done = answer(second)?;
    assert_eq!((&done.tokens, done.parts.external as usize), (&right[1], all[1].len() - 1));
    answer(also)?;
    drop(held);
    assert_eq!(answer(first)?.tokens, right[0]);
    answer(computed)?;
    settled(&[&slow, &quick, &decode])
}

/// Each engine has room for one prompt, and they get the prompts in another order.
#[test]
fn two_engines_with_full_pools_do_not_wait_for_each_other() -> Result<()> {
    let (prefill, decode) = (linked(Role::Prefill, 30, 64)?, linked(Role::Decode, 30, 64)?);
    let all: Vec<_> = prompts(2, 2, 0, 400, 10).iter().map(|p| p[..400].to_vec()).collect();
    let right = right(&all, 8)?;
    let names: Vec<_> = all.iter().map(|p| prefill.name(p)).collect();
    let follows: Vec<_> = all.iter().zip(&names).map(|(p, n)| decode.follow(p, 8, n)).collect();
    decode.wait(|s| s.waiting == 2)?;
    let made: Vec<_> = all.iter().zip(&names).rev().map(|(p, n)| prefill.compute(p, 1, n)).collect();
    for (follows, right) in follows.into_iter().zip(&right) {
        let done = answer(follows)?;
        assert_eq!((&done.tokens, done.parts.external), (right, 399), "all of it is loaded");
    }
    made.into_iter().try_for_each(|m| answer(m).map(drop))?;
    settled(&[&prefill, &decode])
}
