//! Deployments whose router sends each prompt to both engines at the same time.

use anyhow::{Context as _, Result, ensure};
use decode_engine::{
    client::Client,
    fleet::{Fleet, Plan, Victim, ask_all, question},
    prompts::prompts,
    soak::{self, soak},
};

use super::{LIMIT, flags, plan, right, seconds};

fn overlap() -> Plan {
    Plan { router_flags: flags(&["--overlap"]), ..plan() }
}

async fn kill(victim: &Victim) -> Result<()> {
    let victim = victim.clone();
    tokio::task::spawn_blocking(move || victim.lock().kill()).await?
}

async fn restart(victim: &Victim) -> Result<()> {
    let victim = victim.clone();
    tokio::task::spawn_blocking(move || victim.lock().restart()).await?
}

/// The number of requests that the router sent to both engines at the same time.
async fn overlapped(client: &Client, fleet: &Fleet) -> Result<u64> {
    Ok(client.metrics(fleet.router.addr()).await?.sum("router_requests_total", &["prefill=\"overlap\""]))
}

/// Waits until the prefill engine has computed this part of its prompt, and returns the computed tokens.
async fn computed(client: &Client, prefill: &str, part: f64) -> Result<u64> {
    let far = |s: &decode_engine::engine::Status| {
        s.prompts.first().filter(|p| p.computed as f64 >= part * p.tokens as f64).map(|p| p.computed)
    };
    tokio::time::timeout(LIMIT, async {
        loop {
            if let Some(computed) = far(&client.status(prefill).await?) {
                return Ok(computed);
            }
        }
    })
    .await
    .context("the prompt was not computed so far")?
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_killed_while_it_computes_leaves_what_it_computed() -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(3, 3, 0, 3700, 61);
    let right = right(&client, &texts, 10).await?;
    for ((part, text), right) in [0.2, 0.5, 0.8].into_iter().zip(&texts).zip(&right) {
        let mut plan = overlap();
        plan.prefill_flags = flags(&["--budget", "8"]);
        let fleet = Fleet::start(&plan)?;
        let (prefill, decode) = (fleet.prefill[0].lock().addr().to_owned(), fleet.decode_addrs().remove(0));
        let answer = {
            let (client, addr, ask) = (client.clone(), fleet.router.addr().to_owned(), question(text, 10));
            tokio::spawn(async move { client.ask(&addr, &ask).await })
        };
        let computed = computed(&client, &prefill, part).await?;
        kill(&fleet.prefill[0]).await?;
        let answer = answer.await??;
        ensure!(answer.tokens == right.tokens, "{part}: {:?}, not {:?}", answer.tokens, right.tokens);
        let m = client.metrics(&decode).await?;
        let [kept, again, ran] =
            ["engine_salvaged_tokens_total", "engine_recomputed_rows_total", "engine_prefill_rows_total"]
                .map(|name| m.sum(name, &[]));
        let tokens = answer.usage.prompt_tokens;
        ensure!(kept + tokens / 10 >= computed, "{part}: {kept} tokens are kept of {computed}, of {tokens}");
        ensure!(kept < tokens - 1, "{part}: the prompt was complete");
        // Only the rest is computed; the last token would have been computed here in any case.
        ensure!((again, ran) == (tokens - 1 - kept, tokens - kept), "{part}: {again} and {ran} of {tokens}");
        m.balanced()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_two_requests_at_once_are_loaded_while_they_are_computed() -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(32, 4, 200, 300, 62);
    let right = right(&client, &texts, 10).await?;
    let mut plan = overlap();
    (plan.prefills, plan.decodes) = (2, 2);
    // Room for five prompts in a prefill engine: most requests wait there.
    plan.prefill_flags = flags(&["--blocks", "200", "--budget", "64"]);
    let fleet = Fleet::start(&plan)?;
    let answers = ask_all(&client, &[fleet.router.addr().to_owned()], &texts, 10, 32).await;
    let mut loaded = 0;
    for (answer, right) in answers.into_iter().zip(&right) {
        let answer = answer?;
        ensure!(answer.tokens == right.tokens);
        ensure!(answer.usage.prompt_tokens_details.recomputed == 0, "{:?}", answer.usage);
        loaded += answer.usage.prompt_tokens_details.external;
    }
    ensure!(loaded > 0 && overlapped(&client, &fleet).await? == 32, "{loaded} tokens are loaded");
    fleet.settled(&client, LIMIT).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_disconnects_ends_its_request_at_both_engines() -> Result<()> {
    let client = Client::new()?;
    let mut plan = overlap();
    plan.prefill_flags = flags(&["--budget", "4"]);
    let fleet = Fleet::start(&plan)?;
    let (prefill, decode) = (fleet.prefill[0].lock().addr().to_owned(), fleet.decode_addrs().remove(0));
    let text = &prompts(1, 1, 0, 3000, 63)[0];
    let asked = {
        let (client, addr, ask) = (client.clone(), fleet.router.addr().to_owned(), question(text, 10));
        tokio::spawn(async move { client.ask(&addr, &ask).await })
    };
    client.wait(&decode, LIMIT, |s| s.pulls.iter().any(|p| p.loaded > 0)).await?;
    asked.abort();
    client.wait(&prefill, LIMIT, |s| s.running == 0).await?;
    fleet.settled(&client, LIMIT).await?;
    let ran = client.metrics(&prefill).await?.sum("engine_prefill_rows_total", &[]);
    ensure!(ran < 3000, "the whole prompt was computed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_that_was_restarted_is_asked_again_who_it_is() -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(2, 2, 100, 200, 64);
    let right = right(&client, &texts, 6).await?;
    let fleet = Fleet::start(&overlap())?;
    let router = fleet.router.addr();
    ensure!(client.ask(router, &question(&texts[0], 6)).await?.tokens == right[0].tokens);
    // The router does not notice: no request is running.
    kill(&fleet.prefill[0]).await?;
    restart(&fleet.prefill[0]).await?;
    ensure!(client.ask(router, &question(&texts[1], 6)).await?.tokens == right[1].tokens);
    tokio::time::timeout(LIMIT, async {
        for seed in 65.. {
            let r = client.ask(router, &question(&prompts(1, 1, 100, 200, seed)[0], 4)).await?;
            if r.usage.prompt_tokens_details.external > 0 {
                break;
            }
        }
        anyhow::Ok(())
    })
    .await
    .context("the restarted prefill engine is not used")??;
    let m = client.metrics(router).await?;
    ensure!(m.sum("router_requests_total", &["prefill=\"remote\""]) == 0, "{m:?}");
    fleet.settled(&client, LIMIT).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_cannot_overlap_gets_its_prompts_one_after_the_other() -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(2, 2, 100, 200, 66);
    let right = right(&client, &texts, 6).await?;
    let mut plan = overlap();
    // Its steps would wait for the whole computation of another engine.
    plan.decode_flags = flags(&["--loads", "sync"]);
    let fleet = Fleet::start(&plan)?;
    for (text, right) in texts.iter().zip(&right) {
        let answer = client.ask(fleet.router.addr(), &question(text, 6)).await?;
        ensure!(answer.tokens == right.tokens && answer.usage.prompt_tokens_details.external > 0, "{:?}", answer.usage);
    }
    ensure!(overlapped(&client, &fleet).await? == 0);
    fleet.settled(&client, LIMIT).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_steady_load_and_kills_no_overlapped_answer_fails_and_no_block_leaks() -> Result<()> {
    let seen = soak(plan(), &soak::Args { seconds: seconds(), overlap: true, ..soak::Args::default() }).await?;
    ensure!(seen.report("recompute").print(), "see above");
    ensure!(seen.ledger.recomputed() > 0, "no token was lost");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_prefill_engines_an_overlapping_router_works() -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(3, 1, 100, 100, 67);
    let right = right(&client, &texts, 6).await?;
    let fleet = Fleet::start(&overlap())?;
    kill(&fleet.prefill[0]).await?;
    let answers = ask_all(&client, &[fleet.router.addr().to_owned()], &texts, 6, 1).await;
    for (answer, right) in answers.into_iter().zip(&right) {
        ensure!(answer?.tokens == right.tokens);
    }
    ensure!(overlapped(&client, &fleet).await? == 0);
    Ok(())
}
