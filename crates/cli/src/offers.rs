//! The Bench service, which makes offers of the pattern on demand, and its client.

use std::{
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use kvferry::{BlockId, Offer, OfferGroup, OfferSpec, Producer, Ready};
use tonic::{
    Request, Response, Status,
    service::Routes,
    transport::{Channel, Endpoint},
};

use self::proto::{MakeOfferReply, MakeOfferRequest, bench_client::BenchClient, bench_server::BenchServer};
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

/// Makes offers of a producer, which is set when it serves.
#[derive(Clone, Default)]
pub(crate) struct Bench(Arc<OnceLock<(Weak<Producer>, MemoryRecord)>>);

impl Bench {
    /// The service, and its descriptors for reflection.
    pub(crate) fn routes(&self) -> (Routes, Vec<(String, Vec<u8>)>) {
        let server = BenchServer::new(self.clone()).max_encoding_message_size(FRAME_BYTES);
        (Routes::new(server), vec![(NAME.into(), DESCRIPTORS.to_vec())])
    }

    /// From now on, the service offers blocks of this producer.
    pub(crate) fn set(&self, producer: &Arc<Producer>) {
        // `serve` sets it once.
        let _ = self.0.set((Arc::downgrade(producer), MemoryRecord::from(producer.memory())));
    }
}

#[tonic::async_trait]
impl proto::bench_server::Bench for Bench {
    async fn make_offer(&self, request: Request<MakeOfferRequest>) -> Result<Response<MakeOfferReply>, Status> {
        let serving = self.0.get().and_then(|(producer, memory)| Some((producer.upgrade()?, memory)));
        let (producer, memory) =
            serving.ok_or_else(|| Status::unavailable("this producer is starting or stopping: try again"))?;
        let offer = make(&producer, request.into_inner()).map_err(Status::failed_precondition)?;
        let memory = proto::Memory {
            place: memory.place.clone(),
            name: memory.name.clone().unwrap_or_default(),
            uuid: memory.uuid.clone().unwrap_or_default(),
        };
        let (offer, pattern) = (offer.to_json(), producer.me().incarnation.get());
        Ok(Response::new(MakeOfferReply { offer, pattern, memory: Some(memory) }))
    }
}

/// Offers blocks of the group whose blocks have `block_bytes` bytes (0: the first group), in pool order or scattered.
fn make(producer: &Producer, r: MakeOfferRequest) -> Result<Offer, String> {
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
    producer.offer(spec, Ready::Now).map_err(|e| e.to_string())
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
