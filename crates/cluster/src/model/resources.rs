//! Amounts: CPU, memory and disk, with arithmetic that cannot wrap.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a VM needs, or a host has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// CPU in thousandths of one CPU.
    #[serde(default)]
    pub cpu_milli: u64,
    /// Memory in bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Disk in bytes.
    #[serde(default)]
    pub disk_bytes: u64,
}

impl Resources {
    /// Nothing.
    pub const ZERO: Self = Self {
        cpu_milli: 0,
        memory_bytes: 0,
        disk_bytes: 0,
    };

    /// Whole CPUs, memory in MiB and disk in GiB.
    #[must_use]
    pub const fn new(cpus: u64, memory_mib: u64, disk_gib: u64) -> Self {
        Self {
            cpu_milli: cpus.saturating_mul(1000),
            memory_bytes: memory_mib.saturating_mul(1 << 20),
            disk_bytes: disk_gib.saturating_mul(1 << 30),
        }
    }

    /// The sum, each part saturating.
    #[must_use]
    pub const fn plus(self, o: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(o.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_add(o.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(o.disk_bytes),
        }
    }

    /// What is left, each part at least zero.
    #[must_use]
    pub const fn minus(self, o: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(o.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_sub(o.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(o.disk_bytes),
        }
    }

    /// The larger of each part.
    #[must_use]
    pub fn max(self, o: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.max(o.cpu_milli),
            memory_bytes: self.memory_bytes.max(o.memory_bytes),
            disk_bytes: self.disk_bytes.max(o.disk_bytes),
        }
    }

    /// Whether each part is at most the other's.
    #[must_use]
    pub const fn fits(self, room: Self) -> bool {
        self.cpu_milli <= room.cpu_milli
            && self.memory_bytes <= room.memory_bytes
            && self.disk_bytes <= room.disk_bytes
    }

    /// Nothing of anything.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

/// `1.5 CPUs, 2.0 GiB memory, 10.0 GiB disk`; parts that are zero are left out.
impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.cpu_milli > 0 {
            parts.push(format!("{} CPUs", self.cpu_milli as f64 / 1000.0));
        }
        if self.memory_bytes > 0 {
            parts.push(format!("{} memory", size(self.memory_bytes)));
        }
        if self.disk_bytes > 0 {
            parts.push(format!("{} disk", size(self.disk_bytes)));
        }
        if parts.is_empty() {
            return f.write_str("nothing");
        }
        f.write_str(&parts.join(", "))
    }
}

/// A number of bytes for people.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_and_reads_well() {
        let one = Resources::new(1, 512, 4);
        assert_eq!(one.minus(Resources::new(2, 256, 4)), Resources::new(0, 256, 0));
        assert_eq!(Resources::new(u64::MAX, 0, 0).plus(one).cpu_milli, u64::MAX);
        assert!(one.fits(Resources::new(1, 512, 4)) && !one.fits(Resources::new(1, 511, 4)));
        assert_eq!(one.to_string(), "1 CPUs, 512.0 MiB memory, 4.0 GiB disk");
        assert_eq!(Resources::ZERO.to_string(), "nothing");
    }
}
