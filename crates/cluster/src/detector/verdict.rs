//! From the views of all observers to a verdict on one host.
//!
//! | evidence | verdict | class |
//! |---|---|---|
//! | heard by anybody on any path | up | one path lost, if one is; host starved, if it says so |
//! | not heard, but its kernel answers | suspect | process died (the daemon; VMs run on) |
//! | not heard by anybody, its lease is renewed in the store | suspect | all paths lost |
//! | silent to every observer that sees, lease not renewed | dead | host dead |
//! | as before, and the lease ran out with its margin, or it was fenced | dead, fenced | host dead |
//! | nobody sees (all observers starved or stale) | as it was | - |

use super::{FailureClass, PeerClass, Settings, View};
use crate::model::HostHealth;
use serde::{Deserialize, Serialize};

/// What is known about one host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEvidence {
    /// Views of its peers (witnesses too), each with its age in ms.
    pub views: Vec<(u64, View)>,
    /// Time since its lease in the store was seen renewed, ms; none: it has no lease.
    pub lease_age_ms: Option<u64>,
    /// Its lease ran out with the margin ([`crate::lease::Watcher`]).
    pub lease_over: bool,
    /// A fence agent confirmed that it is off.
    pub fenced: bool,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// For [`crate::model::HostStatus::observed`].
    pub health: HostHealth,
    /// What is wrong, if anything.
    pub class: Option<FailureClass>,
    /// Why, for people.
    pub why: String,
}

/// Judges one host. `before` is the verdict so far.
#[must_use]
pub fn verdict(before: HostHealth, e: &HostEvidence, s: &Settings) -> Verdict {
    let sighted: Vec<&View> = e
        .views
        .iter()
        .filter(|(age, v)| *age <= s.view_max_ms && !v.blind)
        .map(|(_, v)| v)
        .collect();
    let of = |c: PeerClass| sighted.iter().filter(|v| v.class == c).count();
    let (heard, refused, silent) = (
        of(PeerClass::Heard),
        of(PeerClass::DaemonDown),
        of(PeerClass::Silent),
    );
    let result = |health, class, why: String| Verdict { health, class, why };
    if e.fenced {
        return result(
            HostHealth::Dead { fenced: true },
            Some(FailureClass::HostDead),
            "a fence agent confirmed that it is off".into(),
        );
    }
    if sighted.is_empty() {
        return result(
            before,
            None,
            "no observer sees: all are starved, or their views are old".into(),
        );
    }
    if heard > 0 {
        let starved = sighted.iter().any(|v| v.class == PeerClass::Heard && v.starved);
        let lost = sighted.iter().any(|v| !v.lost.is_empty());
        let class = match (starved, lost) {
            (true, _) => Some(FailureClass::HostStarved),
            (_, true) => Some(FailureClass::PathLost),
            _ => None,
        };
        return result(
            HostHealth::Up,
            class,
            format!("heard by {heard} of {}", sighted.len()),
        );
    }
    if refused > 0 {
        let why = format!("{refused} observers find its host alive and its daemon not answering");
        return result(still(before), Some(FailureClass::ProcessDied), why);
    }
    let renewed = e.lease_age_ms.is_some_and(|age| age <= s.lease_fresh_ms);
    if renewed {
        let why = "nobody hears it, but it renews its lease: it is cut off, not dead".to_owned();
        return result(still(before), Some(FailureClass::AllPathsLost), why);
    }
    if silent == sighted.len() {
        let health = HostHealth::Dead {
            fenced: e.lease_over || before == (HostHealth::Dead { fenced: true }),
        };
        let why = format!("silent to all {silent} observers, its lease is not renewed");
        return result(health, Some(FailureClass::HostDead), why);
    }
    result(
        still(before),
        None,
        format!("{silent} of {} observers find it silent", sighted.len()),
    )
}

/// Not heard, not dead: suspect, or what it was if that was worse.
fn still(before: HostHealth) -> HostHealth {
    match before {
        HostHealth::Dead { .. } => before,
        HostHealth::Up | HostHealth::Suspect => HostHealth::Suspect,
    }
}
