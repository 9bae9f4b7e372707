//! A producer's ticket for a lane: where to connect, and the key that proves the right to.

use std::fmt;

use kvferry_proto::LaneKind;

use crate::lane::verbs::VerbsTicket;

/// The answer to ConnectLane. Valid for the session of the requesting rank.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum LaneTicket {
    /// A TCP lane.
    Tcp {
        /// Host to connect to; `None`: the host of the control plane.
        host: Option<String>,
        /// Port of the data server, not 0.
        port: u16,
        /// Names the lane in its first frame.
        lane: u64,
        /// HMAC-SHA256 key of the lane.
        key: [u8; 32],
    },
    /// A lane inside one host.
    Local {
        /// Path of a unix socket, or an abstract name when it starts with a zero byte; 1 to 108 bytes.
        uds: Vec<u8>,
        /// Names the lane.
        lane: u64,
        /// The key that opens the lane.
        key: [u8; 32],
    },
    /// A lane over verbs.
    Verbs(VerbsTicket),
}

impl LaneTicket {
    /// Longest path of a unix socket, in bytes: the size of `sockaddr_un`'s path.
    pub(crate) const MAX_UDS: usize = 108;
    /// Longest host name, in bytes.
    pub(crate) const MAX_HOST: usize = 255;

    /// The lane's kind.
    pub(crate) fn kind(&self) -> LaneKind {
        match self {
            Self::Tcp { .. } => LaneKind::Tcp,
            Self::Local { .. } => LaneKind::Local,
            Self::Verbs(_) => LaneKind::Verbs,
        }
    }
}

impl fmt::Debug for LaneTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The keys open the producer's memory: they are never printed.
        match self {
            Self::Tcp { host, port, lane, .. } => f
                .debug_struct("Tcp")
                .field("host", host)
                .field("port", port)
                .field("lane", lane)
                .finish_non_exhaustive(),
            Self::Verbs(t) => f.debug_struct("Verbs").field("lane", &t.lane).field("rails", &t.rails.len()).finish(),
            Self::Local { uds, lane, .. } => f
                .debug_struct("Local")
                .field("uds", &uds.escape_ascii().to_string())
                .field("lane", lane)
                .finish_non_exhaustive(),
        }
    }
}
