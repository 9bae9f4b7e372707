//! All rails of a rank in one role: which are named or found, which can be used now, and which are tried again later.
//!
//! Owns the list of rails. Their pools are registered once, in the background; one that cannot be used, or died, is opened
//! again now and then.

use std::{
    net::IpAddr,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

#[cfg(test)]
use super::rail::Pool;
use super::{
    device::{self, Device, Port, SYS},
    error::VerbsError,
    exchange::{LinkLayer, MAX_RAILS},
    library::Library,
    rail::{LEFT_OUT, Rail, Role, lock, split},
    server::Lanes,
};
use crate::{config::VerbsConfig, memory::Memory};

/// Longest wait before a rail whose memory could not be registered is tried again: pinning a large pool takes seconds, and
/// what was in its way is rarely gone soon.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

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

/// All rails of a rank in one role.
#[derive(Debug)]
pub(crate) struct Rails {
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
    pub(crate) fn open(config: &VerbsConfig, memory: Memory, role: Role) -> Result<Arc<Self>, VerbsError> {
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
    pub(crate) fn check(config: &VerbsConfig) -> Result<(), VerbsError> {
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
    #[cfg(test)]
    pub(crate) fn withdraw(&self) {
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
    pub(crate) fn progress(&self) -> (u64, u64) {
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
    pub(super) fn let_go(&self) {
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
