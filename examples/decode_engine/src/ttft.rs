//! `decode-engine ttft`: time to first token with remote and with local prefill, in one run on this machine, and what a
//! prefill engine's death costs when 60 % of the KV have arrived.
//!
//! Prefill and decode engines have one thread each. On the decode engine others generate all the while, as they do on one
//! in use; its steps are kept short for their sake, so a prompt that is computed there runs in many small pieces.

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
    #[arg(long, default_value_t = 16)]
    beside: usize,
    /// Tokens in a step of the decode engine.
    #[arg(long, default_value_t = 64)]
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

/// First tokens, by what was done.
#[derive(Default)]
struct Times {
    tokens: u64,
    local: Vec<Duration>,
    remote: Vec<Duration>,
    pulled: Vec<Duration>,
}

/// Runs it; `false`: remote prefill did not pay.
pub async fn run(args: Args) -> Result<bool> {
    let mut report = Report::default();
    let mut plan = Plan::new(std::env::current_exe()?, &args.model);
    plan.blocks = 2048;
    let budget = args.budget.to_string();
    plan.decode_flags = ["--budget", &budget].map(String::from).to_vec();

    println!("time to first token, median of {}; one thread an engine", args.rounds);
    println!("{:<34} {:>7} {:>9} {:>9} {:>12}", "decode engine", "tokens", "local", "remote", "KV was ready");
    for beside in [0, args.beside] {
        let mut bench = Bench::start(&plan)?;
        // Others generate: long enough for all that follows, and gone with the engine.
        let mut others = Vec::new();
        for i in 0..beside {
            let (client, addr) = (bench.client.clone(), bench.decode());
            let ask = question(&format!("Story number {i}: once upon a time"), 4000);
            others.push(tokio::spawn(async move { client.ask(&addr, &ask).await }));
        }
        bench.client.wait(&bench.decode(), Duration::from_secs(60), |s| s.running == beside).await?;
        for &tokens in &args.lengths {
            let mut t = Times::default();
            for _ in 0..args.rounds {
                let ask = bench.prompt(tokens).await?;
                let r = bench.client.ask(&bench.decode(), &ask).await?;
                t.local.push(r.first);
                t.tokens = r.usage.prompt_tokens;

                let ask = bench.prompt(tokens).await?;
                t.remote.push(bench.client.ask(bench.fleet.router.addr(), &ask).await?.first);

                let ask = bench.prompt(tokens).await?;
                let offer = bench.offer(&ask).await?;
                t.pulled.push(bench.with(&ask, offer).await?.first);
            }
            let ms = |d: &[Duration]| format!("{:.0} ms", median(d).as_secs_f64() * 1e3);
            let name =
                if beside == 0 { "idle".into() } else { format!("{beside} others generate, steps of {}", args.budget) };
            println!("{name:<34} {:>7} {:>9} {:>9} {:>12}", t.tokens, ms(&t.local), ms(&t.remote), ms(&t.pulled));
            if beside > 0 {
                let (remote, local) = (median(&t.remote), median(&t.local));
                let what = format!("remote first, {tokens} tokens");
                report.saw(
                    &what,
                    remote < local,
                    format!("{:.2} s against {:.2} s", remote.as_secs_f64(), local.as_secs_f64()),
                );
            }
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
