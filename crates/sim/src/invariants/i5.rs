//! I5 durability: what the guest flushed and then told the world is on the disk that it boots from, whatever lost power.

use crate::guest::Reply;
use crate::world::World;

/// The outside world sees a reply: every flush before it is promised from now on.
pub fn visible(w: &mut World, f: &Reply) {
    let floor = w.history.node(w.checks.flushed).depth;
    let mut n = f.node;
    while w.history.node(n).depth > floor {
        if w.history.node(n).flushed {
            w.checks.flushed = n;
            return;
        }
        n = w.history.node(n).parent;
    }
}

/// The guest boots from this disk.
pub fn booted(w: &mut World, h: usize, disk: u32) {
    let flushed = w.checks.flushed;
    if !w.history.is_ancestor(flushed, disk) {
        let how = format!("{} boots from disk {disk} without the flushed and told {flushed}", w.hosts[h].id);
        w.checks.fail("I5", how);
    }
}
