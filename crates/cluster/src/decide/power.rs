//! On and off as wanted: left-overs ended, orderly stops, power-on with admission, priorities and dependencies.

use super::fit::Role;
use super::recover::{may_start, waits_for};
use super::world::World;
use crate::action::{Action, Because, NoHost, Wanted};
use crate::model::{AlarmKey, HostHealth, Phase, Protection, Resources};
use crate::sabotage::Sabotage;

/// Ends instances that should not be: of hosts that came back, of VMs that are off, of removed standbys.
pub(crate) fn end_leftovers(w: &mut World) {
    for v in 0..w.vms.len() {
        let vm = &w.vms[v];
        let mut stop = Vec::new();
        for (id, i) in &vm.vm.state.instances {
            let Some(h) = w.host(id) else { continue };
            let moving = vm.migrating.is_some_and(|m| m.from == h || m.to == h);
            let listed = vm.owner == Some(h) || vm.standbys.contains(&h) && (vm.on() || vm.owner.is_some());
            let ends = matches!(i.phase, Phase::Stopping | Phase::Failed(_));
            if !listed && !moving && !ends && w.health(h) == HostHealth::Up {
                stop.push((h, i.term));
            }
        }
        for (h, term) in stop {
            let vm = &w.vms[v];
            let why = format!(
                "left over from term {term}; the VM is in term {}",
                vm.vm.state.term
            );
            let (vm, host) = (vm.id().clone(), w.host_id(h));
            let in_order = false;
            w.act(Action::StopInstance { vm, host, in_order }, why);
        }
    }
}

/// Stops VMs that should be off: those that others need last.
pub(crate) fn power_off(w: &mut World) {
    let mut needed = vec![false; w.vms.len()];
    for vm in w.vms.iter().filter(|vm| !vm.on() && vm.owner.is_some()) {
        for n in vm.needs.iter().flatten() {
            needed[*n] = true;
        }
    }
    let ready = |w: &World, v: &usize| !w.vms[*v].on() && w.vms[*v].owner.is_some() && !needed[*v];
    for v in (0..w.vms.len()).filter(|v| ready(w, v)).collect::<Vec<_>>() {
        let vm = &w.vms[v];
        let Some(owner) = vm.owner.filter(|&o| w.health(o) == HostHealth::Up) else {
            continue;
        };
        let (id, host) = (vm.id().clone(), w.host_id(owner));
        if let Some(m) = vm.migrating {
            let to = w.host_id(m.to);
            w.act(
                Action::CancelMigration { vm: id.clone(), to },
                "the VM shall be off".into(),
            );
        }
        let in_order = true;
        w.act(
            Action::StopInstance {
                vm: id,
                host,
                in_order,
            },
            "it shall be off".into(),
        );
    }
}

/// A refusal for want of room that also answers every later VM that needs at least as much.
struct Refused {
    demand: Resources,
    standbys: usize,
    because: Because,
}

/// Starts VMs that should be on and were never started, or were stopped in order.
pub(crate) fn power_on(w: &mut World) {
    let off: Vec<usize> = (0..w.vms.len())
        .filter(|&v| w.vms[v].on() && w.vms[v].owner.is_none())
        .collect();
    let mut refused: Vec<Refused> = Vec::new();
    for v in w.by_priority(off) {
        if let Some(owner) = w.vms[v].vm.state.owner.clone() {
            // It may be running there, and nobody here can tell.
            let text = format!(
                "its owner {owner} is not a host of this pool; add it again, or fence it and clear the owner"
            );
            w.alarms_wanted.insert(AlarmKey::VmDown(w.vms[v].id().clone()));
            w.refuse(Some(v), None, Wanted::PowerOn, Because::Other(text));
            continue;
        }
        let vm = &w.vms[v];
        let spec = &vm.vm.spec;
        let plain = spec.protection != Protection::None && vm.groups.is_empty();
        let demand = spec.demand();
        let standbys = spec.standbys_wanted();
        let known = refused
            .iter()
            .find(|r| plain && r.demand.fits(demand) && r.standbys <= standbys && spec.baseline.is_empty());
        let result = match known {
            Some(r) => Err(r.because.clone()),
            None => power_on_one(w, v),
        };
        if let Err(because) = result {
            if plain && matches!(because, Because::NoFailoverRoom { .. }) && known_is_new(&refused, demand) {
                refused.push(Refused {
                    demand,
                    standbys,
                    because: because.clone(),
                });
            }
            if !matches!(because, Because::WaitsFor(_)) {
                w.alarms_wanted.insert(AlarmKey::VmDown(w.vms[v].id().clone()));
            }
            w.refuse(Some(v), None, Wanted::PowerOn, because);
        }
    }
}

fn known_is_new(refused: &[Refused], demand: Resources) -> bool {
    refused.len() < 64 && !refused.iter().any(|r| r.demand == demand)
}

fn power_on_one(w: &mut World, v: usize) -> Result<(), Because> {
    waits_for(w, v)?;
    let (start, standbys) = plan_power_on(w, v)?;
    let vm = &w.vms[v];
    let host = &w.hosts[start];
    let why = format!(
        "it shall be on; {} suits best with {} free",
        host.id(),
        host.free().minus(host.reserve.sum())
    );
    let (id, term) = (vm.id().clone(), vm.vm.state.term);
    let action = Action::StartVm {
        vm: id.clone(),
        host: w.host_id(start),
        term,
    };
    let mark = w.out.actions.len();
    w.act(action, why);
    for s in &standbys {
        let (vm, host) = (id.clone(), w.host_id(*s));
        let action = Action::AddStandby { vm, host };
        w.act(
            action,
            "its class wants a standby, and this host suits best".into(),
        );
    }
    debug_assert!(w.out.actions.len() > mark);
    Ok(())
}

/// Where it would run and stand by, all rules and admission kept. Leaves the world as it was.
pub(crate) fn plan_power_on(w: &mut World, v: usize) -> Result<(usize, Vec<usize>), Because> {
    let vm = &w.vms[v];
    let replicas: Vec<usize> = vm.vm.state.replicas.iter().filter_map(|h| w.host(h)).collect();
    if vm.bound_to_disks() && !replicas.iter().any(|&h| w.hosts[h].usable()) {
        let hosts = replicas.iter().map(|&h| w.host_id(h)).collect();
        return Err(Because::DisksUnreachable(hosts));
    }
    let start = w.best(v, Role::Primary).map_err(|none| {
        if none.failed_there > 0 && none.room == 0 {
            Because::GaveUp(vm.vm.state.start_failures.values().map(|f| f.count).sum())
        } else {
            Because::NoHost(*none)
        }
    })?;
    may_start(w, v, &w.host_id(start))?;
    plan_protection(w, v, start).map(|standbys| (start, standbys))
}

/// The standbys of a VM that runs on `start`, admission kept. Leaves the world as it was: it is played through on the
/// world itself, and taken back.
pub(crate) fn plan_protection(w: &mut World, v: usize, start: usize) -> Result<Vec<usize>, Because> {
    let before = w.vms[v].vm.clone();
    let actions = w.out.actions.len();
    let planned = play(w, v, start);
    w.restore(v, before);
    w.out.actions.truncate(actions);
    planned
}

fn play(w: &mut World, v: usize, start: usize) -> Result<Vec<usize>, Because> {
    let (vm, term) = (w.vms[v].id().clone(), w.vms[v].vm.state.term);
    let host = w.host_id(start);
    w.act(
        Action::StartVm {
            vm: vm.clone(),
            host,
            term,
        },
        String::new(),
    );
    let mut touched = vec![start];
    let mut standbys = Vec::new();
    let wanted = w.vms[v].vm.spec.standbys_wanted();
    let have = w.vms[v]
        .standbys
        .iter()
        .filter(|&&h| w.standby_counts(v, h))
        .count();
    let admit = w.pool.host_failures > 0;
    for _ in have..wanted {
        match w.best(v, Role::Standby) {
            Ok(h) => {
                let (vm, host) = (vm.clone(), w.host_id(h));
                w.act(Action::AddStandby { vm, host }, String::new());
                touched.push(h);
                standbys.push(h);
            }
            Err(none) if admit => return Err(Because::NoStandbyHost(*none)),
            Err(_) => break,
        }
    }
    touched.extend(w.vms[v].standbys.iter().copied());
    // A standby from before it was off takes memory again: its host may have given that away meanwhile.
    let full = |t: &&usize| !w.hosts[**t].used.fits(w.hosts[**t].cap);
    if let Some(&t) = touched
        .iter()
        .find(full)
        .filter(|_| !w.broken(Sabotage::IgnoreCapacity))
    {
        return Err(Because::NoHost(NoHost {
            room: 1,
            short: w.hosts[t].used.minus(w.hosts[t].cap),
            closest: Some(w.host_id(t)),
            ..NoHost::default()
        }));
    }
    if !w.broken(Sabotage::NoAdmission) {
        w.absorbs(&touched)?;
    }
    Ok(standbys)
}
