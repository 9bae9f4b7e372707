//! A rail: a port of a device that is open, addressed, and has the pool registered.
//!
//! Owns the device that it opened, one protection domain on it, and the registrations of the pool, which all lanes share.
//! Remembers how it got on with each host, so that one that failed is left out for a while.

use std::{
    collections::HashMap,
    net::IpAddr,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    device::{Device, Limits, Port},
    error::VerbsError,
    events::{State, Watch},
    exchange::LinkLayer,
    gid::{self, Gid, GidEntry},
    library::Library,
    memory::{Access, Pd, Region, Source},
    qp::At,
    rails::Rails,
};
use crate::{
    config::VerbsConfig,
    memory::{FenceWords, Memory},
};

/// How long a rail that failed is left out while others work.
pub(super) const LEFT_OUT: Duration = Duration::from_secs(1);

/// What the pool is registered for.
#[derive(Debug, Clone)]
pub(crate) enum Role {
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
pub(crate) struct Rail {
    name: String,
    port: u8,
    /// Once the pool is registered, until it is withdrawn. Dropped before the domain.
    pub(super) pool: Mutex<Option<Arc<Pool>>>,
    _watch: Option<Watch>,
    pd: Arc<Pd>,
    state: Arc<State>,
    limits: Limits,
    past: Mutex<Past>,
    /// Its pool is being registered, or was, or could not be: once is enough.
    pub(super) asked: AtomicBool,
    /// Who keeps it open between lanes.
    pub(super) keeper: Arc<OnceLock<Weak<Rails>>>,
}

impl Rail {
    /// Opens a rail. Fails when its port is not up.
    pub(super) fn open(lib: &'static Library, name: &str) -> Result<Arc<Self>, VerbsError> {
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
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The domain.
    pub(crate) fn pd(&self) -> &Arc<Pd> {
        &self.pd
    }

    /// What the device can do.
    pub(crate) fn limits(&self) -> &Limits {
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
    pub(crate) fn up(&self) -> Result<(Port, LinkLayer), VerbsError> {
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
    pub(crate) fn gids(&self) -> Vec<GidEntry> {
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

    pub(super) fn left_out(&self, host: Option<IpAddr>) -> bool {
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

    /// Registers the pool, and adds what it has registered so far to `done`.
    pub(super) fn register(
        &self,
        memory: &Memory,
        role: &Role,
        relaxed: bool,
        done: &AtomicU64,
    ) -> Result<(), VerbsError> {
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

/// DEVICE or DEVICE:PORT.
pub(super) fn split(name: &str) -> Result<(&str, u8), VerbsError> {
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

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
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
