//! I7 no false failover: in a run where hosts are only slow or starved, within the detector's bounds, nobody is promoted.

use crate::world::World;

/// At the end of a run without any real fault.
pub fn ended(w: &mut World) {
    if w.checks.promotions > 0 || w.checks.cold_boots > 1 {
        let how = format!("{} promotions though nobody had failed", w.checks.promotions);
        w.checks.fail("I7", how);
    }
}
