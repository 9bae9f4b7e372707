use std::{fmt::Debug, time::Duration};

use kvferry_proto::{
    BlockId, ClaimId, ClientBody, ClientFrame, Contents, Gone, Grant, Growth, Nonce, OfferGroup, Reader, Release,
    ServerBody, ServerFrame,
};
use proptest::{collection::vec, option, prelude::*, sample::select, strategy::ValueTree};
use prost::Message;

use super::{
    check::{MAX_READERS, MAX_SAID},
    frame::MAX_RENEW,
    *,
};
use crate::{
    control::proto::client_frame::Frame as C,
    lane::verbs::{Gid, LinkLayer, QpEnd, RailEnd, Remote, ServedRail, VerbsTicket},
};

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 ./_é-]{0,40}"
}

fn incarnations() -> impl Strategy<Value = Incarnation> {
    (1u64..).prop_map(|i| Incarnation::from_wire(i).unwrap())
}

fn offer_ids() -> impl Strategy<Value = OfferId> {
    (any::<u64>(), 1u64..).prop_map(|(high, low)| OfferId { high, low })
}

fn peers() -> impl Strategy<Value = PeerId> {
    ("[a-z0-9-]{1,128}", any::<u32>(), incarnations()).prop_map(|(e, r, incarnation)| PeerId {
        engine: e.parse().unwrap(),
        rank: Rank(r),
        incarnation,
    })
}

fn models() -> impl Strategy<Value = Model> {
    (text(), text(), text(), text(), text(), 1u32..).prop_map(
        |(name, dtype, scales, weights, attention, block_tokens)| Model {
            name,
            dtype,
            scales,
            weights,
            attention,
            block_tokens,
        },
    )
}

fn shards() -> impl Strategy<Value = Shard> {
    let part = || (1u32..64).prop_flat_map(|size| (0..size, Just(size)));
    (part(), part(), 0u32..1000, 1u32..1000, 0u32..1000, 1u32..1000).prop_map(
        |((tp_rank, tp_size), (pp_rank, pp_size), first_head, heads, first_layer, layers)| Shard {
            tp_rank,
            tp_size,
            pp_rank,
            pp_size,
            first_head,
            heads,
            first_layer,
            layers,
        },
    )
}

fn pools() -> impl Strategy<Value = PoolLayout> {
    let kind = select(vec![GroupKind::Full, GroupKind::SlidingWindow, GroupKind::State]);
    let group = (kind, 1u32..100, 1u32..100, vec((1u64..1 << 20, 0u64..1000), 1..5));
    vec(group, 0..4).prop_map(|groups| {
        let mut layout = PoolLayout::default();
        for (i, (kind, block_tokens, blocks, regions)) in groups.into_iter().enumerate() {
            let mut end = 0;
            let regions = regions
                .into_iter()
                .enumerate()
                .map(|(n, (block_bytes, gap))| {
                    let r = Region {
                        name: format!("layer.{n}").into(),
                        segment: i as u16,
                        offset: end,
                        block_bytes,
                        stride: block_bytes + gap,
                    };
                    end += u64::from(blocks) * r.stride;
                    r
                })
                .collect();
            layout.segments.push(end);
            layout.groups.push(Group { id: GroupId(i as u16 * 7), kind, block_tokens, blocks, regions });
        }
        layout
    })
}

fn hellos() -> impl Strategy<Value = Hello> {
    (any::<(u32, u32)>(), any::<u64>(), peers(), models(), shards(), text()).prop_map(
        |(versions, features, peer, model, shard, host)| Hello { versions, features, peer, model, shard, host },
    )
}

fn lanes() -> impl Strategy<Value = Vec<LaneKind>> {
    vec(select(vec![LaneKind::Tcp, LaneKind::Local, LaneKind::Verbs]), 0..5)
}

fn welcomes() -> impl Strategy<Value = Welcome> {
    let who = (peers(), incarnations(), models(), shards());
    let place = (text(), any::<Option<[u8; 16]>>());
    (1u32.., any::<u64>(), who, pools(), any::<u32>(), lanes(), place, 1u64..86_400_000).prop_map(
        |(version, features, (peer, engine_incarnation, model, shard), pool, fence_slots, lanes, place, ms)| Welcome {
            version,
            features,
            peer,
            engine_incarnation,
            model,
            shard,
            pool: Arc::new(pool),
            fence_slots,
            lanes,
            host: place.0,
            silence: Duration::from_millis(ms),
            gpu_uuid: place.1,
        },
    )
}

fn verbs_end() -> impl Strategy<Value = RailEnd> {
    let pair = (0..1u32 << 24, 0..1u32 << 24).prop_map(|(number, psn)| QpEnd { number, psn });
    let layer = select(vec![LinkLayer::InfiniBand, LinkLayer::Ethernet]);
    ("[a-z0-9_:]{1,80}", layer, 1u16.., any::<[u8; 15]>(), 256u32..=1 << 16, 1u8.., vec(pair, 1..=4)).prop_map(
        |(name, link_layer, lid, gid, mtu, rd_atomic, queue_pairs)| {
            let mut all = [1; 16];
            all[1..].copy_from_slice(&gid);
            RailEnd { name, link_layer, lid, gid: Gid(all), mtu, rd_atomic, queue_pairs }
        },
    )
}

fn served() -> impl Strategy<Value = ServedRail> {
    let remote = || (any::<u64>(), any::<u32>()).prop_map(|(address, rkey)| Remote { address, rkey });
    (any::<u8>(), verbs_end(), vec(remote(), 0..5), remote()).prop_map(|(of, end, segments, words)| ServedRail {
        of,
        end,
        segments,
        words,
    })
}

fn tickets() -> impl Strategy<Value = LaneTicket> {
    let tcp = (option::of("[a-z0-9.]{1,40}"), 1u16.., any::<u64>(), any::<[u8; 32]>())
        .prop_map(|(host, port, lane, key)| LaneTicket::Tcp { host, port, lane, key });
    let local = (vec(any::<u8>(), 1..=108), any::<u64>(), any::<[u8; 32]>())
        .prop_map(|(uds, lane, key)| LaneTicket::Local { uds, lane, key });
    let verbs = (any::<u64>(), any::<u64>(), any::<u32>(), vec(served(), 1..4), any::<bool>()).prop_map(
        |(lane, incarnation, fence_slots, rails, degraded)| {
            LaneTicket::Verbs(VerbsTicket { lane, incarnation, fence_slots, rails, degraded })
        },
    );
    prop_oneof![tcp, local, verbs]
}

fn claims() -> impl Strategy<Value = ClaimId> {
    (1u64..).prop_map(ClaimId)
}

fn readers() -> impl Strategy<Value = Reader> {
    (1..=MAX_READERS).prop_flat_map(|of| (0..of, Just(of))).prop_map(|(index, of)| Reader { index, of })
}

fn tokens() -> impl Strategy<Value = Token> {
    any::<[u8; 16]>().prop_map(Token::from_bytes)
}

/// Blocks in runs and single ones, up to the highest id, with null blocks between them.
fn group_blocks() -> impl Strategy<Value = Vec<Option<BlockId>>> {
    let run = (prop_oneof![0..100u32, BlockId::NULL - 100..BlockId::NULL], 1..5u32)
        .prop_map(|(first, n)| (first..first.saturating_add(n)).map(|b| Some(BlockId(b))).collect::<Vec<_>>());
    let none = (1..4usize).prop_map(|n| vec![None; n]);
    vec(prop_oneof![run, none], 0..12).prop_map(|runs| runs.concat())
}

fn contents() -> impl Strategy<Value = Contents> {
    let prints = proptest::collection::btree_map("[a-z]{1,9}", "[0-9a-f]{0,32}", 0..4);
    (any::<u64>(), any::<bool>(), prints, vec((0..1000u32, group_blocks()), 0..4)).prop_map(
        |(tokens, complete, fingerprints, groups)| {
            let group = |(i, (first_position, blocks))| OfferGroup { group: GroupId(i as u16), first_position, blocks };
            let groups = groups.into_iter().enumerate().map(group).collect();
            let whole = if complete { tokens } else { tokens.saturating_add(1) };
            Contents { tokens: tokens.min(whole), whole, complete, fingerprints, groups }
        },
    )
}

fn growths() -> impl Strategy<Value = Growth> {
    contents().prop_map(|Contents { tokens, complete, groups, .. }| Growth { tokens, complete, groups })
}

fn client_frames() -> impl Strategy<Value = ClientFrame> {
    let release = (option::of(claims()), offer_ids(), tokens(), readers(), any::<bool>())
        .prop_map(|(claim, offer, token, reader, all)| Release { claim, offer, token, reader, all });
    let body = prop_oneof![
        (peers(), incarnations()).prop_map(|(from, expect)| ClientBody::Open { from, expect }),
        any::<u64>().prop_map(ClientBody::Ping),
        (claims(), offer_ids(), tokens(), any::<u64>(), readers(), any::<bool>()).prop_map(
            |(claim, offer, token, number, reader, awaited)| {
                ClientBody::Claim { claim, offer, token, number, reader, awaited }
            }
        ),
        vec(claims(), 0..10).prop_map(ClientBody::Renew),
        release.prop_map(ClientBody::Release),
    ];
    (1u64.., body).prop_map(|(seq, body)| ClientFrame { seq, body })
}

fn server_frames() -> impl Strategy<Value = ServerFrame> {
    let why = || {
        select(vec![
            Gone::Unknown,
            Gone::Expired,
            Gone::Released,
            Gone::Revoked,
            Gone::HardCap,
            Gone::Limit,
            Gone::Token,
        ])
    };
    let ms = || (0u64..86_400_000).prop_map(Duration::from_millis);
    let body = prop_oneof![
        incarnations().prop_map(ServerBody::Opened),
        any::<u64>().prop_map(ServerBody::Pong),
        (claims(), any::<u32>(), 1u64.., contents(), any::<u64>(), ms()).prop_map(
            |(claim, slot, nonce, contents, growths, remaining)| {
                let (grant, contents) = (Grant { slot, nonce: Nonce::from_wire(nonce).unwrap() }, Arc::new(contents));
                ServerBody::Granted { claim, grant, contents, growths, remaining }
            }
        ),
        (claims(), any::<u64>(), any::<u64>(), growths())
            .prop_map(|(claim, after, growths, growth)| { ServerBody::Grown { claim, after, growths, growth } }),
        (claims(), ms()).prop_map(|(claim, retry)| ServerBody::NotYet { claim, retry }),
        (claims(), why()).prop_map(|(claim, why)| ServerBody::Gone { claim, why }),
        (offer_ids(), why()).prop_map(|(offer, why)| ServerBody::Revoked { offer, why }),
        Just(ServerBody::Draining),
    ];
    (any::<u64>(), option::of(body)).prop_map(|(ack, body)| ServerFrame { ack, body })
}

/// Through bytes and back.
fn again<P: Message + Default>(p: P) -> P {
    P::decode(p.encode_to_vec().as_slice()).unwrap()
}

fn arrives<D: PartialEq + Debug>(sent: &D, got: Result<D, BadMessage>) {
    assert_eq!(got.as_ref(), Ok(sent));
}

proptest! {
    #[test]
    fn every_message_arrives_as_it_was_sent(
        hello in hellos(), welcome in welcomes(), ticket in tickets(), c in client_frames(), s in server_frames(),
        release in (option::of(peers()), offer_ids(), tokens(), option::of(incarnations())),
    ) {
        arrives(&hello, again(proto::HelloRequest::from(&hello)).try_into());
        arrives(&welcome, again(proto::Welcome::from(&welcome)).try_into());
        arrives(&ticket, again(proto::LaneReply::from(ticket.clone())).try_into());
        arrives(&c, again(proto::ClientFrame::from(c.clone())).try_into());
        arrives(&s, server_frame(again(proto::ServerFrame::from(s.clone())), 1 << 20));
        let (from, offer, token, expect) = release;
        let release = ReleaseWanted { from, offer, token, expect };
        arrives(&release, again(proto::ReleaseRequest::from(&release)).try_into());
    }

    /// Random bytes hardly ever form a message, so most inputs here are messages with some bytes changed.
    #[test]
    fn no_input_panics(
        raw in vec(any::<u8>(), 0..200), welcome in welcomes(), c in client_frames(), s in server_frames(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        let spoil = |mut bytes: Vec<u8>| {
            for (at, b) in &changes {
                if !bytes.is_empty() {
                    let i = at.index(bytes.len());
                    bytes[i] = *b;
                }
            }
            bytes
        };
        for bytes in [
            raw.clone(),
            spoil(proto::Welcome::from(&welcome).encode_to_vec()),
            spoil(proto::ClientFrame::from(c).encode_to_vec()),
            spoil(proto::ServerFrame::from(s).encode_to_vec()),
        ] {
            let bytes = bytes.as_slice();
            let _ = proto::HelloRequest::decode(bytes).map(Hello::try_from);
            if let Ok(Ok(w)) = proto::Welcome::decode(bytes).map(Welcome::try_from) {
                prop_assert_eq!(w.pool.check(), Ok(()));
                prop_assert_eq!(w.shard.check(), Ok(()));
            }
            let _ = proto::LaneRequest::decode(bytes).map(LaneWanted::try_from);
            let _ = proto::LaneReply::decode(bytes).map(LaneTicket::try_from);
            let _ = proto::ClientFrame::decode(bytes).map(ClientFrame::try_from);
            if let Ok(Ok(ServerFrame { body: Some(ServerBody::Granted { contents, .. }), .. })) =
                proto::ServerFrame::decode(bytes).map(|f| server_frame(f, 1 << 20))
            {
                prop_assert_eq!(contents.check(1 << 20), Ok(()));
            }
            let _ = proto::ReleaseRequest::decode(bytes).map(ReleaseWanted::try_from);
            let _ = proto::Mismatch::decode(bytes).map(Mismatch::from);
        }
    }
}

fn refused<D: Debug>(got: Result<D, BadMessage>, field: &str) {
    assert_eq!(got.expect_err(field).field, field);
}

fn sample<S: Strategy>(s: S) -> S::Value {
    s.new_tree(&mut proptest::test_runner::TestRunner::deterministic()).unwrap().current()
}

#[test]
fn a_bad_frame_is_refused_by_the_name_of_its_field() {
    let frame = |seq, frame| ClientFrame::try_from(proto::ClientFrame { seq, frame: Some(frame) });
    let id = Some(proto::OfferId { high: 1, low: 2 });
    let token = vec![1; 16];
    let claim = proto::Claim {
        claim: 1,
        offer: id,
        reader: 0,
        readers: 1,
        token: token.clone().into(),
        number: 0,
        awaited: false,
    };
    assert!(frame(0, C::Claim(claim.clone())).is_ok());
    refused(frame(0, C::Claim(proto::Claim { token: vec![1; 15].into(), ..claim.clone() })), "claim.token");
    refused(frame(0, C::Claim(proto::Claim { claim: 0, ..claim.clone() })), "claim.claim");
    refused(frame(0, C::Claim(proto::Claim { offer: None, ..claim.clone() })), "claim.offer");
    refused(frame(0, C::Claim(proto::Claim { reader: 1, ..claim.clone() })), "claim.reader");
    refused(frame(0, C::Claim(proto::Claim { readers: 0, ..claim.clone() })), "claim.readers");
    refused(frame(0, C::Claim(proto::Claim { readers: MAX_READERS + 1, ..claim.clone() })), "claim.readers");
    refused(frame(0, C::Renew(proto::Renew { claims: vec![1; MAX_RENEW + 1] })), "renew.claims");
    refused(frame(0, C::Renew(proto::Renew { claims: vec![0] })), "renew.claims");
    let release = proto::Unclaim { claim: 0, offer: id, reader: 0, readers: 1, all: true, token: token.into() };
    assert!(frame(1, C::Release(release.clone())).is_ok());
    refused(frame(1, C::Release(proto::Unclaim { token: vec![].into(), ..release.clone() })), "release.token");
    refused(frame(0, C::Release(release)), "seq");
    refused(ClientFrame::try_from(proto::ClientFrame { seq: 0, frame: None }), "frame");
    let from = |engine: &str, incarnation| Some(proto::Peer { engine: engine.into(), rank: 0, incarnation });
    let open = |from, expect_incarnation| frame(0, C::Open(proto::Open { from, expect_incarnation }));
    assert!(open(from("e", 1), 1).is_ok());
    refused(open(from("", 1), 1), "open.from.engine");
    refused(open(from("e\n", 1), 1), "open.from.engine");
    refused(open(from("e", 0), 1), "open.from.incarnation");
    refused(open(from("e", 1), 0), "open.expect_incarnation");
    refused(open(None, 1), "open.from");
}

#[test]
fn a_grant_of_a_million_blocks_is_small_if_they_are_consecutive_and_fits_a_frame_if_they_are_not() {
    const BLOCKS: u32 = 1 << 20;
    let bytes = |id: &dyn Fn(u32) -> u32| {
        let blocks = (0..BLOCKS).map(|i| Some(BlockId(id(i)))).collect();
        let contents = Contents {
            groups: vec![OfferGroup { group: GroupId(0), first_position: 0, blocks }],
            ..Contents::default()
        };
        let grant = Grant { slot: 1, nonce: Nonce::random() };
        let body = ServerBody::Granted {
            claim: ClaimId(1),
            growths: 0,
            grant,
            contents: Arc::new(contents.clone()),
            remaining: Duration::ZERO,
        };
        let sent = proto::ServerFrame::from(ServerFrame { ack: 0, body: Some(body) }).encode_to_vec();
        let got = server_frame(proto::ServerFrame::decode(&*sent).unwrap(), BLOCKS as usize).unwrap().body;
        let Some(ServerBody::Granted { contents: got, .. }) = got else { panic!("another frame arrived") };
        assert!(*got == contents);
        sent.len()
    };
    assert!(bytes(&|i| i) < 100);
    let scattered = bytes(&|i| BlockId::NULL - 1 - i.wrapping_mul(7919) % BLOCKS);
    assert!(scattered <= crate::config::Config::default().limits.frame_bytes, "{scattered} bytes");
}

#[test]
fn a_bad_grant_is_refused_by_the_name_of_its_field() {
    let run =
        |first, count| proto::GroupBlocks { group: 0, first_position: 0, firsts: vec![first], counts: vec![count] };
    let with = |contents: Option<proto::Contents>| {
        let granted = proto::Granted { claim: 1, slot: 0, nonce: 1, remaining_ms: 1, contents, growths: 0 };
        server_frame(proto::ServerFrame { ack: 0, frame: Some(proto::server_frame::Frame::Granted(granted)) }, 100)
    };
    let of = |groups| with(Some(proto::Contents { groups, ..proto::Contents::default() }));
    assert!(of(vec![run(5, 100)]).is_ok());
    assert!(of(vec![run(BlockId::NULL - 1, 1)]).is_ok());
    refused(with(None), "granted.contents");
    for (groups, field) in [
        (vec![run(5, 101)], "groups"),
        (vec![run(5, 60), proto::GroupBlocks { group: 1, ..run(5, 60) }], "groups"),
        (vec![run(BlockId::NULL, u32::MAX)], "groups"),
        (vec![run(5, 0)], "groups.counts"),
        (vec![run(BlockId::NULL - 1, 2)], "groups.firsts"),
        (vec![run(5, 1), run(9, 1)], "groups"),
        (vec![proto::GroupBlocks { group: 1 << 16, ..run(5, 1) }], "groups.group"),
        (vec![proto::GroupBlocks { counts: vec![], ..run(5, 1) }], "groups"),
        (vec![proto::GroupBlocks { first_position: u32::MAX, ..run(5, 9) }], "groups"),
    ] {
        refused(of(groups), &format!("granted.contents.{field}"));
    }
}

#[test]
fn a_bad_welcome_is_refused_by_the_name_of_its_field() {
    let good = proto::Welcome::from(&sample(welcomes()));
    let with = |change: &dyn Fn(&mut proto::Welcome)| {
        let mut w = good.clone();
        change(&mut w);
        Welcome::try_from(w)
    };
    assert!(with(&|_| {}).is_ok());
    refused(with(&|w| w.peer = None), "peer");
    refused(with(&|w| w.engine_incarnation = 0), "engine_incarnation");
    refused(with(&|w| w.silence_ms = 0), "silence_ms");
    for malformed in [&[7; 15][..], &[7; 17], &[7]] {
        refused(with(&|w| w.gpu_uuid = malformed.to_vec().into()), "gpu_uuid");
    }
    refused(with(&|w| w.host = "x".repeat(MAX_HOST + 1)), "host");
    refused(with(&|w| w.model.as_mut().unwrap().dtype = "x".repeat(257)), "model.dtype");
    refused(with(&|w| w.shard.as_mut().unwrap().tp_size = 0), "shard");
    refused(with(&|w| w.lanes = vec![1; MAX_LANES + 1]), "lanes");
    let pool = PoolLayout::uniform(4, 1, 64, 16);
    let region = |change: &dyn Fn(&mut proto::Region)| {
        let mut p = proto::Pool::from(&pool);
        change(&mut p.groups[0].regions[0]);
        with(&|w| w.pool = Some(p.clone()))
    };
    refused(region(&|r| r.segment = 1 << 16), "groups.regions.segment");
    refused(region(&|r| r.offset = 1), "pool");
    // Lane kinds of a newer producer are left out.
    assert_eq!(with(&|w| w.lanes = vec![99, 1]).unwrap().lanes, [LaneKind::Tcp]);
}

#[test]
fn a_mismatch_keeps_its_sides_and_a_long_one_is_cut() {
    let m = Mismatch { field: "dtype".into(), consumer: "a".into(), producer: "b".into() };
    let p = proto::Mismatch::from(m.clone());
    assert_eq!((p.here.as_str(), p.there.as_str()), ("b", "a"), "`here` is the producer, which sends it");
    assert_eq!(Mismatch::from(p), m);
    let long = proto::Mismatch { field: "é".repeat(4000), here: String::new(), there: String::new() };
    assert!(Mismatch::from(long).field.len() <= MAX_SAID);
}
