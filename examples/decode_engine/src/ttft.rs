//! `decode-engine ttft`: time to first token with remote and with local prefill, in one run on this machine, and what a
//! prefill engine's death costs when 60 % of the KV have arrived.
//!
//! Prefill and decode engines have one thread each. A prompt costs the same computation wherever it runs, so on an idle
//! decode engine remote prefill can only lose, by the pull. It pays on one that is in use: others generate there, and their
//! next token waits for the step that a piece of prompt is in. Either the pieces are large, and the others wait; or they
//! are small, and the prompt does. Both are measured, with the others' time from token to token.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::{
    api::{Ask, Transfer},
    client::{Client, Reply},
    fleet::{Fleet, Plan, hold, in_mid_pull, question},
    prompts::Writer,
    report::{Report, median},
};

/// Flags of `ttft`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// As `serve --model` takes it.
    #[arg(long, default_value = "smollm2")]
    model: String,
    /// Tokens of a prompt, at least.
    #[arg(long, value_delimiter = ',', default_value = "512,1024")]
    lengths: Vec<u64>,
    /// Rounds; medians are printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Requests that generate on the decode engine meanwhile.
    #[arg(long, default_value_t = 8)]
    beside: usize,
    /// Tokens in a step of a decode engine that keeps steps short for them.
    #[arg(long, default_value_t = 24)]
    budget: u64,
    /// How fast pulls are where one is killed, in bytes a second.
    #[arg(long, default_value = "40M")]
    throttle: String,
}

struct Bench {
    client: Client,
    fleet: Fleet,
    /// Numbers prompts: no two are alike.
    next: u64,
}

impl Bench {
    fn start(plan: &Plan) -> Result<Self> {
        Ok(Self { client: Client::new()?, fleet: Fleet::start(plan)?, next: 1 })
    }

    fn decode(&self) -> String {
        self.fleet.decode[0].addr().to_owned()
    }

    fn prefill(&self) -> String {
        hold(&self.fleet.prefill[0]).addr().to_owned()
    }

    /// A prompt of at least so many tokens that nobody has seen.
    async fn prompt(&mut self, tokens: u64) -> Result<Ask> {
        self.next += 1;
        let mut writer = Writer::new(self.next * 7919);
        let mut text = format!("Note {}: ", self.next);
        // A token of these texts is three bytes or more, of a byte model one.
        let each = if self.byte_model().await? { 1 } else { 5 };
        while (text.len() as u64) < tokens * each {
            text.push_str(&writer.sentence());
            text.push(' ');
        }
        Ok(question(&text, 1))
    }

    async fn byte_model(&self) -> Result<bool> {
        let a = self.client.whole(&self.decode(), &question("abcdefgh", 1)).await?;
        Ok(a.usage.is_some_and(|u| u.prompt_tokens == 8))
    }

    /// The name of an ask's KV, computed by the prefill engine.
    async fn offer(&self, ask: &Ask) -> Result<Transfer> {
        let ask = Ask {
            stream: false,
            kv_transfer_params: Some(Transfer { do_remote_decode: true, ..Transfer::default() }),
            ..ask.clone()
        };
        self.client.whole(&self.prefill(), &ask).await?.kv_transfer_params.context("the prefill engine offers nothing")
    }

    async fn with(&self, ask: &Ask, offer: Transfer) -> Result<Reply> {
        let ask = Ask { kv_transfer_params: Some(offer), ..ask.clone() };
        Ok(self.client.ask(&self.decode(), &ask).await?)
    }
}

/// First tokens, by what was done, and the time from token to token of the others meanwhile.
#[derive(Default)]
struct Times {
    tokens: u64,
    local: Vec<Duration>,
    remote: Vec<Duration>,
    pulled: Vec<Duration>,
    local_gap: Vec<Duration>,
    remote_gap: Vec<Duration>,
}

impl Bench {
    /// Each of the others gets a token in every step.
    async fn gap<T>(&self, what: impl Future<Output = T>) -> Result<(T, Duration)> {
        let steps =
            async || Ok::<_, anyhow::Error>(self.client.metrics(&self.decode()).await?.sum("engine_steps_total", &[]));
        let (before, started) = (steps().await?, Instant::now());
        let done = what.await;
        let took = started.elapsed();
        Ok((done, took / u32::try_from(steps().await? - before)?.max(1)))
    }

    async fn measure(&mut self, tokens: u64, rounds: usize) -> Result<Times> {
        let mut t = Times::default();
        for _ in 0..rounds {
            let ask = self.prompt(tokens).await?;
            let (reply, gap) = self.gap(self.client.ask(&self.decode(), &ask)).await?;
            let reply = reply?;
            t.local.push(reply.first);
            t.local_gap.push(gap);
            t.tokens = reply.usage.prompt_tokens;

            let ask = self.prompt(tokens).await?;
            let (reply, gap) = self.gap(self.client.ask(self.fleet.router.addr(), &ask)).await?;
            t.remote.push(reply?.first);
            t.remote_gap.push(gap);

            let ask = self.prompt(tokens).await?;
            let offer = self.offer(&ask).await?;
            t.pulled.push(self.with(&ask, offer).await?.first);
        }
        Ok(t)
    }
}

/// Runs it; `false`: remote prefill did not pay.
pub async fn run(args: Args) -> Result<bool> {
    let mut report = Report::default();
    let mut plan = Plan::new(std::env::current_exe()?, &args.model);
    plan.blocks = 2048;
    let ms = |d: &[Duration]| format!("{:.0} ms", median(d).as_secs_f64() * 1e3);

    println!(
        "time to first token (and the others' time from token to token), median of {}; one thread an engine",
        args.rounds
    );
    println!(
        "{:<36} {:>6} {:>20} {:>20} {:>13}",
        "decode engine", "tokens", "local prefill", "remote prefill", "KV was ready"
    );
    for (beside, budget) in [(0, 256), (args.beside, 256), (args.beside, args.budget)] {
        plan.decode_flags = ["--budget", &budget.to_string()].map(String::from).to_vec();
        let mut bench = Bench::start(&plan)?;
        // Others generate: long enough for all that follows, and gone with the engine.
        let mut others = Vec::new();
        for i in 0..beside {
            let (client, addr) = (bench.client.clone(), bench.decode());
            let ask = question(&format!("Story number {i}: once upon a time"), 3000);
            others.push(tokio::spawn(async move { client.ask(&addr, &ask).await }));
        }
        bench.client.wait(&bench.decode(), Duration::from_secs(60), |s| s.running == beside).await?;
        for &tokens in &args.lengths {
            let t = bench.measure(tokens, args.rounds).await?;
            let name = if beside == 0 { "idle".into() } else { format!("{beside} others generate, steps of {budget}") };
            let with_gap = |first: &[Duration], gap: &[Duration]| match beside {
                0 => ms(first),
                _ => format!("{} ({})", ms(first), ms(gap)),
            };
            println!(
                "{name:<36} {:>6} {:>20} {:>20} {:>13}",
                t.tokens,
                with_gap(&t.local, &t.local_gap),
                with_gap(&t.remote, &t.remote_gap),
                ms(&t.pulled)
            );
            let (remote, ready, local) = (median(&t.remote), median(&t.pulled), median(&t.local));
            let seen = |here: Duration| format!("{:.2} s against {:.2} s", here.as_secs_f64(), local.as_secs_f64());
            if beside > 0 && budget == args.budget {
                report.saw(&format!("remote first, {tokens}"), remote < local, seen(remote));
            }
            report.saw(&format!("pull first, {tokens}"), ready < local, seen(ready));
        }
        others.iter().for_each(tokio::task::JoinHandle::abort);
    }

    println!("\nafter a SIGKILL of the prefill engine; pulls throttled to {} bytes/s", args.throttle);
    println!("{:>7} {:>12} {:>22} {:>24}", "tokens", "salvaged", "killed at 60 %", "recomputing everything");
    let fault = format!("throttle={}", args.throttle);
    plan.decode_flags = ["--budget", "256", "--lanes", "tcp", "--fault", &fault].map(String::from).to_vec();
    let mut bench = Bench::start(&plan)?;
    for &tokens in &args.lengths {
        let (mut killed, mut all, mut kept, mut length) = (Vec::new(), Vec::new(), 0, 0);
        for _ in 0..args.rounds {
            let ask = bench.prompt(tokens).await?;
            let offer = bench.offer(&ask).await?;
            let kill = kill_at(&bench, 0.6);
            let started = Instant::now();
            let (reply, dead) = tokio::join!(bench.with(&ask, offer), kill);
            dead?;
            let reply = reply?;
            killed.push(reply.first);
            (kept, length) = (reply.usage.prompt_tokens_details.external, reply.usage.prompt_tokens);
            let victim = bench.fleet.prefill[0].clone();
            tokio::task::spawn_blocking(move || hold(&victim).restart()).await??;
            tracing::info!("killed and back after {:?}", started.elapsed());

            // The same death, but before a byte has moved: everything is computed again.
            let ask = bench.prompt(tokens).await?;
            let offer = bench.offer(&ask).await?;
            let victim = bench.fleet.prefill[0].clone();
            tokio::task::spawn_blocking(move || hold(&victim).kill()).await??;
            all.push(bench.with(&ask, offer).await?.first);
            let victim = bench.fleet.prefill[0].clone();
            tokio::task::spawn_blocking(move || hold(&victim).restart()).await??;
        }
        let (k, a) = (median(&killed), median(&all));
        println!("{length:>7} {kept:>12} {:>19.0} ms {:>21.0} ms", k.as_secs_f64() * 1e3, a.as_secs_f64() * 1e3);
        let what = format!("killed at 60 %, {tokens}");
        report.saw(&what, k < a && kept > 0, format!("{:.2} s against {:.2} s", k.as_secs_f64(), a.as_secs_f64()));
    }
    Ok(report.print())
}

/// Kills the prefill engine when a pull from it has come this far.
async fn kill_at(bench: &Bench, part: f64) -> Result<()> {
    let (client, decode) = (bench.client.clone(), vec![bench.decode()]);
    let victim = bench.fleet.prefill[0].clone();
    let started = Instant::now();
    while !in_mid_pull(&client, &decode, "prefill-0", part).await {
        anyhow::ensure!(started.elapsed() < Duration::from_secs(30), "no pull came to {part} of itself");
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    tokio::task::spawn_blocking(move || hold(&victim).kill()).await?
}
