//! A single engine: batches, chunks, the prefix cache, preemption, and clients that disconnect.

mod common;

use anyhow::Result;
use common::{Rig, answer, outcome, prompts};
use decode_engine::{engine::Settings, request::Refusal};

fn settings() -> Settings {
    Settings::default()
}

/// The reference answers: one request at a time, each in a new engine.
fn right(prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
    prompts.iter().map(|p| Ok(Rig::new(128, settings())?.ask(p, tokens)?.tokens)).collect()
}

#[test]
fn an_answer_depends_only_on_its_prompt() -> Result<()> {
    let all = prompts(12, 3, 120, 60, 1);
    let right = right(&all, 10)?;
    for budget in [1, 7, 64, 1000] {
        let rig = Rig::new(400, Settings { budget, ..settings() })?;
        let events: Vec<_> = all.iter().map(|p| rig.submit(p, 10, false, None)).collect();
        for (e, right) in events.into_iter().zip(&right) {
            assert_eq!(&answer(e)?.tokens, right, "with {budget} tokens per step");
        }
        rig.settled()?;
    }
    Ok(())
}

#[test]
fn a_prefix_is_computed_once() -> Result<()> {
    let all = prompts(2, 1, 160, 40, 2);
    let rig = Rig::new(128, settings())?;
    let first = rig.ask(&all[0], 4)?;
    assert_eq!((first.parts.local_cache, first.parts.computed()), (0, all[0].len() as u64));
    let common = all[0].iter().zip(&all[1]).take_while(|(a, b)| a == b).count();
    let second = rig.ask(&all[1], 4)?;
    assert_eq!(second.parts.local_cache as usize, common / 16 * 16);
    // The whole prompt and the answer, without the last token.
    let more = [&all[1][..], &second.tokens].concat();
    let third = rig.ask(&more, 4)?;
    assert_eq!(third.parts.local_cache as usize, (more.len() - 1) / 16 * 16);
    assert_eq!(third.tokens, right(&[more], 4)?[0]);
    rig.settled()
}

#[test]
fn a_request_waits_for_a_prefix_that_another_one_computes() -> Result<()> {
    let all = prompts(6, 1, 400, 20, 3);
    let right = right(&all, 4)?;
    let rig = Rig::new(400, Settings { budget: 32, ..settings() })?;
    let events: Vec<_> = all.iter().map(|p| rig.submit(p, 4, false, None)).collect();
    for (e, right) in events.into_iter().zip(&right) {
        assert_eq!(&answer(e)?.tokens, right);
    }
    let (tokens, ran) = (all.iter().map(Vec::len).sum::<usize>() as u64, rig.count("engine_prefill_rows_total")?);
    assert!(ran < tokens / 2, "{ran} rows for {tokens} tokens, most of which are shared");
    rig.settled()
}

#[test]
fn a_preempted_request_gives_the_same_answer() -> Result<()> {
    let all = prompts(8, 8, 0, 100, 4);
    let right = right(&all, 60)?;
    // Room for three complete requests.
    let rig = Rig::new(44, Settings { budget: 64, ..settings() })?;
    let events: Vec<_> = all.iter().map(|p| rig.submit(p, 60, false, None)).collect();
    for (e, right) in events.into_iter().zip(&right) {
        assert_eq!(&answer(e)?.tokens, right);
    }
    assert!(rig.count("engine_preemptions_total")? > 0, "no request was preempted");
    rig.settled()
}

#[test]
fn a_client_that_disconnects_leaves_no_blocks_behind() -> Result<()> {
    let all = prompts(9, 2, 100, 60, 5);
    let rig = Rig::new(60, Settings { budget: 32, ..settings() })?;
    let mut events: Vec<_> = all.iter().map(|p| rig.submit(p, 80, false, None)).collect();
    // Some disconnect before their requests run, some later.
    let last = events.remove(8);
    rig.wait(|s| s.running > 1)?;
    drop(events.split_off(4));
    drop(events);
    assert_eq!(answer(last)?.tokens, right(&all[8..], 80)?[0]);
    rig.settled()
}

#[test]
fn an_invalid_request_is_refused_with_a_reason() -> Result<()> {
    let rig = Rig::new(10, settings())?;
    for (prompt, tokens) in [(vec![], 4), (vec![1; 20], 0), (vec![1; 200], 4), (vec![1; 20], 5000), (vec![256], 1)] {
        let refused = outcome(rig.submit(&prompt, tokens, false, None))?;
        assert!(matches!(refused, Err(Refusal::Bad(_))), "{} tokens, {tokens} to generate: {refused:?}", prompt.len());
    }
    assert_eq!(rig.ask(&[1; 20], 4)?.tokens.len(), 4);
    rig.settled()
}
