//! I2 one owner: per term one process at most commits, releases or starts, on the host that the record of that term names;
//! and a term is given once.

use crate::world::World;

/// A host does what only the owner may.
pub fn acts(w: &mut World, h: usize, what: &str) {
    let host = &w.hosts[h];
    let Some(term) = host.replica.as_ref().and_then(|r| r.primary()).map(|p| p.term()) else { return };
    let me = (h, host.instance);
    let before = *w.checks.acting.entry(term).or_insert(me);
    let named = w.store.by_term.get(&term).is_some_and(|r| r.owner == host.id);
    if before != me || !named {
        let how = format!("{} {what} in term {term}; named {named}, acted before: {before:?}", host.id);
        w.checks.fail("I2", how);
    }
}

/// The store has changed.
pub fn store(w: &mut World) {
    if let Some((a, b)) = &w.store.reused {
        let how = format!("term {} was given twice: {a:?} and {b:?}", a.term);
        w.checks.fail("I2", how);
    }
}
