//! What arrives, and how fast.

use kvferry_proto::PoolLayout;

use super::{
    super::{changed, pulls},
    *,
};
use crate::config::TcpConfig;

#[test]
fn pulls_from_gpu_memory_keep_every_promise_of_those_from_host_memory() {
    with_driver(pulls_from_gpu_memory_keep_every_promise_of_those_from_host_memory, "delay=20us", |_| {
        let tests = || {
            pulls::every_byte_lands_where_it_was_wanted_and_nowhere_else();
            pulls::a_fence_comes_after_all_reads_of_its_chunk_however_it_was_posted();
            pulls::an_offer_revoked_in_the_middle_fails_its_fence_and_is_refused_from_then_on();
            pulls::one_attempts_bad_request_leaves_the_others_alone();
            pulls::nothing_is_written_once_a_stopped_attempt_is_quiet();
            pulls::blocks_that_arrived_before_the_producer_went_stay_loaded();
            pulls::a_killed_lane_is_quiet_and_down_at_once();
            pulls::a_consumer_that_does_not_receive_delays_no_other();
        };
        from_gpu(GpuConfig::default(), tests);
        from_gpu(small_ring(), tests);
        from_gpu(GpuConfig::default(), || over_tls(tests));
        from_gpu(small_ring(), || over_tls(tests));
    });
}

#[test]
fn the_data_checksum_covers_what_is_sent_from_the_ring() {
    with_driver(the_data_checksum_covers_what_is_sent_from_the_ring, "", |_| {
        for config in [GpuConfig::default(), small_ring()] {
            from_gpu(config, || {
                changed::words_that_change_places_on_their_way_are_read_again_and_every_byte_is_right();
                changed::a_network_that_changes_every_chunk_fails_the_attempt_as_corrupt_and_nothing_is_fenced();
            });
        }
    });
}

#[test]
fn blocks_of_every_size_arrive_exactly_by_every_way_of_copying() {
    with_driver(blocks_of_every_size_arrive_exactly_by_every_way_of_copying, "", |control| {
        let mut before = control.counts();
        for method in [CopyMethod::Auto, CopyMethod::Copies, CopyMethod::Batch, CopyMethod::Kernel] {
            for (block, blocks) in [(8, 9000), (512, 3000), (1000, 2500), (4 * KIB, 700), (3 * MIB + 8, 5)] {
                for ring in [MIB, 64 * MIB] {
                    let config = GpuConfig { ring, copy: method, ..GpuConfig::default() };
                    from_gpu(config, || blocks_arrive(block, blocks));
                }
            }
            let now = control.counts();
            let (launches, batches) = (now.launches - before.launches, now.batches - before.batches);
            let used = (launches > 0, batches > 0);
            let expected = match method {
                CopyMethod::Copies => (false, false),
                CopyMethod::Batch => (false, true),
                // The kernel takes no blocks of 1000 bytes.
                CopyMethod::Auto | CopyMethod::Kernel => (true, true),
            };
            assert_eq!(used, expected, "{method:?}");
            before = now;
        }
    });
}

fn blocks_arrive(block: u64, blocks: u32) {
    let rig = Rig::new(PoolLayout::uniform(blocks, 1, block, 16));
    // No two are neighbours.
    let order: Vec<u32> = (0..blocks).map(|b| (u64::from(b) * 7919 % u64::from(blocks)) as u32).collect();
    let src: Vec<_> = order.iter().copied().map(Some).collect();
    let dst: Vec<_> = (0..blocks).map(Some).collect();
    let (grant, offer) = rig.offer(1, &src);
    let plan = rig.plan(&offer, &dst, 300 * KIB);
    let (mut lane, memory) = rig.lane(&TcpConfig::default());
    let a = attempt();
    let events = pull(&mut lane, a, grant, &plan, 8 * MIB);
    assert_eq!(fences(&events, a).len(), plan.chunks().len());
    assert!(fences(&events, a).iter().all(|(_, word)| *word == grant.nonce.get()));
    check(&rig.export.layout, &memory, &order.into_iter().zip(0..blocks).collect::<Vec<_>>(), 0);
}

#[test]
fn refused_requests_among_good_ones_are_answered_in_order() {
    with_driver(refused_requests_among_good_ones_are_answered_in_order, "delay=1ms", |_| {
        from_gpu(small_ring(), || {
            let rig = Rig::new(PoolLayout::uniform(2, 1, MIB, 16));
            let (good, stale) = (rig.offer(1, &[Some(0)]).0, rig.offer(2, &[Some(0)]).0);
            rig.export.withdraw(2);
            let stream = super::super::bad_peers::proven(&rig);
            // All of them come at once, so that replies are copied ahead past the refusals.
            let order = [good, stale, stale, good, good, stale, good, good, stale];
            let requests: Vec<u8> = order.iter().flat_map(|&grant| request(grant, 5000)).collect();
            (&stream).write_all(&requests).unwrap();
            for grant in order {
                if grant == good {
                    assert_eq!(reply(&stream, grant, 5000), grant.nonce.get());
                } else {
                    let sum = check_request(&request(grant, 5000)).unwrap();
                    let mut head = [0; Reply::LEN];
                    (&stream).read_exact(&mut head).unwrap();
                    assert_eq!(Reply::decode(&head, sum), Ok(Reply { status: Status::Stale, tag: 9, total: 0 }));
                }
            }
        });
    });
}

/// Pulls from GPU memory beside pulls from host memory, in turn:
/// `cargo test --release -p kvferry --lib gpu_speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, for a release build on an idle machine"]
fn gpu_speed() {
    with_driver(gpu_speed, "", |_| {
        const COPY: u64 = 256 * MIB;
        for (block, chunk) in [(4 * KIB, 256 * KIB), (16 * KIB, 2 * MIB), (64 * KIB, 2 * MIB), (MIB, 8 * MIB)] {
            let blocks = (COPY / block) as u32;
            let start = || Rig::new(PoolLayout::uniform(blocks, 1, block, 16));
            let host = start();
            host.export.memory.touch().unwrap();
            let mut device = None;
            from_gpu(GpuConfig::default(), || device = Some(start()));
            let rigs = [host, device.unwrap()];
            let mut ends = rigs.each_ref().map(|rig| {
                let src: Vec<_> = (0..blocks).map(|b| Some(b.wrapping_mul(7919) % blocks)).collect();
                let (grant, offer) = rig.offer(1, &src);
                let plan = rig.plan(&offer, &(0..blocks).map(Some).collect::<Vec<_>>(), chunk);
                let (lane, memory) = rig.lane(&TcpConfig::default());
                memory.touch().unwrap();
                (grant, plan, lane)
            });
            let mut times = [const { Vec::new() }; 3];
            for round in 0..8 {
                let seconds = ends.each_mut().map(|(grant, plan, lane)| {
                    let (start, a) = (Instant::now(), attempt());
                    let events = pull(lane, a, *grant, plan, 8 * MIB);
                    assert_eq!(fences(&events, a).len(), plan.chunks().len());
                    start.elapsed().as_secs_f64()
                });
                if round > 0 {
                    times[0].push(COPY as f64 / seconds[0] / 1e9);
                    times[1].push(COPY as f64 / seconds[1] / 1e9);
                    times[2].push(seconds[0] / seconds[1]);
                }
            }
            let [host, gpu, ratio] = times.map(|mut t| {
                t.sort_by(f64::total_cmp);
                t[t.len() / 2]
            });
            println!(
                "blocks of {block:>7}, chunks of {chunk:>7}: {gpu:.2} GB/s from GPU memory, {host:.2} from host \
                 memory, median ratio {ratio:.2}"
            );
        }
    });
}
