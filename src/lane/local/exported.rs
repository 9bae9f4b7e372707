//! The part of a reply that describes a pool in GPU memory.
//!
//! ```text
//! uuid[16] allocations:u32 parts:u32
//! for each allocation: size:u64 kind:u32 0:u32, and handle[64] if kind is 0
//! for each part:       segment:u32 allocation:u32 len:u64 offset:u64
//! ```
//! `uuid` names the owner's GPU. An allocation of kind 0 is opened by its legacy IPC handle, one of kind 1 by the next of the
//! packet's descriptors. The parts of a segment follow each other, and segments ascend.

use kvferry_proto::PoolLayout;

use super::wire::{Fields, MAX_FILES};
use crate::memory::gpu::{Handle, Part};

const HEAD: usize = 24;
const ALLOCATION: usize = 16;
const HANDLE: usize = 64;
const PART: usize = 24;

/// Most allocations of a pool. Each may need a descriptor, and one packet carries so many beside the fence table's.
const MAX_ALLOCATIONS: usize = MAX_FILES - 1;
/// Most parts: one for each segment of the largest pool. More are needed only where a segment lies in several allocations.
const MAX_PARTS: usize = PoolLayout::MAX_SEGMENTS;
/// Longest description, in bytes.
pub(super) const MAX_BYTES: usize = HEAD + MAX_ALLOCATIONS * (ALLOCATION + HANDLE) + MAX_PARTS * PART;

/// A pool in GPU memory, as its owner exports it. Its descriptors travel beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GpuPool {
    /// The owner's GPU.
    pub uuid: [u8; 16],
    /// The allocations, with their sizes in bytes.
    pub allocations: Vec<(Handle, u64)>,
    /// Parts of segments, by segment and offset.
    pub parts: Vec<Part>,
}

impl GpuPool {
    /// Whether a reply can carry it. The reason, if not.
    pub(super) fn check(&self) -> Result<(), String> {
        for (what, has, limit) in
            [("allocations", self.allocations.len(), MAX_ALLOCATIONS), ("parts", self.parts.len(), MAX_PARTS)]
        {
            if has > limit {
                return Err(format!(
                    "it lies in {has} {what}, and a local lane takes {limit}: allocate it in fewer pieces"
                ));
            }
        }
        Ok(())
    }

    /// Number of its allocations that are opened by descriptors.
    pub(super) fn descriptors(&self) -> usize {
        self.allocations.iter().filter(|(handle, _)| *handle == Handle::Descriptor).count()
    }

    pub(super) fn encode(&self, b: &mut Vec<u8>) {
        b.extend(self.uuid);
        b.extend((self.allocations.len() as u32).to_le_bytes());
        b.extend((self.parts.len() as u32).to_le_bytes());
        for (handle, size) in &self.allocations {
            b.extend(size.to_le_bytes());
            b.extend(u32::from(*handle == Handle::Descriptor).to_le_bytes());
            b.extend([0; 4]);
            if let Handle::Legacy(handle) = handle {
                b.extend(handle);
            }
        }
        for p in &self.parts {
            b.extend(u32::from(p.segment).to_le_bytes());
            b.extend(p.allocation.to_le_bytes());
            b.extend(p.len.to_le_bytes());
            b.extend(p.offset.to_le_bytes());
        }
    }

    /// Reads the description of a pool with so many segments. Parts are in bounds of their allocations.
    pub(super) fn decode(r: &mut Fields<'_>, segments: u32) -> Result<Self, &'static str> {
        let uuid = r.take()?;
        let (allocations, parts) = (r.u32()? as usize, r.u32()? as usize);
        if allocations > MAX_ALLOCATIONS || parts > MAX_PARTS {
            return Err("a reply with too many allocations or parts");
        }
        let mut this = Self { uuid, allocations: Vec::with_capacity(allocations), parts: Vec::with_capacity(parts) };
        for _ in 0..allocations {
            let (size, kind, zero) = (r.u64()?, r.u32()?, r.u32()?);
            let handle = match (kind, zero) {
                (0, 0) => Handle::Legacy(r.take()?),
                (1, 0) => Handle::Descriptor,
                _ => return Err("an allocation of an unknown kind"),
            };
            this.allocations.push((handle, size));
        }
        for _ in 0..parts {
            let (segment, allocation, len, offset) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
            let size = this.allocations.get(allocation as usize).ok_or("a part of an unknown allocation")?.1;
            if segment >= segments {
                return Err("a part of an unknown segment");
            }
            if len == 0 || offset.checked_add(len).is_none_or(|end| end > size) {
                return Err("a part outside of its allocation");
            }
            let segment = u16::try_from(segment).map_err(|_| "a part of an unknown segment")?;
            let at = match this.parts.last() {
                Some(last) if last.segment > segment => return Err("parts that are not in order"),
                Some(last) if last.segment == segment => {
                    last.at.checked_add(last.len).ok_or("a segment that is too long")?
                }
                _ => 0,
            };
            this.parts.push(Part { segment, at, len, allocation, offset });
        }
        Ok(this)
    }
}

#[cfg(test)]
impl GpuPool {
    /// A pool of four segments, in three allocations.
    pub(super) fn sample() -> Self {
        let part = |segment, at, len, allocation, offset| Part { segment, at, len, allocation, offset };
        Self {
            uuid: [3; 16],
            allocations: vec![(Handle::Legacy([9; 64]), 1000), (Handle::Descriptor, 1 << 40), (Handle::Descriptor, 64)],
            parts: vec![part(0, 0, 1000, 0, 0), part(0, 1000, 77, 1, 0), part(1, 0, 9, 1, 100), part(3, 0, 64, 2, 0)],
        }
    }

    /// The longest description.
    pub(super) fn longest() -> Self {
        let part = |i| Part { segment: i as u16, at: 0, len: 1, allocation: (i % MAX_ALLOCATIONS) as u32, offset: 9 };
        Self {
            uuid: [3; 16],
            allocations: (0..MAX_ALLOCATIONS).map(|i| (Handle::Legacy([i as u8; 64]), u64::MAX)).collect(),
            parts: (0..MAX_PARTS).map(part).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_of_too_many_allocations_is_refused_with_the_number() {
        let mut pool = GpuPool::longest();
        assert_eq!(pool.check(), Ok(()));
        pool.allocations.push((Handle::Descriptor, 1));
        let why = pool.check().unwrap_err();
        assert!(why.contains("253 allocations") && why.contains("takes 252"), "{why}");
        let mut pool = GpuPool::longest();
        pool.parts.push(pool.parts[0]);
        assert!(pool.check().unwrap_err().contains("4097 parts"));
    }
}
