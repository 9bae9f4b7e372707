//! The reason for which a rail of a lane failed.

use std::{fmt, io};

use kvferry_proto::Cause;

use super::cq::Status;

/// The reason for which a rail of a lane failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureReason {
    /// A request failed; with the vendor's error.
    Completion(Status, u32),
    /// The device refused requests, with this errno.
    Post(i32),
    /// The completion queue is broken.
    Queue,
    /// A request did not complete in time.
    Stalled,
    /// The device is unusable.
    Device,
    /// The lane's owner closed it.
    Killed,
}

impl FailureReason {
    /// Whether the peer or the network may have caused it.
    pub(crate) fn may_be_remote(self) -> bool {
        match self {
            Self::Completion(status, _) => !status.is_local(),
            Self::Stalled => true,
            Self::Post(_) | Self::Queue | Self::Device | Self::Killed => false,
        }
    }

    pub(crate) fn cause(self) -> Cause {
        match self {
            Self::Completion(Status::RETRIES_EXCEEDED, _) | Self::Stalled => Cause::Unreachable,
            _ => Cause::LaneFailed,
        }
    }
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completion(status, vendor) => write!(f, "{status}, vendor error {vendor:#x}"),
            Self::Post(os) => write!(f, "the device refused requests: {}", io::Error::from_raw_os_error(*os)),
            Self::Queue => f.write_str("its completion queue is broken"),
            Self::Stalled => f.write_str("no completion came for longer than the transport may take: lost"),
            Self::Device => f.write_str("the device failed or was removed"),
            Self::Killed => f.write_str("closed by its owner"),
        }
    }
}
