//! `decode-engine ttft`: measures the time to first token with remote and with local prefill on this machine, and the cost
//! of a prefill engine's death after 60 % of the KV have arrived.
//!
//! Prefill and decode engines have one thread each. A prompt needs the same computation everywhere, so on an idle decode
//! engine remote prefill is slower by the time of the pull. It pays on a busy one: other requests generate there, and their
//! next token waits for each step with a piece of the prompt. Large pieces delay the others, small ones delay the prompt.
//! Both are measured, together with the others' time between tokens.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::{
    api::{Ask, Transfer},
    client::{Client, Reply},
    fleet::{Fleet, Plan, in_mid_pull, question},
    handover,
    prompts::Writer,
    report::{Report, median},
};

/// Flags of `ttft`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model, as for `serve`.
    #[arg(long, default_value = "smollm2")]
    model: String,
    /// Least number of tokens per prompt.
    #[arg(long, value_delimiter = ',', default_value = "512,1024")]
    lengths: Vec<u64>,
    /// Rounds; the result is the median.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Other requests that generate on the decode engine at the same time.
    #[arg(long, default_value_t = 8)]
    beside: usize,
    /// Tokens per step of a decode engine with short steps for the other requests.
    #[arg(long, default_value_t = 24)]
    budget: u64,
    /// Measure the hand-over instead: from the last computed chunk to the decode engine's first token.
    #[arg(long)]
    hand_over: bool,
    /// Rate of pulls in the test with kills, in bytes per second.
    #[arg(long, default_value = "40M")]
    throttle: String,
}

struct Bench {
    client: Client,
    fleet: Fleet,
    /// The number of the next prompt, so that all prompts differ.
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
        self.fleet.prefill[0].lock().addr().to_owned()
    }

    /// A new prompt of at least this many tokens.
    async fn prompt(&mut self, tokens: u64) -> Result<Ask> {
        self.next += 1;
        let mut writer = Writer::new(self.next * 7919);
        let mut text = format!("Note {}: ", self.next);
        // A token of these texts has at least three bytes; in a byte model it has one.
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

    /// The offer of a prompt's KV by the prefill engine.
    async fn offer(&self, ask: &Ask) -> Result<Transfer> {
        let ask = Ask {
            stream: false,
            kv_transfer_params: Some(Transfer { do_remote_decode: true, ..Transfer::default() }),
            ..ask.clone()
        };
        self.client.whole(&self.prefill(), &ask).await?.kv_transfer_params.context("the prefill engine made no offer")
    }

    async fn with(&self, ask: &Ask, offer: Transfer) -> Result<Reply> {
        let ask = Ask { kv_transfer_params: Some(offer), ..ask.clone() };
        Ok(self.client.ask(&self.decode(), &ask).await?)
    }
}

/// Times to the first token, and the other requests' times between tokens.
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
    /// Measures the time per step: each of the other requests gets a token in every step.
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

/// Runs the command. `false` if remote prefill did not pay.
pub async fn run(args: Args) -> Result<bool> {
    if args.hand_over {
        return handover::run(&args.model, &args.lengths, args.rounds).await;
    }
    let mut report = Report::default();
    let mut plan = Plan::new(std::env::current_exe()?, &args.model);
    plan.blocks = 2048;
    let ms = |d: &[Duration]| format!("{:.0} ms", median(d).as_secs_f64() * 1e3);

    println!(
        "time to first token (and the others' time between tokens), median of {}; one thread per engine",
        args.rounds
    );
    println!(
        "{:<36} {:>6} {:>20} {:>20} {:>13}",
        "decode engine", "tokens", "local prefill", "remote prefill", "KV was ready"
    );
    for (beside, budget) in [(0, 256), (args.beside, 256), (args.beside, args.budget)] {
        plan.decode_flags = ["--budget", &budget.to_string()].map(String::from).to_vec();
        let mut bench = Bench::start(&plan)?;
        // The other requests generate until the end of the measurement, and end with the engine.
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

    println!("\nafter a SIGKILL of the prefill engine; pulls are limited to {} bytes/s", args.throttle);
    println!("{:>7} {:>12} {:>22} {:>24}", "tokens", "kept", "killed at 60 %", "recomputing everything");
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
            tokio::task::spawn_blocking(move || victim.lock().restart()).await??;
            tracing::info!("killed and restarted after {:?}", started.elapsed());

            // The same kill before the pull: everything is computed again.
            let ask = bench.prompt(tokens).await?;
            let offer = bench.offer(&ask).await?;
            let victim = bench.fleet.prefill[0].clone();
            tokio::task::spawn_blocking(move || victim.lock().kill()).await??;
            all.push(bench.with(&ask, offer).await?.first);
            let victim = bench.fleet.prefill[0].clone();
            tokio::task::spawn_blocking(move || victim.lock().restart()).await??;
        }
        let (k, a) = (median(&killed), median(&all));
        println!("{length:>7} {kept:>12} {:>19.0} ms {:>21.0} ms", k.as_secs_f64() * 1e3, a.as_secs_f64() * 1e3);
        let name = format!("killed at 60 %, {tokens}");
        report.saw(&name, k < a && kept > 0, format!("{:.2} s against {:.2} s", k.as_secs_f64(), a.as_secs_f64()));
    }
    Ok(report.print())
}

/// Kills the prefill engine when this share of a pull from it has arrived.
async fn kill_at(bench: &Bench, part: f64) -> Result<()> {
    let (client, decode) = (bench.client.clone(), vec![bench.decode()]);
    let victim = bench.fleet.prefill[0].clone();
    let started = Instant::now();
    while !in_mid_pull(&client, &decode, "prefill-0", part).await {
        anyhow::ensure!(started.elapsed() < Duration::from_secs(30), "no pull reached {part}");
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    tokio::task::spawn_blocking(move || victim.lock().kill()).await?
}
