//! I8 honest status: a primary that calls itself protected has a standby that could go on, or notices within its bound.

use crate::world::World;
use steadfast_epoch::{Phase, Role};

/// Looks at whoever calls itself protected.
pub fn look(w: &mut World) {
    // An echo may be under way for as long as the slowest link takes, and clocks may run a tenth slow.
    let slowest = w.links.iter().flatten().map(|l| l.delay_us).max().unwrap_or(0) + 20_000;
    let bound = (w.settings.standby_lost_us + 4 * w.settings.heartbeat_us) * 10 / 9 + 2 * slowest;
    let liar = w.hosts.iter().any(|h| {
        let awake = h.up && h.frozen_until <= w.now && h.busy_until <= w.now && h.starve_us == 0;
        let Some(p) = h.replica.as_ref().and_then(|r| r.primary()).filter(|_| awake) else { return false };
        // A primary that has lost the right does not know it before it asks; what it says is about the past.
        let current = w.store.record.nonce == p.record().nonce;
        let could = p.record().in_sync.iter().any(|s| {
            let s = &w.hosts[w.index(s)];
            let state = s.replica.as_ref().map(|r| r.role());
            s.up && matches!(state, Some(Role::Standby(s)) if s.status().staged.is_some())
        });
        current && p.phase() == Phase::Protected && !could
    });
    if !liar {
        w.checks.false_status_since = None;
        return;
    }
    let since = *w.checks.false_status_since.get_or_insert(w.now);
    if w.now - since > bound {
        w.checks.fail("I8", format!("called protected for {} us while no standby could go on", w.now - since));
    }
}
