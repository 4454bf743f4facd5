//! The files of cgroup v2 and v1, behind one trait: which file takes which text for a limit.

use super::limits::{CpuMax, IoMax, Limits, MemoryMax};

/// Length of the interval over which a CPU maximum is kept, in microseconds; the kernel's default.
const PERIOD_US: u64 = 100_000;

/// What limits one kind of thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// Processor time.
    Cpu,
    /// Memory.
    Memory,
    /// Disks.
    Io,
}

impl Controller {
    pub(super) fn by_name(version: Version, name: &str) -> Option<Self> {
        match (version, name) {
            (_, "cpu") => Some(Self::Cpu),
            (_, "memory") => Some(Self::Memory),
            (Version::V2, "io") | (Version::V1, "blkio") => Some(Self::Io),
            _ => None,
        }
    }

    pub(super) fn v2_name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Io => "io",
        }
    }

    pub(super) fn what(self) -> &'static str {
        self.v2_name()
    }
}

/// A version of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Version {
    V1,
    V2,
}

impl Version {
    pub(super) fn knobs(self) -> &'static dyn Knobs {
        match self {
            Self::V1 => &V1,
            Self::V2 => &V2,
        }
    }
}

/// The files of one version.
pub trait Knobs {
    /// `(file, text)` to write, in order, for the limits of `controller` that are given.
    fn settings(
        &self,
        controller: Controller,
        limits: &Limits,
        disks: &[(u32, u32)],
    ) -> Vec<(&'static str, String)>;

    /// The files that show the limits of `controller`.
    fn files(&self, controller: Controller) -> &'static [&'static str];
}

/// cgroup v2.
pub struct V2;

fn quota_us(percent: u32) -> u64 {
    u64::from(percent) * PERIOD_US / 100
}

impl Knobs for V2 {
    fn settings(
        &self,
        controller: Controller,
        limits: &Limits,
        disks: &[(u32, u32)],
    ) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        match controller {
            Controller::Cpu => {
                if let Some(weight) = limits.cpu_weight {
                    out.push(("cpu.weight", weight.to_string()));
                }
                match limits.cpu_max {
                    Some(CpuMax::Unlimited) => out.push(("cpu.max", format!("max {PERIOD_US}"))),
                    Some(CpuMax::Percent(p)) => out.push(("cpu.max", format!("{} {PERIOD_US}", quota_us(p)))),
                    None => {}
                }
            }
            Controller::Memory => match limits.memory_max {
                Some(MemoryMax::Unlimited) => out.push(("memory.max", "max".into())),
                Some(MemoryMax::Bytes(bytes)) => out.push(("memory.max", bytes.to_string())),
                None => {}
            },
            Controller::Io => {
                let Some(io) = limits.io_max else { return out };
                let text = |limit: Option<u64>| limit.map_or_else(|| "max".to_owned(), |n| n.to_string());
                for (major, minor) in disks {
                    out.push((
                        "io.max",
                        format!(
                            "{major}:{minor} rbps={} wbps={} riops={} wiops={}",
                            text(io.read_bytes),
                            text(io.write_bytes),
                            text(io.read_ops),
                            text(io.write_ops)
                        ),
                    ));
                }
            }
        }
        out
    }

    fn files(&self, controller: Controller) -> &'static [&'static str] {
        match controller {
            Controller::Cpu => &["cpu.weight", "cpu.max"],
            Controller::Memory => &["memory.max", "memory.current"],
            Controller::Io => &["io.max"],
        }
    }
}

/// cgroup v1.
pub struct V1;

/// The kernel's own conversion runs the other way: 1024 shares are a weight of 100.
fn shares(weight: u32) -> u64 {
    (u64::from(weight) * 1024 / 100).clamp(2, 262_144)
}

impl Knobs for V1 {
    fn settings(
        &self,
        controller: Controller,
        limits: &Limits,
        disks: &[(u32, u32)],
    ) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        match controller {
            Controller::Cpu => {
                if let Some(weight) = limits.cpu_weight {
                    out.push(("cpu.shares", shares(weight).to_string()));
                }
                match limits.cpu_max {
                    Some(CpuMax::Unlimited) => out.push(("cpu.cfs_quota_us", "-1".into())),
                    Some(CpuMax::Percent(p)) => {
                        out.push(("cpu.cfs_period_us", PERIOD_US.to_string()));
                        out.push(("cpu.cfs_quota_us", quota_us(p).to_string()));
                    }
                    None => {}
                }
            }
            Controller::Memory => match limits.memory_max {
                Some(MemoryMax::Unlimited) => out.push(("memory.limit_in_bytes", "-1".into())),
                Some(MemoryMax::Bytes(bytes)) => out.push(("memory.limit_in_bytes", bytes.to_string())),
                None => {}
            },
            Controller::Io => {
                let Some(IoMax {
                    read_bytes,
                    write_bytes,
                    read_ops,
                    write_ops,
                }) = limits.io_max
                else {
                    return out;
                };
                for (major, minor) in disks {
                    for (file, limit) in [
                        ("blkio.throttle.read_bps_device", read_bytes),
                        ("blkio.throttle.write_bps_device", write_bytes),
                        ("blkio.throttle.read_iops_device", read_ops),
                        ("blkio.throttle.write_iops_device", write_ops),
                    ] {
                        // Zero takes a limit away.
                        out.push((file, format!("{major}:{minor} {}", limit.unwrap_or(0))));
                    }
                }
            }
        }
        out
    }

    fn files(&self, controller: Controller) -> &'static [&'static str] {
        match controller {
            Controller::Cpu => &["cpu.shares", "cpu.cfs_quota_us"],
            Controller::Memory => &["memory.limit_in_bytes", "memory.usage_in_bytes"],
            Controller::Io => &[
                "blkio.throttle.read_bps_device",
                "blkio.throttle.write_bps_device",
                "blkio.throttle.read_iops_device",
                "blkio.throttle.write_iops_device",
            ],
        }
    }
}
