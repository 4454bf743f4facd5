//! Faults of a server's data disk. `/data` is on a device-mapper device (`/dev/mapper/data`) whose table the rig swaps:
//!
//! | fault | table |
//! |---|---|
//! | none | `linear` |
//! | [`DiskFault::Fail`] | `error`: every read and write fails with EIO |
//! | [`DiskFault::FailWrites`] | `flakey ... error_writes` |
//! | [`DiskFault::LoseWrites`] | `flakey ... drop_writes`: writes seem to succeed and are lost |
//! | [`DiskFault::Slow`] | `delay`: every read and write waits so long |
//! | [`DiskFault::Hang`] | suspended: nothing ends until it heals |
//! | [`DiskFault::Full`] | `linear`, and a file that takes the room |
//!
//! A server that restarts starts with a whole disk (what was lost is lost, the file of `Full` stays).

use super::server::Server;
use crate::error::Result;
use std::time::Duration;

/// What is wrong with a data disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFault {
    /// Every read and write fails.
    Fail,
    /// Every write fails.
    FailWrites,
    /// Writes succeed and are lost.
    LoseWrites,
    /// Every read and write takes so many milliseconds longer.
    Slow(u32),
    /// Nothing ends.
    Hang,
    /// So many MiB of room are left.
    Full(u32),
}

/// The file that takes the room of a full disk.
const FILLER: &str = "/data/.rig-full";
const BOUND: Duration = Duration::from_secs(60);

impl Server {
    /// Makes the data disk fail.
    ///
    /// # Errors
    /// [`crate::RigError::CommandFailed`] with what `dmsetup` or `fallocate` said.
    pub fn disk_fault(&self, fault: DiskFault) -> Result<()> {
        match fault {
            DiskFault::Fail => self.load_table("error", "", true),
            DiskFault::FailWrites => self.load_table("flakey", "0 0 3600 1 error_writes", false),
            DiskFault::LoseWrites => self.load_table("flakey", "0 0 3600 1 drop_writes", false),
            DiskFault::Slow(ms) => self.load_table("delay", &format!("0 {ms}"), false),
            DiskFault::Hang => self
                .exec_within("dmsetup suspend --nolockfs --noflush data", BOUND)
                .map(|_| ()),
            DiskFault::Full(left_mib) => {
                let fill = format!(
                    "have=$(df --output=avail -B1M /data | tail -n 1); \
                     [ $have -le {left_mib} ] || fallocate -l $((have - {left_mib}))M {FILLER}"
                );
                self.exec_within(&fill, BOUND).map(|_| ())
            }
        }
    }

    /// Makes the data disk whole again. A file system that the kernel turned read-only after errors stays so until the server
    /// restarts.
    pub fn disk_heal(&self) -> Result<()> {
        self.load_table("linear", "0", false)?;
        // On a file system that is read-only now there is nothing to remove that could be removed. What is removed must stay
        // so: with a power loss or the next fault soon after, the journal would bring the file back, and a full disk.
        let remove = format!("[ ! -e {FILLER} ] || {{ rm -f {FILLER} && sync -f /data; }} || [ ! -w /data ]");
        self.exec_within(&remove, BOUND).map(|_| ())
    }

    /// Swaps the table, under running I/O: nothing is flushed, nothing waits.
    fn load_table(&self, target: &str, parameters: &str, alone: bool) -> Result<()> {
        let module = if matches!(target, "flakey" | "delay") {
            format!("modprobe dm-{target}; ")
        } else {
            String::new()
        };
        let device = if alone { "" } else { "/dev/rig/data " };
        let swap = format!(
            "{module}n=$(blockdev --getsz /dev/rig/data) && \
             dmsetup load data --table \"0 $n {target} {device}{parameters}\" && \
             dmsetup suspend --nolockfs --noflush data && dmsetup resume data"
        );
        self.exec_within(&swap, BOUND).map(|_| ())
    }
}
