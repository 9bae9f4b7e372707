//! Copies and memsets. A copy checks its device ranges at the call and again when it runs.

use std::sync::atomic::Ordering::Relaxed;

use crate::abi::{CopyAttributes, In, Out, api};
use crate::control::tally;
use crate::device::driver;
use crate::error::{Error, Result};
use crate::space::{self, Access, Piece};
use crate::stream::{Position, Work, submit};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Host,
    Device,
}

/// One side of a copy, resolved only when the copy runs.
#[derive(Clone, Copy, Debug)]
struct Side {
    address: u64,
    len: u64,
    place: Place,
}

impl Side {
    /// Checks an address of a caller.
    fn new(address: u64, len: usize) -> Result<Side> {
        let len = len as u64;
        let place = if space::is_device(address) { Place::Device } else { Place::Host };
        if place == Place::Device {
            space::resolve(address, len, Access::Copy)?;
        } else if address == 0 && len > 0 {
            return Err(Error::INVALID_VALUE);
        }
        Ok(Side { address, len, place })
    }

    fn pieces(self) -> Result<Vec<Piece>> {
        match self.place {
            Place::Host => Ok(space::host(self.address, self.len)),
            Place::Device => space::resolve(self.address, self.len, Access::Copy).map_err(|_| Error::ILLEGAL_ADDRESS),
        }
    }

    fn read(self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len as usize];
        // SAFETY: the buffer has the length of the side.
        unsafe { space::copy_out(&self.pieces()?, bytes.as_mut_ptr()) };
        Ok(bytes)
    }
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    from: Side,
    to: Side,
}

impl Copy {
    fn new(to: u64, from: u64, len: usize) -> Result<Copy> {
        Ok(Copy { from: Side::new(from, len)?, to: Side::new(to, len)? })
    }

    fn expect(self, from: Place, to: Place) -> Result<Copy> {
        if (self.from.place, self.to.place) == (from, to) { Ok(self) } else { Err(Error::INVALID_VALUE) }
    }

    fn count(self) {
        let tally = tally();
        let counter = match (self.from.place, self.to.place) {
            (Place::Host, Place::Device) => &tally.host_to_device,
            (Place::Device, Place::Host) => &tally.device_to_host,
            (Place::Device, Place::Device) => &tally.device_to_device,
            (Place::Host, Place::Host) => &tally.host_to_host,
        };
        counter.fetch_add(1, Relaxed);
    }

    fn run(self) -> Result {
        space::copy(&self.from.pieces()?, &self.to.pieces()?);
        Ok(())
    }

    fn submit(self, stream: usize) -> Result<Position> {
        let position = submit(stream, Work::Data(Box::new(move || self.run())))?;
        self.count();
        Ok(position)
    }
}

pub(crate) fn set(stream: usize, address: u64, value: u8, len: usize) -> Result<Position> {
    let side = Side::new(address, len)?;
    if side.place == Place::Host {
        return Err(Error::INVALID_VALUE);
    }
    let work = move || {
        for piece in side.pieces()? {
            // SAFETY: a piece is memory of its length.
            unsafe { piece.at.write_bytes(value, piece.len) };
        }
        Ok(())
    };
    let position = submit(stream, Work::Data(Box::new(work)))?;
    tally().memsets.fetch_add(1, Relaxed);
    Ok(position)
}

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`. The other orders allow reads before the stream gets there.
const ORDER_STREAM: u32 = 1;
const ORDER_ANY: u32 = 3;

/// A copy of a batch, with its source as it was at the call if the caller allowed early reads.
struct BatchCopy {
    copy: Copy,
    early: Option<Vec<u8>>,
}

impl BatchCopy {
    fn run(self) -> Result {
        let Some(bytes) = self.early else { return self.copy.run() };
        // SAFETY: the bytes have the length of the copy.
        unsafe { space::copy_in(&self.copy.to.pieces()?, bytes.as_ptr()) };
        Ok(())
    }
}

struct Batch {
    to: Vec<u64>,
    from: Vec<u64>,
    sizes: Vec<usize>,
    attributes: Vec<CopyAttributes>,
    /// The first copy of each of the attributes.
    starts: Vec<usize>,
}

impl Batch {
    /// Checks the batch. An error comes with the copy that it is about, if it is about one.
    fn copies(&self) -> std::result::Result<Vec<BatchCopy>, (Error, Option<usize>)> {
        let rising = self.starts.is_sorted_by(|a, b| a < b) && self.starts.first() == Some(&0);
        if self.to.is_empty() || !rising || self.starts.iter().any(|&start| start >= self.to.len()) {
            return Err((Error::INVALID_VALUE, None));
        }
        (0..self.to.len()).map(|i| self.copy(i).map_err(|error| (error, Some(i)))).collect()
    }

    fn copy(&self, i: usize) -> Result<BatchCopy> {
        let attributes = &self.attributes[self.starts.partition_point(|&start| start <= i) - 1];
        if !(ORDER_STREAM..=ORDER_ANY).contains(&attributes.source_order) || self.sizes[i] == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let copy = Copy::new(self.to[i], self.from[i], self.sizes[i])?;
        let early = (attributes.source_order != ORDER_STREAM).then(|| copy.from.read()).transpose()?;
        Ok(BatchCopy { copy, early })
    }

    fn submit(&self, stream: usize, failed: &Out<usize>) -> Result {
        let copies = self.copies().map_err(|(error, at)| {
            failed.put_if_wanted(at.unwrap_or(usize::MAX));
            error
        })?;
        let kinds: Vec<Copy> = copies.iter().map(|c| c.copy).collect();
        submit(stream, Work::Data(Box::new(move || copies.into_iter().try_for_each(BatchCopy::run))))?;
        kinds.into_iter().for_each(Copy::count);
        tally().batches.fetch_add(1, Relaxed);
        Ok(())
    }
}

api! {
    InContext fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) {
        Copy::new(to, from, len)?.expect(Place::Host, Place::Device)?.submit(stream).map(drop)
    }

    InContext fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, len: usize, stream: usize) {
        Copy::new(to, from, len)?.expect(Place::Device, Place::Host)?.submit(stream).map(drop)
    }

    InContext fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) {
        Copy::new(to, from, len)?.expect(Place::Device, Place::Device)?.submit(stream).map(drop)
    }

    InContext fn cuMemcpyAsync(to: u64, from: u64, len: usize, stream: usize) {
        Copy::new(to, from, len)?.submit(stream).map(drop)
    }

    NotInCapture fn cuMemcpyHtoD_v2(to: u64, from: u64, len: usize) {
        Copy::new(to, from, len)?.expect(Place::Host, Place::Device)?.submit(0)?.wait()
    }

    NotInCapture fn cuMemcpyDtoH_v2(to: u64, from: u64, len: usize) {
        Copy::new(to, from, len)?.expect(Place::Device, Place::Host)?.submit(0)?.wait()
    }

    NotInCapture fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) {
        Copy::new(to, from, len)?.expect(Place::Device, Place::Device)?.submit(0)?.wait()
    }

    NotInCapture fn cuMemcpy(to: u64, from: u64, len: usize) {
        Copy::new(to, from, len)?.submit(0)?.wait()
    }

    InContext fn cuMemcpyBatchAsync(
        to: In<u64>,
        from: In<u64>,
        sizes: In<usize>,
        count: usize,
        attributes: In<CopyAttributes>,
        starts: In<usize>,
        attribute_count: usize,
        failed: Out<usize>,
        stream: usize,
    ) {
        if !driver()?.settings.batch || driver()?.settings.version < 12080 {
            return Err(Error::NOT_SUPPORTED);
        }
        failed.put_if_wanted(usize::MAX);
        // The default stream is not allowed.
        if stream < 0x1000 || attribute_count == 0 || attribute_count > count {
            return Err(Error::INVALID_VALUE);
        }
        let batch = Batch {
            to: to.list(count)?,
            from: from.list(count)?,
            sizes: sizes.list(count)?,
            attributes: attributes.list(attribute_count)?,
            starts: starts.list(attribute_count)?,
        };
        batch.submit(stream, &failed)
    }
}
