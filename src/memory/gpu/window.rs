//! Accesses of the host to GPU memory, through a buffer in host memory. The caller waits: for tools and tests.

use std::{io, sync::Arc, time::Duration};

use super::{CopyQueue, Direction, Gpu, GpuError, Piece};
use crate::{config::CopyMethod, memory::Memory};

/// How long an access waits for its copy.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The buffer of one GPU pool.
pub(crate) struct Window {
    buffer: Memory,
    read: CopyQueue,
    write: CopyQueue,
}

impl Window {
    /// Bytes of the buffer: the longest access.
    pub(crate) const BYTES: u64 = 1 << 20;

    pub(crate) fn new(gpu: &Gpu) -> io::Result<Self> {
        let buffer = Memory::anonymous(&[Self::BYTES]).map_err(io::Error::other)?;
        let (read, write) = (CopyQueue::new(gpu, CopyMethod::Copies)?, CopyQueue::new(gpu, CopyMethod::Copies)?);
        Ok(Self { buffer, read, write })
    }

    /// Reads from a segment and an offset of `pool`.
    pub(crate) fn read(&mut self, pool: &Memory, at: (u16, u64), into: &mut [u8]) -> io::Result<()> {
        let piece = Piece::new((pool, at.0, at.1), (&self.buffer, 0, 0), into.len() as u64)?;
        Self::run(&mut self.read, Direction::ToHost, piece, pool, &self.buffer)?;
        self.buffer.read_into(0, 0, into)
    }

    /// Writes to a segment and an offset of `pool`.
    pub(crate) fn write(&mut self, pool: &Memory, at: (u16, u64), from: &[u8]) -> io::Result<()> {
        self.buffer.write_from(0, 0, from)?;
        let piece = Piece::new((&self.buffer, 0, 0), (pool, at.0, at.1), from.len() as u64)?;
        Self::run(&mut self.write, Direction::ToGpu, piece, pool, &self.buffer)
    }

    fn run(
        queue: &mut CopyQueue,
        direction: Direction,
        piece: Piece,
        pool: &Memory,
        buffer: &Memory,
    ) -> io::Result<()> {
        let keep = Arc::new((pool.clone(), buffer.clone()));
        let submitted = queue.submit(direction, vec![piece], keep).is_some();
        if submitted && !queue.wait(TIMEOUT) {
            return Err(GpuError::Hung { seconds: TIMEOUT.as_secs() }.into());
        }
        match queue.finished() {
            (_, false) if submitted => Ok(()),
            _ => Err(GpuError::Os { what: "a copy of GPU memory", error: "the GPU refused it".into() }.into()),
        }
    }
}
