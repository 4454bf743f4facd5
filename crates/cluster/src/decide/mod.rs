//! From a snapshot to decisions.

use crate::action::Decisions;
use crate::model::Snapshot;

/// What to do now. See the crate's documentation for what holds.
#[must_use]
pub fn decide(_snapshot: &Snapshot) -> Decisions {
    Decisions::default()
}
