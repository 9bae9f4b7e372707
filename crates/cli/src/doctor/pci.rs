//! What sysfs says about the place of devices on the PCI bus. A file that is absent is no error: a container may have none.

use std::path::{Path, PathBuf};

/// How near two devices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Distance {
    SameSwitch,
    SameRootPort,
    SameNumaNode,
    Other,
}

impl Distance {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::SameSwitch => "same PCI switch",
            Self::SameRootPort => "same root port",
            Self::SameNumaNode => "same NUMA node",
            Self::Other => "another NUMA node or an unknown one",
        }
    }
}

/// A host's sysfs.
#[derive(Debug, Clone)]
pub(super) struct Sysfs(PathBuf);

impl Sysfs {
    pub(super) fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The folder of the device at a PCI address, with links resolved.
    fn device(&self, address: &str) -> Option<PathBuf> {
        // The driver writes digits in upper case.
        self.0.join("bus/pci/devices").join(address.to_lowercase()).canonicalize().ok()
    }

    /// The size of a GPU's window to its memory on the bus, which NVIDIA calls BAR1. That is the largest prefetchable region;
    /// its number differs between generations.
    pub(super) fn window(&self, address: &str) -> Option<u64> {
        /// IORESOURCE_PREFETCH of Linux.
        const PREFETCHABLE: u64 = 0x2000;
        /// Base address registers; the lines after them are the ROM and the windows of bridges.
        const REGISTERS: usize = 6;
        let text = std::fs::read_to_string(self.device(address)?.join("resource")).ok()?;
        let size = |line: &str| {
            let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
            let mut numbers = line.split_whitespace().map(number);
            let (first, last, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
            (flags & PREFETCHABLE != 0).then(|| last.checked_sub(first)?.checked_add(1)).flatten()
        };
        text.lines().take(REGISTERS).filter_map(size).max()
    }

    /// The names of the RDMA devices.
    pub(super) fn nics(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.join("class/infiniband")).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort_unstable();
        names
    }

    /// How near a GPU is to an RDMA device.
    pub(super) fn distance(&self, gpu: &str, nic: &str) -> Distance {
        let nic = self.0.join("class/infiniband").join(nic).join("device").canonicalize().ok();
        let (Some(gpu), Some(nic)) = (self.device(gpu), nic) else { return Distance::Other };
        // The host bridge, the root port, a switch's ports, and the device.
        let bridges = |path: &Path| -> Vec<_> {
            let names = path.iter().filter_map(|p| p.to_str().map(str::to_owned));
            names.skip_while(|n| !n.starts_with("pci0") && !n.starts_with("pci1")).collect()
        };
        let common = bridges(&gpu).into_iter().zip(bridges(&nic)).take_while(|(a, b)| a == b).count();
        let node = |of: &Path| {
            let text = std::fs::read_to_string(of.join("numa_node")).ok()?;
            text.trim().parse::<u32>().ok()
        };
        match common {
            3.. => Distance::SameSwitch,
            2 => Distance::SameRootPort,
            _ if node(&gpu).is_some_and(|n| node(&nic) == Some(n)) => Distance::SameNumaNode,
            _ => Distance::Other,
        }
    }

    /// Whether an IOMMU translates the addresses of a device's transfers; `None`: unknown, or no IOMMU.
    pub(super) fn is_translated(&self, address: &str) -> Option<bool> {
        let kind = std::fs::read_to_string(self.device(address)?.join("iommu_group/type")).ok()?;
        Some(kind.trim() != "identity")
    }

    /// Whether a module that registers GPU memory by address is loaded.
    pub(super) fn has_peer_memory(&self) -> bool {
        ["nvidia_peermem", "nv_peer_mem"].iter().any(|m| self.0.join("module").join(m).exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with a GPU, and NICs at other places. Removed when dropped.
    struct Fake(PathBuf);

    impl Fake {
        fn new() -> Self {
            let root = std::env::temp_dir().join(format!("kvferry-sysfs-{}", std::process::id()));
            let this = Self(root);
            let at = |path: &str| this.0.join(path);
            for folder in ["bus/pci/devices", "class/infiniband", "module"] {
                std::fs::create_dir_all(at(folder)).unwrap();
            }
            let below = "devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0";
            let gpu = at(below).join("0000:3c:00.0/0000:3d:00.0");
            this.device(&gpu, 0);
            std::os::unix::fs::symlink(&gpu, at("bus/pci/devices/0000:3d:00.0")).unwrap();
            std::fs::create_dir_all(gpu.join("iommu_group")).unwrap();
            std::fs::write(gpu.join("iommu_group/type"), "DMA-FQ\n").unwrap();
            // The registers of a GPU with a window of 256 MiB.
            let lines = [
                "0x00000000de000000 0x00000000deffffff 0x0000000000040200",
                "0x000000c000000000 0x000000c00fffffff 0x000000000014220c",
                "0x0000000000000000 0x0000000000000000 0x0000000000000000",
                "0x000000d000000000 0x000000d001ffffff 0x000000000014220c",
                "0x0000000000000000 0x0000000000000000 0x0000000000000000",
                "0x0000000000000000 0x0000000000000000 0x0000000000000000",
                "0x00000000df000000 0x000000ffffffffff 0x000000000014220c",
            ];
            std::fs::write(gpu.join("resource"), lines.join("\n")).unwrap();
            for (nic, folder, node) in [
                ("mlx5_0", "devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:04.0/0000:3e:00.0", 0),
                ("mlx5_1", "devices/pci0000:3a/0000:3a:00.0/0000:40:00.0", 0),
                ("mlx5_2", "devices/pci0000:5a/0000:5a:00.0/0000:5b:00.0", 0),
                ("mlx5_3", "devices/pci0000:ba/0000:ba:00.0/0000:bb:00.0", 1),
            ] {
                this.device(&at(folder), node);
                std::fs::create_dir_all(at("class/infiniband").join(nic)).unwrap();
                std::os::unix::fs::symlink(at(folder), at("class/infiniband").join(nic).join("device")).unwrap();
            }
            this
        }

        fn device(&self, folder: &Path, node: u32) {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(folder.join("numa_node"), format!("{node}\n")).unwrap();
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn places_on_the_bus_are_read_from_sysfs_and_unknown_where_it_is_absent() {
        let fake = Fake::new();
        let (sysfs, gpu) = (Sysfs::new(&fake.0), "0000:3D:00.0");
        assert_eq!(sysfs.nics(), ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]);
        let distances = sysfs.nics().iter().map(|n| sysfs.distance(gpu, n)).collect::<Vec<_>>();
        use Distance::{Other, SameNumaNode, SameRootPort, SameSwitch};
        assert_eq!(distances, [SameSwitch, SameRootPort, SameNumaNode, Other]);
        assert_eq!(sysfs.window(gpu), Some(256 << 20));
        assert_eq!(sysfs.is_translated(gpu), Some(true));
        assert!(!sysfs.has_peer_memory());
        std::fs::create_dir(fake.0.join("module/nvidia_peermem")).unwrap();
        assert!(sysfs.has_peer_memory());
        let absent = "7fff:00:00.0";
        assert_eq!((sysfs.window(absent), sysfs.is_translated(absent)), (None, None));
        assert_eq!(sysfs.distance(absent, "mlx5_0"), Other);
        assert!(Sysfs::new("/nowhere").nics().is_empty());
    }
}
