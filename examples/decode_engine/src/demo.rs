//! `decode-engine demo`: a good day and a bad day on this machine, compared with a single engine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    client::{Client, Metrics, Reply, Trouble},
    fleet::{Fleet, Kills, Plan, ask_all, kill_repeatedly},
    prompts::prompts,
    report::{Report, median},
};

/// Flags of `demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model, as for `serve`.
    #[arg(long, default_value = "smollm2")]
    model: String,
    /// Prompts per act, all sent at once.
    #[arg(long, default_value_t = 24)]
    prompts: usize,
    /// Tokens per answer.
    #[arg(long, default_value_t = 16)]
    tokens: usize,
    /// Bytes of each prompt that it shares with other prompts.
    #[arg(long, default_value_t = 450)]
    shared: usize,
    /// Bytes of each prompt that are unique.
    #[arg(long, default_value_t = 350)]
    own: usize,
    /// Rate of pulls on the bad day, in bytes per second: slow, so that kills come in mid-pull.
    #[arg(long, default_value = "5M")]
    throttle: String,
}

type Answers = Vec<std::result::Result<Reply, Trouble>>;

/// One act: its answers and its time.
struct Act {
    answers: Answers,
    took: Duration,
}

impl Act {
    async fn play(client: &Client, addrs: &[String], prompts: &[String], tokens: usize) -> Self {
        let started = Instant::now();
        let answers = ask_all(client, addrs, prompts, tokens, prompts.len()).await;
        Self { answers, took: started.elapsed() }
    }

    fn good(&self) -> impl Iterator<Item = &Reply> {
        self.answers.iter().flatten()
    }

    fn line(&self) -> String {
        let (prompt, made) =
            self.good().fold((0, 0), |(p, m), r| (p + r.usage.prompt_tokens, m + r.usage.completion_tokens));
        let seconds = self.took.as_secs_f64();
        let first: Vec<_> = self.good().map(|r| r.first).collect();
        format!(
            "{} answers in {seconds:.1} s: {:.0} tokens/s ({prompt} of prompts, {made} generated); time to first token {:.2} s (median)",
            first.len(),
            (prompt + made) as f64 / seconds,
            median(&first).as_secs_f64()
        )
    }

    /// Compares all answers with those of the single engine.
    fn same(&self, right: &Act) -> Result<String> {
        for (i, (here, there)) in self.answers.iter().zip(&right.answers).enumerate() {
            let (here, there) = match (here, there) {
                (Ok(here), Ok(there)) => (here, there),
                (Err(e), _) | (_, Err(e)) => anyhow::bail!("answer {i} failed: {e}"),
            };
            ensure!(
                here.tokens == there.tokens,
                "answer {i} is {:?}, but the single engine says {:?}",
                here.text,
                there.text
            );
        }
        Ok(format!("{} of {} answers, token by token", self.answers.len(), right.answers.len()))
    }
}

/// Runs the acts. `false` if a property did not hold.
pub async fn run(args: Args) -> Result<bool> {
    let started = Instant::now();
    let say = |text: String| println!("{:7.1} s  {text}", started.elapsed().as_secs_f64());
    let client = Client::new()?;
    let mut plan = Plan::new(std::env::current_exe()?, &args.model);
    (plan.prefills, plan.decodes) = (2, 2);
    let mut report = Report::default();
    let texts = |seed| prompts(args.prompts, 4, args.shared, args.own, seed);
    // Each act has its own prompts, which no prefix cache contains.
    let acts = [texts(1), texts(2), texts(3)];

    say(format!(
        "a single engine, model {}: {} prompts for each act, for the reference answers",
        args.model, args.prompts
    ));
    let single = plan.single()?;
    let mut right = Vec::new();
    for prompts in &acts {
        right.push(Act::play(&client, &[single.addr().to_owned()], prompts, args.tokens).await);
    }
    say(right[0].line());
    if let Some(r) = right[0].good().next() {
        say(format!("an answer, for example: {:?}", r.text.trim()));
    }
    drop(single);

    say("act 1: a router, 2 prefill and 2 decode engines; a good day".into());
    let fleet = Fleet::start(&plan)?;
    let router = [fleet.router.addr().to_owned()];
    let good = Act::play(&client, &router, &acts[0], args.tokens).await;
    say(format!("with remote prefill:    {}", good.line()));
    report.check("answers, good day", good.same(&right[0]));
    let local = Act::play(&client, &fleet.decode_addrs(), &acts[1], args.tokens).await;
    say(format!("without remote prefill: {}", local.line()));
    report.check("answers, no prefill", local.same(&right[1]));
    let idle = fleet.settled(&client, Duration::from_secs(40)).await;
    report.check("accounting, good day", idle.map(|()| "all blocks returned, all ledgers exact".into()));
    drop(fleet);

    say(format!(
        "act 2: a bad day: prefill engines are killed in mid-pull and restarted; pulls are limited to {} bytes/s",
        args.throttle
    ));
    let fault = format!("throttle={}", args.throttle);
    plan.decode_flags = ["--lanes", "tcp", "--fault", &fault].map(String::from).to_vec();
    plan.prefill_flags = ["--unclaimed", "5"].map(String::from).to_vec();
    let fleet = Fleet::start(&plan)?;
    let stop = Arc::new(AtomicBool::new(false));
    let how = Kills {
        every: Duration::from_millis(500),
        mid_pull: 0.3,
        patience: Duration::from_secs(20),
        dead: Duration::from_millis(300),
    };
    let killer =
        tokio::spawn(kill_repeatedly(client.clone(), fleet.prefill.clone(), fleet.decode_addrs(), how, stop.clone()));
    let bad = Act::play(&client, &[fleet.router.addr().to_owned()], &acts[2], args.tokens).await;
    stop.store(true, Ordering::Release);
    let killed = killer.await??;
    say(format!("{} kills, {} of them in mid-pull", killed.kills, killed.mid_pull));
    say(bad.line());
    report.check("answers, bad day", bad.same(&right[2]));
    report.saw("kills", killed.mid_pull > 0, format!("{} kills, {} in mid-pull", killed.kills, killed.mid_pull));
    let idle = fleet.settled(&client, Duration::from_secs(40)).await;
    report.check("accounting, bad day", idle.map(|()| "all blocks returned, all ledgers exact".into()));
    let mut ledger = Ledger::default();
    for addr in fleet.decode_addrs() {
        ledger.add(&client.metrics(&addr).await.with_context(|| format!("the metrics of {addr}"))?);
    }
    ledger.print();
    let asked: u64 = bad.good().map(|r| r.usage.prompt_tokens).sum();
    report.saw(
        "ledger",
        ledger.sources() == asked,
        format!("the sources add up to {} prompt tokens, the prompts have {asked}", ledger.sources()),
    );
    Ok(report.print())
}

/// The sum of the ledgers of the decode engines.
#[derive(Debug, Default)]
pub struct Ledger {
    computed: u64,
    local_cache: u64,
    external: u64,
    own: u64,
    other: u64,
    measured: u64,
    salvaged: u64,
    asked: u64,
}

impl Ledger {
    /// Adds the metrics of an engine.
    pub fn add(&mut self, m: &Metrics) {
        let source = |s: &str| m.sum("kvferry_prompt_tokens_total", &[&format!("source=\"{s}\"")]);
        let by = |s: &str| m.sum("kvferry_prompt_tokens_recomputed_total", &[&format!("by=\"{s}\"")]);
        self.computed += source("computed");
        self.local_cache += source("local_cache");
        self.external += source("external");
        self.own += by("own");
        self.other += by("other");
        self.measured += m.sum("engine_recomputed_rows_total", &[]);
        self.salvaged += m.sum("engine_salvaged_tokens_total", &[]);
        self.asked += m.sum("engine_load_tokens_total", &[]);
    }

    /// The sum of all sources.
    pub fn sources(&self) -> u64 {
        self.computed + self.local_cache + self.external
    }

    /// Tokens that were lost and computed again, by the ledger.
    pub fn recomputed(&self) -> u64 {
        self.own
    }

    /// Prints the table.
    pub fn print(&self) {
        println!("\nprompt tokens of the decode engines, by source");
        println!(
            "  computed     {:>7}  of these recomputed after a loss: {} (counted by the engine: {}), by another request: {}",
            self.computed, self.own, self.measured, self.other
        );
        println!("  local cache  {:>7}", self.local_cache);
        println!(
            "  external     {:>7}  of {} that pulls should bring; {} kept from failed pulls",
            self.external, self.asked, self.salvaged
        );
        println!("  all          {:>7}", self.sources());
    }
}
