//! Classification of failures from evidence; see [`FailureClass`].

use serde::{Deserialize, Serialize};

/// What is wrong, from the smallest to the largest. Each class has its own answer (`answer.rs`); most are no failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureClass {
    /// One of several paths to a host is lost.
    PathLost,
    /// A host is short of CPU, memory or I/O.
    HostStarved,
    /// A disk answers late or with errors.
    DiskFault,
    /// The guest's kernel panicked or triple-faulted.
    GuestCrashed,
    /// The guest makes no progress, or its watchdog barked.
    GuestHung,
    /// The process of an instance ended.
    ProcessDied,
    /// No path to a host works, but it is known, or may be, alive.
    AllPathsLost,
    /// The host is gone.
    HostDead,
}
