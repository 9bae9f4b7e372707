//! How a consumer is configured and started.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64},
};

use kvferry_proto::{
    EngineId, Incarnation, Model, PeerId, PoolLayout, Rank, Shard,
    hello::{self, Hello},
    puller::{Puller, better::Waits},
};
use parking_lot::Mutex;

use super::{
    Consumer,
    connector::Connector,
    directory::{Directory, Sessions, ToPuller},
    pulls::Pulls,
};
use crate::{
    config::Config,
    control::host,
    driver::{runtime::Runtime, thread},
    error::StartError,
    mailbox::Mailbox,
    memory::Memory,
    tls::TlsIdentity,
};

/// Builds a [`Consumer`].
pub struct Builder {
    engine: EngineId,
    rank: Rank,
    model: Model,
    shard: Shard,
    layout: PoolLayout,
    memory: Option<Memory>,
    config: Config,
}

impl Consumer {
    /// Starts building a consumer: the engine, what its KV means, and how its memory is laid out.
    pub fn builder(engine: EngineId, model: Model, layout: PoolLayout) -> Builder {
        let shard = Shard::whole(1, 1);
        Builder { engine, rank: Rank(0), model, shard, layout, memory: None, config: Config::default() }
    }
}

impl Builder {
    /// Sets the rank of the engine and its part of the model. Default: the engine's only rank.
    pub fn rank(mut self, rank: Rank, shard: Shard) -> Self {
        (self.rank, self.shard) = (rank, shard);
        self
    }

    /// Uses the engine's own memory. Default: kvferry allocates memory for the layout.
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = Some(memory);
        self
    }

    /// Replaces the default settings.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Starts the consumer's two threads: one moves data, one talks to peers. Connects to no peer yet.
    pub fn build(self) -> Result<Consumer, StartError> {
        self.layout.check()?;
        self.shard.check().map_err(|why| StartError::Config { field: "shard", why: why.into() })?;
        self.config.check()?;
        let memory = Memory::for_layout(self.memory, &self.layout)?;
        let tls = self.config.tls.as_ref().map(|t| TlsIdentity::new(t, Some(&self.engine))).transpose()?;
        let me = PeerId { engine: self.engine, rank: self.rank, incarnation: Incarnation::random() };
        let runtime = Runtime::start("kvferry-control").map_err(StartError::os("cannot start the control thread"))?;
        let mailbox = Mailbox::new().map_err(StartError::os("cannot create an eventfd"))?;
        let layout = Arc::new(self.layout);
        let pulls = Arc::new(Pulls::new(&layout, self.config.pull.on_wedge));
        let sessions = Arc::new(Sessions::default());
        let hello = Hello {
            versions: hello::VERSIONS,
            features: hello::features::ALL,
            peer: me.clone(),
            model: self.model,
            shard: self.shard,
            host: host::identity().to_owned(),
        };
        let directory = Directory::new(
            runtime.handle().clone(),
            Arc::new(hello),
            Arc::new(self.config.clone()),
            Arc::new(ToPuller(mailbox.clone())),
            Arc::new(Connector::new(memory.clone(), &self.config, tls.clone())?),
            sessions.clone(),
            tls,
        );
        let waits = Waits { first: self.config.pull.look_min, longest: self.config.pull.look_max };
        let puller = Puller::new(layout.clone(), self.shard, self.config.limits.blocks_per_offer, waits);
        let data_thread = thread::spawn(puller, mailbox.clone(), Box::new(directory), pulls.clone())
            .map_err(StartError::os("cannot start the data thread"))?;
        Ok(Consumer {
            me,
            layout,
            memory,
            shard: self.shard,
            config: self.config,
            pulls,
            sessions,
            mailbox,
            next_pull: AtomicU64::new(1),
            stopped: AtomicBool::new(false),
            data_thread: Mutex::new(Some(data_thread)),
            runtime,
        })
    }
}
