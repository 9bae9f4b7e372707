//! A running `kvferry serve`, as the other commands see it: its pool, offers of its blocks, and pulls of them.

use std::time::Duration;

use kvferry::{
    BlockId, Caller, Cause, Config, Consumer, Ended, EngineId, GroupId, LaneKind, LocalBlocks, Model, Offer,
    PoolLayout, Pull, PullId, Welcome,
};
use kvferry_testkit::pattern::Check;
use tokio::runtime::Runtime;

use crate::{
    offers,
    pool::MemoryRecord,
    report::{Ending, Failure},
};

/// One life of a `kvferry serve`.
pub(crate) struct Peer {
    addr: String,
    runtime: Runtime,
    pub welcome: Welcome,
    /// Where its pool lies; `None`: it has made no offer for this process, or does not say.
    pub memory: Option<MemoryRecord>,
}

impl Peer {
    /// Greets the producer at `addr`, which must answer within `limit`.
    pub(crate) fn probe(addr: &str, engine: &EngineId, model: &Model, limit: Duration) -> Result<Self, Failure> {
        Self::probe_listed(addr, engine, model, limit, &[])
    }

    /// The same if `addr` is among the hosts in `dial`; an empty list has all.
    pub(crate) fn probe_listed(
        addr: &str,
        engine: &EngineId,
        model: &Model,
        limit: Duration,
        dial: &[String],
    ) -> Result<Self, Failure> {
        let mut config = Config::default();
        config.session.hello_timeout = limit;
        config.dial = dial.to_vec();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let welcome =
            runtime.block_on(Caller::new(config).probe(addr, engine, model)).map_err(|e| Failure::dial(&e))?;
        Ok(Self { addr: addr.into(), runtime, welcome, memory: None })
    }

    /// A new offer of `blocks` scattered blocks (0: all) of `block_bytes` bytes (0: of its first group), made within `limit`.
    pub(crate) fn offer(&mut self, blocks: u32, block_bytes: u32, limit: Duration) -> Result<Offer, Failure> {
        let made = self.runtime.block_on(offers::make_offer(&self.addr, blocks, block_bytes, limit));
        let (offer, memory) = made?;
        if offer.incarnation != self.welcome.peer.incarnation {
            // The pattern and the layout of this one are unknown.
            let why = format!("{} restarted after its Hello: run the command again", self.addr);
            return Err(Failure::of(Ending::Unreachable, why));
        }
        self.memory = memory;
        Ok(offer)
    }

    /// The consumers' claims on the producer.
    pub(crate) fn usage(&self, limit: Duration) -> Result<offers::Usage, Failure> {
        self.runtime.block_on(offers::usage(&self.addr, limit))
    }

    /// A layout for `blocks` blocks of the shape that the producer's group has.
    pub(crate) fn local_layout(&self, group: GroupId, blocks: u32) -> Result<PoolLayout, Failure> {
        let group = self.welcome.pool.group(group);
        let mut group = group.ok_or_else(|| Failure::failed("the peer's pool lacks the offer's group"))?.clone();
        let mut offset = 0;
        group.blocks = blocks.max(1);
        for r in &mut group.regions {
            (r.segment, r.offset, r.stride) = (0, offset, r.block_bytes);
            offset = u64::from(group.blocks)
                .checked_mul(r.block_bytes)
                .and_then(|n| n.checked_add(offset))
                .ok_or_else(|| Failure::failed("the peer's blocks are too large for this machine"))?;
        }
        Ok(PoolLayout { segments: vec![offset], groups: vec![group] })
    }

    /// Compares the loaded blocks with the producer's pattern. Returns verified and mismatched bytes.
    pub(crate) fn verify(&self, ended: &Ended, consumer: &Consumer) -> Result<(u64, u64), Failure> {
        let seed = self.welcome.peer.incarnation.get();
        let (theirs, ours): (&PoolLayout, &PoolLayout) = (&self.welcome.pool, consumer.layout());
        let mut check = Check::new();
        let (mut good, mut bad) = (0, 0);
        let offered = ended.contents.as_ref().map_or(&[][..], |c| &c.groups);
        for (g, offered) in ended.outcome.groups.iter().zip(offered) {
            for position in g.loaded.iter() {
                let at = (position - offered.first_position) as usize;
                let Some(src) = offered.blocks[at] else { continue };
                let (ok, wrong) = check.block(seed, (theirs, src.0), (consumer.memory(), ours, position), g.group)?;
                good += ok;
                bad += wrong;
            }
        }
        Ok((good, bad))
    }
}

/// Starts a pull of an offer's first `blocks` positions into blocks of the same numbers, of a group whose blocks have
/// `block_bytes` bytes (0: the first group).
pub(crate) fn pull(
    consumer: &Consumer,
    (offer, block_bytes): (Offer, u64),
    blocks: u32,
    lanes: Vec<LaneKind>,
    deadline: Duration,
) -> Result<PullId, Failure> {
    let mut groups = consumer.layout().groups.iter();
    let group = groups.find(|g| block_bytes == 0 || g.block_bytes() == block_bytes).map(|g| g.id);
    let group = group.ok_or_else(|| Failure::failed("this side's pool has no group with blocks of this size"))?;
    let blocks = (0..blocks).map(|b| Some(BlockId(b))).collect();
    let wanted = LocalBlocks { group, first_position: 0, blocks };
    consumer.pull(Pull::new(offer, vec![wanted]).deadline(deadline).lanes(lanes)).map_err(|e| {
        let ending = if e.cause() == Cause::BadOffer { Ending::BadOffer } else { Ending::Failed };
        Failure::of(ending, e)
    })
}
