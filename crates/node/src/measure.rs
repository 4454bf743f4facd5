//! What a host measures of itself: load, pressure, capacity.
//!
//! Sources: `/proc/stat`, `/proc/meminfo`, `/proc/pressure/*` (PSI), what [`crate::predict`] reads beside. What the kernel does not tell is left at zero.

use crate::loads::Load;
use crate::records::now_ms;
use std::fs;
use std::path::Path;
use std::time::Instant;
use steadfast_cluster::model::{BalanceSettings, HostRecord, HostStatus, Resources, Versions};

/// Share of time, in percent over 10 s, that some task waited for CPU, or all waited for memory or I/O, from which on a host is
/// starved.
const STARVED_PERCENT: f64 = 60.0;

/// Measures. What it needs of the pool it knows from the round before.
#[derive(Default)]
pub struct Measure {
    load: Load,
}

impl Measure {
    /// Now. `of`: this host's record, and what the balancer calls hot.
    pub fn status(&mut self, of: Option<(&HostRecord, &BalanceSettings)>) -> HostStatus {
        let own = crate::binary::own();
        HostStatus {
            load: self.load.sample(Instant::now(), now_ms(), of),
            starved: starved(),
            versions: Versions {
                steadfast: own.version.clone(),
                wire_min: own.wire_min,
                wire_max: own.wire_max,
            },
            ..HostStatus::default()
        }
    }
}

/// Ticks of all CPUs that were not idle.
pub(crate) fn busy_ticks() -> Option<u64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().next()?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|f| f.parse().ok())
        .collect();
    let idle: u64 = fields.get(3..5)?.iter().sum();
    // Guest time is counted in user time already.
    Some(fields.iter().take(8).sum::<u64>() - idle)
}

/// Total and available memory, bytes.
pub(crate) fn memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
            .map(|kib| kib << 10)
    };
    Some((value("MemTotal:")?, value("MemAvailable:")?))
}

fn starved() -> bool {
    let avg = |what: &str, kind: &str| {
        let text = fs::read_to_string(format!("/proc/pressure/{what}")).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix(kind))?;
        let field = line.split_whitespace().find_map(|f| f.strip_prefix("avg10="))?;
        field.parse::<f64>().ok()
    };
    let above = |v: Option<f64>| v.is_some_and(|v| v > STARVED_PERCENT);
    above(avg("memory", "full")) || above(avg("io", "full"))
}

/// What this host has.
#[must_use]
pub fn capacity(data: &Path) -> Resources {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let disk = rustix::fs::statvfs(data).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize));
    Resources {
        cpu_milli: cpus * 1000,
        memory_bytes: memory().map_or(0, |(total, _)| total),
        disk_bytes: disk,
    }
}

/// What its network cards carry, bytes a second; zero: they do not say.
#[must_use]
pub fn link_bytes_per_s() -> u64 {
    crate::loads::speed(Path::new("/sys/class/net"))
}

/// The CPU baselines that this host can give a guest.
#[must_use]
pub fn baselines() -> std::collections::BTreeSet<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text
        .lines()
        .find_map(|l| l.strip_prefix("flags"))
        .unwrap_or_default();
    let has = |names: &[&str]| names.iter().all(|n| flags.split_whitespace().any(|f| f == *n));
    let mut found = std::collections::BTreeSet::new();
    if has(&["cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"]) {
        found.insert("x86-64-v2".into());
        if has(&["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"]) {
            found.insert("x86-64-v3".into());
        }
    }
    found
}
