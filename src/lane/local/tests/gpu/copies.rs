//! Copies and their fences.

use super::*;

#[test]
fn every_byte_arrives_from_memory_of_every_kind() {
    with_driver(every_byte_arrives_from_memory_of_every_kind, "", |control| {
        for kind in ["gpu handles", "gpu descriptors", "gpu both"] {
            let p = Producer::start(kind);
            let memory = memory();
            let mut lane = lane(&p, &memory, LONG);
            // Across allocations, odd sizes, all segments, and more reads than a job has.
            let mut odd = vec![
                Read::between(5, (0, 1), (0, 1), 3_000_000),
                Read::between(5, (1, 0), (1, 4000), 3000),
                Read::between(5, (2, 2 * MIB - 77), (0, 3_000_010), 1000),
                Read::between(5, (2, 0), (0, 4 * MIB), 4 * MIB),
            ];
            odd.extend(
                (0..6000u64).map(|i| Read::between(5, (0, i * 1234 % 6_000_000), (0, 8 * MIB + i * 700), 1 + i % 700)),
            );
            // Whole vectors, for the kernel.
            let even: Vec<_> = (0..200u64)
                .map(|i| Read::between(5, (0, (i * 7 % 200) * 8192), (0, 13 * MIB + i * 8192), 4096))
                .collect();
            let mut expected = [vec![0; 16 * MIB as usize], vec![0; 9000]];
            for reads in [odd, even] {
                let events = pull(&mut lane, &reads);
                assert_eq!(done(&events, 5), reads.len() as u32);
                assert_eq!(events.last(), Some(&LaneEvent::Fence { attempt: A, chunk: 5, word: p.nonce }));
                for r in &reads {
                    let to = r.dst_offset as usize..(r.dst_offset + r.len) as usize;
                    expected[usize::from(r.dst_segment)][to].copy_from_slice(&stamps(
                        r.src_segment,
                        r.src_offset,
                        r.len as usize,
                    ));
                }
            }
            for (segment, expected) in expected.iter().enumerate() {
                let got = bytes(&memory, segment as u16, 0, expected.len());
                let wrong = got.iter().zip(expected).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "{kind}, segment {segment}");
            }
        }
        let counts = control.counts();
        assert!(counts.launches > 0 && counts.batches > 0, "{counts:?}");
    });
}

#[test]
fn another_gpu_of_the_host_reads_the_memory_too() {
    with_driver(another_gpu_of_the_host_reads_the_memory_too, "devices=2", |_| {
        for kind in ["gpu handles", "gpu both"] {
            let p = Producer::start(kind);
            let memory = Memory::alloc_gpu(1, &[4 * MIB]).unwrap();
            let mut lane = lane(&p, &memory, LONG);
            assert_eq!(pull(&mut lane, &[Read::between(5, (2, 0), (0, 0), 4 * MIB)]), pulled(1, p.nonce));
            assert!(bytes(&memory, 0, 0, 4 << 20) == stamps(2, 0, 4 << 20), "{kind}");
        }
    });
}

#[test]
fn lanes_to_one_process_share_its_handles() {
    with_driver(lanes_to_one_process_share_its_handles, "", |control| {
        let p = Producer::start("gpu handles");
        let memory = memory();
        let first = lane(&p, &memory, LONG);
        let mut second = connect(&p.name, 2, p.incarnation, &memory, LONG).unwrap();
        assert_eq!(control.counts().imports, 2, "the allocations of the pool");
        drop(first);
        second.begin(A, grant(&p));
        assert_eq!(pull(&mut second, &[Read::between(5, (0, 0), (0, 0), 100)]), pulled(1, p.nonce));
        drop(second);
        wait_imports(control, 0);
        let mut third = connect(&p.name, 3, p.incarnation, &memory, LONG).unwrap();
        third.begin(A, grant(&p));
        assert_eq!(pull(&mut third, &[Read::between(5, (0, 0), (0, 0), 100)]), pulled(1, p.nonce));
    });
}

#[test]
fn a_revoked_word_is_stale() {
    with_driver(a_revoked_word_is_stale, "", |_| {
        let mut p = Producer::start("gpu descriptors");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        let read = [Read::between(5, (0, 0), (0, 0), 100)];
        assert_eq!(pull(&mut lane, &read), pulled(1, p.nonce));
        p.tell("withdraw");
        assert_eq!(pull(&mut lane, &read), pulled(1, 0));
        lane.stop(A);
        assert_eq!(poll_once(&mut lane), [quiet()]);
        // A slot past the table.
        lane.begin(A, Grant { slot: 8, ..grant(&p) });
        assert_eq!(pull(&mut lane, &read), pulled(1, 0));
    });
}

#[test]
fn a_word_is_read_after_the_last_copy_of_its_chunk() {
    with_driver(a_word_is_read_after_the_last_copy_of_its_chunk, "", |control| {
        let mut p = Producer::start("gpu descriptors");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        control.hang(true);
        // In two jobs: the second post brings the rest of the chunk.
        let reads: Vec<_> = (0..5000).map(|i| Read::between(5, (0, i * 64), (0, i * 64), 64)).collect();
        let first = lane.post(A, &reads);
        assert!(first < reads.len());
        assert_eq!(lane.post(A, &reads[first..]), reads.len() - first);
        assert_eq!(poll_once(&mut lane), []);
        p.tell("withdraw");
        control.hang(false);
        let events = drive(&mut lane, |e| e.iter().any(|e| matches!(e, LaneEvent::Fence { .. })));
        assert_eq!(done(&events, 5), 5000);
        assert_eq!(events.last(), Some(&LaneEvent::Fence { attempt: A, chunk: 5, word: 0 }));
        let fences = events.iter().filter(|e| matches!(e, LaneEvent::Fence { .. }));
        assert_eq!(fences.count(), 1, "a chunk has one fence");
    });
}

#[test]
fn a_read_outside_of_either_pool_fails_its_attempt_only() {
    with_driver(a_read_outside_of_either_pool_fails_its_attempt_only, "", |_| {
        let p = Producer::start("gpu both");
        let memory = memory();
        let mut lane = lane(&p, &memory, LONG);
        let end = layout().segments[0];
        let bad = [
            Read::between(0, (0, end - 99), (0, 0), 100),
            Read::between(0, (3, 0), (0, 0), 1),
            Read::between(0, (0, u64::MAX), (0, 0), 100),
            Read::between(0, (0, 0), (1, 8901), 100),
            Read::between(0, (0, 0), (2, 0), 1),
            Read::between(0, (0, 0), (0, u64::MAX), 100),
            Read::between(0, (0, 0), (0, 0), u64::MAX),
            Read::between(0, (0, 0), (0, 0), 0),
        ];
        for (i, bad) in bad.into_iter().enumerate() {
            let attempt = Attempt(100 + i as u64);
            lane.begin(attempt, grant(&p));
            lane.post(attempt, &[Read::between(0, (0, 0), (0, 0), 100), bad]);
            assert_eq!(poll_once(&mut lane), [LaneEvent::Failed { attempt, cause: Cause::BadOffer }], "{bad:?}");
            lane.stop(attempt);
            assert_eq!(poll_once(&mut lane), [LaneEvent::Quiet { attempt }]);
        }
        assert_eq!(pull(&mut lane, &[Read::between(5, (0, end - 100), (0, 0), 100)]), pulled(1, p.nonce));
    });
}
