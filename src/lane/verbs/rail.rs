//! Rails: ports of devices that are open, addressed, and have the pool registered.
//!
//! Owns each device that it opened, one protection domain on it, and the registrations of the pool: made once, in the
//! background, and shared by all lanes. A rail that failed is left out for a while and tried again later.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::Path,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    device::{self, Device, Limits, Port, SYS},
    error::VerbsError,
    events::{State, Watch},
    exchange::{LinkLayer, MAX_RAILS},
    gid::{self, Gid, GidEntry},
    library::Library,
    memory::{Access, Pd, Region, Source},
    qp::At,
    server::Lanes,
};
use crate::{
    config::VerbsConfig,
    memory::{FenceWords, Memory},
};

/// How long a rail that failed is left out while others work.
const LEFT_OUT: Duration = Duration::from_secs(1);
/// Longest wait before a rail whose memory could not be registered is tried again: pinning a large pool takes seconds, and
/// what was in its way is rarely gone soon.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

/// What the pool is registered for.
#[derive(Debug, Clone)]
pub enum Role {
    /// Blocks land in it.
    Reader,
    /// It is read, and so are these words.
    Served(Arc<FenceWords>),
}

/// The pool's registrations on one rail.
#[derive(Debug)]
pub(crate) struct Pool {
    /// `None`: an empty segment, of which there is nothing to register.
    pub segments: Vec<Option<Region<Memory>>>,
    pub words: Option<Region<Arc<FenceWords>>>,
}

/// What came of a rail so far: by itself, and towards each host.
#[derive(Debug, Default)]
struct Past {
    failed: Option<Instant>,
    hosts: HashMap<IpAddr, Towards>,
}

/// How a rail got on with a host.
#[derive(Debug, Default)]
struct Towards {
    failed: Option<Instant>,
    reached: bool,
}

/// Hosts that a rail remembers.
const HOSTS: usize = 1024;

impl Past {
    fn towards(&mut self, host: IpAddr) -> &mut Towards {
        if self.hosts.len() >= HOSTS && !self.hosts.contains_key(&host) {
            self.hosts.clear();
        }
        self.hosts.entry(host).or_default()
    }
}

/// One rail.
#[derive(Debug)]
pub struct Rail {
    name: String,
    port: u8,
    /// Once the pool is registered, until it is withdrawn. Dropped before the domain.
    pool: Mutex<Option<Arc<Pool>>>,
    _watch: Option<Watch>,
    pd: Arc<Pd>,
    state: Arc<State>,
    limits: Limits,
    past: Mutex<Past>,
    /// Its pool is being registered, or was, or could not be: once is enough.
    asked: AtomicBool,
    /// Who keeps it open between lanes.
    keeper: Arc<OnceLock<Weak<Rails>>>,
}

impl Rail {
    /// Opens a rail. Fails when its port is not up.
    fn open(lib: &'static Library, name: &str) -> Result<Arc<Self>, VerbsError> {
        let (dev, port) = split(name)?;
        Self::on(Device::open(lib, dev)?, port, true)
    }

    /// A rail on a device that is open.
    pub(crate) fn on(device: Arc<Device>, port: u8, watch: bool) -> Result<Arc<Self>, VerbsError> {
        let limits = device.limits()?;
        if port > limits.ports {
            return Err(VerbsError::NoSuchPort { device: device.name().into(), port, ports: limits.ports });
        }
        let (state, keeper) = (Arc::<State>::default(), Arc::<OnceLock<Weak<Rails>>>::default());
        let watch = match watch {
            true => {
                let keeper = keeper.clone();
                let died = move || let_go(&keeper);
                let watch = Watch::start(device.clone(), state.clone(), died);
                Some(watch.map_err(|e| device.os("cannot watch the device", e))?)
            }
            false => None,
        };
        let name = format!("{}:{port}", device.name());
        let pd = Pd::new(device)?;
        let (pool, past, asked) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        let rail = Self { name, port, pool, _watch: watch, pd, state, limits, past, asked, keeper };
        rail.up()?;
        Ok(Arc::new(rail))
    }

    /// DEVICE:PORT.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The domain.
    pub fn pd(&self) -> &Arc<Pd> {
        &self.pd
    }

    /// What the device can do.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Tells everybody who holds its device to let go of it: lanes when they look next, whoever keeps it between lanes soon.
    pub(crate) fn condemn(&self) {
        self.state.condemn();
        let_go(&self.keeper);
    }

    /// The registered pool.
    pub(crate) fn pool(&self) -> Option<Arc<Pool>> {
        lock(&self.pool).clone()
    }

    #[cfg(test)]
    pub(crate) fn put_pool(&self, pool: Option<Arc<Pool>>) {
        *lock(&self.pool) = pool;
    }

    /// Its port, which must be up.
    pub fn up(&self) -> Result<(Port, LinkLayer), VerbsError> {
        let device = self.pd.device();
        let port = device.port(self.port)?;
        let name = device.name().to_owned();
        if !port.active {
            return Err(VerbsError::PortDown { device: name, port: self.port, state: port.state });
        }
        match port.link_layer {
            Some(layer) => Ok((port, layer)),
            None => Err(VerbsError::LinkLayer { device: name, port: self.port }),
        }
    }

    /// Its GIDs.
    pub fn gids(&self) -> Vec<GidEntry> {
        self.pd.device().gids(self.port)
    }

    /// The GID to use towards a peer, and how queue pairs say where they are.
    pub(crate) fn address(
        &self,
        port: &Port,
        layer: LinkLayer,
        peer: Option<&Gid>,
        config: &VerbsConfig,
    ) -> Result<(Gid, At), VerbsError> {
        let table = self.gids();
        let device = || self.pd.device().name().to_owned();
        let entry = match config.gid_index {
            Some(index) => {
                let found = table.iter().find(|e| e.index == index);
                Some(found.ok_or_else(|| VerbsError::BadGid {
                    device: device(),
                    port: self.port,
                    index: index.into(),
                })?)
            }
            None if layer == LinkLayer::Ethernet => {
                let found = gid::choose(&table, peer).or_else(|| gid::choose(&table, None));
                Some(found.ok_or_else(|| VerbsError::NoGid { device: device(), port: self.port })?)
            }
            // InfiniBand: by LID in one subnet; the first GID says which subnet it is.
            None => table.first(),
        };
        let gid = entry.map(|e| e.gid).unwrap_or_default();
        let global = layer == LinkLayer::Ethernet
            || port.grh_required
            || config.gid_index.is_some()
            || peer.is_some_and(|p| p.0[..8] != gid.0[..8]);
        Ok((gid, At { port: self.port, gid_index: entry.filter(|_| global).map(|e| e.index) }))
    }

    /// Something failed on it: it is left out for a while, towards this host, or towards all if no host has to do with it.
    pub(crate) fn failed(&self, host: Option<IpAddr>) {
        let mut past = lock(&self.past);
        let now = Some(Instant::now());
        match host {
            Some(host) => past.towards(host).failed = now,
            None => past.failed = now,
        }
    }

    fn left_out(&self, host: Option<IpAddr>) -> bool {
        let past = lock(&self.past);
        let towards = host.and_then(|h| past.hosts.get(&h)?.failed);
        [past.failed, towards].into_iter().flatten().any(|at| at.elapsed() < LEFT_OUT)
    }

    /// A lane to this host was connected over it.
    pub(crate) fn reaches(&self, host: Option<IpAddr>) {
        if let Some(host) = host {
            lock(&self.past).towards(host).reached = true;
        }
    }

    /// Whether one was, at some time.
    pub(crate) fn has_reached(&self, host: Option<IpAddr>) -> bool {
        host.is_some_and(|h| lock(&self.past).hosts.get(&h).is_some_and(|t| t.reached))
    }

    fn register(&self, memory: &Memory, role: &Role, relaxed: bool, done: &AtomicU64) -> Result<(), VerbsError> {
        let access = match role {
            Role::Reader => Access::Landing { relaxed },
            Role::Served(_) => Access::Exported { relaxed },
        };
        let mut segments = Vec::with_capacity(memory.segments().len());
        if let Some(&bytes) =
            memory.segments().iter().find(|&&len| len > self.limits.max_region && self.limits.max_region > 0)
        {
            let (device, most) = (self.pd.device().name().into(), self.limits.max_region);
            return Err(VerbsError::TooLarge { device, bytes, most });
        }
        // What one that fails has counted is taken back.
        let mut counted = Counted { done, bytes: 0 };
        for (i, &len) in memory.segments().iter().enumerate() {
            if len == 0 {
                segments.push(None);
                continue;
            }
            let base = memory.at(i as u16, 0, len).map_err(|e| self.pd.device().os("memory", e))?;
            // SAFETY: the segment is valid as long as a clone of the memory lives, and devices may touch it: see
            // `Memory::from_raw`.
            let region = unsafe { Region::register(&self.pd, Source::Address { base, len }, access, memory.clone()) };
            segments.push(Some(region?));
            counted.add(len);
        }
        let words = match role {
            Role::Reader => None,
            Role::Served(words) => {
                let base = NonNull::new(words.address() as *mut u8).unwrap_or(NonNull::dangling());
                let len = u64::from(words.len()) * 8;
                // Never in relaxed order: a word must not be read before what it vouches for.
                let access = Access::Exported { relaxed: false };
                // SAFETY: the words stay mapped as long as `words` is held, and are only read.
                let region =
                    unsafe { Region::register(&self.pd, Source::Address { base, len }, access, words.clone()) };
                Some(region?)
            }
        };
        counted.bytes = 0;
        *lock(&self.pool) = Some(Arc::new(Pool { segments, words }));
        Ok(())
    }
}

/// Bytes that one registration has added to the progress of all; taken back when it is dropped before it succeeded.
struct Counted<'a> {
    done: &'a AtomicU64,
    bytes: u64,
}

impl Counted<'_> {
    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.done.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Has whoever keeps rails open let go of those that are dead.
fn let_go(keeper: &OnceLock<Weak<Rails>>) {
    if let Some(keeper) = keeper.get().and_then(Weak::upgrade) {
        // On a thread of its own: the list is locked while a device is opened.
        super::wake::undertake("kvferry-condemn", move || keeper.let_go());
    }
}

/// The rails that are named, or all of this host.
fn names(config: &VerbsConfig) -> Result<Vec<String>, VerbsError> {
    // What is no name at all is a slip of the pen; a device that is not there may be one that died.
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

/// DEVICE or DEVICE:PORT.
fn split(name: &str) -> Result<(&str, u8), VerbsError> {
    let bad = || VerbsError::BadRail { name: name.into() };
    match name.split_once(':') {
        _ if name.is_empty() => Err(bad()),
        None => Ok((name, 1)),
        Some((dev, port)) => match port.parse() {
            Ok(port @ 1..) if !dev.is_empty() => Ok((dev, port)),
            _ => Err(bad()),
        },
    }
}

/// All rails of a rank in one role.
#[derive(Debug)]
pub struct Rails {
    lib: &'static Library,
    config: VerbsConfig,
    memory: Memory,
    role: Role,
    list: Mutex<Vec<Slot>>,
    /// What is served through them.
    served: OnceLock<Weak<Lanes>>,
    done: AtomicU64,
    all: AtomicU64,
}

/// A rail's place in the list.
#[derive(Debug)]
struct Slot {
    name: String,
    rail: Option<Arc<Rail>>,
    why_not: Option<String>,
    tried: Instant,
    /// How long after that it is tried again.
    wait: Duration,
    /// Its pool was registered at some time: its port was up, and it could be used.
    worked: bool,
}

impl Slot {
    fn new(name: String, rail: Option<Arc<Rail>>, why_not: Option<String>) -> Self {
        Self { name, rail, why_not, tried: Instant::now(), wait: LEFT_OUT, worked: false }
    }
}

impl Rails {
    /// Opens the rails that `config` names, or all that are up, and begins to register the memory on them in the
    /// background. At least one must be there; one whose link is down is used once it is up.
    pub fn open(config: &VerbsConfig, memory: Memory, role: Role) -> Result<Arc<Self>, VerbsError> {
        let lib = Library::get()?;
        let names = names(config)?;
        let (mut last, mut down) = (None, false);
        let mut list = Vec::with_capacity(names.len());
        for name in names {
            let (rail, why_not) = match Rail::open(lib, &name) {
                Ok(rail) => (Some(rail), None),
                Err(e) => {
                    let why = e.to_string();
                    down |= matches!(e, VerbsError::PortDown { .. });
                    last = Some(e);
                    (None, Some(why))
                }
            };
            list.push(Slot::new(name, rail, why_not));
        }
        let none = list.iter().all(|s| s.rail.is_none());
        if none && down {
            tracing::warn!(why = reasons(&list), "no rail can be used now: verbs lanes are made once a link is up");
        } else if none {
            return Err(match last {
                Some(e) if list.len() == 1 => e,
                _ => VerbsError::NoRail { why: reasons(&list) },
            });
        }
        if !none && !config.rails.is_empty() {
            for (s, why) in list.iter().filter_map(|s| Some((s, s.why_not.as_ref()?))) {
                tracing::warn!(rail = s.name, why, "a rail cannot be used: it is tried again later");
            }
        }
        let it = Self::with(lib, config, memory, role, list);
        it.register();
        Ok(it)
    }

    /// Whether a rail can be used at this moment, and those that `config` names are no slip; registers nothing. For
    /// commands whose user asked for verbs, and wants to hear of a slip before anything else is done.
    pub fn check(config: &VerbsConfig) -> Result<(), VerbsError> {
        let lib = Library::get()?;
        let one = |name: &String| {
            let (device, port) = split(name)?;
            let rail = Rail::on(Device::open(lib, device)?, port, false)?;
            let (port, layer) = rail.up()?;
            rail.address(&port, layer, None, config).map(drop)
        };
        let mut tried: Vec<_> = names(config)?.iter().map(one).collect();
        // A slip is one whatever the other rails do; a link that is down is what the others are for.
        let slip = |t: &Result<(), VerbsError>| matches!(t, Err(e) if !matches!(e, VerbsError::PortDown { .. }));
        if let Some(i) = tried.iter().position(slip).filter(|_| !config.rails.is_empty()) {
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

    fn with(lib: &'static Library, config: &VerbsConfig, memory: Memory, role: Role, list: Vec<Slot>) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            for rail in list.iter().filter_map(|s| s.rail.as_ref()) {
                rail.keeper.get_or_init(|| this.clone());
            }
            Self {
                lib,
                config: config.clone(),
                memory,
                role,
                list: Mutex::new(list),
                served: OnceLock::new(),
                done: AtomicU64::new(0),
                all: AtomicU64::new(0),
            }
        })
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
            rail.register(&it.memory, &it.role, config.relaxed_ordering, &it.done)?;
            it.slot_of(&rail, |s| s.worked = true);
        }
        Ok(it)
    }

    /// As if a rail's pool were not registered yet; what it is registered as.
    #[cfg(test)]
    pub(crate) fn not_yet(&self, rail: &Arc<Rail>) -> Option<Arc<Pool>> {
        self.slot_of(rail, |s| s.worked = false);
        lock(&rail.pool).take()
    }

    /// The settings.
    pub fn config(&self) -> &VerbsConfig {
        &self.config
    }

    /// The memory that is registered.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    fn open_rails(&self) -> Vec<Arc<Rail>> {
        lock(&self.list).iter().filter_map(|s| s.rail.clone()).collect()
    }

    /// Registers what is not registered, on a thread of its own: pinning 100 GB takes seconds.
    fn register(self: &Arc<Self>) {
        // One that is at it already stays at it: another registration would take its keys from under living lanes.
        let rails: Vec<_> = self.open_rails().into_iter().filter(|r| !r.asked.swap(true, Ordering::AcqRel)).collect();
        let bytes: u64 = self.memory.segments().iter().sum();
        self.all.fetch_add(bytes * rails.len() as u64, Ordering::Relaxed);
        let weak: Weak<Self> = Arc::downgrade(self);
        super::wake::undertake("kvferry-register", move || {
            for rail in rails {
                let Some(this) = weak.upgrade() else { return };
                let began = Instant::now();
                match rail.register(&this.memory, &this.role, this.config.relaxed_ordering, &this.done) {
                    Ok(()) => {
                        tracing::info!(rail = rail.name(), bytes, took = ?began.elapsed(), "pool registered");
                        this.slot_of(&rail, |s| (s.wait, s.worked) = (LEFT_OUT, true));
                    }
                    Err(error) => {
                        tracing::warn!(rail = rail.name(), %error, "the pool cannot be registered: this rail is not used");
                        this.all.fetch_sub(bytes, Ordering::Relaxed);
                        this.slot_of(&rail, |s| {
                            s.rail = None;
                            s.why_not = Some(error.to_string());
                            (s.tried, s.wait) = (Instant::now(), (s.wait * 2).min(REGISTER_AGAIN));
                        });
                    }
                }
            }
        });
    }

    /// Gives all registrations back, for good: whoever still reads through a queue pair gets an error from now on. Lanes of
    /// this side keep theirs until they are quiet.
    pub fn withdraw(&self) {
        for s in lock(&self.list).iter_mut() {
            if let Some(rail) = s.rail.take() {
                lock(&rail.pool).take();
            }
            s.why_not = Some("its memory was withdrawn".into());
            s.wait = Duration::MAX;
        }
    }

    /// Changes a rail's place in the list, if it still has one.
    fn slot_of(&self, rail: &Arc<Rail>, change: impl FnOnce(&mut Slot)) {
        let mut list = lock(&self.list);
        if let Some(s) = list.iter_mut().find(|s| s.rail.as_ref().is_some_and(|r| Arc::ptr_eq(r, rail))) {
            change(s);
        }
    }

    /// Bytes registered, and bytes to register, over all rails.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.all.load(Ordering::Relaxed))
    }

    /// The rails that can be used now, each with its port. Those that failed a moment ago, by themselves or towards this
    /// host, only where no other is left.
    pub(crate) fn usable(
        self: &Arc<Self>,
        host: Option<IpAddr>,
    ) -> Result<Vec<(Arc<Rail>, Port, LinkLayer)>, VerbsError> {
        self.reopen();
        let (mut good, mut left_out, mut why, mut waiting) = (Vec::new(), Vec::new(), Vec::new(), false);
        for rail in self.open_rails() {
            if rail.pool().is_none() {
                waiting = true;
                continue;
            }
            match rail.up() {
                Ok((port, layer)) if rail.left_out(host) => left_out.push((rail, port, layer)),
                Ok((port, layer)) => good.push((rail, port, layer)),
                Err(e) => why.push(e.to_string()),
            }
        }
        if good.is_empty() {
            good = left_out;
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

    /// How many rails a lane may have, soon or again: those that could be used at some time, and those whose pool is being
    /// registered. A port that never had a link is not missed.
    pub(crate) fn to_be_had(&self) -> usize {
        let registering = |s: &Slot| s.rail.as_ref().is_some_and(|r| r.pool().is_none());
        lock(&self.list).iter().filter(|s| s.worked || registering(s)).count().min(MAX_RAILS)
    }

    /// Lets go of rails whose device failed, or must be closed. Their lanes hold them until they are quiet.
    fn let_go(&self) {
        let mut any = false;
        for s in lock(&self.list).iter_mut().filter(|s| s.rail.as_ref().is_some_and(|r| r.state().fatal())) {
            (s.rail, any) = (None, true);
            s.why_not = Some("the device failed".into());
        }
        if any && let Some(lanes) = self.served.get().and_then(Weak::upgrade) {
            lanes.let_go();
        }
    }

    /// These lanes are served through them: they are to let go of what dies, too.
    pub(crate) fn serves(&self, lanes: &Arc<Lanes>) {
        self.served.get_or_init(|| Arc::downgrade(lanes));
    }

    /// Opens rails again that failed or died, now and then.
    fn reopen(self: &Arc<Self>) {
        self.let_go();
        let mut opened = false;
        for s in lock(&self.list).iter_mut() {
            if s.rail.is_none() && s.tried.elapsed() >= s.wait {
                s.tried = Instant::now();
                match Rail::open(self.lib, &s.name) {
                    Ok(rail) => {
                        rail.keeper.get_or_init(|| Arc::downgrade(self));
                        (s.rail, s.why_not, opened) = (Some(rail), None, true);
                    }
                    Err(e) => s.why_not = Some(e.to_string()),
                }
            }
        }
        if opened {
            self.register();
        }
    }
}

fn reasons(list: &[Slot]) -> String {
    let why: Vec<_> = list.iter().filter_map(|s| Some(format!("{}: {}", s.name, s.why_not.as_ref()?))).collect();
    why.join("; ")
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every value here is whole at any time.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_towards_a_host_is_no_other_hosts_matter() {
        let mut past = Past::default();
        let host = |n| IpAddr::from([10, 0, (n >> 8) as u8, n as u8]);
        past.towards(host(1)).failed = Some(Instant::now());
        assert!(past.towards(host(2)).failed.is_none() && past.failed.is_none());
        (0..5000).for_each(|n| past.towards(host(n)).reached = true);
        assert!(past.hosts.len() <= HOSTS, "what peers say takes no memory without end");
    }

    #[test]
    fn a_rail_is_a_device_and_a_port() {
        assert_eq!(split("mlx5_0").unwrap(), ("mlx5_0", 1));
        assert_eq!(split("mlx5_0:2").unwrap(), ("mlx5_0", 2));
        for bad in ["", ":1", "a:", "a:0", "a:x", "a:300"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
