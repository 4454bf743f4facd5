//! Moves that are needed: off hosts that are emptied, off failing disks, apart from VMs that must be apart, and back home.
//!
//! A VM with standbys moves to one of them that is in sync: a planned promote, its old host becomes the standby. So it is
//! unprotected for no longer than the switch. Before a drain `protect` has filled one more standby where there is room; afterwards it
//! removes the one on the leaving host, and only when another is in sync.

use super::fit::{Obstacle, Role};
use super::hosts;
use super::world::{World, elapsed};
use crate::action::{Action, Because, Wanted};
use crate::model::{AlarmKey, HostHealth, MoveCause, Phase};

/// Why there is no target.
enum NoTarget {
    /// It will come by itself.
    Wait(Because),
    /// It will not.
    Stuck(Because),
}

/// Stops migrations whose other end is lost.
pub(crate) fn cancel_hopeless(w: &mut World) {
    for v in 0..w.vms.len() {
        let Some(m) = w.vms[v].migrating else { continue };
        let why = if w.hosts[m.to].host.record.dead() {
            "its target is dead"
        } else if w.vms[v].owner == Some(m.to) {
            // It has arrived; that ends its task.
            continue;
        } else if w.vms[v].owner != Some(m.from) {
            "the VM is not where it came from any more"
        } else if w.hosts[m.to].host.record.leaving() && m.cause != MoveCause::Operator {
            "its target is being emptied"
        } else {
            continue;
        };
        let (vm, to) = (w.vms[v].id().clone(), w.host_id(m.to));
        w.act(Action::CancelMigration { vm, to }, why.into());
    }
}

/// Empties hosts that leave.
pub(crate) fn drain(w: &mut World) {
    for h in 0..w.hosts.len() {
        let record = &w.hosts[h].host.record;
        if !record.leaving() || !record.reachable() {
            continue;
        }
        let here: Vec<usize> = w.hosts[h].copies.iter().copied().collect();
        let mut stuck = None;
        for v in w.by_priority(here.clone()) {
            let moves = w.vms[v].owner == Some(h) && w.vms[v].on() && w.vms[v].migrating.is_none();
            if !moves || hosts::stays(w, v, h) {
                continue;
            }
            if let Some(text) = not_yet_safe(w, v) {
                w.refuse(Some(v), Some(h), Wanted::Drain, Because::Other(text));
                continue;
            }
            let why = format!("{} is being emptied", w.hosts[h].id());
            match go(w, v, MoveCause::Drain, why) {
                Ok(()) => {}
                Err(NoTarget::Wait(because)) => w.refuse(Some(v), Some(h), Wanted::Drain, because),
                Err(NoTarget::Stuck(because)) => {
                    w.refuse(Some(v), Some(h), Wanted::Drain, because);
                    stuck = Some(v);
                }
            }
        }
        // A standby that has no other place: `protect` has refused it already.
        let kept = here.iter().any(|&v| {
            let vm = &w.vms[v];
            let degraded = AlarmKey::VmDegraded(vm.id().clone());
            vm.on() && vm.standbys.contains(&h) && w.alarms_wanted.contains(&degraded)
        });
        // Waiting for a standby to be filled, or for a move that fails each time, has no end of its own: people are told.
        let since = w.hosts[h].host.status.admin_since_ms;
        let long = since.is_some_and(|since| elapsed(w.now_ms, since) > w.pool.limits.drain_alarm_ms);
        let empty = hosts::is_empty(w, h);
        if stuck.is_some() || (kept || long) && !empty {
            w.alarms_wanted.insert(AlarmKey::DrainStuck(w.host_id(h)));
        }
    }
}

/// Moves VMs off failing disks and out of places where they may not be.
pub(crate) fn relieve(w: &mut World) {
    for v in 0..w.vms.len() {
        let vm = &w.vms[v];
        let Some(owner) = vm
            .owner
            .filter(|_| vm.on() && vm.vm.state.running() && vm.migrating.is_none())
        else {
            continue;
        };
        let host = w.hosts[owner].id();
        if w.health(owner) != HostHealth::Up || w.hosts[owner].host.record.leaving() {
            continue;
        }
        let disk = vm.vm.state.primary().is_some_and(|i| i.disk_fault)
            && vm.vm.spec.protection != crate::model::Protection::None;
        let misplaced = w.misplaced(v, owner);
        let why = match (disk, misplaced) {
            (true, _) => format!("its disk on {host} answers late or with errors"),
            (_, true) => format!("on {host} is a VM that it must be apart from"),
            _ => continue,
        };
        if misplaced {
            w.alarms_wanted
                .insert(AlarmKey::VmNotApart(w.vms[v].id().clone()));
        }
        if let Err(NoTarget::Wait(because) | NoTarget::Stuck(because)) = go(w, v, MoveCause::Relief, why) {
            w.refuse(Some(v), Some(owner), Wanted::Recover, because);
        }
    }
}

/// Brings VMs back to where they were before a drain.
pub(crate) fn bring_back(w: &mut World) {
    for v in 0..w.vms.len() {
        let Some(h) = w.home_bound(v) else { continue };
        let vm = &w.vms[v];
        let filling = vm.standbys.contains(&h) && !w.in_sync(v, h);
        let protected = w.good_standbys(v) >= vm.vm.spec.standbys_wanted();
        if filling || !protected || not_yet_safe(w, v).is_some() {
            continue;
        }
        let why = format!(
            "{} is in use again, and it was there before the drain",
            w.hosts[h].id()
        );
        let _ = migrate(w, v, h, MoveCause::BringBack, why);
    }
}

/// Why a VM that can take its protection along when it leaves is to wait for that.
fn not_yet_safe(w: &World, v: usize) -> Option<String> {
    if w.spare_wanted(v) == 0 {
        return None;
    }
    let vm = &w.vms[v];
    let filling = |s: &&usize| w.standby_counts(v, **s) && !w.in_sync(v, **s);
    if let Some(&s) = vm.standbys.iter().find(filling) {
        return Some(format!(
            "its standby on {} is being filled first",
            w.hosts[s].id()
        ));
    }
    if w.good_standbys(v) > vm.vm.spec.standbys_wanted() {
        return None;
    }
    // There is no room for one more, or only what is left of it there is in the way. That may never end.
    let leaving = vm.owner.and_then(|o| w.hosts[o].host.status.admin_since_ms);
    if leaving.is_some_and(|since| elapsed(w.now_ms, since) > w.pool.limits.drain_alarm_ms) {
        return None;
    }
    let mut instances = vm.vm.state.instances.iter();
    let ends = instances.find(|(host, i)| {
        let h = w.host(host).filter(|&h| w.hosts[h].usable());
        i.phase == Phase::Stopping && h.is_some_and(|h| vm.owner != Some(h) && !vm.standbys.contains(&h))
    });
    ends.map(|(host, _)| {
        format!("what is left of it on {host} is to end first: one more standby can be there")
    })
}

/// Finds a target and moves.
fn go(w: &mut World, v: usize, cause: MoveCause, why: String) -> Result<(), NoTarget> {
    if w.vms[v].vm.state.primary().map(|i| i.phase) != Some(Phase::Running) {
        return Err(NoTarget::Wait(Because::Other(
            "it does not run yet, or not any more".into(),
        )));
    }
    if let Some(why) = &w.vms[v].vm.state.fixed {
        return Err(NoTarget::Stuck(Because::Other(why.clone())));
    }
    let to = target(w, v)?;
    let how = if w.vms[v].standbys.contains(&to) {
        "its standby there is in sync"
    } else {
        "that host suits best"
    };
    migrate(w, v, to, cause, format!("{why}; {how}"))
}

fn migrate(w: &mut World, v: usize, to: usize, cause: MoveCause, why: String) -> Result<(), NoTarget> {
    let limits = &w.pool.limits;
    let Some(from) = w.vms[v].owner else {
        return Err(NoTarget::Wait(Because::Other("it has no owner".into())));
    };
    if w.migrations() >= limits.migrations_in_pool {
        let text = format!("{} moves at a time in the pool", limits.migrations_in_pool);
        return Err(NoTarget::Wait(Because::Limit(text)));
    }
    if w.hosts[from].migrations.max(w.hosts[to].migrations) >= limits.migrations_per_host {
        let text = format!("{} moves at a time per host", limits.migrations_per_host);
        return Err(NoTarget::Wait(Because::Limit(text)));
    }
    let (vm, term) = (w.vms[v].id().clone(), w.vms[v].vm.state.term);
    let (from, to) = (w.host_id(from), w.host_id(to));
    w.act(
        Action::Migrate {
            vm,
            from,
            to,
            term,
            cause,
        },
        why,
    );
    Ok(())
}

fn target(w: &World, v: usize) -> Result<usize, NoTarget> {
    let vm = &w.vms[v];
    if vm.vm.spec.standbys_wanted() > 0 {
        let counts: Vec<usize> = vm
            .standbys
            .iter()
            .copied()
            .filter(|&h| w.standby_counts(v, h))
            .collect();
        let not_yet = |h: usize| (!w.in_sync(v, h)).then_some(Obstacle::HasCopy);
        if let Ok(h) = w.best_of(v, Role::Move, counts.iter().copied(), not_yet) {
            return Ok(h);
        }
        let filling = counts
            .iter()
            .find(|&&h| !w.in_sync(v, h) && w.obstacle(v, h, Role::Move).is_none());
        if let Some(&h) = filling {
            let text = format!("its standby on {} is being filled", w.hosts[h].id());
            return Err(NoTarget::Wait(Because::Other(text)));
        }
    }
    let not_filling = |h: usize| {
        let filling = vm.standbys.contains(&h) && !w.in_sync(v, h);
        filling.then_some(Obstacle::HasCopy)
    };
    w.best_of(v, Role::Move, 0..w.hosts.len(), not_filling)
        .map_err(|none| NoTarget::Stuck(Because::NoHost(*none)))
}
