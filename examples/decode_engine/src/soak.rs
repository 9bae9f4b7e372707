//! `decode-engine soak`: sends requests at a steady rate while prefill engines are killed, and checks every answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    client::{Client, Reply, Trouble},
    demo::Ledger,
    fleet::{Fleet, Killed, Kills, Plan, ask_all, kill_repeatedly, question},
    prompts::prompts,
    report::{Report, median},
};

/// Flags of `soak`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model, as for `serve`. Two cores can run only the tiny one at this rate.
    #[arg(long, default_value = "tiny")]
    pub model: String,
    /// Requests per second.
    #[arg(long, default_value_t = 16.0)]
    pub rate: f64,
    /// Duration in seconds.
    #[arg(long, default_value_t = 60.0)]
    pub seconds: f64,
    /// Seconds from one kill to the next.
    #[arg(long, default_value_t = 5.0)]
    pub every: f64,
    /// Policy for requests whose KV does not arrive: `recompute` or `fail`.
    #[arg(long, default_value = "recompute")]
    pub policy: String,
    /// Whether a decode engine's step waits for its loads: `async` or `sync`.
    #[arg(long, default_value = "async")]
    pub loads: String,
    /// Rate of pulls, in bytes per second: slow, so that kills come in mid-pull.
    #[arg(long, default_value = "1M")]
    pub throttle: String,
    /// Tokens per answer.
    #[arg(long, default_value_t = 12)]
    pub tokens: usize,
    /// Send each prompt to both engines at the same time.
    #[arg(long)]
    pub overlap: bool,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            model: "tiny".into(),
            rate: 16.0,
            seconds: 60.0,
            every: 5.0,
            policy: "recompute".into(),
            loads: "async".into(),
            throttle: "1M".into(),
            tokens: 12,
            overlap: false,
        }
    }
}

/// The results.
#[derive(Debug, Default)]
pub struct Findings {
    pub asked: usize,
    pub right: usize,
    pub wrong: Vec<String>,
    /// Answers that failed because of lost KV, as they should under `fail`.
    pub kv_lost: usize,
    /// Answers that failed for another reason.
    pub failed: Vec<String>,
    /// Partial and failed pulls, as the consumers count them.
    pub broken_pulls: u64,
    pub killed: Killed,
    pub ledger: Ledger,
    /// `None`: no block leaked, and all ledgers agree with the engines' counts.
    pub unsettled: Option<String>,
    pub first: Vec<Duration>,
}

/// Runs the soak with processes of this plan.
pub async fn soak(mut plan: Plan, args: &Args) -> Result<Findings> {
    let client = Client::new()?;
    let n = (args.rate * args.seconds) as usize;
    let texts = prompts(n, 6, 240, 240, 9);
    let single = plan.single()?;
    let right: Vec<_> = ask_all(&client, &[single.addr().to_owned()], &texts, args.tokens, 32).await;
    let right = right.into_iter().collect::<std::result::Result<Vec<Reply>, Trouble>>()?;
    drop(single);

    (plan.prefills, plan.decodes) = (2, 2);
    let fault = format!("throttle={}", args.throttle);
    let flags = ["--policy", &args.policy, "--loads", &args.loads, "--lanes", "tcp", "--fault", &fault];
    plan.decode_flags = flags.map(String::from).to_vec();
    plan.prefill_flags = ["--unclaimed", "5"].map(String::from).to_vec();
    plan.router_flags.extend(args.overlap.then(|| "--overlap".into()));
    let fleet = Fleet::start(&plan)?;
    let stop = Arc::new(AtomicBool::new(false));
    let every = Duration::from_secs_f64(args.every);
    let how = Kills { every, mid_pull: 0.1, patience: every / 2, dead: Duration::from_millis(300) };
    let killer =
        tokio::spawn(kill_repeatedly(client.clone(), fleet.prefill.clone(), fleet.decode_addrs(), how, stop.clone()));

    let started = Instant::now();
    let mut asks = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let at = started + Duration::from_secs_f64(i as f64 / args.rate);
        tokio::time::sleep_until(at.into()).await;
        let (client, addr, ask) = (client.clone(), fleet.router.addr().to_owned(), question(text, args.tokens));
        asks.push(tokio::spawn(async move { client.ask(&addr, &ask).await }));
    }
    let mut seen = Findings { asked: n, ..Findings::default() };
    for (i, ask) in asks.into_iter().enumerate() {
        match ask.await? {
            Ok(r) if r.tokens == right[i].tokens => {
                seen.right += 1;
                seen.first.push(r.first);
            }
            Ok(r) => seen.wrong.push(format!("answer {i} is {:?}, not {:?}", r.tokens, right[i].tokens)),
            Err(Trouble::Said(p)) if p.error.kind == "kv_load_failed" && p.error.message.contains("did not arrive") => {
                seen.kv_lost += 1;
            }
            Err(e) => seen.failed.push(format!("answer {i}: {e}")),
        }
    }
    stop.store(true, Ordering::Release);
    seen.killed = killer.await??;
    seen.unsettled = fleet.settled(&client, Duration::from_secs(60)).await.err().map(|e| format!("{e:#}"));
    for addr in fleet.decode_addrs() {
        let m = client.metrics(&addr).await?;
        seen.ledger.add(&m);
        let broken = |result: &str| m.sum("kvferry_pulls_total", &[&format!("result=\"{result}\"")]);
        seen.broken_pulls += broken("partial") + broken("failed");
    }
    Ok(seen)
}

impl Findings {
    /// The properties that must hold.
    pub fn report(&self, policy: &str) -> Report {
        let mut r = Report::default();
        let first = |list: &[String]| list.first().cloned().unwrap_or_default();
        r.saw(
            "no wrong answer",
            self.wrong.is_empty(),
            format!("{} wrong of {} {}", self.wrong.len(), self.asked, first(&self.wrong)),
        );
        if policy == "fail" {
            let same = self.kv_lost as u64 == self.broken_pulls;
            r.saw(
                "affected requests fail",
                same,
                format!(
                    "{} answers failed because of lost KV, {} pulls were incomplete",
                    self.kv_lost, self.broken_pulls
                ),
            );
            r.saw(
                "no other request fails",
                self.failed.is_empty(),
                format!("{} {}", self.failed.len(), first(&self.failed)),
            );
        } else {
            let failed = self.failed.len() + self.kv_lost;
            r.saw(
                "no failed answer",
                failed == 0,
                format!("{failed} failed of {} {}", self.asked, first(&self.failed)),
            );
        }
        r.saw(
            "kills",
            self.killed.mid_pull > 0,
            format!(
                "{} kills, {} in mid-pull; {} incomplete pulls",
                self.killed.kills, self.killed.mid_pull, self.broken_pulls
            ),
        );
        let settled = self.unsettled.clone();
        r.saw(
            "no leaked block",
            settled.is_none(),
            settled.unwrap_or_else(|| "all blocks returned, all ledgers exact".into()),
        );
        r
    }
}

/// Runs the command. `false` if a property did not hold.
pub async fn run(args: Args) -> Result<bool> {
    ensure!(["recompute", "fail"].contains(&args.policy.as_str()), "--policy must be recompute or fail");
    println!(
        "{} requests per second for {} s, one prefill engine killed every {} s, policy {}",
        args.rate, args.seconds, args.every, args.policy
    );
    let seen = soak(Plan::new(std::env::current_exe()?, &args.model), &args).await?;
    println!("time to first token: {:.0} ms (median)", median(&seen.first).as_secs_f64() * 1e3);
    seen.ledger.print();
    Ok(seen.report(&args.policy).print())
}
