//! Hosts: what the detector found is written down, hosts that expect to fail are emptied, empty ones go into maintenance, and the
//! rolling upgrade goes from host to host.

use super::fit::Role;
use super::world::{World, elapsed};
use crate::action::{Action, Because, Wanted};
use crate::model::{AlarmKey, DrainWhy, HostAdmin, HostHealth, Phase, Task};

/// So long an upgrade looks for another place for a VM without protection.
const STAYS_AFTER_MS: u64 = 60_000;

/// Writes down what was observed, and who has to go.
pub(crate) fn mark(w: &mut World) {
    let leaves = |w: &World, h: usize| {
        let admin = w.hosts[h].host.record.admin;
        let for_it = matches!(
            admin,
            HostAdmin::Draining(DrainWhy::Prediction) | HostAdmin::Maintenance(DrainWhy::Prediction)
        );
        for_it && w.hosts[h].host.record.reachable()
    };
    // One at a time: what many hosts expect at once is the room's or the sensors', and nobody is left to take their VMs.
    let mut leaving = (0..w.hosts.len()).any(|h| leaves(w, h));
    for h in 0..w.hosts.len() {
        let (old, seen) = (w.health(h), w.hosts[h].host.status.observed);
        if let Some(health) = next_health(old, seen) {
            let host = w.host_id(h);
            let why = match health {
                HostHealth::Up => "it answers again".into(),
                HostHealth::Suspect => "it does not answer on any path; nothing is taken from it yet".into(),
                HostHealth::Dead { fenced: false } => {
                    "the detector is sure; its protected VMs go on elsewhere, `restart` VMs wait for its lease".into()
                }
                HostHealth::Dead { fenced: true } => "it cannot be running VMs any more".into(),
            };
            w.act(Action::MarkHealth { host, health }, why);
        }
        let host = &w.hosts[h].host;
        if let Some(p) = host
            .status
            .prediction
            .as_ref()
            .filter(|_| w.pool.evacuate_on_prediction)
            && host.record.admin == HostAdmin::InUse
            && host.record.reachable()
            && !host.record.witness
        {
            let why = format!("it predicts its failure ({:?}): {}", p.part, p.evidence);
            let admin = HostAdmin::Draining(DrainWhy::Prediction);
            let host = w.host_id(h);
            if !leaving {
                leaving = w.act(Action::MarkAdmin { host, admin }, why);
            }
        }
    }
}

/// What the record becomes. A host once fenced stays fenced until it is up; a dead one is not suspected again.
fn next_health(old: HostHealth, seen: HostHealth) -> Option<HostHealth> {
    use HostHealth::{Dead, Suspect, Up};
    let next = match (old, seen) {
        (_, Up) => Up,
        (Dead { .. }, Suspect) | (Dead { fenced: true }, Dead { .. }) => old,
        (_, seen) => seen,
    };
    (next != old).then_some(next)
}

/// Left where it is while its host is upgraded, because it cannot be moved or there is no place for it: its process goes on, as the old
/// binary, while the daemon is replaced. A protected VM is never left so: its host may need its standby's protection next.
pub(crate) fn stays(w: &World, v: usize, h: usize) -> bool {
    use HostAdmin::{Draining, Maintenance};
    let vm = &w.vms[v].vm;
    let has_place = || w.best_of(v, Role::Move, 0..w.hosts.len(), |_| None).is_ok();
    // What is in the way elsewhere may be gone in a moment.
    let since = w.hosts[h].host.status.admin_since_ms;
    let waited = since.is_none_or(|at| elapsed(w.now_ms, at) > STAYS_AFTER_MS);
    // A move that comes to nothing each time must not hold up the upgrade of all hosts for ever: its process outlives the daemon.
    let gives_up = since.is_some_and(|at| elapsed(w.now_ms, at) > w.pool.limits.drain_alarm_ms);
    let upgrade = match w.hosts[h].host.record.admin {
        Draining(DrainWhy::Upgrade) => vm.state.fixed.is_some() || gives_up || waited && !has_place(),
        // Its daemon is being replaced: nothing begins there.
        Maintenance(DrainWhy::Upgrade) => true,
        _ => false,
    };
    upgrade && !vm.spec.protection.hot()
}

/// A standby in sync that has no other place, and whose successor is not being filled: it stays while its host is emptied, and protects its VM
/// until that host is turned off.
fn standby_stays(w: &World, v: usize, h: usize) -> bool {
    let vm = &w.vms[v];
    let since = w.hosts[h].host.status.admin_since_ms;
    let waited = since.is_none_or(|at| elapsed(w.now_ms, at) > STAYS_AFTER_MS);
    vm.on()
        && vm.owner.is_some_and(|o| o != h)
        && vm.standbys.contains(&h)
        && w.in_sync(v, h)
        && !vm
            .standbys
            .iter()
            .any(|&o| o != h && w.standby_counts(v, o) && !w.in_sync(v, o))
        && waited
        && w.best_of(v, Role::Standby, 0..w.hosts.len(), |_| None).is_err()
}

/// Nothing that runs or protects is there (disks of VMs that are off may be, and what has no other place).
pub(crate) fn is_empty(w: &World, h: usize) -> bool {
    w.hosts[h].migrations == 0
        && w.hosts[h].copies.iter().all(|&v| {
            let vm = &w.vms[v];
            let here = vm.owner == Some(h) || vm.on() && vm.standbys.contains(&h);
            let process = vm.vm.state.instances.get(w.hosts[h].id());
            stays(w, v, h)
                || standby_stays(w, v, h)
                || !here && process.is_none_or(|i| matches!(i.phase, Phase::Failed(_)))
        })
}

/// Emptied hosts go into maintenance.
pub(crate) fn drained(w: &mut World) {
    for h in 0..w.hosts.len() {
        if let HostAdmin::Draining(why) = w.hosts[h].host.record.admin
            && w.hosts[h].host.record.reachable()
            && is_empty(w, h)
        {
            let admin = HostAdmin::Maintenance(why);
            let host = w.host_id(h);
            w.act(
                Action::MarkAdmin { host, admin },
                "nothing is on it any more that has another place".into(),
            );
        }
    }
}

/// The rolling upgrade: one host after the other is emptied, upgraded, and used again; those with the fewest VMs first.
pub(crate) fn upgrade(w: &mut World) {
    let Some(to) = w.pool.upgrade_to.clone() else {
        call_off_upgrade(w);
        return;
    };
    let mut under_way = 0;
    for h in 0..w.hosts.len() {
        let host = &w.hosts[h].host;
        let done = host.status.versions.steadfast == to;
        match host.record.admin {
            HostAdmin::Maintenance(DrainWhy::Upgrade) if done && host.record.reachable() => {
                let host = w.host_id(h);
                let admin = HostAdmin::InUse;
                w.act(Action::MarkAdmin { host, admin }, format!("it runs {to} now"));
            }
            HostAdmin::Maintenance(DrainWhy::Upgrade) => {
                under_way += 1;
                let busy = |t: &Task| matches!(t, Task::Upgrade { host, .. } if host == w.hosts[h].id());
                let moves = w.hosts[h].migrations > 0;
                if host.record.reachable() && !moves && !w.tasks.iter().any(busy) {
                    let host = w.host_id(h);
                    let why = format!("the rolling upgrade to {to} has come to it, and it is empty");
                    w.act(Action::UpgradeHost { host, to: to.clone() }, why);
                }
            }
            HostAdmin::Draining(DrainWhy::Upgrade) => under_way += 1,
            _ => {}
        }
    }
    let mut next: Vec<usize> = (0..w.hosts.len())
        .filter(|&h| {
            let host = &w.hosts[h].host;
            host.record.admin == HostAdmin::InUse && host.status.versions.steadfast != to
        })
        .collect();
    next.sort_by_key(|&h| (w.hosts[h].copies.len(), h));
    for h in next {
        if under_way >= w.pool.limits.upgrades_at_once {
            return;
        }
        if let Some(because) = upgrade_must_wait(w) {
            w.alarms_wanted.insert(AlarmKey::UpgradeWaits);
            w.refuse(None, Some(h), Wanted::Upgrade, Because::Other(because));
            return;
        }
        let host = w.host_id(h);
        let admin = HostAdmin::Draining(DrainWhy::Upgrade);
        let why =
            format!("the rolling upgrade to {to} has come to it: all others are up, all VMs are protected");
        w.act(Action::MarkAdmin { host, admin }, why);
        under_way += 1;
    }
}

/// No upgrade is wanted (any more): hosts that were emptied for one are used again.
fn call_off_upgrade(w: &mut World) {
    for h in 0..w.hosts.len() {
        let admin = w.hosts[h].host.record.admin;
        let for_upgrade = matches!(
            admin,
            HostAdmin::Draining(DrainWhy::Upgrade) | HostAdmin::Maintenance(DrainWhy::Upgrade)
        );
        let busy = |t: &Task| matches!(t, Task::Upgrade { host, .. } if host == w.hosts[h].id());
        if for_upgrade && !w.tasks.iter().any(busy) {
            let (host, admin) = (w.host_id(h), HostAdmin::InUse);
            w.act(
                Action::MarkAdmin { host, admin },
                "the upgrade was called off".into(),
            );
        }
    }
}

/// Protection is kept: the next host is touched only when everything is in order.
fn upgrade_must_wait(w: &World) -> Option<String> {
    let down = w.hosts.iter().find(|h| !h.host.record.reachable());
    if let Some(h) = down {
        return Some(format!("host {} is not up", h.id()));
    }
    if w.migrations() > 0 {
        return Some("VMs are on the move".into());
    }
    let bad = (0..w.vms.len()).find(|&v| {
        let vm = &w.vms[v];
        let wanted = vm.vm.spec.standbys_wanted();
        vm.on() && vm.owner.is_some() && (!vm.vm.state.running() || w.good_standbys(v) < wanted)
    });
    bad.map(|v| format!("VM {} is not protected in full", w.vms[v].id()))
}
