//! A rail: a port of an open device, with its address, on which the pool is registered.
//!
//! Owns the open device, one protection domain on it, and the registrations of the pool, which all lanes share. Records
//! failures by host, so that a rail that failed is avoided for a while.

use std::{
    collections::HashMap,
    net::IpAddr,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvferry_proto::retry::Backoff;

use super::{
    device::{Device, Limits, Port},
    error::VerbsError,
    events::{State, Watch},
    exchange::LinkLayer,
    gid::{self, Gid, GidEntry},
    gpu::{self, Dmabufs},
    library::Library,
    memory::{Access, Pd, Region, Source},
    qp::At,
};
use crate::{
    config::VerbsConfig,
    memory::{FenceWords, Memory},
};

/// How long a rail that failed is avoided while others work, and the first wait before a rail is opened again.
pub(super) const AVOIDED: Duration = Duration::from_secs(1);

/// The purpose for which the pool is registered.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    /// Blocks are read into it.
    Reader,
    /// Peers read it, and these words.
    Served(Arc<FenceWords>),
}

impl Role {
    /// The device's access to the pool.
    pub(super) fn access(&self, relaxed: bool) -> Access {
        match self {
            Self::Reader => Access::Landing { relaxed },
            Self::Served(_) => Access::Exported { relaxed },
        }
    }
}

/// The pool's registrations on one rail.
#[derive(Debug)]
pub(crate) struct Pool {
    /// `None`: an empty segment, which is not registered.
    pub segments: Vec<Option<Region<Memory>>>,
    pub words: Option<Region<Arc<FenceWords>>>,
}

/// The failures of a rail: by itself, and towards each host.
#[derive(Debug, Default)]
struct History {
    own: Failures,
    hosts: HashMap<IpAddr, Towards>,
}

/// The history of a rail with one host.
#[derive(Debug, Default)]
struct Towards {
    failures: Failures,
    reached: bool,
}

/// When a rail that failed may be used again.
#[derive(Debug)]
struct Failures {
    until: Option<Instant>,
    backoff: Backoff,
}

impl Default for Failures {
    fn default() -> Self {
        // The wait does not grow: a lane that finds no other rail uses this one anyway.
        Self { until: None, backoff: Backoff::new(AVOIDED, AVOIDED) }
    }
}

impl Failures {
    fn add(&mut self) {
        self.until = Some(Instant::now() + self.backoff.wait());
    }

    fn recent(&self) -> bool {
        self.until.is_some_and(|t| Instant::now() < t)
    }
}

/// Most hosts in a rail's history.
const HOSTS: usize = 1024;

impl History {
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
    history: Mutex<History>,
    /// The registration of its pool was begun. It is never begun twice.
    pub(super) asked: AtomicBool,
}

impl Rail {
    /// Opens a rail. Fails when its port is not up.
    pub(super) fn open(lib: &'static Library, name: &str) -> Result<Arc<Self>, VerbsError> {
        let (dev, port) = split(name)?;
        Self::on(Device::open(lib, dev)?, port, true)
    }

    /// A rail on an open device.
    pub(crate) fn on(device: Arc<Device>, port: u8, watch: bool) -> Result<Arc<Self>, VerbsError> {
        let limits = device.limits()?;
        if port > limits.ports {
            return Err(VerbsError::NoSuchPort { device: device.name().into(), port, ports: limits.ports });
        }
        let state = Arc::<State>::default();
        let watch = match watch {
            true => {
                let watch = Watch::start(device.clone(), state.clone());
                Some(watch.map_err(|e| device.os("cannot watch the device", e))?)
            }
            false => None,
        };
        let name = format!("{}:{port}", device.name());
        let pd = Pd::new(device)?;
        let (pool, history, asked) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        let rail = Self { name, port, pool, _watch: watch, pd, state, limits, history, asked };
        rail.up()?;
        Ok(Arc::new(rail))
    }

    /// DEVICE:PORT.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The protection domain.
    pub(crate) fn pd(&self) -> &Arc<Pd> {
        &self.pd
    }

    /// The device's limits.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The state of the device. An owner of the rail subscribes to it, to release the rail when the device has failed.
    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
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

    /// The GID to use towards a peer, and the local address of queue pairs.
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
            // InfiniBand: by LID in one subnet; the first GID names the subnet.
            None => table.first(),
        };
        let gid = entry.map(|e| e.gid).unwrap_or_default();
        let global = layer == LinkLayer::Ethernet
            || port.grh_required
            || config.gid_index.is_some()
            || peer.is_some_and(|p| p.0[..8] != gid.0[..8]);
        Ok((gid, At { port: self.port, gid_index: entry.filter(|_| global).map(|e| e.index) }))
    }

    /// It failed: it is avoided for a while, towards this host, or towards all hosts if the failure has none.
    pub(crate) fn failed(&self, host: Option<IpAddr>) {
        let mut history = lock(&self.history);
        match host {
            Some(host) => history.towards(host).failures.add(),
            None => history.own.add(),
        }
    }

    /// Whether it failed a moment ago, by itself or towards this host.
    pub(super) fn is_avoided(&self, host: Option<IpAddr>) -> bool {
        let history = lock(&self.history);
        history.own.recent() || host.and_then(|h| history.hosts.get(&h)).is_some_and(|t| t.failures.recent())
    }

    /// A lane to this host was connected over it.
    pub(crate) fn reaches(&self, host: Option<IpAddr>) {
        if let Some(host) = host {
            lock(&self.history).towards(host).reached = true;
        }
    }

    /// Whether a lane to this host was ever connected over it.
    pub(crate) fn has_reached(&self, host: Option<IpAddr>) -> bool {
        host.is_some_and(|h| lock(&self.history).hosts.get(&h).is_some_and(|t| t.reached))
    }

    /// Registers the pool, and adds the bytes that it has registered so far to `done`.
    pub(super) fn register(
        &self,
        memory: &Memory,
        role: &Role,
        relaxed: bool,
        dmabufs: &Dmabufs,
        done: &AtomicU64,
    ) -> Result<(), VerbsError> {
        // Whether a flush covers writes in relaxed order is an open question (NCCL #2439).
        let access = role.access(relaxed && memory.gpu().is_none());
        let mut segments = Vec::with_capacity(memory.segments().len());
        if let Some(&bytes) =
            memory.segments().iter().find(|&&len| len > self.limits.max_region && self.limits.max_region > 0)
        {
            let (device, most) = (self.pd.device().name().into(), self.limits.max_region);
            return Err(VerbsError::TooLarge { device, bytes, most });
        }
        // A registration that fails subtracts its bytes again.
        let mut counted = Counted { done, bytes: 0 };
        for (i, &len) in memory.segments().iter().enumerate() {
            if len == 0 {
                segments.push(None);
                continue;
            }
            let region = match memory.gpu() {
                Some(gpu) => {
                    let part = gpu::Part { gpu, memory, segment: i, len };
                    gpu::register(&self.pd, part, access, dmabufs)?
                }
                None => {
                    let base = memory.at(i as u16, 0, len).map_err(|e| self.pd.device().os("memory", e))?;
                    let source = Source::Address { base, len };
                    // SAFETY: the segment is valid as long as a clone of the memory lives, and devices may touch it: see
                    // `Memory::from_raw`.
                    unsafe { Region::register(&self.pd, source, access, memory.clone()) }?
                }
            };
            segments.push(Some(region));
            counted.add(len);
        }
        let words = match role {
            Role::Reader => None,
            Role::Served(words) => {
                let base = NonNull::new(words.address() as *mut u8).unwrap_or(NonNull::dangling());
                let len = u64::from(words.len()) * 8;
                // Never in relaxed order: a word must not be read before the data that it vouches for.
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

/// Bytes that one registration has added to the progress of all; subtracted when it is dropped before it succeeded.
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
    // Every value behind these locks is consistent after any panic.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_towards_one_host_counts_for_no_other_host() {
        let mut history = History::default();
        let host = |n| IpAddr::from([10, 0, (n >> 8) as u8, n as u8]);
        history.towards(host(1)).failures.add();
        assert!(history.towards(host(1)).failures.recent());
        assert!(!history.towards(host(2)).failures.recent() && !history.own.recent());
        (0..5000).for_each(|n| history.towards(host(n)).reached = true);
        assert!(history.hosts.len() <= HOSTS, "the memory that peers can make it use is bounded");
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
