//! All rails of a rank in one role: those that are configured or found, those that are usable now, and those to open again.
//!
//! Owns the list of rails. Their pools are registered once, in the background. A rail that cannot be used, or whose device
//! failed, is opened again when a lane is made and its wait is over.

use std::{
    net::IpAddr,
    path::Path,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry_proto::retry::Backoff;

#[cfg(test)]
use super::rail::Pool;
use super::{
    cleanup,
    device::{self, Device, Port, SYS},
    error::VerbsError,
    events::Subscriber,
    exchange::{LinkLayer, MAX_RAILS},
    gpu::{self, Dmabufs, GpuReach},
    library::Library,
    rail::{AVOIDED, Rail, Role, lock, split},
};
use crate::{config::VerbsConfig, memory::Memory};

/// Longest wait before the memory of a rail is registered again after a failure: pinning a large pool takes seconds, and the
/// obstacle is rarely gone soon.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

/// The names of the configured rails, or of all rails of this host.
fn names(config: &VerbsConfig) -> Result<Vec<String>, VerbsError> {
    // A malformed name is a mistake; a device that does not exist may have failed.
    config.rails.iter().try_for_each(|name| split(name).map(drop))?;
    if !config.rails.is_empty() {
        return Ok(config.rails.clone());
    }
    let mut names = Vec::new();
    for d in device::names(Path::new(SYS)) {
        let ports = std::fs::read_dir(Path::new(SYS).join(&d).join("ports")).into_iter().flatten().flatten();
        let mut ports: Vec<u8> = ports.filter_map(|p| p.file_name().to_str()?.parse().ok()).collect();
        ports.sort_unstable();
        names.extend(ports.into_iter().map(|p| format!("{d}:{p}")));
    }
    match names.is_empty() {
        true => Err(VerbsError::NoDevice),
        false => Ok(names),
    }
}

/// All rails of a rank in one role.
#[derive(Debug)]
pub(crate) struct Rails {
    lib: &'static Library,
    config: VerbsConfig,
    memory: Memory,
    role: Role,
    /// Of a pool in GPU memory.
    dmabufs: Dmabufs,
    list: Mutex<Vec<Slot>>,
    done: AtomicU64,
    all: AtomicU64,
}

/// A rail's place in the list.
#[derive(Debug)]
struct Slot {
    name: String,
    rail: Option<Arc<Rail>>,
    /// Why there is none.
    reason: Option<String>,
    /// When it may be opened again; `None`: never.
    retry_at: Option<Instant>,
    /// Waits after registrations that failed.
    backoff: Backoff,
    /// Its pool was registered at some time: its port was up, and it was usable.
    worked: bool,
    /// Its pool was refused, and never registered.
    refused: bool,
}

impl Slot {
    fn new(name: String, rail: Option<Arc<Rail>>, reason: Option<String>) -> Self {
        let backoff = Backoff::new(2 * AVOIDED, REGISTER_AGAIN);
        Self { name, rail, reason, retry_at: Some(Instant::now() + AVOIDED), backoff, worked: false, refused: false }
    }

    /// Its rail is unusable.
    fn release(&mut self, reason: String, wait: Duration) {
        (self.rail, self.reason) = (None, Some(reason));
        self.retry_at = Some(Instant::now() + wait);
    }
}

impl Rails {
    /// Opens the rails that `config` names, or all that are up, and begins to register the memory on them in the
    /// background. At least one must exist; a rail whose link is down is used once the link is up.
    pub(crate) fn open(config: &VerbsConfig, memory: Memory, role: Role) -> Result<Arc<Self>, VerbsError> {
        let lib = Library::get()?;
        let names = names(config)?;
        let (mut last, mut down) = (None, false);
        let mut list = Vec::with_capacity(names.len());
        for name in names {
            let (rail, reason) = match Rail::open(lib, &name) {
                Ok(rail) => (Some(rail), None),
                Err(e) => {
                    let reason = e.to_string();
                    down |= matches!(e, VerbsError::PortDown { .. });
                    last = Some(e);
                    (None, Some(reason))
                }
            };
            list.push(Slot::new(name, rail, reason));
        }
        let none = list.iter().all(|s| s.rail.is_none());
        if none && down {
            tracing::warn!(reason = reasons(&list), "no rail is usable now: verbs lanes are made once a link is up");
        } else if none {
            return Err(match last {
                Some(e) if list.len() == 1 => e,
                _ => VerbsError::NoRail { why: reasons(&list) },
            });
        }
        if !none && !config.rails.is_empty() {
            for (s, reason) in list.iter().filter_map(|s| Some((s, s.reason.as_ref()?))) {
                tracing::warn!(rail = s.name, reason, "a rail is not usable: it is opened again later");
            }
        }
        let it = Self::with(lib, config, memory, role, list);
        it.register();
        Ok(it)
    }

    /// Checks that a rail is usable now, and that `config` names existing rails; registers nothing. For commands whose user
    /// asked for verbs, and must hear of a mistake before anything else is done.
    pub(crate) fn check(config: &VerbsConfig) -> Result<(), VerbsError> {
        let lib = Library::get()?;
        let one = |name: &String| {
            let (device, port) = split(name)?;
            let rail = Rail::on(Device::open(lib, device)?, port, false)?;
            let (port, layer) = rail.up()?;
            rail.address(&port, layer, None, config).map(drop)
        };
        let mut tried: Vec<_> = names(config)?.iter().map(one).collect();
        // A mistake is reported whatever the other rails do; a link that is down is no mistake.
        let mistake = |t: &Result<(), VerbsError>| matches!(t, Err(e) if !matches!(e, VerbsError::PortDown { .. }));
        if let Some(i) = tried.iter().position(mistake).filter(|_| !config.rails.is_empty()) {
            return tried.swap_remove(i);
        }
        if tried.iter().any(Result::is_ok) {
            return Ok(());
        }
        if tried.len() == 1 || tried.iter().all(|t| matches!(t, Err(VerbsError::PortDown { .. }))) {
            return tried.swap_remove(0);
        }
        let why: Vec<_> = tried.into_iter().filter_map(|t| Some(t.err()?.to_string())).collect();
        Err(VerbsError::NoRail { why: why.join("; ") })
    }

    /// Checks that a rail reaches a pool in GPU memory, with a small part of it. `Ok` for host memory.
    ///
    /// # Errors
    /// The reason of each rail.
    pub(crate) fn reach(config: &VerbsConfig, memory: &Memory, role: &Role) -> Result<(), VerbsError> {
        let Some(gpu) = memory.gpu() else { return Ok(()) };
        if matches!(role, Role::Reader) {
            gpu::unordered(gpu).map_err(|why| VerbsError::Unordered { why })?;
        }
        let lib = Library::get()?;
        let one = |name: &String| {
            let (device, port) = split(name)?;
            let rail = Rail::on(Device::open(lib, device)?, port, false)?;
            gpu::probe(rail.pd(), gpu, memory, role.access(false))
        };
        let tried: Vec<_> = names(config)?.iter().map(one).collect();
        if tried.iter().any(Result::is_ok) {
            return Ok(());
        }
        let why: Vec<_> = tried.into_iter().filter_map(|t| Some(t.err()?.to_string())).collect();
        Err(VerbsError::NoRail { why: why.join("; ") })
    }

    /// How each rail reaches a pool in GPU memory, with each way tried; empty for host memory.
    pub(crate) fn gpu_reach(config: &VerbsConfig, memory: &Memory) -> Result<Vec<GpuReach>, VerbsError> {
        let Some(gpu) = memory.gpu() else { return Ok(Vec::new()) };
        let lib = Library::get()?;
        let one = |name: &String| {
            let (device, port) = split(name)?;
            let rail = Rail::on(Device::open(lib, device)?, port, false)?;
            Ok(GpuReach::of(rail.name(), rail.pd(), gpu, memory))
        };
        Ok(names(config)?.iter().map(|name| one(name).unwrap_or_else(|e| GpuReach::unusable(name, &e))).collect())
    }

    /// Whether every rail has refused the pool, though one was open.
    pub(crate) fn refused(&self) -> bool {
        let list = lock(&self.list);
        list.iter().any(|s| s.refused) && list.iter().all(|s| s.rail.is_none() && !s.worked)
    }

    fn with(lib: &'static Library, config: &VerbsConfig, memory: Memory, role: Role, list: Vec<Slot>) -> Arc<Self> {
        let it = Arc::new(Self {
            lib,
            config: config.clone(),
            memory,
            role,
            dmabufs: Dmabufs::default(),
            list: Mutex::new(list),
            done: AtomicU64::new(0),
            all: AtomicU64::new(0),
        });
        it.open_rails().iter().for_each(|rail| it.watch(rail));
        it
    }

    /// Releases the rail when its device has failed.
    fn watch(self: &Arc<Self>, rail: &Rail) {
        let this: Weak<Self> = Arc::downgrade(self);
        rail.state().subscribe(this);
    }

    /// Rails that are open already, registered before this returns.
    #[cfg(test)]
    pub(crate) fn of(
        lib: &'static Library,
        config: &VerbsConfig,
        memory: Memory,
        role: Role,
        rails: Vec<Arc<Rail>>,
    ) -> Result<Arc<Self>, VerbsError> {
        let slot = |rail: Arc<Rail>| Slot::new(rail.name().into(), Some(rail), None);
        let it = Self::with(lib, config, memory, role, rails.into_iter().map(slot).collect());
        for rail in it.open_rails() {
            rail.register(&it.memory, &it.role, config.relaxed_ordering, &it.dmabufs, &it.done)?;
            it.slot_of(&rail, |s| s.worked = true);
        }
        Ok(it)
    }

    /// Acts as if a rail's pool were not registered yet, and returns its registrations.
    #[cfg(test)]
    pub(crate) fn not_yet(&self, rail: &Arc<Rail>) -> Option<Arc<Pool>> {
        self.slot_of(rail, |s| s.worked = false);
        lock(&rail.pool).take()
    }

    /// The settings.
    pub(crate) fn config(&self) -> &VerbsConfig {
        &self.config
    }

    /// The memory that is registered.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    fn open_rails(&self) -> Vec<Arc<Rail>> {
        lock(&self.list).iter().filter_map(|s| s.rail.clone()).collect()
    }

    /// Registers the pool on rails that lack it, on a thread of its own: pinning 100 GB takes seconds.
    fn register(self: &Arc<Self>) {
        // A second registration on a rail would invalidate the keys of its lanes.
        let rails: Vec<_> = self.open_rails().into_iter().filter(|r| !r.asked.swap(true, Ordering::AcqRel)).collect();
        let bytes: u64 = self.memory.segments().iter().sum();
        self.all.fetch_add(bytes * rails.len() as u64, Ordering::Relaxed);
        let weak: Weak<Self> = Arc::downgrade(self);
        cleanup::spawn("kvferry-register", move || {
            for rail in rails {
                let Some(this) = weak.upgrade() else { return };
                let began = Instant::now();
                let relaxed = this.config.relaxed_ordering;
                match rail.register(&this.memory, &this.role, relaxed, &this.dmabufs, &this.done) {
                    Ok(()) => {
                        tracing::info!(rail = rail.name(), bytes, took = ?began.elapsed(), "pool registered");
                        this.slot_of(&rail, |s| {
                            s.backoff.reset();
                            s.worked = true;
                        });
                    }
                    Err(error) => {
                        tracing::warn!(rail = rail.name(), %error, "the pool cannot be registered: this rail is not used");
                        this.all.fetch_sub(bytes, Ordering::Relaxed);
                        this.slot_of(&rail, |s| {
                            let wait = s.backoff.wait();
                            s.refused = true;
                            s.release(error.to_string(), wait);
                        });
                    }
                }
            }
        });
    }

    /// Gives all registrations back, for good: reads of peers fail from now on. Lanes of this side keep theirs until they are
    /// quiet.
    #[cfg(test)]
    pub(crate) fn withdraw(&self) {
        for s in lock(&self.list).iter_mut() {
            if let Some(rail) = s.rail.take() {
                lock(&rail.pool).take();
            }
            (s.reason, s.retry_at) = (Some("its memory was withdrawn".into()), None);
        }
    }

    /// Changes a rail's slot, if it still has one.
    fn slot_of(&self, rail: &Arc<Rail>, change: impl FnOnce(&mut Slot)) {
        let mut list = lock(&self.list);
        if let Some(s) = list.iter_mut().find(|s| s.rail.as_ref().is_some_and(|r| Arc::ptr_eq(r, rail))) {
            change(s);
        }
    }

    /// Bytes registered, and bytes to register, over all rails.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.all.load(Ordering::Relaxed))
    }

    /// The rails that are usable now, each with its port. Rails that failed a moment ago, by themselves or towards this
    /// host, only if no other is left.
    pub(crate) fn usable(
        self: &Arc<Self>,
        host: Option<IpAddr>,
    ) -> Result<Vec<(Arc<Rail>, Port, LinkLayer)>, VerbsError> {
        self.reopen();
        let (mut good, mut avoided, mut why, mut waiting) = (Vec::new(), Vec::new(), Vec::new(), false);
        for rail in self.open_rails() {
            if rail.pool().is_none() {
                waiting = true;
                continue;
            }
            match rail.up() {
                Ok((port, layer)) if rail.is_avoided(host) => avoided.push((rail, port, layer)),
                Ok((port, layer)) => good.push((rail, port, layer)),
                Err(e) => why.push(e.to_string()),
            }
        }
        if good.is_empty() {
            good = avoided;
        }
        if !good.is_empty() {
            return Ok(good);
        }
        if waiting {
            let (done, all) = self.progress();
            return Err(VerbsError::NotYet { done, all });
        }
        why.push(reasons(&lock(&self.list)));
        Err(VerbsError::NoRail { why: why.join("; ") })
    }

    /// How many rails a lane could have: those that were usable at some time, and those whose pool is being registered. A
    /// port that never had a link does not count.
    pub(crate) fn expected(&self) -> usize {
        let registering = |s: &Slot| s.rail.as_ref().is_some_and(|r| r.pool().is_none());
        lock(&self.list).iter().filter(|s| s.worked || registering(s)).count().min(MAX_RAILS)
    }

    /// Opens rails without a device whose wait is over.
    fn reopen(self: &Arc<Self>) {
        self.device_failed();
        let mut opened = false;
        for s in lock(&self.list).iter_mut() {
            if s.rail.is_none() && s.retry_at.is_some_and(|t| Instant::now() >= t) {
                match Rail::open(self.lib, &s.name) {
                    Ok(rail) => {
                        self.watch(&rail);
                        (s.rail, s.reason, opened) = (Some(rail), None, true);
                    }
                    // Opening is cheap: the wait does not grow, so that a port whose link comes up is used soon.
                    Err(e) => s.release(e.to_string(), AVOIDED),
                }
            }
        }
        if opened {
            self.register();
        }
    }
}

impl Subscriber for Rails {
    /// Lanes hold the rails of a failed device until they are quiet.
    fn device_failed(&self) {
        for s in lock(&self.list).iter_mut().filter(|s| s.rail.as_ref().is_some_and(|r| r.state().fatal())) {
            s.rail = None;
            s.reason = Some("the device failed".into());
        }
    }
}

fn reasons(list: &[Slot]) -> String {
    let all: Vec<_> = list.iter().filter_map(|s| Some(format!("{}: {}", s.name, s.reason.as_ref()?))).collect();
    all.join("; ")
}
