//! The choice of the way in which a part of a job is copied. Makes no call of the driver.

use super::queue::{Direction, Piece};
use crate::config::CopyMethod;

/// Length from which runs are copied one by one: the cost of a call is then a few percent of its copy (LMCache and vLLM
/// measured gains of other ways only below it). Not measured by us on a GPU.
const LONG: u64 = 256 << 10;
/// The kernel gets ranges of at most this length, so that a few long ones keep all its blocks busy.
pub(super) const KERNEL_RANGE: u64 = 64 << 10;
/// Most ranges of a part.
pub(super) const MOST_RANGES: usize = 4096;
/// The kernel reads and writes vectors of this many bytes.
const VECTOR: u64 = 16;

/// The way to copy a part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    Copies,
    Batch,
    Kernel,
}

/// Chooses the way for these runs.
pub(super) fn choose(method: CopyMethod, direction: Direction, runs: &[Piece], kernel: bool, batch: bool) -> Way {
    let bytes: u64 = runs.iter().map(|r| r.len).sum();
    let kernel = kernel && fits_kernel(direction, runs);
    let short = runs.len() > 1 && bytes / (runs.len() as u64) < LONG;
    match method {
        CopyMethod::Copies => Way::Copies,
        CopyMethod::Batch if batch => Way::Batch,
        CopyMethod::Batch => Way::Copies,
        CopyMethod::Kernel if kernel => Way::Kernel,
        CopyMethod::Auto if short && kernel => Way::Kernel,
        CopyMethod::Auto | CopyMethod::Kernel if short && batch => Way::Batch,
        CopyMethod::Auto | CopyMethod::Kernel => Way::Copies,
    }
}

/// Whether the kernel can copy these runs: all aligned, and without gaps on the host.
fn fits_kernel(direction: Direction, runs: &[Piece]) -> bool {
    let aligned = runs.iter().all(|r| (r.src | r.dst | r.len) % VECTOR == 0);
    let ranges: u64 = runs.iter().map(|r| r.len.div_ceil(KERNEL_RANGE)).sum();
    let without_gaps = match direction {
        Direction::ToGpu => runs.windows(2).all(|w| w[0].src + w[0].len == w[1].src),
        Direction::ToHost => runs.windows(2).all(|w| w[0].dst + w[0].len == w[1].dst),
        Direction::Between => true,
    };
    aligned && without_gaps && ranges <= MOST_RANGES as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(n: u64, len: u64, gap: u64) -> Vec<Piece> {
        (0..n).map(|i| Piece { src: 4096 + i * len, dst: (1 << 30) + i * (len + gap), len }).collect()
    }

    #[test]
    fn long_runs_are_copied_one_by_one_and_short_ones_by_the_kernel_or_in_a_batch() {
        let way = |n, len, kernel, batch| choose(CopyMethod::Auto, Direction::ToGpu, &runs(n, len, 64), kernel, batch);
        assert_eq!(way(512, 16 << 10, true, true), Way::Kernel);
        assert_eq!(way(512, 16 << 10, false, true), Way::Batch);
        assert_eq!(way(512, 16 << 10, false, false), Way::Copies);
        assert_eq!(way(8, 1 << 20, true, true), Way::Copies);
        assert_eq!(way(1, 4096, true, true), Way::Copies);
        assert_eq!(way(512, 1000, true, true), Way::Batch, "the kernel copies vectors of 16 bytes only");
        let gaps = choose(CopyMethod::Kernel, Direction::ToHost, &runs(512, 4096, 64), true, true);
        assert_eq!(gaps, Way::Batch, "the host's side has gaps");
        assert_eq!(choose(CopyMethod::Copies, Direction::ToGpu, &runs(512, 4096, 0), true, true), Way::Copies);
    }
}
