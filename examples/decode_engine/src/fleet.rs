//! A deployment on this machine: a router, prefill and decode engines, and whoever kills prefill engines under load.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    api::{Ask, Prompt},
    client::{Client, Reply, Trouble},
    process::Process,
};

/// What to start.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This program.
    pub exe: PathBuf,
    /// As `serve --model` takes it.
    pub model: String,
    pub prefills: usize,
    pub decodes: usize,
    /// Blocks of each engine.
    pub blocks: u32,
    /// More flags of prefill engines.
    pub prefill_flags: Vec<String>,
    /// More flags of decode engines.
    pub decode_flags: Vec<String>,
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
        }
    }

    /// An engine that does all by itself: its answers are the right ones.
    pub fn single(&self) -> Result<Process> {
        self.engine("both", "single", &[])
    }

    fn engine(&self, role: &str, name: &str, more: &[String]) -> Result<Process> {
        let blocks = self.blocks.to_string();
        let mut args = vec!["serve", "--role", role, "--name", name, "--model", &self.model, "--blocks", &blocks];
        args.extend(more.iter().map(String::as_str));
        Process::start(&self.exe, &args)
    }
}

/// Shared with whoever kills it.
pub type Victim = Arc<Mutex<Process>>;

/// The process, whoever panicked with it.
pub fn hold(p: &Victim) -> MutexGuard<'_, Process> {
    p.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What runs.
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
            addrs(prefill.iter().map(|p| hold(p).addr().to_owned()).collect()),
            addrs(decode.iter().map(|p| p.addr().to_owned()).collect()),
        );
        let router = Process::start(&plan.exe, &["router", "--prefill", &p, "--decode", &d])?;
        Ok(Self { prefill, decode, router })
    }

    /// `HOST:PORT` of every decode engine.
    pub fn decode_addrs(&self) -> Vec<String> {
        self.decode.iter().map(|p| p.addr().to_owned()).collect()
    }

    /// `HOST:PORT` of every engine.
    pub fn addrs(&self) -> Vec<String> {
        let prefill = self.prefill.iter().map(|p| hold(p).addr().to_owned());
        prefill.chain(self.decode_addrs()).collect()
    }

    /// Waits until nothing is under way anywhere, and checks that every block is back and every book is balanced. Leases of
    /// offers that nobody claimed have to run out first, so `limit` must be longer than those.
    pub async fn settled(&self, client: &Client, limit: Duration) -> Result<()> {
        for addr in self.addrs() {
            let idle = client.wait(&addr, limit, |s| s.running + s.waiting + s.offers + s.pulls.len() == 0).await?;
            ensure!(idle.free == idle.blocks, "{addr} leaked {} blocks", idle.blocks - idle.free);
            client.metrics(&addr).await?.balanced().with_context(|| format!("the books of {addr}"))?;
        }
        Ok(())
    }
}

/// How prefill engines are killed.
#[derive(Debug, Clone)]
pub struct Terror {
    /// From one kill to the next, at least.
    pub every: Duration,
    /// A kill waits until a pull from the victim has come this far,
    pub mid_pull: f64,
    /// but not for longer than this.
    pub patience: Duration,
    /// How long a victim stays dead.
    pub dead: Duration,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Killed {
    pub kills: usize,
    /// Of these, in the middle of a pull from the victim.
    pub mid_pull: usize,
}

/// Kills prefill engines in turn, and starts them again, until `stop`.
pub async fn terrorise(
    client: Client,
    victims: Vec<Victim>,
    decode: Vec<String>,
    how: Terror,
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
            hold(&victim).kill()?;
            std::thread::sleep(dead);
            hold(&victim).restart()
        })
        .await??;
    }
    Ok(killed)
}

/// Whether a pull from this engine has come at least this far, and is not over.
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

/// A question of so many tokens.
pub fn question(prompt: &str, tokens: usize) -> Ask {
    Ask { prompt: Prompt::Text(prompt.into()), max_tokens: tokens, ignore_eos: true, ..Ask::default() }
}

/// Asks all at once, some clients at a time, and returns the answers in order.
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
            let _place = gate.acquire().await;
            client.ask(&addr, &ask).await
        }));
    }
    let mut answers = Vec::with_capacity(asks.len());
    for ask in asks {
        answers.push(ask.await.unwrap_or_else(|e| Err(Trouble::Lost(e.to_string()))));
    }
    answers
}
