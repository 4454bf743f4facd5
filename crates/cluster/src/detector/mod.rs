//! Detection that classifies: from evidence to a [`FailureClass`], and from the views of several observers to a verdict on a host.
//!
//! ```text
//!   heartbeats per path --> PathClock --\
//!   "connection refused" ----------------> Peer --> View --\            lease, fence agent
//!   what the peer says of itself --------/                  \                  |
//!   own starvation (steps, PSI, steal) -- stops all clocks   >--> Verdict <----/
//!                                           other observers /        |
//!                                                                    v
//!   process exit, vCPU progress, panic,                       HostStatus.observed
//!   watchdog, disk latency and errors --> InstanceWatch --> Phase::Failed(class), disk_fault
//! ```
//! **I7.** Silence is counted in the observer's own waking time: a step longer than `step_cap_ms`, or one in which the observer is
//! starved, adds nothing, and for `settle_ms` after it nothing is added either. So an observer that did not run cannot suspect
//! anybody, however long it slept. A peer that says it is starved gets `starved_factor` times the patience. A view of a
//! starved observer does not count.
//!
//! **Bound.** See [`Settings::dead_bound_ms`].

mod answer;
mod clock;
mod instance;
mod peer;
mod settings;
mod verdict;

pub use answer::{Answer, answer};
pub use clock::{OwnClock, OwnSample, PathClock};
pub use instance::{DiskSample, Findings, InstanceSample, InstanceWatch, Process};
pub use peer::{Peer, PeerClass, SelfReport, View};
pub use settings::Settings;
pub use verdict::{HostEvidence, Verdict, verdict};

use serde::{Deserialize, Serialize};
use std::fmt;

/// What is wrong, from the smallest to the largest. Each class has its own [`answer`]; most are no failover.
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
    /// The process of an instance, or the daemon of a host, ended.
    ProcessDied,
    /// No path to a host works, but it is known to be alive.
    AllPathsLost,
    /// The host is gone.
    HostDead,
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PathLost => "one path lost",
            Self::HostStarved => "host starved",
            Self::DiskFault => "disk fault",
            Self::GuestCrashed => "guest crashed",
            Self::GuestHung => "guest hung",
            Self::ProcessDied => "process died",
            Self::AllPathsLost => "all paths lost",
            Self::HostDead => "host dead",
        })
    }
}
