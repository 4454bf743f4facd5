//! CPU time and memory of a process, as the kernel counts them.

use anyhow::{Context, Result};

/// CPU time in seconds, of the threads of vCPUs and of all others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// vCPUs: the guest's own work, and its exits.
    pub vcpus: f64,
    /// Everything else.
    pub others: f64,
}

impl std::ops::Sub for Cpu {
    type Output = Self;
    fn sub(self, before: Self) -> Self {
        Self {
            vcpus: self.vcpus - before.vcpus,
            others: self.others - before.others,
        }
    }
}

/// CPU time of a process until now; nothing if it is gone.
pub fn cpu(pid: u32) -> Cpu {
    let mut all = Cpu::default();
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return all;
    };
    for thread in threads.flatten() {
        let read = |name: &str| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        // Nanoseconds on a CPU: finer than the ticks of `stat`.
        let ns: f64 = read("schedstat")
            .split(' ')
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0.0);
        if read("comm").starts_with("vcpu") {
            all.vcpus += ns / 1e9;
        } else {
            all.others += ns / 1e9;
        }
    }
    all
}

/// Memory of a process beyond the guest's RAM in bytes: proportional share of all mappings but those of RAM, which are the
/// shared ones of at least 16 MiB.
pub fn memory_beyond_ram(pid: u32, ram_bytes: u64) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("read smaps")?;
    let (mut shared, mut size_kib, mut own, mut ram) = (false, 0, 0, 0);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let kib = || value.parse::<u64>().unwrap_or(0);
        match key {
            "Size:" => size_kib = kib(),
            "Pss:" if shared && size_kib >= 16 << 10 => ram += kib(),
            "Pss:" => own += kib(),
            k if !k.ends_with(':') => shared = value.ends_with('s'),
            _ => {}
        }
    }
    if ram * 1024 < ram_bytes / 2 || ram * 1024 > ram_bytes {
        anyhow::bail!("{ram} KiB of shared mappings are not the guest's RAM");
    }
    Ok(own * 1024)
}

/// Memory that could be had without swapping, in MiB.
pub fn available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|v| v.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib >> 10)
}
