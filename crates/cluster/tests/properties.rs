//! Properties of the decisions over made-up pools and histories, and the broken variants that prove the checkers.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
use common::{check_all_run, check_apart, check_capacity, protected};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{TestCaseError, TestRunner};
use steadfast_cluster::model::{
    AlarmKey, DiskPlace, DrainWhy, FailureClass, GroupRule, HostAdmin, HostHealth, Phase, Power, Protection,
    Snapshot, StandbyMemory, Task, Vm,
};
use steadfast_cluster::synthetic::{add, describe, kill, pool, revive, run, vm};
use steadfast_cluster::{Action, Sabotage, admit, apply, decide, settle};
use steadfast_types::{HostId, VmId};

/// A VM in numbers: class, memory in GiB, standbys, group, shared disk or local, priority, file-backed standby.
type VmSeed = (u8, u8, u8, u8, bool, u8, bool);
/// Something that happens: what, to which host or VM.
type Op = (u8, u8);

fn a_vm() -> impl Strategy<Value = VmSeed> {
    (
        0u8..6,
        1u8..24,
        1u8..3,
        0u8..5,
        prop::bool::weighted(0.2),
        0u8..4,
        any::<bool>(),
    )
}

fn a_pool(hosts: u8, vms: &[VmSeed], ram_only: bool) -> Snapshot {
    let mut s = pool(usize::from(hosts), 2).unwrap();
    s.pool.groups.insert("apart1".parse().unwrap(), GroupRule::Apart);
    s.pool.groups.insert("apart2".parse().unwrap(), GroupRule::Apart);
    s.pool.groups.insert("near".parse().unwrap(), GroupRule::Together);
    s.pool
        .groups
        .insert("soft".parse().unwrap(), GroupRule::PreferApart);
    for h in s.hosts.values_mut() {
        h.record.storages.insert("san".into());
    }
    for (i, (class, gib, standbys, group, shared, priority, file)) in vms.iter().enumerate() {
        let class = match class {
            0 => Protection::None,
            1 | 2 => Protection::Restart,
            3 => Protection::Checkpoint { interval_ms: 1000 },
            _ => Protection::Ft,
        };
        let mut x = vm(&format!("v{i:02}"), class).unwrap();
        x.spec.resources.memory_bytes = u64::from(*gib) << 30;
        x.spec.resources.cpu_milli = u64::from(*gib % 8 + 1) * 1000;
        x.spec.standbys = *standbys;
        x.spec.priority = u16::from(*priority);
        if *shared {
            x.spec.disks[0].place = DiskPlace::Shared("san".into());
        }
        if *file && !ram_only {
            x.spec.standby_memory = StandbyMemory::File;
        }
        match group {
            1 => drop(x.spec.groups.insert("apart1".parse().unwrap())),
            2 => drop(x.spec.groups.insert("apart2".parse().unwrap())),
            3 => drop(x.spec.groups.insert("near".parse().unwrap())),
            4 => drop(x.spec.groups.insert("soft".parse().unwrap())),
            _ => {}
        }
        add(&mut s, x);
    }
    s
}

fn host(s: &Snapshot, n: u8) -> HostId {
    s.hosts
        .keys()
        .nth(usize::from(n) % s.hosts.len())
        .cloned()
        .unwrap()
}

fn a_vm_of(s: &Snapshot, n: u8) -> VmId {
    s.vms.keys().nth(usize::from(n) % s.vms.len()).cloned().unwrap()
}

fn happen(s: &mut Snapshot, (what, n): Op) {
    match what {
        0 => {
            let h = host(s, n);
            kill(s, &h, n % 2 == 0);
        }
        1 | 2 => {
            let h = host(s, n);
            revive(s, &h);
        }
        3 => {
            let h = host(s, n);
            let x = s.hosts.get_mut(&h).unwrap();
            if x.record.admin == HostAdmin::InUse {
                x.record.admin = HostAdmin::Draining(DrainWhy::Operator);
            }
        }
        4 | 5 => {
            let h = host(s, n);
            s.hosts.get_mut(&h).unwrap().record.admin = HostAdmin::InUse;
        }
        6 => {
            let v = a_vm_of(s, n);
            let x = s.vms.get_mut(&v).unwrap();
            x.spec.power = if n % 3 == 0 { Power::Off } else { Power::On };
        }
        7 => {
            let v = a_vm_of(s, n);
            let x = s.vms.get_mut(&v).unwrap();
            if let Some(o) = x.state.owner.clone()
                && let Some(i) = x.state.instances.get_mut(&o)
                && i.phase == Phase::Running
            {
                i.phase = Phase::Failed(match n % 3 {
                    0 => FailureClass::ProcessDied,
                    1 => FailureClass::GuestHung,
                    _ => FailureClass::DiskFault,
                });
            }
        }
        8 => {
            let h = host(s, n);
            let x = s.hosts.get_mut(&h).unwrap();
            if x.record.health == HostHealth::Up {
                x.status.observed = HostHealth::Suspect;
            }
        }
        9 => {
            let v = a_vm_of(s, n);
            let mut spec = s.vms[&v].spec.clone();
            spec.protection = match n % 4 {
                0 => Protection::None,
                1 => Protection::Restart,
                2 => Protection::Checkpoint { interval_ms: 500 },
                _ => Protection::Ft,
            };
            // As the command line does: asked before it is written.
            if admit(s, &spec).is_ok() {
                s.vms.get_mut(&v).unwrap().spec = spec;
            }
        }
        _ => settle(s),
    }
    s.now_ms += 500;
}

type Check = Result<(), String>;

/// What holds in every state.
fn always(s: &Snapshot) -> Check {
    check_apart(s)?;
    check_capacity(s, false)
}

/// `decide` is a fixpoint of its own actions; doing them twice, or a first part of them, is harmless.
fn decide_well(s: &mut Snapshot, pick: u64) -> Check {
    let d = decide(s);
    let before = s.clone();
    for x in &d.actions {
        apply(s, &x.action);
        always(s).map_err(|e| format!("{e}, after {x}\n{}", describe(s)))?;
    }
    let once = s.clone();
    for x in &d.actions {
        apply(s, &x.action);
    }
    if *s != once {
        // The same records; only a mark may be written twice.
        return Err(format!("applied twice is not applied once: {d}"));
    }
    let again = decide(s);
    if !again.actions.is_empty() {
        return Err(format!("no fixpoint:\n{d}then\n{again}\n{}", describe(s)));
    }
    // The leader died, or a compare-and-swap found the record moved: only the first actions were done.
    let mut part = before;
    for x in d.actions.iter().take(pick as usize % (d.actions.len() + 1)) {
        apply(&mut part, &x.action);
        always(&part).map_err(|e| format!("{e}, in part, after {x}"))?;
    }
    let rest = decide(&part);
    for x in &rest.actions {
        apply(&mut part, &x.action);
        always(&part).map_err(|e| format!("{e}, after the rest, {x}"))?;
    }
    Ok(())
}

fn history(hosts: u8, vms: &[VmSeed], ops: &[Op], pick: u64, sabotage: Sabotage) -> Check {
    let mut s = a_pool(hosts, vms, true);
    s.pool.sabotage = sabotage;
    let step = |s: &mut Snapshot| decide_well(s, pick);
    step(&mut s)?;
    settle(&mut s);
    for op in ops {
        happen(&mut s, *op);
        always(&s).map_err(|e| format!("{e}, after the event {op:?}"))?;
        step(&mut s)?;
    }
    // The world heals: everything runs and is protected again, and it ends.
    for h in s.hosts.keys().cloned().collect::<Vec<_>>() {
        revive(&mut s, &h);
        s.hosts.get_mut(&h).unwrap().record.admin = HostAdmin::InUse;
    }
    let result = run(&mut s, 60, |_| {});
    if result.rounds.len() >= 60 {
        return Err(format!("it does not end: {}", result.rounds[59]));
    }
    always(&s)?;
    check_all_run(&s).map_err(|e| format!("{e}\n{}{}", describe(&s), decide(&s)))
}

/// After single host failures every protected VM runs again; if the pool says that there is room for it.
fn survives(hosts: u8, vms: &[VmSeed], failures: u8, sabotage: Sabotage) -> Check {
    let mut s = a_pool(hosts, vms, false);
    s.pool.host_failures = failures;
    s.pool.sabotage = sabotage;
    run(&mut s, 20, |_| {});
    always(&s)?;
    let short = s.vms.values().any(|x| {
        x.state.running()
            && x.spec.protection != Protection::None
            && protected(&s, x) < x.spec.standbys_wanted()
    });
    if s.alarms.contains(&AlarmKey::NoFailoverRoom) || short {
        return Err("power-on was granted beyond what can be absorbed".into());
    }
    let all: Vec<HostId> = s.hosts.keys().cloned().collect();
    for (i, a) in all.iter().enumerate() {
        let others: Vec<Option<&HostId>> = if failures > 1 {
            all.iter().skip(i + 1).map(Some).collect()
        } else {
            vec![None]
        };
        for b in others {
            let mut t = s.clone();
            kill(&mut t, a, true);
            if let Some(b) = b {
                kill(&mut t, b, true);
            }
            let lost = |x: &steadfast_cluster::model::Vm| {
                let owner = x.state.owner.as_ref();
                let copies = x.state.standbys.len() + 1;
                let shared = !x.spec.has_local_disk();
                (owner == Some(a) || owner == b)
                    && copies <= usize::from(failures)
                    && !(shared && x.spec.protection == Protection::Restart)
            };
            t.vms.retain(|_, x| !lost(x));
            run(&mut t, 30, |_| {});
            always(&t)?;
            check_all_run(&t)
                .map_err(|e| format!("{a} {b:?} failed: {e}\n{}\n{}", describe(&t), decide(&t)))?;
        }
    }
    Ok(())
}

/// A drain empties its host, or says that it is stuck; nothing is less protected on the way than it was.
fn drains(hosts: u8, vms: &[VmSeed], which: u8, sabotage: Sabotage) -> Check {
    let mut s = a_pool(hosts, vms, false);
    s.pool.sabotage = sabotage;
    run(&mut s, 20, |_| {});
    let h = host(&s, which);
    s.hosts.get_mut(&h).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    let before: Vec<usize> = s
        .vms
        .values()
        .map(|x| protected(&s, x).min(x.spec.standbys_wanted()))
        .collect();
    let ran: Vec<bool> = s.vms.values().map(|x| x.state.running()).collect();
    let mut worse = None;
    run(&mut s, 60, |s| {
        for ((x, b), r) in s.vms.values().zip(&before).zip(&ran) {
            if protected(s, x) < *b || *r && !x.state.running() {
                worse.get_or_insert(format!("{} lost protection\n{}", x.spec.id, describe(s)));
            }
        }
    });
    if let Some(e) = worse {
        return Err(e);
    }
    // Nothing runs there any more, and of each standby that has no other place people know; or the drain says that it is stuck.
    let left = |x: &&Vm| x.spec.power == Power::On && x.state.instances.contains_key(&h);
    let known = |x: &Vm| {
        x.state.owner.as_ref() != Some(&h) && s.alarms.contains(&AlarmKey::VmDegraded(x.spec.id.clone()))
    };
    let through = s.hosts[&h].record.admin == HostAdmin::Maintenance(DrainWhy::Operator);
    let told = s.alarms.contains(&AlarmKey::DrainStuck(h.clone()));
    let hidden = through && !s.vms.values().filter(left).all(known);
    if through == told || hidden {
        return Err(format!(
            "through: {through}, told to be stuck: {told}, hidden: {hidden}\n{}{}",
            describe(&s),
            decide(&s)
        ));
    }
    Ok(())
}

fn fail(e: String) -> TestCaseError {
    TestCaseError::fail(e)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn histories(
        hosts in 2u8..8,
        vms in prop::collection::vec(a_vm(), 1..24),
        ops in prop::collection::vec((0u8..14, any::<u8>()), 0..30),
        pick in any::<u64>(),
    ) {
        history(hosts, &vms, &ops, pick, Sabotage::None).map_err(fail)?;
    }

    #[test]
    fn any_single_failure_is_absorbed(hosts in 2u8..8, vms in prop::collection::vec(a_vm(), 1..40)) {
        survives(hosts, &vms, 1, Sabotage::None).map_err(fail)?;
    }

    #[test]
    fn any_two_failures_are_absorbed(hosts in 3u8..7, vms in prop::collection::vec(a_vm(), 1..20)) {
        survives(hosts, &vms, 2, Sabotage::None).map_err(fail)?;
    }

    #[test]
    fn a_drain_keeps_protection(hosts in 2u8..7, vms in prop::collection::vec(a_vm(), 1..20), which in any::<u8>()) {
        drains(hosts, &vms, which, Sabotage::None).map_err(fail)?;
    }
}

/// The first of some random cases that a checker finds fault with.
fn caught(mut f: impl FnMut(u8, &[VmSeed], &[Op], u64) -> Check) -> Option<String> {
    let mut runner = TestRunner::deterministic();
    let strategy = (
        3u8..8,
        prop::collection::vec(a_vm(), 6..40),
        prop::collection::vec((0u8..14, any::<u8>()), 5..30),
        any::<u64>(),
    );
    (0..100).find_map(|_| {
        let (hosts, vms, ops, pick) = strategy.new_tree(&mut runner).unwrap().current();
        f(hosts, &vms, &ops, pick).err()
    })
}

#[test]
fn the_checkers_catch_every_broken_variant() {
    use Sabotage::{
        DrainUnprotects, ForgetTasks, IgnoreApart, IgnoreCapacity, NoAdmission, NoReprotection,
        PromoteOnSuspect, StartBeforeFence,
    };
    for s in [IgnoreApart, IgnoreCapacity, ForgetTasks] {
        assert!(caught(|h, v, o, p| history(h, v, o, p, s)).is_some(), "{s:?}");
    }
    assert!(caught(|h, v, _, _| survives(h, v, 1, NoAdmission)).is_some());
    assert!(caught(|h, v, _, p| drains(h, v, p as u8, DrainUnprotects)).is_some());
    for s in [StartBeforeFence, PromoteOnSuspect] {
        assert!(
            caught(|h, v, _, p| never_too_early(h, v, p as u8, s)).is_some(),
            "{s:?}"
        );
    }
    assert!(caught(|h, v, _, p| protected_again(h, v, p as u8, NoReprotection)).is_some());
    // And they find nothing where nothing is broken.
    assert_eq!(
        caught(|h, v, _, p| never_too_early(h, v, p as u8, Sabotage::None)),
        None
    );
    assert_eq!(
        caught(|h, v, _, p| protected_again(h, v, p as u8, Sabotage::None)),
        None
    );
}

/// Nothing is started for a host that is not fenced, nothing at all is taken from one that is suspect (I7).
fn never_too_early(hosts: u8, vms: &[VmSeed], which: u8, sabotage: Sabotage) -> Check {
    let mut s = a_pool(hosts, vms, true);
    s.pool.sabotage = sabotage;
    run(&mut s, 20, |_| {});
    let h = host(&s, which);
    let mut suspect = s.clone();
    suspect.hosts.get_mut(&h).unwrap().status.observed = HostHealth::Suspect;
    let taken = decide(&suspect);
    let takes = |a: &Action| match a {
        Action::StartVm { vm, .. } | Action::Promote { vm, .. } => s.vms[vm].state.owner.as_ref() == Some(&h),
        _ => false,
    };
    if let Some(x) = taken.actions.iter().find(|x| takes(&x.action)) {
        return Err(format!("{h} is only suspect: {x}"));
    }
    kill(&mut s, &h, false);
    let d = decide(&s);
    let early = |a: &Action| match a {
        Action::StartVm { vm, .. } => s.vms[vm].state.owner.as_ref() == Some(&h),
        _ => false,
    };
    match d.actions.iter().find(|x| early(&x.action)) {
        Some(x) => Err(format!("{h} is not fenced: {x}")),
        None => Ok(()),
    }
}

/// After a failure every VM has its standbys again in the same round of decisions, or the refusal says why not.
fn protected_again(hosts: u8, vms: &[VmSeed], which: u8, sabotage: Sabotage) -> Check {
    let mut s = a_pool(hosts, vms, true);
    s.pool.sabotage = sabotage;
    run(&mut s, 20, |_| {});
    let h = host(&s, which);
    kill(&mut s, &h, true);
    let d = decide(&s);
    for x in &d.actions {
        apply(&mut s, &x.action);
    }
    for (id, x) in &s.vms {
        let live = x
            .state
            .standbys
            .keys()
            .filter(|k| s.hosts[*k].record.reachable())
            .count();
        let refused = d.refusals.iter().any(|r| r.vm.as_ref() == Some(id));
        if x.spec.power == Power::On && x.state.owner.is_some() && live < x.spec.standbys_wanted() && !refused
        {
            return Err(format!("{id} has {live} standbys and nobody says why"));
        }
    }
    let tasks = s
        .tasks
        .iter()
        .filter(|t| matches!(t, Task::Migrate { .. }))
        .count();
    if tasks > 64 {
        Err("too many moves".into())
    } else {
        Ok(())
    }
}

/// Floating VMs, one of which fits on one host only: admitted by one packing, they must not be placed by another that fails.
#[test]
fn what_was_admitted_fits_whatever_the_loads_are() {
    let none = (0, 1, 1, 0, false, 3, false);
    let vms = [
        (0, 1, 1, 0, false, 0, false),
        none,
        (3, 17, 1, 0, false, 2, true),
        (0, 17, 1, 0, false, 0, false),
        (0, 1, 1, 0, false, 0, false),
        (1, 2, 1, 2, true, 3, false),
        (0, 3, 1, 0, false, 3, false),
        (3, 23, 2, 2, false, 3, false),
        (0, 1, 1, 4, false, 3, false),
        (3, 3, 1, 4, false, 3, false),
        (0, 14, 1, 4, false, 3, false),
        (1, 19, 1, 4, false, 3, false),
        (1, 12, 1, 0, true, 3, false),
        (1, 22, 1, 4, true, 3, false),
        (1, 23, 1, 0, false, 3, false),
    ];
    survives(5, &vms, 1, Sabotage::None).unwrap();
}
