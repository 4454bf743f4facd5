//! The answer to each class: always the smallest means that helps.

use super::FailureClass;
use serde::{Deserialize, Serialize};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Go on over the other paths; alarm.
    UseOtherPaths,
    /// Relieve the host by moving VMs off; nothing is taken from it by force.
    Relieve,
    /// Serve the blocks from the standby, and hand over by a planned promote.
    HandOver,
    /// Reset the guest in place.
    ResetGuest,
    /// Promote the standby; without one boot on the same host.
    PromoteOrBootHere,
    /// Wait: it runs its VMs. Nothing new is put there.
    Wait,
    /// Promote standbys at once; boot `restart` VMs elsewhere when it is fenced.
    FailOver,
}

/// The answer to a class.
#[must_use]
pub const fn answer(class: FailureClass) -> Answer {
    match class {
        FailureClass::PathLost => Answer::UseOtherPaths,
        FailureClass::HostStarved => Answer::Relieve,
        FailureClass::DiskFault => Answer::HandOver,
        FailureClass::GuestCrashed | FailureClass::GuestHung => Answer::ResetGuest,
        FailureClass::ProcessDied => Answer::PromoteOrBootHere,
        FailureClass::AllPathsLost => Answer::Wait,
        FailureClass::HostDead => Answer::FailOver,
    }
}

impl Answer {
    /// Whether this takes a VM away from a host without its consent.
    #[must_use]
    pub const fn is_failover(self) -> bool {
        matches!(self, Self::FailOver | Self::PromoteOrBootHere)
    }
}
