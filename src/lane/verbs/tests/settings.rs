//! Settings that reach the device: access, limits, and the attributes of queue pairs.

use ibverbs_sys::{ibv_qp_attr_mask as mask, ibv_qp_state};

use std::sync::{Arc, Mutex};

use super::{
    fake::{Control, Set},
    rig::Rig,
};
use crate::config::VerbsConfig;

const LOCAL_WRITE: u32 = 1;
const REMOTE_READ: u32 = 4;
const RELAXED: u32 = 1 << 20;

/// The attributes that were set on each queue pair in a state.
fn set(control: &Arc<Mutex<Control>>, state: ibv_qp_state::Type) -> Vec<(Set, i32)> {
    let c = control.lock().unwrap();
    c.set.iter().filter(|(_, s, _)| s.0.qp_state == state).map(|(_, s, m)| (*s, *m)).collect()
}

#[test]
fn peers_may_read_the_pool_and_the_words_and_write_nothing() {
    for relaxed in [true, false] {
        let r = Rig::new(1, VerbsConfig { relaxed_ordering: relaxed, ..VerbsConfig::default() });
        let also = if relaxed { RELAXED } else { 0 };
        let (pool, words) = (r.there.at(0, 0, 1).unwrap().as_ptr() as u64, r.words.address());
        let of = |control: &Arc<Mutex<Control>>, at: u64| {
            let c = control.lock().unwrap();
            c.registered.iter().find(|(a, ..)| *a == at).unwrap_or_else(|| panic!("{at:x} of {:x?}", c.registered)).2
        };
        assert_eq!(of(&r.served[0], pool), REMOTE_READ | also);
        assert_eq!(of(&r.served[0], words), REMOTE_READ, "a word is never read before the data that it vouches for");
        let here = r.here.at(0, 0, 1).unwrap().as_ptr() as u64;
        assert_eq!(of(&r.devices[0], here), LOCAL_WRITE | also);
        let landing: Vec<_> =
            r.devices[0].lock().unwrap().registered.iter().filter(|(a, ..)| *a != here).map(|r| r.2).collect();
        assert_eq!(landing, [LOCAL_WRITE], "a word never lands after its completion");
        for (control, access) in [(&r.served[0], REMOTE_READ), (&r.devices[0], 0)] {
            for (s, fields) in set(control, ibv_qp_state::IBV_QPS_INIT) {
                assert!(fields as u32 & mask::IBV_QP_ACCESS_FLAGS.0 != 0);
                assert_eq!(s.0.qp_access_flags, access);
            }
        }
    }
}

#[test]
fn queue_pairs_have_the_configured_attributes_within_the_limits_of_the_devices() {
    let config = VerbsConfig {
        queue_pairs: 3,
        depth: 64,
        rd_atomic: 16,
        timeout: 17,
        retry: 5,
        min_rnr_timer: 9,
        service_level: 3,
        traffic_class: 106,
        ..VerbsConfig::default()
    };
    let r = Rig::new(1, config);
    let (reader, served) = (&r.devices[0], &r.served[0]);
    for (control, depth) in [(reader, 64), (served, 1)] {
        let made = control.lock().unwrap().made.clone();
        assert_eq!(made.len(), 3);
        assert!(made.iter().all(|(_, cap)| cap.max_send_wr == depth && cap.max_send_sge == 1));
    }
    // The fake device starts 8 READs at most, and answers 200.
    for (control, own, answers) in [(reader, 8, 1), (served, 1, 8)] {
        let (rtr, rts) = (set(control, ibv_qp_state::IBV_QPS_RTR), set(control, ibv_qp_state::IBV_QPS_RTS));
        assert_eq!((rtr.len(), rts.len()), (3, 3));
        for (s, _) in rtr {
            // 5 is 4096 bytes, the MTU of both ports.
            assert_eq!((s.0.max_dest_rd_atomic, s.0.path_mtu, s.0.min_rnr_timer), (answers, 5, 9));
            assert_eq!((s.0.ah_attr.sl, s.0.ah_attr.port_num, s.0.ah_attr.dlid), (3, 1, 7));
        }
        for (s, fields) in rts {
            assert!(fields as u32 & mask::IBV_QP_MAX_QP_RD_ATOMIC.0 != 0);
            assert_eq!((s.0.max_rd_atomic, s.0.timeout, s.0.retry_cnt), (own, 17, 5));
        }
    }
    // Each queue pair is connected to its counterpart, with the sequence numbers that both expect.
    let from = |control: &Arc<Mutex<Control>>| {
        let c = control.lock().unwrap();
        let of = |state| move |(n, s, _): &(u32, Set, i32)| (s.0.qp_state == state).then_some((*n, s.0));
        let rtr: Vec<_> = c.set.iter().filter_map(of(ibv_qp_state::IBV_QPS_RTR)).collect();
        let rts: Vec<_> = c.set.iter().filter_map(of(ibv_qp_state::IBV_QPS_RTS)).collect();
        rtr.into_iter().zip(rts).map(|(a, b)| (a.0, a.1.dest_qp_num, a.1.rq_psn, b.1.sq_psn)).collect::<Vec<_>>()
    };
    let (here, there) = (from(reader), from(served));
    for (number, to, expects, sends) in here {
        let (_, back, theirs, mine) = *there.iter().find(|t| t.0 == to).expect("a queue pair of the peer");
        assert_eq!((back, theirs, mine), (number, sends, expects));
    }
}
