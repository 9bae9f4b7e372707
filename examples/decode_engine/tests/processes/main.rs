//! Complete deployments of processes on loopback: a router, prefill and decode engines, and kills.

mod overlap;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use decode_engine::{
    api::{Ask, Prompt, Transfer},
    client::{Client, Reply, Trouble},
    fleet::{Fleet, Plan, ask_all, in_mid_pull, question},
    prompts::prompts,
    soak::{self, soak},
};

const LIMIT: Duration = Duration::from_secs(60);

fn plan() -> Plan {
    Plan { blocks: 1500, ..Plan::new(Path::new(env!("CARGO_BIN_EXE_decode-engine")), "tiny") }
}

fn flags(list: &[&str]) -> Vec<String> {
    list.iter().map(|f| (*f).to_owned()).collect()
}

async fn right(client: &Client, texts: &[String], tokens: usize) -> Result<Vec<Reply>> {
    let single = plan().single()?;
    let all = ask_all(client, &[single.addr().to_owned()], texts, tokens, 16).await;
    Ok(all.into_iter().collect::<std::result::Result<_, Trouble>>()?)
}

/// Many requests share a prefix, and the prefill engine is killed in the middle of the pull that brings it.
async fn killed_in_mid_pull(loads: &str) -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(24, 2, 500, 100, 21);
    let right = right(&client, &texts, 10).await?;
    let mut plan = plan();
    plan.decode_flags = flags(&["--lanes", "tcp", "--fault", "throttle=200K", "--loads", loads]);
    plan.prefill_flags = flags(&["--unclaimed", "3"]);
    let fleet = Fleet::start(&plan)?;
    let (addr, decode) = (fleet.router.addr().to_owned(), fleet.decode_addrs());
    let before = client.metrics(&decode[0]).await?;

    let answers = {
        let (client, texts) = (client.clone(), texts.clone());
        tokio::spawn(async move { ask_all(&client, &[addr], &texts, 10, 24).await })
    };
    tokio::time::timeout(LIMIT, async {
        while !in_mid_pull(&client, &decode, "prefill-0", 0.3).await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .context("no pull was seen")?;
    let victim = fleet.prefill[0].clone();
    tokio::task::spawn_blocking(move || victim.lock().kill()).await??;

    for (i, answer) in answers.await?.into_iter().enumerate() {
        let answer = answer.with_context(|| format!("answer {i}"))?;
        ensure!(answer.tokens == right[i].tokens, "answer {i} is {:?}, not {:?}", answer.tokens, right[i].tokens);
    }
    let m = client.metrics(&decode[0]).await?;
    ensure!(m.decreased(&before).next().is_none(), "a counter decreased");
    ensure!(m.sum("engine_recomputed_rows_total", &[]) > 0, "no token was lost: {m:?}");
    m.balanced()?;
    // The sources add up to the tokens of all prompts.
    let asked: u64 = right.iter().map(|r| r.usage.prompt_tokens).sum();
    ensure!(m.sum("kvferry_prompt_tokens_total", &[]) == asked);

    // After its restart, the decode engine pulls from it again.
    let victim = fleet.prefill[0].clone();
    tokio::task::spawn_blocking(move || victim.lock().restart()).await??;
    tokio::time::timeout(LIMIT, async {
        // The router skips a failed engine for a moment. Each attempt needs a new prompt.
        for seed in 77.. {
            let text = &prompts(1, 1, 100, 200, seed)[0];
            let r = client.ask(fleet.router.addr(), &question(text, 4)).await?;
            if r.usage.prompt_tokens_details.external > 0 {
                break;
            }
        }
        anyhow::Ok(())
    })
    .await
    .context("the restarted prefill engine is not used")??;
    fleet.settled(&client, LIMIT).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_killed_in_mid_pull_changes_no_answer() -> Result<()> {
    killed_in_mid_pull("async").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_killed_in_mid_pull_changes_no_answer_where_steps_wait_for_loads() -> Result<()> {
    killed_in_mid_pull("sync").await
}

fn seconds() -> f64 {
    std::env::var("KVFERRY_SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(15.0)
}

/// 16 requests per second; a prefill engine is killed and restarted every 5 s. `KVFERRY_SOAK_SECONDS` is the duration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_steady_load_and_kills_no_answer_fails_and_no_block_leaks() -> Result<()> {
    let seen = soak(plan(), &soak::Args { seconds: seconds(), ..soak::Args::default() }).await?;
    ensure!(seen.report("recompute").print(), "see above");
    ensure!(seen.ledger.recomputed() > 0, "no token was lost");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_the_policy_fail_exactly_the_affected_requests_fail() -> Result<()> {
    let args = soak::Args { seconds: seconds(), policy: "fail".into(), ..soak::Args::default() };
    let seen = soak(plan(), &args).await?;
    ensure!(seen.report("fail").print(), "see above");
    ensure!(seen.kv_lost > 0, "no request was affected");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_answers_openai_style_requests() -> Result<()> {
    let client = Client::new()?;
    let engine = plan().single()?;
    let ask = question("Tell me about the sea.", 8);
    let whole = client.whole(engine.addr(), &ask).await?;
    let pieces = client.ask(engine.addr(), &ask).await?;
    ensure!(whole.choices[0].token_ids == pieces.tokens && whole.choices[0].text == pieces.text);
    ensure!(whole.usage.context("no usage")?.prompt_tokens == 22 && pieces.usage.completion_tokens == 8);
    // A prompt of tokens instead of text.
    let tokens = Prompt::Tokens("Tell me about the sea.".bytes().map(u32::from).collect());
    let same = client.ask(engine.addr(), &Ask { prompt: tokens, ..ask.clone() }).await?;
    ensure!(same.tokens == pieces.tokens);
    for bad in [
        Ask { temperature: Some(0.7), ..ask.clone() },
        Ask { max_tokens: 0, ..ask.clone() },
        Ask { max_tokens: usize::MAX, ..ask.clone() },
        Ask { n: Some(2), ..ask.clone() },
        Ask { stop: Some("sea".into()), ..ask.clone() },
        Ask { prompt: Prompt::Tokens(vec![9999]), ..ask.clone() },
    ] {
        let refused = client.ask(engine.addr(), &bad).await;
        ensure!(matches!(&refused, Err(Trouble::Said(p)) if p.error.code == 400), "{bad:?}: {refused:?}");
    }
    Ok(())
}

/// KV of another prompt would give wrong answers, even to other requests through the prefix cache.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offer_of_another_prompt_is_ignored() -> Result<()> {
    let client = Client::new()?;
    let texts = prompts(2, 2, 0, 200, 41);
    let right = right(&client, &texts, 6).await?;
    let fleet = Fleet::start(&plan())?;
    let (prefill, decode) = (fleet.prefill[0].lock().addr().to_owned(), fleet.decode_addrs().remove(0));
    let offering = Transfer { do_remote_decode: true, ..Transfer::default() };
    let ask = Ask { kv_transfer_params: Some(offering.clone()), ..question(&texts[1], 1) };
    let other = client.whole(&prefill, &ask).await?.kv_transfer_params.context("no offer was made")?;
    let offer = other.offer.clone().context("no offer was made")?;
    let unnamed = Transfer { offer: Some(offer.clone().fingerprints([].into())), ..other.clone() };
    for transfer in [other.clone(), unnamed] {
        let ask = Ask { kv_transfer_params: Some(transfer), ..question(&texts[0], 6) };
        ensure!(client.whole(&decode, &ask).await?.choices[0].token_ids == right[0].tokens);
        ensure!(
            client.ask(&decode, &question(&texts[0], 6)).await?.tokens == right[0].tokens,
            "the cache has wrong KV"
        );
    }
    // It is used for its own prompt.
    let ask = Ask { kv_transfer_params: Some(other.clone()), ..question(&texts[1], 6) };
    let answer = client.whole(&decode, &ask).await?;
    ensure!(answer.choices[0].token_ids == right[1].tokens);
    ensure!(answer.usage.context("no usage")?.prompt_tokens_details.external > 0);
    // A client that puts its own prompt's fingerprint into another prompt's name gets nothing loaded.
    let more = prompts(2, 2, 0, 200, 42);
    let right = self::right(&client, &more, 6).await?;
    let mut names = Vec::new();
    for text in &more {
        let ask = Ask { kv_transfer_params: Some(offering.clone()), ..question(text, 1) };
        let made = client.whole(&prefill, &ask).await?.kv_transfer_params.and_then(|t| t.offer);
        names.push(made.context("no offer was made")?);
    }
    let forged = names[1].clone().fingerprints(names[0].fingerprints.clone());
    for offer in [forged, names[0].clone()] {
        let transfer = Transfer { offer: Some(offer), ..other.clone() };
        let ask = Ask { kv_transfer_params: Some(transfer), ..question(&more[0], 6) };
        ensure!(client.whole(&decode, &ask).await?.choices[0].token_ids == right[0].tokens);
    }
    fleet.settled(&client, LIMIT).await
}

/// A wedged lane may write its blocks at any time, so they are never reused, and the request would wait indefinitely.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_with_a_wedged_lane_exits() -> Result<()> {
    for loads in ["async", "sync"] {
        let client = Client::new()?;
        let mut plan = plan();
        let fault = "silent@20K,wedge,lanes=1";
        plan.decode_flags = flags(&["--lanes", "tcp", "--fault", fault, "--deadline", "2", "--loads", loads]);
        let mut fleet = Fleet::start(&plan)?;
        let text = &prompts(1, 1, 100, 200, 51)[0];
        let answer = client.ask(fleet.router.addr(), &question(text, 4)).await;
        ensure!(answer.is_err(), "{answer:?}");
        tokio::time::timeout(LIMIT, async {
            while fleet.decode[0].is_alive() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .context("it did not exit")?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_closed_aborts_its_request() -> Result<()> {
    let client = Client::new()?;
    let fleet = Fleet::start(&plan())?;
    let decode = fleet.decode_addrs().remove(0);
    for addr in [decode.clone(), fleet.router.addr().to_owned()] {
        let (c, ask) = (client.clone(), question("A long story, please.", 3000));
        let asked = tokio::spawn(async move { c.ask(&addr, &ask).await });
        client.wait(&decode, LIMIT, |s| s.running == 1).await?;
        asked.abort();
        client.wait(&decode, LIMIT, |s| s.running == 0 && s.free == s.blocks).await?;
    }
    fleet.settled(&client, LIMIT).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_works_without_prefill_engines() -> Result<()> {
    let client = Client::new()?;
    let fleet = Fleet::start(&plan())?;
    let texts = prompts(4, 1, 100, 100, 31);
    let right = right(&client, &texts, 6).await?;
    let victim = fleet.prefill[0].clone();
    tokio::task::spawn_blocking(move || victim.lock().kill()).await??;
    let answers = ask_all(&client, &[fleet.router.addr().to_owned()], &texts, 6, 4).await;
    for (a, right) in answers.into_iter().zip(&right) {
        ensure!(a?.tokens == right.tokens);
    }
    let m = client.metrics(fleet.router.addr()).await?;
    ensure!(m.sum("router_requests_total", &["prefill=\"local\""]) == 4, "{m:?}");
    Ok(())
}
