//! Pools made up for tests and benchmarks: hosts and VMs with sensible values, and the verbs of a world that obeys.

use crate::action::{Action, Decisions};
use crate::apply::{apply, settle};
use crate::decide::decide;
use crate::model::{
    DiskPlace, DiskRecord, Host, HostHealth, HostRecord, HostStatus, PoolSettings, Protection, Resources,
    SiteRules, Snapshot, Versions, Vm, VmSpecRecord, VmState,
};
use std::collections::{BTreeMap, BTreeSet};
use steadfast_types::{BadName, HostId, VmId};

/// A host of 16 CPUs, 64 GiB and 1 TiB at one site, with 10 Gbit/s.
///
/// # Errors
/// The name is not usable.
pub fn host(name: &str) -> Result<Host, BadName> {
    let record = HostRecord {
        id: name.parse()?,
        site: "here".parse()?,
        rack: None,
        addresses: BTreeMap::new(),
        witness: false,
        capacity: Resources::new(16, 64 << 10, 1 << 10),
        reserved: Resources::ZERO,
        baselines: BTreeSet::from(["v2".to_owned()]),
        storages: BTreeSet::new(),
        link_bytes_per_s: 1_250_000_000,
        admin: crate::model::HostAdmin::InUse,
        health: HostHealth::Up,
    };
    let status = HostStatus {
        versions: Versions {
            steadfast: "1".into(),
            wire_min: 1,
            wire_max: 1,
        },
        ..HostStatus::default()
    };
    Ok(Host { record, status })
}

/// A VM of 2 CPUs and 4 GiB with a local disk of 20 GiB.
///
/// # Errors
/// The name is not usable.
pub fn vm(name: &str, protection: Protection) -> Result<Vm, BadName> {
    let spec = VmSpecRecord {
        id: name.parse()?,
        resources: Resources::new(2, 4 << 10, 0),
        disks: vec![DiskRecord {
            name: "root".into(),
            bytes: 20 << 30,
            place: DiskPlace::Local,
        }],
        protection,
        standbys: 1,
        standby_memory: crate::model::StandbyMemory::Ram,
        baseline: "v2".into(),
        groups: BTreeSet::new(),
        sites: SiteRules::default(),
        priority: 100,
        depends_on: BTreeSet::new(),
        application: None,
        health: None,
        power: crate::model::Power::On,
        pinned: false,
    };
    Ok(Vm {
        spec,
        state: VmState::default(),
    })
}

/// An empty pool of `hosts` hosts `h0001`, ... in racks of `per_rack`.
///
/// # Errors
/// None for fewer than 10,000 hosts.
pub fn pool(hosts: usize, per_rack: usize) -> Result<Snapshot, BadName> {
    let mut s = Snapshot {
        now_ms: 1_000_000,
        pool: PoolSettings::default(),
        ..Snapshot::default()
    };
    for i in 0..hosts {
        let mut h = host(&format!("h{:04}", i + 1))?;
        h.record.rack = i.checked_div(per_rack).map(|r| format!("r{:03}", r + 1));
        s.hosts.insert(h.record.id.clone(), h);
    }
    Ok(s)
}

/// Adds a VM.
pub fn add(s: &mut Snapshot, vm: Vm) {
    s.vms.insert(vm.spec.id.clone(), vm);
}

/// A host dies, and the detector sees it; its processes are gone.
pub fn kill(s: &mut Snapshot, host: &HostId, fenced: bool) {
    if let Some(h) = s.hosts.get_mut(host) {
        h.status.observed = HostHealth::Dead { fenced };
    }
    for vm in s.vms.values_mut() {
        vm.state.instances.remove(host);
        if let Some(standby) = vm.state.standbys.get_mut(host) {
            standby.in_sync = false;
            vm.state.replicas.remove(host);
        }
        if vm.state.owner.as_ref() == Some(host) {
            vm.state.ready = false;
        }
    }
}

/// A host comes back.
pub fn revive(s: &mut Snapshot, host: &HostId) {
    if let Some(h) = s.hosts.get_mut(host) {
        h.status.observed = HostHealth::Up;
    }
}

/// What [`run`] did.
#[derive(Debug, Default)]
pub struct Run {
    /// The decisions of each round.
    pub rounds: Vec<Decisions>,
}

impl Run {
    /// All actions in order.
    pub fn actions(&self) -> impl Iterator<Item = &Action> {
        self.rounds
            .iter()
            .flat_map(|d| d.actions.iter().map(|d| &d.action))
    }
}

/// Decides, begins everything, lets everything succeed, and again, until nothing is decided; at most `rounds_max` times.
/// `after` looks at the state after each step.
pub fn run(s: &mut Snapshot, rounds_max: usize, mut after: impl FnMut(&Snapshot)) -> Run {
    let mut run = Run::default();
    for _ in 0..rounds_max {
        let d = decide(s);
        if d.actions.is_empty() {
            // What was under way before may still end.
            let before = s.clone();
            settle(s);
            if *s == before {
                run.rounds.push(d);
                return run;
            }
            after(s);
            continue;
        }
        for decision in &d.actions {
            apply(s, &decision.action);
            after(s);
        }
        run.rounds.push(d);
        s.now_ms = s.now_ms.saturating_add(1_000);
        settle(s);
        after(s);
    }
    run
}

/// The VM's names and states in one line each; for messages of tests.
#[must_use]
pub fn describe(s: &Snapshot) -> String {
    let line = |(id, vm): (&VmId, &Vm)| {
        let standbys: Vec<String> = vm
            .state
            .standbys
            .iter()
            .map(|(h, x)| format!("{h}{}", if x.in_sync { "" } else { "?" }))
            .collect();
        format!(
            "{id} {} on {:?} {:?} standbys {standbys:?}",
            vm.spec.protection.name(),
            vm.state.owner.as_ref().map(HostId::as_str),
            vm.state.primary().map(|i| i.phase),
        )
    };
    s.vms.iter().map(line).collect::<Vec<_>>().join("\n")
}
