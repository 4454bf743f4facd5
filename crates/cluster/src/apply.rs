//! What an action does to a snapshot: the reference for the node that carries it out, the world of tests, and `--dry-run`.
//!
//! [`apply`] is the state right after an action was *begun* (records written, work under way); [`settle`] lets all that is
//! under way succeed. `decide` on a state to which its own actions were applied has nothing further to say.
//!
//! Applying is idempotent and safe on a state that has moved on: an action whose expectation does not hold does nothing.

use crate::action::Action;
use crate::model::{
    AlarmKey, Home, Host, HostHealth, Instance, MoveCause, Phase, Power, Snapshot, Standby, Task, Vm,
};
use std::collections::BTreeSet;
use steadfast_types::{HostId, VmId};

/// Begins an action. False when its expectation does not hold (any more): nothing was changed.
pub fn apply(snapshot: &mut Snapshot, action: &Action) -> bool {
    let now = snapshot.now_ms;
    match action {
        Action::MarkHealth { host, .. } | Action::MarkAdmin { host, .. } => {
            snapshot.hosts.get_mut(host).is_some_and(|h| on_host(h, action))
        }
        Action::UpgradeHost { .. } | Action::CancelMigration { .. } => {
            on_tasks(&mut snapshot.tasks, action, now)
        }
        Action::Migrate { vm, .. } => {
            snapshot.vms.get(vm).is_some_and(|v| may_migrate(v, action))
                && on_tasks(&mut snapshot.tasks, action, now)
        }
        Action::RaiseAlarm { .. } | Action::ClearAlarm { .. } => on_alarms(&mut snapshot.alarms, action),
        Action::StartVm { vm, .. }
        | Action::ResetVm { vm, .. }
        | Action::Promote { vm, .. }
        | Action::StopInstance { vm, .. }
        | Action::AddStandby { vm, .. }
        | Action::RemoveStandby { vm, .. } => snapshot.vms.get_mut(vm).is_some_and(|v| on_vm(v, action)),
    }
}

/// The part of [`apply`] that changes a host's record.
pub(crate) fn on_host(host: &mut Host, action: &Action) -> bool {
    match action {
        Action::MarkHealth { health, .. } => std::mem::replace(&mut host.record.health, *health) != *health,
        Action::MarkAdmin { admin, .. } => std::mem::replace(&mut host.record.admin, *admin) != *admin,
        _ => false,
    }
}

/// The part of [`apply`] that changes alarms.
pub(crate) fn on_alarms(alarms: &mut BTreeSet<AlarmKey>, action: &Action) -> bool {
    match action {
        Action::RaiseAlarm { alarm } => alarms.insert(alarm.clone()),
        Action::ClearAlarm { alarm } => alarms.remove(alarm),
        _ => false,
    }
}

/// Whether a migration may begin.
pub(crate) fn may_migrate(vm: &Vm, action: &Action) -> bool {
    let Action::Migrate { from, to, term, .. } = action else {
        return false;
    };
    let s = &vm.state;
    s.owner.as_ref() == Some(from) && s.term == *term && from != to && s.running()
}

/// The part of [`apply`] that changes the work under way.
pub(crate) fn on_tasks(tasks: &mut Vec<Task>, action: &Action, now_ms: u64) -> bool {
    match action {
        Action::Migrate {
            vm, from, to, cause, ..
        } => {
            let busy = |t: &Task| matches!(t, Task::Migrate { vm: v, .. } if v == vm);
            if tasks.iter().any(busy) {
                return false;
            }
            tasks.push(Task::Migrate {
                vm: vm.clone(),
                from: from.clone(),
                to: to.clone(),
                cause: *cause,
                since_ms: now_ms,
            });
            true
        }
        Action::CancelMigration { vm, to } => {
            let before = tasks.len();
            tasks.retain(|t| !matches!(t, Task::Migrate { vm: v, to: h, .. } if v == vm && h == to));
            tasks.len() != before
        }
        Action::UpgradeHost { host, to } => {
            let busy = |t: &Task| matches!(t, Task::Upgrade { host: h, .. } if h == host);
            if tasks.iter().any(busy) {
                return false;
            }
            tasks.push(Task::Upgrade {
                host: host.clone(),
                to: to.clone(),
                since_ms: now_ms,
            });
            true
        }
        _ => false,
    }
}

/// The part of [`apply`] that changes a VM's state.
pub(crate) fn on_vm(vm: &mut Vm, action: &Action) -> bool {
    match action {
        Action::StartVm { host, term, .. } if vm.state.term == *term => {
            take_over(vm, host);
            // What was in memory is gone: every standby begins anew, and only these disks are current.
            for s in vm.state.standbys.values_mut() {
                s.in_sync = false;
            }
            vm.state.replicas = BTreeSet::from([host.clone()]);
            true
        }
        Action::Promote { to, term, .. } if vm.state.term == *term && vm.state.standbys.contains_key(to) => {
            let old = vm.state.owner.clone();
            take_over(vm, to);
            for s in vm.state.standbys.values_mut() {
                s.in_sync = false;
            }
            vm.state.replicas.retain(|h| Some(h) != old.as_ref());
            vm.state.replicas.insert(to.clone());
            true
        }
        Action::ResetVm { host, term, .. }
            if vm.state.term == *term && vm.state.owner.as_ref() == Some(host) =>
        {
            set_phase(vm, host, Phase::Starting);
            vm.state.ready = false;
            true
        }
        Action::StopInstance { host, in_order, .. } => match vm.state.instances.get_mut(host) {
            Some(i) if i.phase != Phase::Stopping => {
                if *in_order && vm.state.owner.as_ref() == Some(host) {
                    vm.state.ready = false;
                }
                i.phase = Phase::Stopping;
                true
            }
            _ => false,
        },
        Action::AddStandby { host, .. }
            if vm.state.owner.as_ref() != Some(host) && !vm.state.standbys.contains_key(host) =>
        {
            vm.state.standbys.insert(host.clone(), Standby::default());
            set_phase(vm, host, Phase::Standby);
            true
        }
        Action::RemoveStandby { host, .. } if vm.state.standbys.remove(host).is_some() => {
            vm.state.replicas.remove(host);
            if let Some(i) = vm.state.instances.get_mut(host) {
                i.phase = Phase::Stopping;
            }
            true
        }
        _ => false,
    }
}

/// The right to run it goes to `host`; the old owner stays listed as a standby that has to be filled again, so that a host
/// that comes back soon needs only what has changed since.
fn take_over(vm: &mut Vm, host: &HostId) {
    let wants_standbys = vm.spec.standbys_wanted() > 0;
    let s = &mut vm.state;
    s.term = s.term.next();
    if let Some(old) = s
        .owner
        .replace(host.clone())
        .filter(|old| old != host && wants_standbys)
    {
        s.standbys.insert(old, Standby::default());
    }
    s.standbys.remove(host);
    s.ready = false;
    set_phase(vm, host, Phase::Starting);
}

fn set_phase(vm: &mut Vm, host: &HostId, phase: Phase) {
    let term = vm.state.term;
    let fault = vm.state.instances.get(host).is_some_and(|i| i.disk_fault);
    vm.state.instances.insert(
        host.clone(),
        Instance {
            phase,
            term,
            disk_fault: fault,
        },
    );
}

/// Lets everything that is under way succeed: starts, stops, standbys, migrations, upgrades. Instances on dead hosts are gone.
/// For `--dry-run` and tests.
pub fn settle(snapshot: &mut Snapshot) {
    let tasks = std::mem::take(&mut snapshot.tasks);
    let now = snapshot.now_ms;
    for task in tasks {
        match task {
            Task::Migrate {
                vm, from, to, cause, ..
            } => finish_migration(snapshot, &vm, &from, &to, cause, now),
            Task::Upgrade { host, to, .. } => {
                if let Some(h) = snapshot.hosts.get_mut(&host) {
                    h.status.versions.steadfast = to;
                }
            }
            Task::RollingUpgrade { .. } => {}
        }
    }
    let Snapshot { hosts, vms, .. } = snapshot;
    let up = |h: &HostId| hosts.get(h).is_some_and(|h| h.record.health == HostHealth::Up);
    let dead = |h: &HostId| hosts.get(h).is_none_or(|h| h.record.dead());
    for vm in vms.values_mut() {
        settle_vm(vm, &up, &dead);
    }
}

fn settle_vm(vm: &mut Vm, up: &dyn Fn(&HostId) -> bool, dead: &dyn Fn(&HostId) -> bool) {
    let s = &mut vm.state;
    s.instances.retain(|h, _| !dead(h));
    let owner = s.owner.clone();
    let stopped = |h: &HostId, i: &Instance| i.phase == Phase::Stopping && up(h);
    if let Some(o) = &owner
        && s.instances.get(o).is_some_and(|i| stopped(o, i))
    {
        s.owner = None;
        s.ready = false;
    }
    s.instances.retain(|h, i| !stopped(h, i));
    for (h, i) in &mut s.instances {
        if i.phase == Phase::Starting && up(h) {
            i.phase = Phase::Running;
            s.ready |= owner.as_ref() == Some(h);
        }
    }
    if s.running() && vm.spec.power == Power::On && owner.as_ref().is_some_and(up) {
        let term = s.term;
        for (h, standby) in s.standbys.iter_mut().filter(|(h, _)| up(h)) {
            *standby = Standby {
                in_sync: true,
                lag_ms: 0,
            };
            s.replicas.insert(h.clone());
            s.instances
                .entry(h.clone())
                .or_insert(Instance::new(Phase::Standby, term));
        }
    }
}

fn finish_migration(snap: &mut Snapshot, id: &VmId, from: &HostId, to: &HostId, cause: MoveCause, now: u64) {
    let fine = |h: &HostId| snap.hosts.get(h).is_some_and(|h| h.record.reachable());
    if !fine(from) || !fine(to) {
        return;
    }
    let Some(vm) = snap.vms.get_mut(id) else {
        return;
    };
    if vm.state.owner.as_ref() != Some(from) || !vm.state.running() {
        return;
    }
    take_over(vm, to);
    set_phase(vm, to, Phase::Running);
    let wants_standbys = vm.spec.standbys_wanted() > 0;
    if wants_standbys {
        set_phase(vm, from, Phase::Standby);
    }
    let s = &mut vm.state;
    s.ready = true;
    s.moved_ms = Some(now);
    s.replicas.insert(to.clone());
    if wants_standbys {
        let synced = Standby {
            in_sync: true,
            lag_ms: 0,
        };
        s.standbys.insert(from.clone(), synced);
    } else {
        s.replicas.remove(from);
        s.instances.remove(from);
    }
    match cause {
        MoveCause::Drain if s.home.is_none() => {
            s.home = Some(Home {
                host: from.clone(),
                left_ms: now,
            });
        }
        MoveCause::Drain => {}
        _ => s.home = None,
    }
    if cause == MoveCause::Balance {
        for h in [from, to] {
            if let Some(h) = snap.hosts.get_mut(h) {
                h.status.balanced_ms = Some(now);
            }
        }
    }
}
