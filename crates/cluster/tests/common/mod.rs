//! Checkers over snapshots, written apart from the decisions: they count everything anew.
#![allow(dead_code)]

use std::collections::BTreeMap;
use steadfast_cluster::decide;
use steadfast_cluster::model::{GroupRule, Phase, Power, Protection, Resources, Snapshot, Task, Vm};
use steadfast_cluster::synthetic::{add, describe, pool, run, vm};
use steadfast_types::{HostId, VmId};

pub fn h(n: usize) -> HostId {
    HostId::new(format!("h{n:04}")).unwrap()
}

pub fn v(name: &str) -> VmId {
    VmId::new(name).unwrap()
}

/// Hosts with a copy of a VM: where it runs, stands by, is a left-over process, or moves to.
pub fn copies(s: &Snapshot, vm: &Vm) -> BTreeMap<HostId, Resources> {
    let mut at: BTreeMap<HostId, Resources> = BTreeMap::new();
    let mut add = |h: &HostId, r: Resources| {
        let e = at.entry(h.clone()).or_default();
        *e = e.max(r);
    };
    let spec = &vm.spec;
    let full = Resources {
        disk_bytes: spec.local_disk_bytes(),
        ..spec.resources
    };
    let disk = Resources {
        disk_bytes: full.disk_bytes,
        ..Resources::ZERO
    };
    let ram = spec.protection.hot() && spec.standby_memory == steadfast_cluster::model::StandbyMemory::Ram;
    let live = vm.state.owner.is_some();
    for h in &vm.state.replicas {
        add(h, disk);
    }
    for h in vm.state.standbys.keys() {
        add(h, disk);
        if ram && live {
            add(
                h,
                Resources {
                    memory_bytes: full.memory_bytes,
                    ..disk
                },
            );
        }
    }
    if let Some(o) = &vm.state.owner {
        add(o, full);
    }
    for (h, i) in &vm.state.instances {
        let running = matches!(i.phase, Phase::Starting | Phase::Running);
        if running && !vm.state.standbys.contains_key(h) {
            add(h, full);
        }
    }
    for t in &s.tasks {
        if let Task::Migrate { vm: id, to, .. } = t
            && *id == spec.id
        {
            add(to, full);
        }
    }
    at
}

/// No host has more memory or disk promised than it has, nor more CPU than the overcommitment allows. Promotions may
/// exceed the CPU: survival comes first.
pub fn check_capacity(s: &Snapshot, cpu_too: bool) -> Result<(), String> {
    let mut used: BTreeMap<HostId, Resources> = BTreeMap::new();
    for vm in s.vms.values() {
        for (h, r) in copies(s, vm) {
            let e = used.entry(h).or_default();
            *e = e.plus(r);
        }
    }
    for (id, host) in s.hosts.iter().filter(|(_, h)| !h.record.dead()) {
        let mut cap = host.record.capacity.minus(host.record.reserved);
        cap.cpu_milli = cap.cpu_milli * u64::from(s.pool.cpu_overcommit_permille) / 1000;
        let mut u = used.get(id).copied().unwrap_or_default();
        if !cpu_too {
            u.cpu_milli = 0;
        }
        if !u.fits(cap) {
            return Err(format!("host {id} has {cap}, and {u} is promised"));
        }
    }
    Ok(())
}

/// No two members of an `Apart` group have a copy on one host.
pub fn check_apart(s: &Snapshot) -> Result<(), String> {
    let mut seen: BTreeMap<(String, HostId), VmId> = BTreeMap::new();
    for vm in s.vms.values() {
        for g in &vm.spec.groups {
            if s.pool.groups.get(g) != Some(&GroupRule::Apart) {
                continue;
            }
            for h in copies(s, vm).into_keys() {
                let key = (g.to_string(), h.clone());
                if let Some(other) = seen.insert(key, vm.spec.id.clone()) {
                    return Err(format!("{other} and {} are both on {h}", vm.spec.id));
                }
            }
        }
    }
    Ok(())
}

/// Every VM that is on, was started and not stopped in order since, and is protected, runs on a host that is up.
pub fn check_all_run(s: &Snapshot) -> Result<(), String> {
    for (id, vm) in &s.vms {
        let wanted = vm.spec.power == Power::On && vm.spec.protection != Protection::None;
        if !wanted || vm.state.owner.is_none() {
            continue;
        }
        let up = vm
            .state
            .owner
            .as_ref()
            .is_some_and(|o| s.hosts[o].record.reachable());
        if !up || !vm.state.running() {
            return Err(format!("{id} does not run: {:?}", vm.state));
        }
    }
    Ok(())
}

/// In-sync standbys of a VM on hosts that are up.
pub fn protected(s: &Snapshot, vm: &Vm) -> usize {
    vm.state
        .in_sync()
        .filter(|h| s.hosts[*h].record.reachable())
        .count()
}

/// A pool that has settled with these VMs.
pub fn small(hosts: usize, vms: &[(&str, Protection)]) -> Snapshot {
    let mut s = pool(hosts, 0).unwrap();
    for (name, class) in vms {
        add(&mut s, vm(name, *class).unwrap());
    }
    run(&mut s, 10, |s| check_capacity(s, true).unwrap());
    s
}

/// Who runs a VM.
pub fn owner(s: &Snapshot, vm: &str) -> String {
    let o = s.vms[&v(vm)].state.owner.as_ref();
    o.map_or_else(|| "nobody".into(), ToString::to_string)
}

/// There is nothing to do.
pub fn fixpoint(s: &Snapshot) {
    let d = decide(s);
    assert!(d.actions.is_empty(), "{d}\n{}", describe(s));
}
