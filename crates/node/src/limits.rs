//! What VMs may use of their hosts: kept in the VM's record, set by the daemon of whichever host runs a process of it.
//!
//! They are of the process's cgroup, so a standby has them too. A protected VM's process is put into its cgroup by the daemon; others
//! enter theirs by themselves.

use crate::error::{NodeError, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use steadfast_types::VmId;
use steadfast_vmm::control::NetRate;
use steadfast_vmm::isolation::cgroup::{self, Cgroup, Limits, PARENT, limits};
use utoipa::ToSchema;

/// What a monitor needs beside guest RAM and its page tables, at the least.
const OWN_BYTES: u64 = 256 << 20;

/// Limits as they are written; what is not given is not limited by the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmLimits {
    /// Share when CPUs are short: 1 to 10000, 100 is normal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    /// Most CPU time in percent of one core (`150%`), or `max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_max: Option<String>,
    /// Most memory of guest and monitor together (`2GiB`), or `max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<String>,
    /// Most I/O per second on each of its disks: `read=SIZE,write=SIZE,read-ops=N,write-ops=N`, each optional, or `max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_max: Option<String>,
    /// Most that each of its network cards carries per second: `in=SIZE,out=SIZE`, each optional, or `max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_max: Option<String>,
}

impl VmLimits {
    /// Nothing is given.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These, and where nothing is given those from before.
    #[must_use]
    pub fn over(&self, before: &Self) -> Self {
        let text = |new: &Option<String>, old: &Option<String>| new.clone().or_else(|| old.clone());
        Self {
            cpu_weight: self.cpu_weight.or(before.cpu_weight),
            cpu_max: text(&self.cpu_max, &before.cpu_max),
            memory_max: text(&self.memory_max, &before.memory_max),
            io_max: text(&self.io_max, &before.io_max),
            net_max: text(&self.net_max, &before.net_max),
        }
    }

    /// What network cards carry at most, which the process itself sees to.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn net_rate(&self) -> Result<NetRate> {
        let text = self.net_max.as_deref().map(limits::parse_net_max);
        text.transpose()
            .map(Option::unwrap_or_default)
            .map_err(NodeError::Refused)
    }

    /// As the kernel shall have them, for a VM with so much memory.
    ///
    /// # Errors
    /// What is wrong with which.
    pub fn read(&self, ram_bytes: u64) -> Result<Limits> {
        let wrong = NodeError::Refused;
        let weight = self.cpu_weight.map(|w| limits::parse_weight(&w.to_string()));
        let memory = self.memory_max.as_deref().map(limits::parse_memory_max);
        let memory = memory.transpose().map_err(wrong)?;
        if let Some(limits::MemoryMax::Bytes(bytes)) = memory
            && bytes < ram_bytes.saturating_add(ram_bytes / 16).saturating_add(OWN_BYTES)
        {
            return Err(NodeError::Refused(format!(
                "{bytes} bytes are less than the guest's memory ({ram_bytes}), a sixteenth of it and {OWN_BYTES} for the monitor: its \
                 process would be ended; give more, or a VM with less memory"
            )));
        }
        Ok(Limits {
            cpu_weight: weight.transpose().map_err(wrong)?,
            cpu_max: self
                .cpu_max
                .as_deref()
                .map(limits::parse_cpu_max)
                .transpose()
                .map_err(wrong)?,
            memory_max: memory,
            io_max: self
                .io_max
                .as_deref()
                .map(limits::parse_io_max)
                .transpose()
                .map_err(wrong)?,
        })
    }
}

/// Sets limits of a process of a VM.
///
/// # Errors
/// The process is in no cgroup of its own, or the kernel refuses.
pub fn set(vm: &VmId, pid: u32, wanted: &Limits) -> Result<()> {
    let named = |e: cgroup::CgroupError| NodeError::Refused(format!("limits of VM {vm}: {e}"));
    let group = Cgroup::of_process(pid, vm).map_err(named)?;
    group.set(wanted, &cgroup::disks_of_process(pid)).map_err(named)
}

/// Removes the cgroup of a VM that has no process here any more.
pub fn tidy(vm: &VmId) {
    Cgroup::remove(Path::new(PARENT), vm);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_joined_and_refused_with_the_reason() {
        let before = VmLimits {
            cpu_weight: Some(50),
            cpu_max: Some("150%".into()),
            ..VmLimits::default()
        };
        let new = VmLimits {
            cpu_max: Some("max".into()),
            memory_max: Some("2GiB".into()),
            ..VmLimits::default()
        };
        let both = new.over(&before);
        assert_eq!(
            (both.cpu_weight, both.cpu_max.as_deref()),
            (Some(50), Some("max"))
        );
        let read = both.read(1 << 30).unwrap();
        assert_eq!(read.memory_max, Some(limits::MemoryMax::Bytes(2 << 30)));
        assert_eq!(read.cpu_max, Some(limits::CpuMax::Unlimited));
        let why = both.read(3 << 30).unwrap_err().to_string();
        assert!(why.contains("less than the guest's memory"), "{why}");
        for (bad, reason) in [
            (
                VmLimits {
                    cpu_weight: Some(0),
                    ..VmLimits::default()
                },
                "1 to 10000",
            ),
            (
                VmLimits {
                    cpu_max: Some("1.5".into()),
                    ..VmLimits::default()
                },
                "150%",
            ),
            (
                VmLimits {
                    io_max: Some("fast".into()),
                    ..VmLimits::default()
                },
                "read=SIZE",
            ),
        ] {
            let why = bad.read(1 << 30).unwrap_err().to_string();
            assert!(why.contains(reason), "{why}");
        }
    }
}
