//! The Bench service, which makes offers of the pattern on demand, and its client.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use kvferry::{BlockId, Freed, Gone, Offer, OfferError, OfferGroup, OfferId, OfferSpec, Producer, Ready};
use tokio::sync::SetOnce;
use tonic::{
    Request, Response, Status,
    service::Routes,
    transport::{Channel, Endpoint},
};

pub(crate) use self::proto::GetUsageReply as Usage;
use self::proto::{
    GetUsageRequest, MakeOfferReply, MakeOfferRequest, bench_client::BenchClient, bench_server::BenchServer,
};
use crate::{
    pool::MemoryRecord,
    report::{Ending, Failure},
};

#[allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications, rustdoc::all)]
mod proto {
    tonic::include_proto!("kvferry.v1");
}

const NAME: &str = "kvferry.v1.Bench";
const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("kvferry.v1.bench");
/// Largest message: an offer of 1,048,576 blocks takes about 11 MB of JSON.
const FRAME_BYTES: usize = 32 << 20;

/// Makes offers of a producer, which is set when it serves, and keeps account of them.
#[derive(Clone, Default)]
pub(crate) struct Bench(Arc<State>);

#[derive(Default)]
struct State {
    serving: SetOnce<(Weak<Producer>, MemoryRecord)>,
    account: Mutex<Account>,
}

/// The offers of this producer.
#[derive(Default)]
struct Account {
    /// Blocks and bytes of each live offer.
    live: HashMap<OfferId, (u64, u64)>,
    released: u64,
    ended: u64,
    /// Bytes of the offers that consumers released.
    bytes: u64,
}

impl Bench {
    /// The service, and its descriptors for reflection.
    pub(crate) fn routes(&self) -> (Routes, Vec<(String, Vec<u8>)>) {
        let server = BenchServer::new(self.clone()).max_encoding_message_size(FRAME_BYTES);
        (Routes::new(server), vec![(NAME.into(), DESCRIPTORS.to_vec())])
    }

    /// From now on, the service offers blocks of this producer.
    pub(crate) fn set(&self, producer: &Arc<Producer>) {
        // `serve` sets it once.
        let _ = self.0.serving.set((Arc::downgrade(producer), MemoryRecord::from(producer.memory())));
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.0.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an offer, and enters it into the account.
    pub(crate) fn offer(&self, producer: &Producer, spec: OfferSpec) -> Result<Offer, OfferError> {
        let layout = producer.layout();
        let size = |g: &OfferGroup| {
            let bytes = layout.group(g.group).map_or(0, |l| l.block_bytes() * l.regions.len() as u64);
            (g.blocks.len() as u64, g.blocks.len() as u64 * bytes)
        };
        let size = spec.groups.iter().map(size).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        // Under the lock, so that the offer is not freed before it is entered.
        let mut account = self.account();
        let offer = producer.offer(spec, Ready::Now)?;
        account.live.insert(offer.id, size);
        Ok(offer)
    }

    /// Takes a freed offer out of the account.
    pub(crate) fn freed(&self, freed: &Freed) {
        let mut account = self.account();
        let (_, bytes) = account.live.remove(&freed.offer).unwrap_or_default();
        if freed.why == Gone::Released {
            account.released += 1;
            account.bytes += bytes;
        } else {
            account.ended += 1;
        }
    }

    /// The consumers' claims now, and the bytes of all offers that they have released.
    pub(crate) fn usage(&self, producer: &Producer) -> (Usage, u64) {
        let account = self.account();
        let usage = Usage {
            offers: account.live.len() as u64,
            blocks: account.live.values().map(|(blocks, _)| blocks).sum(),
            claims: producer.live().1 as u64,
            released: account.released,
            ended: account.ended,
        };
        (usage, account.bytes)
    }

    async fn serving(&self) -> Result<(Arc<Producer>, MemoryRecord), Status> {
        // The port answers a moment before the producer is set.
        let (producer, memory) = self.0.serving.wait().await;
        let stopping = || Status::unavailable("this producer is stopping: start it again");
        Ok((producer.upgrade().ok_or_else(stopping)?, memory.clone()))
    }
}

#[tonic::async_trait]
impl proto::bench_server::Bench for Bench {
    async fn make_offer(&self, request: Request<MakeOfferRequest>) -> Result<Response<MakeOfferReply>, Status> {
        let (producer, memory) = self.serving().await?;
        let offer = make(self, &producer, request.into_inner()).map_err(Status::failed_precondition)?;
        let memory = proto::Memory {
            place: memory.place,
            name: memory.name.unwrap_or_default(),
            uuid: memory.uuid.unwrap_or_default(),
        };
        let (offer, pattern) = (offer.to_json(), producer.me().incarnation.get());
        Ok(Response::new(MakeOfferReply { offer, pattern, memory: Some(memory) }))
    }

    async fn get_usage(&self, _: Request<GetUsageRequest>) -> Result<Response<Usage>, Status> {
        Ok(Response::new(self.usage(&self.serving().await?.0).0))
    }
}

/// Offers blocks of the group whose blocks have `block_bytes` bytes (0: the first group), in pool order or scattered.
fn make(bench: &Bench, producer: &Producer, r: MakeOfferRequest) -> Result<Offer, String> {
    let layout = producer.layout();
    let group = match r.block_bytes {
        0 => layout.groups.first(),
        b => layout.groups.iter().find(|g| g.block_bytes() == u64::from(b)),
    };
    let group = group.ok_or_else(|| format!("no group here has blocks of {} bytes", r.block_bytes))?;
    let count = if r.blocks == 0 { group.blocks } else { r.blocks };
    if count > group.blocks {
        return Err(format!(
            "{count} blocks requested, but the pool has {}: request fewer, or serve more",
            group.blocks
        ));
    }
    let mut ids: Vec<u32> = (0..group.blocks).collect();
    if r.scattered {
        fastrand::shuffle(&mut ids);
    }
    let blocks = ids[..count as usize].iter().map(|b| Some(BlockId(*b))).collect();
    let groups = vec![OfferGroup { group: group.id, first_position: 0, blocks }];
    let spec = OfferSpec::new(u64::from(count) * u64::from(group.block_tokens), groups).request("bench");
    bench.offer(producer, spec).map_err(|e| e.to_string())
}

/// Asks the `kvferry serve` at `addr` what consumers hold.
pub(crate) async fn usage(addr: &str, limit: Duration) -> Result<Usage, Failure> {
    let call = async {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|e| e.to_string())?;
        let mut bench = BenchClient::new(endpoint.connect().await.map_err(|e| e.to_string())?);
        bench.get_usage(GetUsageRequest {}).await.map_err(|s| s.message().to_owned())
    };
    let reply = tokio::time::timeout(limit, call).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")));
    Ok(reply.map_err(|why| Failure::failed(format!("{addr} does not report its offers: {why}")))?.into_inner())
}

/// Requests an offer of `blocks` scattered blocks (0: all) of `block_bytes` bytes (0: of the first group) from `addr`. Also
/// returns where they lie; `None`: an older `kvferry serve`, which does not say.
pub(crate) async fn make_offer(
    addr: &str,
    blocks: u32,
    block_bytes: u32,
    limit: Duration,
) -> Result<(Offer, Option<MemoryRecord>), Failure> {
    let failed = |ending, reason: String| {
        Failure::of(ending, format!("{addr} made no offer: {reason}; is it a `kvferry serve`?"))
    };
    let unreachable = |reason| failed(Ending::Unreachable, reason);
    let call = async {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|e| unreachable(e.to_string()))?;
        let channel: Channel = endpoint.connect().await.map_err(|e| unreachable(e.to_string()))?;
        let mut bench = BenchClient::new(channel).max_decoding_message_size(FRAME_BYTES);
        let request = MakeOfferRequest { blocks, scattered: true, block_bytes };
        let reply = bench.make_offer(request).await.map_err(|s| failed(Ending::Refused, s.message().into()))?;
        let reply = reply.into_inner();
        let some = |text: String| Some(text).filter(|t| !t.is_empty());
        let memory = reply.memory.map(|m| MemoryRecord { place: m.place, name: some(m.name), uuid: some(m.uuid) });
        let offer = Offer::from_json(&reply.offer).map_err(|e| failed(Ending::BadOffer, e.to_string()))?;
        Ok((offer, memory))
    };
    tokio::time::timeout(limit, call).await.unwrap_or_else(|_| Err(unreachable(format!("no answer within {limit:?}"))))
}
