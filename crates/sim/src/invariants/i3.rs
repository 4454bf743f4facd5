//! I3 atomic epochs: a standby's memory after an apply is, page for page, the guest's at that epoch; and it applies only
//! what has committed.

use crate::guest::State;
use crate::world::{Record, World};

/// A primary has sealed an epoch: this is what it looks like.
pub fn sealed(w: &mut World, r: &Record) {
    if w.checks.snapshots.insert(r.epoch, r.end).is_some() {
        w.checks.fail("I3", format!("epoch {} was sealed twice", r.epoch));
    }
}

/// A standby's memory stands at this epoch.
pub fn whole(w: &mut World, h: usize, mem: &State, r: &Record) {
    let want = w.checks.snapshots.get(&r.epoch);
    if want != Some(mem) {
        let how = format!("{} at {}: memory {mem:?} instead of {want:?}", w.hosts[h].id, r.epoch);
        w.checks.fail("I3", how);
    }
}

/// A standby has applied an epoch for good.
pub fn applied(w: &mut World, h: usize, mem: &State, r: &Record) {
    whole(w, h, mem, r);
    // What a committed epoch is built on has committed with it.
    if !w.history.is_ancestor(r.end.node, w.checks.committed) {
        let how = format!("{} applies {}, which has not committed", w.hosts[h].id, r.epoch);
        w.checks.fail("I3", how);
    }
}
