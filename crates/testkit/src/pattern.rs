//! The bytes with which `kvferry serve` fills its memory, so that a consumer can check every one.
//!
//! A word depends on the seed (the producer's incarnation), the region, the block and the position. So bytes of another
//! block, another region or another incarnation are detected.

use kvferry::{Group, GroupId, Memory, PoolLayout};

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser (Steele, Lea and Flood, 2014): every bit of the input reaches every bit of the output.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The first word of a page. Each word is [`STEP`] more than the one before, which compilers vectorise.
fn base(seed: u64, segment: u16, page: u64) -> u64 {
    mix(seed ^ mix(page.wrapping_mul(STEP) ^ u64::from(segment)))
}

/// The pattern restarts after this many bytes. Every block size is a multiple of it.
pub const PAGE: u64 = 512;

fn fill(seed: u64, segment: u16, page: u64, out: &mut [u8]) {
    let base = base(seed, segment, page);
    for (i, w) in out.chunks_mut(8).enumerate() {
        let word = base.wrapping_add((i as u64).wrapping_mul(STEP)).to_le_bytes();
        w.copy_from_slice(&word[..w.len()]);
    }
}

/// Fills the memory of a producer.
pub fn write(seed: u64, memory: &Memory) -> std::io::Result<()> {
    let mut buffer = vec![0u8; 1 << 20];
    for (segment, &len) in memory.segments().to_vec().iter().enumerate() {
        let segment = segment as u16;
        let mut at = 0;
        while at < len {
            let n = (len - at).min(buffer.len() as u64) as usize;
            for (i, page) in buffer[..n].chunks_mut(PAGE as usize).enumerate() {
                fill(seed, segment, at / PAGE + i as u64, page);
            }
            memory.write_from(segment, at, &buffer[..n])?;
            at += n as u64;
        }
    }
    Ok(())
}

/// Fills one block of a producer's memory again.
pub fn write_block(seed: u64, memory: &Memory, group: &Group, block: u32) -> std::io::Result<()> {
    for r in &group.regions {
        let (at, mut bytes) = (r.block_offset(block), vec![0; r.block_bytes as usize]);
        for (i, page) in bytes.chunks_mut(PAGE as usize).enumerate() {
            fill(seed, r.segment, at / PAGE + i as u64, page);
        }
        memory.write_from(r.segment, at, &bytes)?;
    }
    Ok(())
}

/// Compares pulled blocks with the pattern.
#[derive(Default)]
pub struct Check {
    expected: Vec<u8>,
    found: Vec<u8>,
}

impl Check {
    pub fn new() -> Self {
        Self::default()
    }

    /// Compares local block `dst` with block `src` of the producer's pool. Returns the numbers of equal and different bytes.
    pub fn block(
        &mut self,
        seed: u64,
        (theirs, src): (&PoolLayout, u32),
        (memory, ours, dst): (&Memory, &PoolLayout, u32),
        group: GroupId,
    ) -> std::io::Result<(u64, u64)> {
        let missing = || std::io::Error::other("the group is not in the pool");
        let theirs: &Group = theirs.group(group).ok_or_else(missing)?;
        let ours: &Group = ours.group(group).ok_or_else(missing)?;
        let (mut good, mut bad) = (0, 0);
        for (there, here) in theirs.regions.iter().zip(&ours.regions) {
            let len = here.block_bytes as usize;
            self.expected.resize(len, 0);
            self.found.resize(len, 0);
            let from = there.block_offset(src);
            for (i, page) in self.expected.chunks_mut(PAGE as usize).enumerate() {
                fill(seed, there.segment, from / PAGE + i as u64, page);
            }
            memory.read_into(here.segment, here.block_offset(dst), &mut self.found)?;
            if self.expected == self.found {
                good += len as u64;
            } else {
                let wrong = self.expected.iter().zip(&self.found).filter(|(a, b)| a != b).count() as u64;
                bad += wrong;
                good += len as u64 - wrong;
            }
        }
        Ok((good, bad))
    }
}
