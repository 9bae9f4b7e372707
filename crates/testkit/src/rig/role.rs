//! The work of a producer process.

use std::{
    collections::{HashMap, HashSet},
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use kvferry::{
    BlockId, Config, GroupId, LaneKind, Memory, OfferGroup, OfferId, OfferSpec, PoolLayout, Producer, Ready, SealKey,
};

use super::{
    producer::{Heard, ROLE, Say},
    spec::{Spec, tls},
    taken,
};
use crate::pattern;

/// The one group of an offer of these blocks.
fn groups(blocks: &[u32]) -> Vec<OfferGroup> {
    let blocks = blocks.iter().map(|b| Some(BlockId(*b))).collect();
    vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }]
}

fn when(ready: bool) -> Ready {
    if ready { Ready::Now } else { Ready::Later }
}

#[cfg(feature = "gpu")]
pub(super) fn pool_on_gpu(layout: &PoolLayout) -> Memory {
    crate::gpu::memory(layout)
}

#[cfg(not(feature = "gpu"))]
pub(super) fn pool_on_gpu(_: &PoolLayout) -> Memory {
    panic!("this build has no GPU memory in tests")
}

/// Writes the KV of another request into a block.
fn overwrite(memory: &Memory, layout: &PoolLayout, block: u32) {
    for r in &layout.groups[0].regions {
        let other = vec![0xEE; r.block_bytes as usize];
        memory.write_from(r.segment, r.block_offset(block), &other).expect("in the pool");
    }
}

/// An open offer of a producer process.
struct Open {
    blocks: Vec<u32>,
    listed: usize,
    computed: usize,
    filled: bool,
}

impl Open {
    /// Computes blocks, and grows the offer. Blocks may be listed before they are computed.
    fn grow(&mut self, producer: &Producer, offer: OfferId, listed: usize, tokens: u64) {
        let (seed, group) = (producer.me().incarnation.get(), &producer.layout().groups[0]);
        let computed = (tokens / 16) as usize;
        for block in self.blocks[self.computed..computed.max(self.computed)].iter().filter(|_| !self.filled) {
            pattern::write_block(seed, producer.memory(), group, *block).expect("in the pool");
        }
        self.computed = self.computed.max(computed);
        let listed = listed.clamp(self.listed, self.blocks.len());
        let blocks = self.blocks[self.listed..listed].iter().map(|b| Some(BlockId(*b))).collect();
        let list = OfferGroup { group: GroupId(0), first_position: self.listed as u32, blocks };
        self.listed = listed;
        // The test's consumer may have ended it.
        let _ = producer.grow(offer, vec![list], tokens, Ready::Now);
    }
}

/// Does the work of a producer if this process was started as one, and then does not return. Tests call it in a test
/// named `role`, benchmarks at the start of `main`.
pub fn play() {
    let Ok(spec) = std::env::var(ROLE) else { return };
    let spec: Spec = serde_json::from_str(&spec).expect("a spec");
    let started = Instant::now();
    let layout = spec.layout();
    let memory = if spec.gpu {
        Ok(pool_on_gpu(&layout))
    } else if spec.engine_memory {
        Memory::anonymous(&layout.segments)
    } else {
        Memory::alloc(&layout.segments)
    };
    let mut config = Config::default();
    config.lease.unclaimed = Duration::from_millis(spec.unclaimed_ms);
    config.lease.claimed = Duration::from_millis(spec.claimed_ms);
    config.lease.hard_cap = Duration::from_millis(spec.hard_cap_ms);
    config.lease.early_grace = Duration::from_millis(spec.early_grace_ms);
    config.verbs.rails = spec.rails.clone();
    if let Some(n) = spec.sessions_per_peer {
        (config.limits.sessions_per_peer, config.limits.connections_per_peer) = (n, 2 * n);
    }
    config.names.seal_keys = spec.seal.iter().map(|k| SealKey::new(k.as_bytes()).expect("a key")).collect();
    config.tcp.checksum = spec.checksum;
    config.tls = tls();
    let lanes = [(spec.local, LaneKind::Local), (spec.tcp, LaneKind::Tcp), (!spec.rails.is_empty(), LaneKind::Verbs)];
    let mut builder = Producer::builder(spec.engine.parse().expect("an id"), spec.kv_model(), layout.clone())
        .memory(memory.expect("memory"))
        .listen(spec.listen.clone())
        .lanes(lanes.iter().filter(|(on, _)| *on).map(|(_, l)| *l).collect())
        .fill(|me, memory| pattern::write(me.incarnation.get(), memory))
        .config(config);
    if spec.listen.starts_with("0.0.0.0:") {
        builder = builder.advertise("127.0.0.1:0");
    }
    let producer = builder.build().expect("a producer starts");
    let seed = producer.me().incarnation.get();
    let tell = |h: &Heard| println!("@@{}", serde_json::to_string(h).expect("JSON"));
    tell(&Heard::Up { addr: producer.addr().into(), incarnation: producer.me().incarnation.to_string(), seed });
    let mut offered: HashMap<OfferId, Vec<u32>> = HashMap::new();
    let mut open: HashMap<OfferId, Open> = HashMap::new();
    let mut reuse = false;
    let mut revoked = HashSet::new();
    let (tx, said) = channel::<Say>();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if let Ok(say) = serde_json::from_str(&line)
                && tx.send(say).is_err()
            {
                return;
            }
        }
        // The test has ended, and nothing else needs this process.
        std::process::exit(0);
    });
    // An engine's loop.
    loop {
        match said.recv_timeout(Duration::from_millis(spec.step_ms)) {
            Ok(Say::Offer { blocks, ready }) => {
                let tokens = blocks.len() as u64 * 16;
                let prompt = [("prompt".to_owned(), format!("{:?}", blocks.first()))].into();
                let spec = OfferSpec::new(tokens, groups(&blocks)).request("test").fingerprints(prompt);
                let made = producer.offer(spec, when(ready)).map_err(|e| e.to_string());
                if let Ok(o) = &made {
                    offered.insert(o.id, blocks.clone());
                }
                tell(&Heard::Offered(made.map(|o| (o, blocks))));
            }
            Ok(Say::Enter { name, blocks, ready }) => {
                let made = producer.enter(&name, groups(&blocks), when(ready)).map_err(|e| e.to_string());
                offered.insert(name.id, blocks.clone());
                tell(&Heard::Offered(made.map(|()| (name, blocks))));
            }
            Ok(Say::Open { name, blocks, filled }) => {
                blocks.iter().filter(|_| !filled).for_each(|b| overwrite(producer.memory(), &layout, *b));
                let made = match name {
                    Some(name) => producer.enter_open(&name).map(|()| name),
                    None => producer.open(OfferSpec::new(blocks.len() as u64 * 16, Vec::new()).request("test")),
                };
                if let Ok(o) = &made {
                    offered.insert(o.id, blocks.clone());
                    open.insert(o.id, Open { blocks: blocks.clone(), listed: 0, computed: 0, filled });
                }
                tell(&Heard::Offered(made.map(|o| (o, blocks)).map_err(|e| e.to_string())));
            }
            Ok(Say::Grow { offer, listed, tokens }) => {
                open.get_mut(&offer).expect("it is open").grow(&producer, offer, listed, tokens);
            }
            Ok(Say::Finish(offer)) => {
                let open = open.get_mut(&offer).expect("it is open");
                let (all, tokens) = (open.blocks.len(), open.blocks.len() as u64 * 16);
                open.grow(&producer, offer, all, tokens);
                let _ = producer.finish(offer, tokens);
            }
            Ok(Say::Ready(id)) => producer.ready(id),
            Ok(Say::Revoke(id)) => {
                revoked.insert(id);
                producer.revoke(id);
            }
            Ok(Say::ReuseAtOnce) => reuse = true,
            Ok(Say::Drain) => producer.drain(),
            Ok(Say::Count) => {
                let (offers, claims) = producer.live();
                tell(&Heard::Counted { offers, claims, sessions: producer.sessions() });
            }
            Ok(Say::Take(what)) => tell(&Heard::Taken(taken::take(what, producer.memory()))),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::process::exit(0),
        }
        while let Some(f) = producer.poll_freed() {
            if reuse || revoked.contains(&f.offer) {
                // The KV of another request.
                offered.get(&f.offer).into_iter().flatten().for_each(|b| overwrite(producer.memory(), &layout, *b));
            }
            tell(&Heard::Freed {
                offer: f.offer,
                why: format!("{:?}", f.why),
                at_us: started.elapsed().as_micros() as u64,
            });
        }
    }
}
