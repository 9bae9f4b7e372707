//! Lanes: how bytes move to and from one peer rank.

use std::{io, os::fd::BorrowedFd};

use kvferry_proto::{Lane, LaneKind};

pub(crate) mod error;
pub(crate) mod faulty;
pub(crate) mod local;
mod log_limit;
pub(crate) mod staged;
pub(crate) mod tcp;
pub(crate) mod ticket;
pub(crate) mod verbs;

pub(crate) use error::LaneError;

/// The kinds of lanes that this build has, best first.
pub fn built() -> &'static [LaneKind] {
    if cfg!(feature = "verbs") {
        &[LaneKind::Verbs, LaneKind::Local, LaneKind::Tcp]
    } else {
        &[LaneKind::Local, LaneKind::Tcp]
    }
}

impl WakingLane for Box<dyn WakingLane> {
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        (**self).arm()
    }
}

/// A lane with a descriptor to sleep on.
pub(crate) trait WakingLane: Lane {
    /// Called before the owner sleeps. `Ok(None)`: no event will come. `Ok(Some(fd))`: readable when `poll` has something to
    /// do; level-triggered, and the same descriptor for the lane's whole life. A lane that can go on at once returns
    /// [`io::ErrorKind::WouldBlock`]: the owner must poll it rather than sleep.
    fn arm(&mut self) -> io::Result<Option<BorrowedFd<'_>>>;
}
