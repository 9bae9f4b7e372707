//! A reliable connected queue pair, through its states.
//!
//! Owns the pair. Dropping it destroys it; teardown destroys it explicitly, to learn whether that succeeded.

use std::{
    io,
    ptr::{self, NonNull},
    sync::Arc,
};

use ibverbs_sys::{
    ibv_ah_attr, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask as mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type,
    ibv_send_wr,
};

use super::{
    cq::Cq,
    device::{check, mtu_code},
    error::VerbsError,
    exchange::{QpEnd, RailEnd},
    memory::Pd,
};
use crate::config::VerbsConfig;

/// The purpose of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// It posts READs. No peer reaches memory through it.
    Reader,
    /// A peer READs through it. It posts nothing.
    Served,
}

/// The local address of a queue pair.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At {
    /// Port of the device.
    pub port: u8,
    /// Index of the local GID; `None`: packets carry no global header (InfiniBand in one subnet).
    pub gid_index: Option<u8>,
}

/// Settings that both ends agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// Path MTU in bytes: the smaller of both.
    pub mtu: u32,
    /// READs in flight: no more than the reader can have, and than the served end accepts.
    pub rd_atomic: u8,
}

/// A queue pair.
#[derive(Debug)]
pub(crate) struct Qp {
    qp: NonNull<ibv_qp>,
    pd: Arc<Pd>,
    side: Side,
}

// SAFETY: see `Device`; posting takes `&mut self`.
unsafe impl Send for Qp {}

impl Qp {
    /// A queue pair in INIT, of `depth` requests. `cq` must be dropped after it.
    pub(crate) fn new(pd: &Arc<Pd>, cq: &Cq, depth: u32, side: Side, port: u8) -> Result<Self, VerbsError> {
        let mut init = ibv_qp_init_attr {
            send_cq: cq.raw(),
            recv_cq: cq.raw(),
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
            ..Default::default()
        };
        init.cap.max_send_wr = if side == Side::Reader { depth } else { 1 };
        init.cap.max_recv_wr = 1;
        init.cap.max_send_sge = 1;
        init.cap.max_recv_sge = 1;
        let device = pd.device();
        // SAFETY: domain and queue are alive, and `init` is filled in.
        let qp = NonNull::new(unsafe { (device.lib().create_qp)(pd.raw(), &mut init) })
            .ok_or_else(|| device.os("ibv_create_qp", io::Error::last_os_error()))?;
        let it = Self { qp, pd: pd.clone(), side };
        let mut a = ibv_qp_attr { qp_state: ibv_qp_state::IBV_QPS_INIT, port_num: port, ..Default::default() };
        // Remote READ on the served side, no access on the other: 4 is IBV_ACCESS_REMOTE_READ.
        a.qp_access_flags = if side == Side::Served { 4 } else { 0 };
        it.modify(a, &[mask::IBV_QP_STATE, mask::IBV_QP_PKEY_INDEX, mask::IBV_QP_PORT, mask::IBV_QP_ACCESS_FLAGS])
            .map_err(|e| device.os("queue pair to INIT", e))?;
        Ok(it)
    }

    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the pair is alive, and its number never changes.
        unsafe { (*self.qp.as_ptr()).qp_num }
    }

    /// To RTR and RTS, towards a peer's queue pair.
    pub(crate) fn connect(
        &self,
        at: At,
        peer: &RailEnd,
        end: QpEnd,
        my_psn: u32,
        agreed: Agreed,
        config: &VerbsConfig,
    ) -> Result<(), VerbsError> {
        let device = self.pd.device();
        let mtu = mtu_code(agreed.mtu).ok_or(VerbsError::Protocol { what: "a path MTU under 256 bytes" })?;
        let mut ah = ibv_ah_attr { dlid: peer.lid, sl: config.service_level, port_num: at.port, ..Default::default() };
        if let Some(index) = at.gid_index {
            ah.is_global = 1;
            ah.grh.dgid.raw = peer.gid.0;
            ah.grh.sgid_index = index;
            ah.grh.hop_limit = HOP_LIMIT;
            ah.grh.traffic_class = config.traffic_class;
        }
        let rtr = ibv_qp_attr {
            qp_state: ibv_qp_state::IBV_QPS_RTR,
            path_mtu: mtu,
            dest_qp_num: end.number,
            rq_psn: end.psn,
            max_dest_rd_atomic: if self.side == Side::Served { agreed.rd_atomic } else { UNUSED },
            min_rnr_timer: config.min_rnr_timer,
            ah_attr: ah,
            ..Default::default()
        };
        let fields = [
            mask::IBV_QP_STATE,
            mask::IBV_QP_AV,
            mask::IBV_QP_PATH_MTU,
            mask::IBV_QP_DEST_QPN,
            mask::IBV_QP_RQ_PSN,
            mask::IBV_QP_MAX_DEST_RD_ATOMIC,
            mask::IBV_QP_MIN_RNR_TIMER,
        ];
        self.modify(rtr, &fields).map_err(|e| device.os("queue pair to RTR (is the peer's address reachable?)", e))?;
        let rts = ibv_qp_attr {
            qp_state: ibv_qp_state::IBV_QPS_RTS,
            timeout: config.timeout,
            // 7 means without end on soft-RoCE; the configuration refuses it.
            retry_cnt: config.retry,
            rnr_retry: RNR_RETRY,
            sq_psn: my_psn,
            max_rd_atomic: if self.side == Side::Reader { agreed.rd_atomic } else { UNUSED },
            ..Default::default()
        };
        let fields = [
            mask::IBV_QP_STATE,
            mask::IBV_QP_TIMEOUT,
            mask::IBV_QP_RETRY_CNT,
            mask::IBV_QP_RNR_RETRY,
            mask::IBV_QP_SQ_PSN,
            mask::IBV_QP_MAX_QP_RD_ATOMIC,
        ];
        self.modify(rts, &fields).map_err(|e| device.os("queue pair to RTS", e))
    }

    /// To ERR: everything posted is flushed.
    pub(crate) fn fail(&self) -> io::Result<()> {
        let attr = ibv_qp_attr { qp_state: ibv_qp_state::IBV_QPS_ERR, ..Default::default() };
        self.modify(attr, &[mask::IBV_QP_STATE])
    }

    fn modify(&self, mut attr: ibv_qp_attr, fields: &[mask]) -> io::Result<()> {
        let bits = fields.iter().fold(0, |m, f| m | f.0);
        // SAFETY: the pair is alive, and the fields named by the mask are filled in.
        check(unsafe { (self.pd.device().lib().modify_qp)(self.qp.as_ptr(), &mut attr, bits as i32) })
    }

    /// Posts a chain. After a failure, any part of it may have been posted.
    ///
    /// # Safety
    /// `first` must be a chain of valid requests that ends with a null link. The memory that they name must be registered
    /// and stay valid until each request has completed or the pair is destroyed.
    #[inline]
    pub(crate) unsafe fn post(&mut self, first: *mut ibv_send_wr) -> io::Result<()> {
        let mut bad = ptr::null_mut();
        // SAFETY: the pair is alive, so its context is, whose operations were set when it was opened. The chain is valid by
        // this function's contract.
        let rc = unsafe {
            match (*(*self.qp.as_ptr()).context).ops.post_send {
                Some(post) => post(self.qp.as_ptr(), first, &mut bad),
                None => return Err(io::ErrorKind::Unsupported.into()),
            }
        };
        check(rc)
    }

    /// Destroys it. After success it cannot write memory any more, and its remaining completions have no effect.
    pub(crate) fn destroy(self) -> io::Result<()> {
        let done = self.destroy_once();
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: the domain is taken out once and `this` is never dropped; its raw pair is not used again.
        drop(unsafe { ptr::read(&this.pd) });
        done
    }

    fn destroy_once(&self) -> io::Result<()> {
        // SAFETY: called once, by `destroy` or by `drop`, never by both.
        match check(unsafe { (self.pd.device().lib().destroy_qp)(self.qp.as_ptr()) }) {
            // A removed device has no queue pairs any more: the kernel destroyed them before it returned this error.
            Err(e) if super::memory::gone(self.pd.device(), &e) => Ok(()),
            done => done,
        }
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        if let Err(error) = self.destroy_once() {
            tracing::warn!(device = self.pd.device().name(), %error, "a queue pair cannot be destroyed");
        }
    }
}

/// A queue pair's first sequence number: random, so that it does not accept packets of an earlier connection.
pub(crate) fn random_psn() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness a late packet may do harm, as with every stack that starts at zero.
    let _ = getrandom::fill(&mut bytes);
    u32::from_ne_bytes(bytes) & 0xff_ffff
}

/// READs in flight in the direction that has none: every device accepts this value.
const UNUSED: u8 = 1;
/// Routers that a packet may pass.
const HOP_LIMIT: u8 = 64;
/// 7 means without end. READs never meet a receiver that is not ready, so it is never needed.
const RNR_RETRY: u8 = 7;
