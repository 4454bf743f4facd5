//! I4 no loss: committed epochs are one line, and whoever is promoted goes on from a state that contains all of it.

use crate::world::World;
use steadfast_epoch::EpochRef;
use steadfast_types::Epoch;

/// A primary declares epochs committed.
pub fn committed(w: &mut World, h: usize, through: Epoch) {
    let records: Vec<_> =
        w.hosts[h].records.range(..=through.0).map(|(_, (r, _))| (r.epoch, r.end.node)).collect();
    for (epoch, node) in records {
        let before = w.checks.committed;
        if w.history.is_ancestor(before, node) {
            w.checks.committed = node;
        } else if !w.history.is_ancestor(node, before) {
            let how = format!("{} commits {epoch}, which is not in line with what has committed", w.hosts[h].id);
            w.checks.fail("I4", how);
        }
    }
}

/// A standby goes on as the primary from this epoch.
pub fn promoted(w: &mut World, h: usize, at: EpochRef, node: Option<u32>) {
    let holds = |n: u32| node.is_some_and(|x| w.history.is_ancestor(n, x));
    if !holds(w.checks.committed) || !holds(w.checks.tip) {
        let how = format!(
            "{} goes on from {at} (state {node:?}) without committed state {} or visible state {}",
            w.hosts[h].id, w.checks.committed, w.checks.tip
        );
        w.checks.fail("I4", how);
    }
}
