//! The checks of GPU memory: the driver, each GPU, its window on the bus, and its way to each NIC.

use kvferry::{GpuInfo, LaneKind, Memory, survey_gpus};

use super::{
    Finding, Status,
    pci::{Distance, Sysfs},
    try_lane,
};
use crate::{pool::PoolPlace, report::size};

/// Bytes allocated on each GPU: what registration is tried with.
const PROBE: u64 = 2 << 20;

/// All checks of GPU memory. Opens each GPU, which takes up to a second for each.
pub(super) fn findings() -> Vec<Finding> {
    let gpus = match survey_gpus() {
        Ok(gpus) => gpus,
        Err(e) => {
            let advice = "nothing to do where pools lie in host memory; docs/gpu.md says what a GPU pool needs";
            return vec![Finding::new("GPU driver", Status::Warn, e.to_string(), advice)];
        }
    };
    let version = gpus.first().map_or(0, |g| g.driver);
    let driver = format!("CUDA {}.{}, visible GPUs: {}", version / 1000, version % 1000 / 10, gpus.len());
    let mut found = vec![Finding::new("GPU driver", Status::Ok, driver, "")];
    let sysfs = Sysfs::new("/sys");
    for gpu in &gpus {
        found.extend(one(gpu, &sysfs));
    }
    found
}

fn one(gpu: &GpuInfo, sysfs: &Sysfs) -> Vec<Finding> {
    let (major, minor) = gpu.capability;
    let line = format!(
        "{}: {}, {}, PCI {}, {}, compute capability {major}.{minor}",
        gpu.ordinal,
        gpu.name,
        gpu.uuid_text(),
        gpu.pci,
        size(gpu.memory)
    );
    let memory = match Memory::alloc_gpu(gpu.ordinal, &[PROBE]) {
        Ok(memory) => memory,
        Err(e) => {
            let advice = "pools on this GPU cannot be made: free its memory, or see `nvidia-smi` and dmesg";
            return vec![Finding::new("GPU", Status::Warn, format!("{line}; cannot be used: {e}"), advice)];
        }
    };
    let mut found = vec![
        Finding::new("GPU", Status::Ok, line, ""),
        copies(memory.gpu_info().unwrap_or(gpu)),
        sharing(gpu),
        nics_write(gpu, sysfs.has_peer_memory()),
        window(gpu, sysfs.window(&gpu.pci)),
    ];
    found.extend(distances(gpu, sysfs));
    found.extend(translation(gpu, sysfs.is_translated(&gpu.pci)));
    #[cfg(feature = "verbs")]
    found.extend(registrations(gpu, &memory));
    found.extend(pulls(gpu));
    found
}

/// The ways to copy.
fn copies(open: &GpuInfo) -> Finding {
    let batches = if open.batch { "batches supported" } else { "no batches (before CUDA 12.8)" };
    let (status, kernel) = match &open.kernel {
        None => (Status::Ok, "copy kernel loaded".to_owned()),
        Some(why) => (Status::Warn, format!("no copy kernel ({why})")),
    };
    Finding::new(
        "GPU copies",
        status,
        format!("{}: {kernel}, {batches}", open.ordinal),
        "short blocks are copied more slowly: the driver compiles the kernel with libnvidia-ptxjitcompiler, which a container may lack",
    )
}

/// Sharing with a process of the same host.
fn sharing(gpu: &GpuInfo) -> Finding {
    let descriptors = if gpu.shareable { "yes" } else { "no" };
    // The name of a slice says so: `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
    let legacy = if gpu.name.contains("MIG ") { "no (MIG)" } else { "for memory of cudaMalloc" };
    Finding::new(
        "GPU sharing",
        if gpu.shareable { Status::Ok } else { Status::Warn },
        format!("{}: pools of kvferry as descriptors: {descriptors}; legacy IPC: {legacy}", gpu.ordinal),
        "pools that kvferry allocates cannot be shared between processes: peers on this host use tcp",
    )
}

/// How NICs would land in this GPU's memory, by its attributes.
fn nics_write(gpu: &GpuInfo, peer_memory: bool) -> Finding {
    let yes = |is: bool| if is { "yes" } else { "no" };
    let registered = gpu.rdma && (gpu.dmabuf || peer_memory);
    let (good, way) = match gpu {
        _ if !gpu.rdma => (false, "reads land through the pinned ring, and a producer serves tcp"),
        _ if !registered => (false, "no NIC can register its memory: the pinned ring, and tcp for a producer"),
        _ if gpu.ordered => (true, "reads land directly, without a flush"),
        _ if gpu.flush => (true, "reads land directly, with a flush after each chunk"),
        _ => (false, "a producer serves verbs, but reads land through the pinned ring"),
    };
    let line = format!(
        "{}: GPUDirect RDMA {}, dmabuf export {}, peer-memory module {}, writes ordered {}, flush by the host {}: {way}",
        gpu.ordinal,
        yes(gpu.rdma),
        yes(gpu.dmabuf),
        if peer_memory { "loaded" } else { "not loaded" },
        yes(gpu.ordered),
        yes(gpu.flush),
    );
    let advice = "only for verbs: use a GPU and a driver with dmabuf export (the open kernel modules), or `modprobe nvidia_peermem`";
    Finding::new("GPU and NICs", if good { Status::Ok } else { Status::Warn }, line, advice)
}

/// The window through which NICs reach its memory, against the memory.
fn window(gpu: &GpuInfo, window: Option<u64>) -> Finding {
    const CHECK: &str = "GPU window (BAR1)";
    match window {
        Some(bytes) if bytes >= gpu.memory => {
            let line = format!("{}: {} for {} of memory", gpu.ordinal, size(bytes), size(gpu.memory));
            Finding::new(CHECK, Status::Ok, line, "")
        }
        Some(bytes) => Finding::new(
            CHECK,
            Status::Warn,
            format!("{}: {} for {} of memory", gpu.ordinal, size(bytes), size(gpu.memory)),
            "only for verbs: a NIC cannot reach a pool larger than the window; turn on resizable BAR in the firmware",
        ),
        None => Finding::new(
            CHECK,
            Status::Warn,
            format!("{}: unknown, since sysfs has no PCI device {}", gpu.ordinal, gpu.pci),
            "only for verbs: run this on the host, or in a container with its /sys",
        ),
    }
}

/// How near each NIC is.
fn distances(gpu: &GpuInfo, sysfs: &Sysfs) -> Option<Finding> {
    let nics: Vec<_> = sysfs.nics().into_iter().map(|nic| (sysfs.distance(&gpu.pci, &nic), nic)).collect();
    let nearest = nics.iter().map(|n| n.0).min()?;
    let each: Vec<_> = nics.iter().map(|(distance, nic)| format!("{nic}: {}", distance.text())).collect();
    Some(Finding::new(
        "GPU to NIC",
        if nearest < Distance::Other { Status::Ok } else { Status::Warn },
        format!("{}: {}", gpu.ordinal, each.join(", ")),
        "data crosses the link between processors: use a GPU and a NIC of one NUMA node, and name the NIC with --rails",
    ))
}

/// Whether an IOMMU is between it and its peers.
fn translation(gpu: &GpuInfo, translated: Option<bool>) -> Option<Finding> {
    let (status, state) = match translated? {
        false => (Status::Ok, "passes addresses through"),
        true => (Status::Warn, "translates addresses"),
    };
    Some(Finding::new(
        "GPU and IOMMU",
        status,
        format!("{}: the IOMMU {state}", gpu.ordinal),
        "only for verbs and several GPUs: transfers between devices may be slow or hang; boot with iommu=pt, and turn off ACS on the switches between them",
    ))
}

/// Registration of its memory on each rail.
#[cfg(feature = "verbs")]
fn registrations(gpu: &GpuInfo, memory: &Memory) -> Vec<Finding> {
    use kvferry::verbs::{GpuReach, VerbsError, gpu_reach};

    let tried = |result: &Result<(), String>| match result {
        Ok(()) => "yes".to_owned(),
        Err(why) => format!("no ({why})"),
    };
    let rail = |r: &GpuReach| {
        let consumer = match (r.is_direct(), &r.unordered) {
            (true, _) => "lands directly".to_owned(),
            (false, Some(why)) if r.is_served() => format!("lands through the ring ({why})"),
            (false, _) => "lands through the ring".to_owned(),
        };
        let producer = if r.is_served() { "is served" } else { "is not served over verbs" };
        let line = format!(
            "{} on {}: dmabuf {}, by address {}: a consumer's pool {consumer}, a producer's {producer}",
            gpu.ordinal,
            r.rail,
            tried(&r.dmabuf),
            tried(&r.address),
        );
        let advice = "see GPU and NICs above; without it, pulls use the ring or tcp";
        Finding::new("GPU registration", if r.is_direct() { Status::Ok } else { Status::Warn }, line, advice)
    };
    match gpu_reach(&kvferry::VerbsConfig::default(), memory) {
        Ok(rails) => rails.iter().map(rail).collect(),
        // The checks of verbs say so already.
        Err(VerbsError::NoDevice | VerbsError::NoLibrary { .. }) => Vec::new(),
        Err(e) => {
            let line = format!("{}: {e}", gpu.ordinal);
            vec![Finding::new("GPU registration", Status::Warn, line, "see verbs device above")]
        }
    }
}

/// Small pulls between two processes with pools on it.
fn pulls(gpu: &GpuInfo) -> [Finding; 2] {
    let one = |check, lane, bad, advice| {
        let (status, found) = match try_lane(lane, false, PoolPlace::Gpu(gpu.ordinal)) {
            Ok(found) => (Status::Ok, found),
            Err(e) => (bad, e.message),
        };
        Finding::new(check, status, format!("{}: {found}", gpu.ordinal), advice)
    };
    [
        one("GPU pull, local", LaneKind::Local, Status::Warn, "pulls use tcp instead; see the log (KVFERRY_LOG=info)"),
        one("GPU pull, tcp", LaneKind::Tcp, Status::Fail, "see the log (KVFERRY_LOG=info), `nvidia-smi` and dmesg"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(change: impl FnOnce(&mut GpuInfo)) -> GpuInfo {
        let mut gpu = GpuInfo::default();
        (gpu.rdma, gpu.dmabuf, gpu.ordered, gpu.flush, gpu.memory) = (true, true, true, true, 1 << 30);
        change(&mut gpu);
        gpu
    }

    #[test]
    fn the_attributes_of_a_gpu_decide_how_nics_land() {
        let way = |change: fn(&mut GpuInfo), peer_memory| {
            let found = nics_write(&gpu(change), peer_memory);
            (found.status, found.found.rsplit_once(": ").unwrap().1.to_owned())
        };
        let is = |(status, text): (Status, String), good: bool, words: &str| {
            assert_eq!(status == Status::Ok, good, "{text}");
            assert!(text.contains(words), "{text}");
        };
        is(way(|_| {}, false), true, "without a flush");
        is(way(|g| g.ordered = false, false), true, "with a flush");
        is(way(|g| (g.ordered, g.flush) = (false, false), false), false, "through the pinned ring");
        is(way(|g| g.dmabuf = false, true), true, "directly");
        is(way(|g| g.dmabuf = false, false), false, "tcp for a producer");
        is(way(|g| g.rdma = false, true), false, "a producer serves tcp");
    }

    #[test]
    fn a_window_smaller_than_the_memory_is_a_warning() {
        let status = |bytes| window(&gpu(|_| {}), bytes).status;
        assert_eq!(status(Some(1 << 30)), Status::Ok);
        assert_eq!(status(Some(256 << 20)), Status::Warn);
        assert_eq!(status(None), Status::Warn);
    }
}
