//! I1 output commit: what leaves a host can be repeated by the standbys that its term's record demands, and everything
//! that was ever seen outside is one linear history.

use crate::guest::Reply;
use crate::world::{Record, World};

/// A host lets the outputs of an epoch out.
pub fn released(w: &mut World, h: usize, r: &Record) {
    let Some(term) = w.hosts[h].replica.as_ref().map(|r| r.term()) else { return };
    let Some(rule) = w.store.by_term.get(&term) else { return };
    let could = |host: &steadfast_types::HostId| {
        let i = w.index(host);
        w.checks.last_staged.get(&i).is_some_and(|s| {
            let node = w.checks.node_of(*s);
            s.epoch >= r.epoch.epoch && node.is_some_and(|n| w.history.is_ancestor(r.end.node, n))
        })
    };
    let have = rule.in_sync.iter().filter(|&x| could(x)).count();
    if have < usize::from(rule.acks) {
        let how = format!("{} releases {} in term {term}: {have} of {} could repeat it", w.hosts[h].id, r.epoch, rule.acks);
        w.checks.fail("I1", how);
    }
}

/// The outside world sees a reply.
pub fn visible(w: &mut World, f: &Reply) {
    let tip = w.checks.tip;
    if w.history.is_ancestor(tip, f.node) {
        w.checks.tip = f.node;
    } else if !w.history.is_ancestor(f.node, tip) {
        let how = format!("the world sees state {} after {tip}: two histories", f.node);
        w.checks.fail("I1", how);
    }
}
