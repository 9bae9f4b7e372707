//! One engine process: builds the model, its ends of kvferry, the engine's thread and the HTTP front.

use std::{io::Write as _, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use kvferry::{
    ChunkSize, Config, Consumer, Faults, LaneKind, Model, OfferRank, OnWedge, PeerId, Producer,
    scheduler::invalid::Policy,
};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use crate::{
    api::{Identity, Source},
    engine::{Engine, Link, Settings},
    http::{self, Front},
    kv::{BLOCK, Kv},
    llama::Llama,
    weights,
};

/// The role of an engine in a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes prompts and offers their KV.
    Prefill,
    /// Pulls the KV of prompts and generates.
    Decode,
    /// Both, or serves requests alone.
    Both,
}

/// See [`Policy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnLoss {
    /// Keep the blocks that arrived, and compute the rest.
    Recompute,
    /// Fail the requests that lost blocks.
    Fail,
}

/// See [`Settings::sync_loads`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Loads {
    /// Requests with a running load are left out of the step.
    Async,
    /// The step waits for its loads.
    Sync,
}

/// Flags of `serve`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Role of the engine.
    #[arg(long, value_enum, default_value = "both")]
    pub role: Role,
    /// The model: a GGUF file of the Llama type, `smollm2` (fetched by fetch-model), or `tiny` (random weights).
    #[arg(long, default_value = "smollm2")]
    pub model: String,
    /// `HOST:PORT` of the HTTP front. Port 0 selects a free port.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: String,
    /// `HOST:PORT` of kvferry's control plane, for offers.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub kv_listen: String,
    /// Engine id for peers.
    #[arg(long, default_value = "engine")]
    pub name: String,
    /// Blocks of 16 tokens in the KV pool.
    #[arg(long, default_value_t = 1024)]
    pub blocks: u32,
    /// Threads for the model.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Most tokens per step. Longer prompts run in chunks.
    #[arg(long, default_value_t = 256)]
    pub budget: u64,
    /// Most requests that run at the same time.
    #[arg(long, default_value_t = 64)]
    pub running: usize,
    /// Policy for requests whose KV does not arrive.
    #[arg(long, value_enum, default_value = "recompute")]
    pub policy: OnLoss,
    /// Whether a step waits for its loads.
    #[arg(long, value_enum, default_value = "async")]
    pub loads: Loads,
    /// Lanes that pulls may use, best first.
    #[arg(long, value_delimiter = ',', default_value = "local,tcp")]
    pub lanes: Vec<String>,
    /// Seconds from the start of a pull to its decision.
    #[arg(long, default_value_t = 10.0)]
    pub deadline: f64,
    /// Lease of an offer without a claim, in seconds.
    #[arg(long, default_value_t = 30.0)]
    pub unclaimed: f64,
    /// Break the lanes of pulls on purpose: see `kvferry pull --fault`.
    #[arg(long)]
    pub fault: Option<Faults>,
    /// End when the parent process does.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// The line of JSON that a process prints when it serves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ready {
    /// `HOST:PORT` of the HTTP front.
    pub listen: String,
    /// `HOST:PORT` of kvferry's control plane; empty if it makes no offers.
    pub kv: String,
    pub pid: u32,
}

impl Ready {
    /// Prints the line.
    pub fn say(&self) -> Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(std::io::stdout().flush()?)
    }
}

/// Makes this process end with its parent.
pub fn follow_parent() -> Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

/// The model, which must be the same on both sides of a transfer.
pub fn identity(model: &Llama) -> Model {
    Model {
        name: model.config.name.clone(),
        dtype: "float16".into(),
        scales: String::new(),
        weights: String::new(),
        attention: "HND".into(),
        block_tokens: BLOCK as u32,
    }
}

/// The engine's ends of kvferry, over its pool.
pub fn link(role: Role, name: &str, model: &Llama, kv: &Kv, kv_listen: &str, config: &Config) -> Result<Link> {
    let layout = || kv.layout().clone();
    let consumer = Consumer::builder(name.parse()?, identity(model), layout());
    let producer = Producer::builder(name.parse()?, identity(model), layout()).listen(kv_listen);
    let mut link = Link::default();
    if role != Role::Prefill {
        let built = consumer.memory(kv.memory().clone()).config(config.clone()).build();
        link.consumer = Some(Arc::new(built.context("the consumer did not start")?));
    }
    if role != Role::Decode {
        let built = producer.memory(kv.memory().clone()).config(config.clone()).build();
        link.producer = Some(Arc::new(built.context("the producer did not start")?));
    }
    Ok(link)
}

/// The place of a producer's offers.
pub fn source(producer: &Producer) -> Source {
    let PeerId { engine, rank, incarnation } = producer.me().clone();
    let ranks = vec![OfferRank { rank, incarnation, addr: producer.addr().to_owned() }];
    Source { engine, incarnation, ranks }
}

impl Args {
    fn config(&self) -> Result<Config> {
        let mut config = Config::default();
        config.lease.unclaimed = Duration::try_from_secs_f64(self.unclaimed).context("--unclaimed")?;
        config.pull.faults = self.fault.clone();
        // A step of a long prompt takes one core several seconds.
        config.pull.stalled = Duration::from_secs(60);
        // A request whose blocks are withheld never ends, so the process exits and its supervisor restarts it.
        config.pull.on_wedge = OnWedge::Exit;
        // One or two blocks of a small model, so that a failure leaves a part of a short prompt.
        config.pull.chunk = ChunkSize { min_bytes: 4 << 10, ..ChunkSize::default() };
        let lane = |l: &String| -> Result<LaneKind> {
            match l.as_str() {
                "local" => Ok(LaneKind::Local),
                "tcp" => Ok(LaneKind::Tcp),
                _ => anyhow::bail!("--lanes: {l:?} is not a lane of this engine; use local or tcp"),
            }
        };
        config.pull.lanes = self.lanes.iter().map(lane).collect::<Result<_>>()?;
        Ok(config)
    }

    fn settings(&self) -> Result<Settings> {
        Ok(Settings {
            policy: if self.policy == OnLoss::Fail { Policy::Fail } else { Policy::Recompute },
            sync_loads: self.loads == Loads::Sync,
            budget: self.budget.max(1),
            running: self.running.max(1),
            deadline: Duration::try_from_secs_f64(self.deadline).context("--deadline")?,
            ..Settings::default()
        })
    }
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(args: Args) -> Result<()> {
    if args.exit_with_parent {
        follow_parent()?;
    }
    // Bind before the model is read, so that a port in use is an error at once.
    let listener =
        TcpListener::bind(&args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    rayon::ThreadPoolBuilder::new().num_threads(args.threads.max(1)).build_global()?;
    let (model, text) = weights::load(&args.model)?;
    let model = Arc::new(model);
    let kv = model.cache(args.blocks)?;
    let link = link(args.role, &args.name, &model, &kv, &args.kv_listen, &args.config()?)?;
    let offers_at = link.producer.as_ref().map(|p| p.addr().to_owned()).unwrap_or_default();
    let name = model.config.name.clone();
    let consumer = link.consumer.clone();
    // A step that waits for its loads cannot wait for another engine's computation.
    let identity = Identity { overlap: args.loads == Loads::Async, source: link.producer.as_deref().map(source) };
    let (engine, handle) = Engine::new(model, kv, args.settings()?, link)?;
    let mut registry = Registry::default();
    engine.register(&mut registry);
    let registry = Arc::new(registry);
    let (over, mut ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        // Dropped when the engine ends, even by a panic.
        let _over: tokio::sync::oneshot::Sender<()> = over;
        engine.run();
    })?;
    let front = Arc::new(Front::new(handle.clone(), text, name, registry, identity));
    Ready { listen: listener.local_addr()?.to_string(), kv: offers_at, pid: std::process::id() }.say()?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        served = axum::serve(listener, http::routes(front)) => served?,
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
        // A front without an engine would refuse all requests.
        _ = &mut ended => anyhow::bail!("the engine has ended; see the log above"),
    }
    handle.stop();
    let shut_down = move || {
        // A panic was printed already.
        let _ = thread.join();
        // Peers get their blocks back at once, not only when a lease ends.
        if let Some(c) = consumer {
            c.shutdown();
        }
    };
    tokio::task::spawn_blocking(shut_down).await?;
    Ok(())
}
