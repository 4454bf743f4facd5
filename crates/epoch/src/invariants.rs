//! The invariants that one replica can check on itself, as assertions that stay on in release builds.
//!
//! | invariant | asserted |
//! |---|---|
//! | I1 output commit | [`i1_release`] at every release: committed, under a term that is still held |
//! | I2 one owner | [`i2_term_grows`] at every grant: terms only grow; [`i2_owner`]: the record names this host |
//! | I3 atomic epochs | [`i3_apply`] at every apply: whole, staged, committed epochs only; [`i3_follows`] at every stage |
//! | I6 order | [`i6_order`], [`i6_monotone`], [`i6_next`] in `progress` wherever a cursor moves |
//!
//! A failed assertion stops this instance. That is the safe side: it holds the VM's outputs for ever, and the other
//! replica takes over from what was committed.

use crate::message::EpochRef;
use crate::progress::Progress;
use steadfast_types::{Epoch, HostId, Term};

/// I1: outputs leave only up to the committed epoch.
pub fn i1_release(committed: Epoch, to: Epoch) {
    assert!(
        to <= committed,
        "I1: release of epoch {to} while only {committed} has committed"
    );
}

/// I2: a grant's term is higher than any term this instance has seen.
pub fn i2_term_grows(seen: Term, granted: Term) {
    assert!(
        granted > seen,
        "I2: granted term {granted} is not above {seen}, which was seen before"
    );
}

/// I2: only the host that the record names acts as the owner.
pub fn i2_owner(me: &HostId, owner: &HostId) {
    assert!(
        me == owner,
        "I2: {me} acts on a record that names {owner} as the owner"
    );
}

/// I3: a standby applies only whole epochs that are staged and committed.
pub fn i3_apply(applied: Epoch, staged: Epoch, committed: Epoch, to: Epoch) {
    assert!(
        to > applied && to <= staged && to <= committed,
        "I3: apply of epoch {to} with applied {applied}, staged {staged}, committed {committed}"
    );
}

/// I3: an epoch is staged only directly on top of the one it follows.
pub fn i3_follows(tip: EpochRef, prev: EpochRef, epoch: EpochRef) {
    assert!(
        prev == tip && epoch.epoch == tip.epoch.next(),
        "I3: epoch {epoch} follows {prev}, but the tip is {tip}"
    );
}

/// I6: `released <= committed <= sent <= sealed`.
pub fn i6_order(p: &Progress) {
    assert!(
        p.released() <= p.committed() && p.committed() <= p.sent() && p.sent() <= p.sealed(),
        "I6: cursors out of order: {p:?}"
    );
}

/// I6: a cursor never goes back.
pub fn i6_monotone(what: &str, from: Epoch, to: Epoch) {
    assert!(to >= from, "I6: {what} went back from {from} to {to}");
}

/// I6: epochs are sealed one after the other.
pub fn i6_next(from: Epoch, to: Epoch) {
    assert!(to == from.next(), "I6: epoch {to} sealed after {from}");
}
