//! I6 order: `released <= committed <= sent <= sealed`, by the order of what each process does.

use crate::world::World;
use steadfast_types::Epoch;

const SEALED: usize = 0;
const SENT: usize = 1;
const COMMITTED: usize = 2;
const RELEASED: usize = 3;

/// A process becomes the primary.
pub fn starts(w: &mut World, h: usize) {
    let Some(p) = w.hosts[h].replica.as_ref().and_then(|r| r.primary()) else { return };
    let p = p.progress();
    w.hosts[h].cursors = [p.sealed().0, p.sent().0, p.committed().0, p.released().0];
}

/// It sends an epoch.
pub fn sends(w: &mut World, h: usize, e: Epoch) {
    let sealed = w.hosts[h].records.last_key_value().map_or(0, |(e, _)| *e);
    let c = &mut w.hosts[h].cursors;
    c[SEALED] = c[SEALED].max(sealed);
    c[SENT] = c[SENT].max(e.0);
    check(w, h);
}

/// It commits.
pub fn commits(w: &mut World, h: usize, to: Epoch) {
    let sealed = w.hosts[h].records.last_key_value().map_or(0, |(e, _)| *e);
    let alone = w.hosts[h]
        .replica
        .as_ref()
        .and_then(|r| r.primary())
        .is_some_and(|p| p.record().in_sync.is_empty());
    let c = &mut w.hosts[h].cursors;
    c[SEALED] = c[SEALED].max(sealed);
    if alone {
        c[SENT] = c[SENT].max(to.0);
    }
    if to.0 < c[COMMITTED] {
        w.checks.fail("I6", format!("committed goes back to {to}"));
        return;
    }
    c[COMMITTED] = to.0;
    check(w, h);
}

/// It releases.
pub fn releases(w: &mut World, h: usize, to: Epoch) {
    let c = &mut w.hosts[h].cursors;
    if to.0 < c[RELEASED] {
        w.checks.fail("I6", format!("released goes back to {to}"));
        return;
    }
    c[RELEASED] = to.0;
    check(w, h);
}

fn check(w: &mut World, h: usize) {
    let c = w.hosts[h].cursors;
    if !(c[RELEASED] <= c[COMMITTED] && c[COMMITTED] <= c[SENT] && c[SENT] <= c[SEALED]) {
        let how = format!("{}: sealed, sent, committed, released are {c:?}", w.hosts[h].id);
        w.checks.fail("I6", how);
    }
}
