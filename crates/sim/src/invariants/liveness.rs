//! After the world has healed: clients are served and the VM is protected again, within a bound.

use crate::world::World;
use steadfast_epoch::Phase;

/// Whether clients were served since, and the VM is protected now.
#[must_use]
pub fn recovered(w: &World, replies_before: &[u64]) -> bool {
    let served = w.clients.iter().zip(replies_before).all(|(c, &n)| c.replies >= n + 3);
    let owner = w.index(&w.store.record.owner);
    let p = w.hosts[owner].replica.as_ref().and_then(|r| r.primary());
    served
        && p.is_some_and(|p| {
            p.phase() == Phase::Protected
                && p.record().in_sync.len() >= w.want
                && p.record().nonce == w.store.record.nonce
        })
}

/// The bound has passed.
pub fn failed(w: &mut World) {
    let owner = w.index(&w.store.record.owner);
    let how = format!(
        "not served or not protected after healing; record {:?}; {:?}; hosts {:?}",
        w.store.record,
        w.clients.iter().map(|c| c.replies).collect::<Vec<_>>(),
        w.hosts.iter().map(|h| h.replica.as_ref().map(|r| r.status())).collect::<Vec<_>>()
    );
    let _ = owner;
    w.checks.fail("liveness", how);
}
