//! A deployment on this machine: a router, prefill and decode engines, and a task that kills prefill engines under load.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;

use crate::{
    api::{Ask, Prompt},
    client::{Client, Reply, Trouble},
    process::Process,
};

/// The processes of a deployment.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This program.
    pub exe: PathBuf,
    /// See `serve --model`.
    pub model: String,
    pub prefills: usize,
    pub decodes: usize,
    /// Blocks per engine.
    pub blocks: u32,
    /// Additional flags of prefill engines.
    pub prefill_flags: Vec<String>,
    /// Additional flags of decode engines.
    pub decode_flags: Vec<String>,
    /// Additional flags of the router.
    pub router_flags: Vec<String>,
}

impl Plan {
    /// One prefill and one decode engine of this program.
    pub fn new(exe: impl AsRef<Path>, model: &str) -> Self {
        Self {
            exe: exe.as_ref().to_owned(),
            model: model.into(),
            prefills: 1,
            decodes: 1,
            blocks: 1024,
            prefill_flags: Vec::new(),
            decode_flags: Vec::new(),
            router_flags: Vec::new(),
        }
    }

    /// A single engine, whose answers are the reference.
    pub fn single(&self) -> Result<Process> {
        self.engine("both", "single", &[])
    }

    fn engine(&self, role: &str, name: &str, more: &[String]) -> Result<Process> {
        let blocks = self.blocks.to_string();
        let mut args = vec!["serve", "--role", role, "--name", name, "--model", &self.model];
        if !more.iter().any(|flag| flag == "--blocks") {
            args.extend(["--blocks", &blocks]);
        }
        args.extend(more.iter().map(String::as_str));
        Process::start(&self.exe, &args)
    }
}

/// A prefill engine, which another task may kill.
pub type Victim = Arc<Mutex<Process>>;

/// A running deployment.
pub struct Fleet {
    pub prefill: Vec<Victim>,
    pub decode: Vec<Process>,
    pub router: Process,
}

impl Fleet {
    /// Starts a plan.
    pub fn start(plan: &Plan) -> Result<Self> {
        let prefill = (0..plan.prefills)
            .map(|i| Ok(Arc::new(Mutex::new(plan.engine("prefill", &format!("prefill-{i}"), &plan.prefill_flags)?))))
            .collect::<Result<Vec<Victim>>>()?;
        let decode = (0..plan.decodes)
            .map(|i| plan.engine("decode", &format!("decode-{i}"), &plan.decode_flags))
            .collect::<Result<Vec<_>>>()?;
        let addrs = |list: Vec<String>| list.join(",");
        let (p, d) = (
            addrs(prefill.iter().map(|p| p.lock().addr().to_owned()).collect()),
            addrs(decode.iter().map(|p| p.addr().to_owned()).collect()),
        );
        let mut args = vec!["router", "--prefill", &p, "--decode", &d];
        args.extend(plan.router_flags.iter().map(String::as_str));
        let router = Process::start(&plan.exe, &args)?;
        Ok(Self { prefill, decode, router })
    }

    /// `HOST:PORT` of every decode engine.
    pub fn decode_addrs(&self) -> Vec<String> {
        self.decode.iter().map(|p| p.addr().to_owned()).collect()
    }

    /// `HOST:PORT` of every engine.
    pub fn addrs(&self) -> Vec<String> {
        let prefill = self.prefill.iter().map(|p| p.lock().addr().to_owned());
        prefill.chain(self.decode_addrs()).collect()
    }

    /// Waits until all engines are idle, and checks their blocks and their ledgers. Unclaimed offers must expire first, so
    /// `limit` must be longer than their lease.
    pub async fn settled(&self, client: &Client, limit: Duration) -> Result<()> {
        for addr in self.addrs() {
            let idle = client.wait(&addr, limit, |s| s.running + s.waiting + s.offers + s.pulls.len() == 0).await?;
            ensure!(idle.free == idle.blocks, "{addr} leaked {} blocks", idle.blocks - idle.free);
            client.metrics(&addr).await?.balanced().with_context(|| format!("the ledger of {addr}"))?;
        }
        Ok(())
    }
}

/// The settings of the kills.
#[derive(Debug, Clone)]
pub struct Kills {
    /// Shortest time between two kills.
    pub every: Duration,
    /// A kill waits until this share of a pull from the victim has arrived,
    pub mid_pull: f64,
    /// but no longer than this.
    pub patience: Duration,
    /// Time from the kill to the restart.
    pub dead: Duration,
}

/// The kills that happened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Killed {
    pub kills: usize,
    /// The kills in the middle of a pull from the victim.
    pub mid_pull: usize,
}

/// Kills prefill engines in turn and restarts them, until `stop`.
pub async fn kill_repeatedly(
    client: Client,
    victims: Vec<Victim>,
    decode: Vec<String>,
    how: Kills,
    stop: Arc<AtomicBool>,
) -> Result<Killed> {
    let mut killed = Killed::default();
    for turn in 0.. {
        let next = Instant::now() + how.every;
        while Instant::now() < next && !stop.load(Ordering::Acquire) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if stop.load(Ordering::Acquire) {
            break;
        }
        let which = turn % victims.len();
        let (victim, name) = (victims[which].clone(), format!("prefill-{which}"));
        let patience = Instant::now() + how.patience;
        let mut mid = false;
        while !mid && Instant::now() < patience && !stop.load(Ordering::Acquire) {
            mid = in_mid_pull(&client, &decode, &name, how.mid_pull).await;
            if !mid {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        if !mid && stop.load(Ordering::Acquire) {
            break;
        }
        killed.kills += 1;
        killed.mid_pull += usize::from(mid);
        let dead = how.dead;
        tokio::task::spawn_blocking(move || {
            victim.lock().kill()?;
            std::thread::sleep(dead);
            victim.lock().restart()
        })
        .await??;
    }
    Ok(killed)
}

/// Whether at least this share of a pull from this engine has arrived, and the pull has not ended.
pub async fn in_mid_pull(client: &Client, decode: &[String], name: &str, part: f64) -> bool {
    for addr in decode {
        let Ok(s) = client.status(addr).await else { continue };
        let far = |p: &crate::engine::PullStatus| p.chunks > 0 && p.loaded as f64 >= part * p.chunks as f64;
        if s.pulls.iter().any(|p| p.from == name && far(p) && p.loaded < p.chunks) {
            return true;
        }
    }
    false
}

/// A request for this many tokens.
pub fn question(prompt: &str, tokens: usize) -> Ask {
    Ask { prompt: Prompt::Text(prompt.into()), max_tokens: tokens, ignore_eos: true, ..Ask::default() }
}

/// Sends all prompts, `at_once` at a time, and returns the answers in order.
pub async fn ask_all(
    client: &Client,
    addrs: &[String],
    prompts: &[String],
    tokens: usize,
    at_once: usize,
) -> Vec<std::result::Result<Reply, Trouble>> {
    let gate = Arc::new(tokio::sync::Semaphore::new(at_once.max(1)));
    let mut asks = Vec::with_capacity(prompts.len());
    for (i, p) in prompts.iter().enumerate() {
        let (client, addr, ask) = (client.clone(), addrs[i % addrs.len()].clone(), question(p, tokens));
        let gate = gate.clone();
        asks.push(tokio::spawn(async move {
            let _permit = gate.acquire().await;
            client.ask(&addr, &ask).await
        }));
    }
    let mut answers = Vec::with_capacity(asks.len());
    for ask in asks {
        answers.push(ask.await.unwrap_or_else(|e| Err(Trouble::Lost(e.to_string()))));
    }
    answers
}
