//! The decisions case by case: each means for its failure, each with a reason.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
use common::{check_all_run, check_apart, check_capacity, fixpoint, h, owner, protected, small, v};
use std::collections::BTreeMap;
use steadfast_cluster::model::{
    AlarmKey, AppRecord, DiskPlace, DrainWhy, FailingPart, FailureClass, GroupRule, HostAdmin, HostHealth,
    Keep, Phase, Power, Prediction, Protection, Snapshot,
};
use steadfast_cluster::synthetic::{add, describe, kill, pool, revive, run, vm};
use steadfast_cluster::{Action, Because, Wanted, admit, apply, decide, settle};
use steadfast_types::{HostId, Term};

const CHECKPOINT: Protection = Protection::Checkpoint { interval_ms: 1000 };

#[test]
fn all_classes_start_with_their_standbys_and_then_there_is_nothing_to_do() {
    let s = small(
        3,
        &[
            ("a", Protection::Ft),
            ("b", Protection::Restart),
            ("c", CHECKPOINT),
            ("d", Protection::None),
        ],
    );
    check_all_run(&s).unwrap();
    for (id, want) in [("a", 1), ("b", 1), ("c", 1), ("d", 0)] {
        assert_eq!(protected(&s, &s.vms[&v(id)]), want, "{id}");
    }
    assert!(s.alarms.is_empty(), "{:?}", s.alarms);
    fixpoint(&s);
}

#[test]
fn a_dead_host_is_answered_by_class_and_everything_is_protected_again() {
    let mut s = small(
        4,
        &[
            ("a", Protection::Ft),
            ("b", Protection::Restart),
            ("d", Protection::None),
        ],
    );
    // All on one host, so that one failure meets all classes.
    let victim = s.vms[&v("a")].state.owner.clone().unwrap();
    for id in ["b", "d"] {
        let x = s.vms.get_mut(&v(id)).unwrap();
        let old = x.state.owner.replace(victim.clone()).unwrap();
        let i = x.state.instances.remove(&old).unwrap();
        x.state.instances.insert(victim.clone(), i);
        x.state.replicas.remove(&old);
        x.state.replicas.insert(victim.clone());
        if x.state.standbys.remove(&victim).is_some() {
            let other = h((1..=4).find(|n| h(*n) != victim).unwrap());
            x.state.standbys.insert(
                other.clone(),
                steadfast_cluster::model::Standby {
                    in_sync: true,
                    lag_ms: 0,
                },
            );
            x.state.replicas.insert(other);
        }
    }
    kill(&mut s, &victim, false);
    let d = decide(&s);
    let text = d.to_string();
    assert!(
        d.actions
            .iter()
            .any(|x| matches!(&x.action, Action::Promote { vm, .. } if *vm == v("a"))),
        "{text}"
    );
    assert!(
        !d.actions
            .iter()
            .any(|x| matches!(&x.action, Action::StartVm { .. })),
        "not fenced: {text}"
    );
    let because = |id: &str| {
        d.refusals
            .iter()
            .find(|r| r.vm == Some(v(id)))
            .map(|r| r.because.clone())
    };
    assert_eq!(because("b"), Some(Because::NotFenced(victim.clone())));
    assert_eq!(because("d"), Some(Because::ClassNone));
    run(&mut s, 10, |_| {});
    // The lease has run out.
    kill(&mut s, &victim, true);
    run(&mut s, 10, |s| check_capacity(s, true).unwrap());
    check_all_run(&s).unwrap();
    for id in ["a", "b"] {
        assert_eq!(protected(&s, &s.vms[&v(id)]), 1, "{}", describe(&s));
    }
    assert!(s.alarms.contains(&AlarmKey::VmDown(v("d"))));
    revive(&mut s, &victim);
    run(&mut s, 10, |_| {});
    assert_eq!(
        owner(&s, "d"),
        victim.to_string(),
        "its host is back, so it is booted again"
    );
    assert!(s.alarms.is_empty(), "{:?}", s.alarms);
    fixpoint(&s);
}

#[test]
fn nothing_is_taken_from_a_suspect_host() {
    let mut s = small(3, &[("a", Protection::Ft), ("b", Protection::Restart)]);
    for n in 1..=3 {
        let mut t = s.clone();
        t.hosts.get_mut(&h(n)).unwrap().status.observed = HostHealth::Suspect;
        let d = decide(&t);
        assert!(
            d.actions
                .iter()
                .all(|x| matches!(x.action, Action::MarkHealth { .. })),
            "{d}"
        );
    }
    // Whether what was down there still is, nobody knows: the alarm stays up.
    let mut t = s.clone();
    let on = t.vms[&v("b")].state.owner.clone().unwrap();
    t.hosts.get_mut(&on).unwrap().status.observed = HostHealth::Suspect;
    t.alarms.insert(AlarmKey::VmDown(v("b")));
    let d = decide(&t);
    let clears = |a: &Action| {
        matches!(
            a,
            Action::ClearAlarm {
                alarm: AlarmKey::VmDown(_)
            }
        )
    };
    assert!(!d.actions.iter().any(|x| clears(&x.action)), "{d}");
    // Nor is it given anything.
    s.hosts.get_mut(&h(1)).unwrap().status.observed = HostHealth::Suspect;
    add(&mut s, vm("n", Protection::None).unwrap());
    run(&mut s, 5, |_| {});
    assert_ne!(owner(&s, "n"), h(1).to_string());
}

#[test]
fn the_smallest_means_for_failures_of_processes_and_guests() {
    let s = small(
        3,
        &[
            ("a", Protection::Ft),
            ("b", Protection::Restart),
            ("d", Protection::None),
        ],
    );
    let with = |id: &str, class| {
        let mut t = s.clone();
        let x = t.vms.get_mut(&v(id)).unwrap();
        let o = x.state.owner.clone().unwrap();
        x.state.instances.get_mut(&o).unwrap().phase = Phase::Failed(class);
        decide(&t)
            .actions
            .into_iter()
            .map(|d| d.action)
            .find(|a| a.vm().is_some())
    };
    let same = s.vms[&v("b")].state.owner.clone().unwrap();
    assert!(matches!(
        with("a", FailureClass::ProcessDied),
        Some(Action::Promote { .. })
    ));
    assert!(matches!(
        with("a", FailureClass::GuestCrashed),
        Some(Action::ResetVm { .. })
    ));
    assert!(
        matches!(with("b", FailureClass::ProcessDied), Some(Action::StartVm { host, .. }) if host == same)
    );
    assert!(matches!(
        with("b", FailureClass::GuestHung),
        Some(Action::ResetVm { .. })
    ));
    assert!(matches!(with("b", FailureClass::DiskFault), Some(Action::StartVm { host, .. }) if host != same));
    assert!(with("d", FailureClass::ProcessDied).is_none());
}

#[test]
fn a_protected_vm_leaves_a_failing_disk_by_a_planned_promote() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let x = s.vms.get_mut(&v("a")).unwrap();
    let o = x.state.owner.clone().unwrap();
    let standby = x.state.standbys.keys().next().cloned().unwrap();
    x.state.instances.get_mut(&o).unwrap().disk_fault = true;
    let d = decide(&s);
    assert!(
        matches!(&d.actions[0].action, Action::Migrate { to, .. } if *to == standby),
        "{d}"
    );
    run(&mut s, 10, |s| assert!(s.vms[&v("a")].state.running()));
    let x = &s.vms[&v("a")];
    assert!(
        !x.state.standbys.contains_key(&o) && protected(&s, x) == 1,
        "{}",
        describe(&s)
    );
}

#[test]
fn failed_starts_back_off_then_go_elsewhere_then_are_given_up() {
    let mut s = small(3, &[("b", Protection::Restart)]);
    let id = v("b");
    let home = s.vms[&id].state.owner.clone().unwrap();
    let mut starts = Vec::new();
    let mut gave_up = None;
    for _ in 0..200 {
        let d = decide(&s);
        for x in &d.actions {
            apply(&mut s, &x.action);
            if let Action::StartVm { host, .. } = &x.action {
                starts.push((s.now_ms, host.clone()));
            }
        }
        gave_up = d
            .refusals
            .iter()
            .find(|r| matches!(r.because, Because::GaveUp(_)))
            .cloned();
        // Every start fails; the disks stay in step.
        let now = s.now_ms;
        let vm = s.vms.get_mut(&id).unwrap();
        let o = vm.state.owner.clone().unwrap();
        let i = vm.state.instances.get_mut(&o).unwrap();
        let first = starts.is_empty() && i.phase == Phase::Running;
        if i.phase == Phase::Starting || first {
            i.phase = Phase::Failed(FailureClass::ProcessDied);
            let f = vm.state.start_failures.entry(o).or_default();
            f.count += u32::from(!first);
            f.last_ms = now;
        }
        let all: Vec<_> = vm.state.standbys.keys().cloned().collect();
        vm.state.replicas.extend(all);
        s.now_ms += 1_000;
    }
    let at = |host: &steadfast_types::HostId| starts.iter().filter(|(_, x)| x == host).count();
    assert_eq!(at(&home), 3, "{starts:?}");
    assert!(starts.len() >= 6 && starts.len() <= 9, "{starts:?}");
    let times: Vec<u64> = starts
        .iter()
        .filter(|(_, x)| *x == home)
        .map(|(t, _)| *t)
        .collect();
    assert!(
        times[2] - times[1] >= 2 * 5_000 && times[1] - times[0] >= 5_000,
        "{times:?}"
    );
    assert!(gave_up.is_some(), "{}", decide(&s));
}

#[test]
fn a_restart_vm_on_shared_storage_starts_anywhere_and_spreads_by_load() {
    let mut s = pool(4, 0).unwrap();
    for host in s.hosts.values_mut() {
        host.record.storages.insert("san".into());
    }
    for n in 0..9 {
        let mut x = vm(&format!("s{n}"), Protection::Restart).unwrap();
        x.spec.disks[0].place = DiskPlace::Shared("san".into());
        add(&mut s, x);
    }
    run(&mut s, 10, |s| check_capacity(s, true).unwrap());
    kill(&mut s, &h(1), true);
    run(&mut s, 10, |s| check_capacity(s, true).unwrap());
    check_all_run(&s).unwrap();
    for n in 2..=4 {
        let here = s.vms.values().filter(|x| x.state.owner == Some(h(n))).count();
        assert_eq!(here, 3, "{}", describe(&s));
    }
}

#[test]
fn admission_refuses_with_the_shortfall_in_numbers() {
    let mut s = small(3, &[]);
    // 64 GiB a host. A VM of 30 GiB and its standby: six such copies fill the pool, with no room for a restart.
    let big = |n: usize, class| {
        let mut x = vm(&format!("big{n}"), class).unwrap();
        x.spec.resources.memory_bytes = 30 << 30;
        x
    };
    for n in 0..3 {
        add(&mut s, big(n, Protection::Ft));
        run(&mut s, 10, |s| check_capacity(s, true).unwrap());
    }
    check_all_run(&s).unwrap();
    let refusal = admit(&s, &big(9, Protection::Ft).spec).unwrap_err();
    assert!(
        refusal.to_string().contains("closest") && refusal.to_string().contains("26.0 GiB memory missing"),
        "{refusal}"
    );
    // `restart` needs no memory for its replica now, but on failure.
    let mut s = small(2, &[]);
    for n in 0..2 {
        add(&mut s, big(n, Protection::Restart));
    }
    run(&mut s, 10, |_| {});
    check_all_run(&s).unwrap();
    let refusal = admit(&s, &big(2, Protection::Restart).spec).unwrap_err();
    let Because::NoFailoverRoom { short, .. } = &refusal.because else {
        panic!("{refusal}");
    };
    assert_eq!(short.memory_bytes, (3 * 30 - 64) << 30, "{refusal}");
    // Without the rule it is granted.
    s.pool.host_failures = 0;
    assert!(admit(&s, &big(2, Protection::Restart).spec).is_ok());
    s.pool.host_failures = 1;
    add(&mut s, big(2, Protection::Restart));
    run(&mut s, 10, |_| {});
    assert_eq!(owner(&s, "big2"), "nobody");
    assert!(s.alarms.contains(&AlarmKey::VmDown(v("big2"))));
}

/// VMs that are booted in one go are spread by load, not all put where it was least a moment before.
#[test]
fn vms_of_a_dead_host_are_spread_by_measured_load() {
    let mut s = pool(4, 0).unwrap();
    let dead = h(1);
    for n in 0..6 {
        let mut x = vm(&format!("r{n}"), Protection::Restart).unwrap();
        x.spec.power = Power::On;
        x.state.owner = Some(dead.clone());
        x.state.term = Term(1);
        x.state.load.cpu_milli = 2_000;
        add(&mut s, x);
    }
    // One is a little less busy than the others.
    for (n, host) in s.hosts.values_mut().enumerate() {
        host.status.load.cpu_milli = 10_000 - u64::from(n == 2) * 100;
    }
    kill(&mut s, &dead, true);
    let mut at: BTreeMap<HostId, usize> = BTreeMap::new();
    for x in decide(&s).actions {
        if let Action::StartVm { host, .. } = x.action {
            *at.entry(host).or_default() += 1;
        }
    }
    assert_eq!(at.len(), 3, "{at:?}");
    assert!(at.values().all(|n| *n == 2), "{at:?}");
}

/// Who can be booted on one host only is not kept out of it by one that has another.
#[test]
fn who_has_one_host_to_choose_is_booted_before_who_has_two() {
    let mut s = pool(3, 0).unwrap();
    let dead = h(1);
    // The one with the choice comes first by its name, and would rather be on the second host.
    for (name, replicas) in [("a", vec![h(1), h(2), h(3)]), ("b", vec![h(1), h(2)])] {
        let mut x = vm(name, Protection::Restart).unwrap();
        x.state.owner = Some(dead.clone());
        x.state.term = Term(1);
        x.state.replicas = replicas.into_iter().collect();
        add(&mut s, x);
    }
    s.pool.host_failures = 0;
    let room = s.vms[&v("a")].spec.demand().memory_bytes * 3 / 2;
    s.hosts.get_mut(&h(2)).unwrap().record.capacity.memory_bytes = room;
    s.hosts.get_mut(&h(3)).unwrap().status.load.cpu_milli = 1 << 20;
    kill(&mut s, &dead, true);
    let all = decide(&s).actions;
    let at = |id: &str| {
        all.iter().find_map(|x| match &x.action {
            Action::StartVm { vm, host, .. } if *vm == v(id) => Some(host.clone()),
            _ => None,
        })
    };
    assert_eq!((at("a"), at("b")), (Some(h(3)), Some(h(2))), "{all:?}");
}

/// `vm stop` and then `vm start`: what is still ending is no reason to refuse; nothing is started beside it.
#[test]
fn what_is_left_of_a_stopped_vm_does_not_refuse_its_start() {
    let mut s = small(2, &[("a", Protection::Ft)]);
    let x = s.vms.get_mut(&v("a")).unwrap();
    x.state.owner = None;
    for instance in x.state.instances.values_mut() {
        instance.phase = Phase::Stopping;
    }
    assert_eq!(x.state.instances.len(), 2);
    let placed = admit(&s, &s.vms[&v("a")].spec).unwrap();
    assert_eq!(placed.standbys.len(), 1);
    assert!(
        decide(&s)
            .actions
            .iter()
            .all(|x| !matches!(x.action, Action::StartVm { .. }))
    );
    s.vms.get_mut(&v("a")).unwrap().state.instances.clear();
    run(&mut s, 10, |_| {});
    check_all_run(&s).unwrap();
}

#[test]
fn two_failures_at_once_are_admitted_only_with_room_for_both() {
    let mut s = pool(4, 0).unwrap();
    s.pool.host_failures = 2;
    let big = |n: usize| {
        let mut x = vm(&format!("big{n}"), Protection::Restart).unwrap();
        x.spec.resources.memory_bytes = 20 << 30;
        x.spec.standbys = 2;
        x
    };
    let mut admitted = 0;
    for n in 0..8 {
        add(&mut s, big(n));
        let run = run(&mut s, 10, |_| {});
        let refused = run
            .rounds
            .last()
            .unwrap()
            .refusals
            .iter()
            .any(|r| r.wanted == Wanted::PowerOn);
        if refused {
            break;
        }
        admitted += 1;
    }
    assert!(admitted >= 3, "{admitted}");
    for (a, b) in [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)] {
        let mut t = s.clone();
        kill(&mut t, &h(a), true);
        kill(&mut t, &h(b), true);
        run(&mut t, 10, |s| check_capacity(s, true).unwrap());
        check_all_run(&t).unwrap();
    }
}

#[test]
fn dependencies_and_priorities_order_starts_and_circles_are_told() {
    let mut s = pool(2, 0).unwrap();
    for (name, priority, need) in [
        ("web", 50, Some("db")),
        ("db", 10, None),
        ("x", 5, Some("y")),
        ("y", 5, Some("x")),
    ] {
        let mut x = vm(name, Protection::Restart).unwrap();
        x.spec.priority = priority;
        x.spec.depends_on.extend(need.map(v));
        add(&mut s, x);
    }
    let mut z = vm("z", Protection::Restart).unwrap();
    z.spec.depends_on.insert(v("nobody"));
    add(&mut s, z);
    let result = run(&mut s, 10, |_| {});
    let started: Vec<_> = result
        .actions()
        .filter_map(|a| match a {
            Action::StartVm { vm, .. } => Some(vm.to_string()),
            _ => None,
        })
        .collect();
    assert_eq!(started, ["db", "web"]);
    let last = decide(&s);
    let why = |id: &str| {
        last.refusals
            .iter()
            .find(|r| r.vm == Some(v(id)))
            .unwrap()
            .because
            .clone()
    };
    assert_eq!(why("x"), Because::Circle(v("y")));
    assert_eq!(why("z"), Because::UnknownDependency(v("nobody")));
    // And the other way round: the database stops last.
    for id in ["web", "db"] {
        s.vms.get_mut(&v(id)).unwrap().spec.power = Power::Off;
    }
    let stops: Vec<_> = run(&mut s, 10, |_| {})
        .actions()
        .filter_map(|a| match a {
            Action::StopInstance {
                vm, in_order: true, ..
            } => Some(vm.to_string()),
            _ => None,
        })
        .collect();
    assert_eq!(stops, ["web", "db"]);
}

#[test]
fn an_application_starts_in_stages_and_is_kept_as_told() {
    let mut s = pool(4, 0).unwrap();
    let app: steadfast_types::AppId = "shop".parse().unwrap();
    let mut record = AppRecord {
        start_order: vec![[v("db")].into(), [v("api")].into(), [v("web")].into()],
        keep: Keep::Together,
        protection: Some(Protection::Ft),
    };
    s.pool.applications.insert(app.clone(), record.clone());
    for name in ["api", "db", "web"] {
        let mut x = vm(name, Protection::Restart).unwrap();
        x.spec.application = Some(app.clone());
        add(&mut s, x);
    }
    let mut t = s.clone();
    let result = run(&mut t, 10, |_| {});
    let started: Vec<_> = result
        .actions()
        .filter_map(|a| match a {
            Action::StartVm { vm, .. } => Some(vm.to_string()),
            _ => None,
        })
        .collect();
    assert_eq!(started, ["db", "api", "web"]);
    assert_eq!(owner(&t, "db"), owner(&t, "web"));
    assert_eq!(owner(&t, "db"), owner(&t, "api"));
    // Drained together: they end up on one host again.
    let from = t.vms[&v("db")].state.owner.clone().unwrap();
    t.hosts.get_mut(&from).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    run(&mut t, 20, |_| {});
    assert_ne!(owner(&t, "db"), from.to_string());
    assert_eq!(owner(&t, "db"), owner(&t, "web"), "{}", describe(&t));
    // Apart: six copies on four hosts do not fit, three with `restart` standbys neither; so two of `none` class do.
    record.keep = Keep::Apart;
    record.protection = Some(Protection::None);
    s.pool.applications.insert(app, record);
    run(&mut s, 10, |_| {});
    let hosts: std::collections::BTreeSet<_> = s.vms.values().filter_map(|x| x.state.owner.clone()).collect();
    assert_eq!(hosts.len(), 3);
}

#[test]
fn a_host_that_predicts_its_failure_is_evacuated() {
    let mut s = small(
        4,
        &[
            ("a", Protection::Ft),
            ("b", Protection::Restart),
            ("d", Protection::None),
        ],
    );
    let victim = s.vms[&v("a")].state.owner.clone().unwrap();
    s.hosts.get_mut(&victim).unwrap().status.prediction = Some(Prediction {
        part: FailingPart::Memory,
        evidence: "37 corrected errors in 24 h".into(),
    });
    run(&mut s, 30, |s| check_all_run(s).unwrap());
    assert_eq!(
        s.hosts[&victim].record.admin,
        HostAdmin::Maintenance(DrainWhy::Prediction)
    );
    assert!(
        s.vms
            .values()
            .all(|x| !common::copies(&s, x).contains_key(&victim))
    );
    assert!(s.alarms.contains(&AlarmKey::HostPredictsFailure(victim.clone())));
    // One at a time, whoever expects it too.
    let other = s.hosts.keys().find(|id| **id != victim).cloned().unwrap();
    s.hosts.get_mut(&other).unwrap().status.prediction = s.hosts[&victim].status.prediction.clone();
    run(&mut s, 30, |s| check_all_run(s).unwrap());
    assert_eq!(s.hosts[&other].record.admin, HostAdmin::InUse);
    assert!(s.alarms.contains(&AlarmKey::HostPredictsFailure(other)));
}

#[test]
fn a_rolling_upgrade_visits_every_host_and_keeps_protection() {
    let mut s = small(
        4,
        &[
            ("a", Protection::Ft),
            ("b", Protection::Restart),
            ("c", CHECKPOINT),
            ("d", Protection::None),
            ("e", Protection::Restart),
        ],
    );
    s.vms.get_mut(&v("e")).unwrap().state.fixed = Some("its disk is shared".into());
    s.pool.upgrade_to = Some("2".into());
    let mut most = 0;
    let result = run(&mut s, 100, |s| {
        let away = s.hosts.values().filter(|x| x.record.leaving()).count();
        most = most.max(away);
        for x in s.vms.values() {
            assert!(x.state.running());
            assert!(protected(s, x) >= x.spec.standbys_wanted(), "{}", describe(s));
        }
    });
    assert_eq!(most, 1, "one host at a time");
    assert!(
        s.hosts
            .values()
            .all(|x| x.status.versions.steadfast == "2" && !x.record.leaving())
    );
    let upgrades = result
        .actions()
        .filter(|a| matches!(a, Action::UpgradeHost { .. }))
        .count();
    assert_eq!(upgrades, 4);
    let moved = |id: &str| {
        let is = |a: &&Action| matches!(a, Action::Migrate { vm, .. } if *vm == v(id));
        result.actions().filter(is).count()
    };
    assert!(moved("a") > 0, "its standby takes it over");
    assert!(
        moved("b") > 0 && moved("d") > 0,
        "they are to run in the new monitor"
    );
    assert_eq!(moved("e"), 0, "its process goes on where it is");
    fixpoint(&s);
    // With a host down it waits, and says so.
    s.pool.upgrade_to = Some("3".into());
    kill(&mut s, &h(4), true);
    let d = decide(&s);
    assert!(
        !d.actions
            .iter()
            .any(|x| matches!(x.action, Action::MarkAdmin { .. })),
        "{d}"
    );
    assert!(d.refusals.iter().any(|r| r.wanted == Wanted::Upgrade), "{d}");
}

#[test]
fn two_hosts_and_a_witness_survive_and_resync() {
    let mut s = pool(2, 0).unwrap();
    let mut w = steadfast_cluster::synthetic::host("witness").unwrap();
    w.record.witness = true;
    s.hosts.insert(w.record.id.clone(), w);
    for (name, class) in [("a", Protection::Ft), ("b", Protection::Restart)] {
        add(&mut s, vm(name, class).unwrap());
    }
    run(&mut s, 10, |_| {});
    for n in [1, 2] {
        kill(&mut s, &h(n), true);
        run(&mut s, 10, |_| {});
        check_all_run(&s).unwrap();
        assert!(
            s.vms.values().all(|x| x.state.owner == Some(h(3 - n))),
            "{}",
            describe(&s)
        );
        assert!(
            s.vms.values().all(|x| x.state.standbys.contains_key(&h(n))),
            "kept for a delta resync"
        );
        revive(&mut s, &h(n));
        run(&mut s, 10, |_| {});
        assert!(s.vms.values().all(|x| protected(&s, x) == 1));
    }
    s.hosts
        .get_mut(&"witness".parse().unwrap())
        .unwrap()
        .status
        .observed = HostHealth::Dead { fenced: true };
    run(&mut s, 10, |_| {});
    check_all_run(&s).unwrap();
}

#[test]
fn apart_holds_for_standbys_too_and_a_late_rule_is_healed() {
    let mut s = pool(6, 0).unwrap();
    for n in 0..3 {
        let mut x = vm(&format!("db{n}"), Protection::Ft).unwrap();
        x.spec.groups.insert("db".parse().unwrap());
        add(&mut s, x);
    }
    run(&mut s, 10, |_| {});
    let mut late = s.clone();
    // Without the rule they may share. Force it: db1 stands by where db0 runs.
    let target = late.vms[&v("db0")].state.owner.clone().unwrap();
    let x = late.vms.get_mut(&v("db1")).unwrap();
    let old = x.state.standbys.keys().next().cloned().unwrap();
    let standby = x.state.standbys.remove(&old).unwrap();
    x.state.instances.remove(&old);
    x.state.replicas.remove(&old);
    if x.state.owner.as_ref() != Some(&target) {
        x.state.standbys.insert(target, standby);
    }
    late.pool.groups.insert("db".parse().unwrap(), GroupRule::Apart);
    run(&mut late, 30, |s| check_all_run(s).unwrap());
    check_apart(&late).unwrap();
    assert!(
        late.vms.values().all(|x| protected(&late, x) == 1),
        "{}",
        describe(&late)
    );
    fixpoint(&late);
}

#[test]
fn leftovers_of_a_host_that_came_back_are_ended() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let old = s.vms[&v("a")].state.owner.clone().unwrap();
    let instance = s.vms[&v("a")].state.instances[&old];
    kill(&mut s, &old, true);
    run(&mut s, 10, |_| {});
    // It was frozen, not dead: its process is still there.
    revive(&mut s, &old);
    s.vms
        .get_mut(&v("a"))
        .unwrap()
        .state
        .instances
        .insert(old.clone(), instance);
    let d = decide(&s);
    assert!(
        d.actions.iter().any(|x| matches!(&x.action,
            Action::StopInstance { host, in_order: false, .. } if *host == old)),
        "{d}"
    );
}

#[test]
fn a_lost_memory_is_not_replaced_by_an_old_disk() {
    // Standby out of sync, primary's host dead: only the dead host's disks are current.
    let mut s = small(3, &[("a", Protection::Ft)]);
    let x = s.vms.get_mut(&v("a")).unwrap();
    let old = x.state.owner.clone().unwrap();
    let standby = x.state.standbys.keys().next().cloned().unwrap();
    x.state.standbys.get_mut(&standby).unwrap().in_sync = false;
    x.state.replicas.remove(&standby);
    kill(&mut s, &old, true);
    let d = decide(&s);
    assert!(
        !d.actions
            .iter()
            .any(|x| matches!(x.action, Action::StartVm { .. } | Action::Promote { .. })),
        "{d}"
    );
    assert!(
        d.refusals
            .iter()
            .any(|r| r.because == Because::DisksUnreachable(vec![old.clone()])),
        "{d}"
    );
    revive(&mut s, &old);
    run(&mut s, 10, |_| {});
    check_all_run(&s).unwrap();
    assert_eq!(owner(&s, "a"), old.to_string());
}

#[test]
fn an_upgrade_that_is_called_off_leaves_no_host_empty() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    s.hosts.get_mut(&h(1)).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Upgrade);
    run(&mut s, 10, |_| {});
    assert!(s.hosts.values().all(|x| !x.record.leaving()));
}

#[test]
fn a_vm_whose_owner_left_the_pool_is_not_started_a_second_time() {
    let mut s = small(3, &[("a", Protection::Restart)]);
    let owner = s.vms[&v("a")].state.owner.clone().unwrap();
    s.hosts.remove(&owner);
    let d = decide(&s);
    assert!(
        !d.actions
            .iter()
            .any(|x| matches!(x.action, Action::StartVm { .. } | Action::Promote { .. })),
        "{d}"
    );
    assert!(d.to_string().contains("is not a host of this pool"), "{d}");
}

#[test]
fn the_model_survives_json_and_every_reason_reads_as_text() {
    let mut s = small(3, &[("a", Protection::Ft), ("b", CHECKPOINT)]);
    kill(&mut s, &h(1), false);
    let d = decide(&s);
    let back: Snapshot = serde_json::from_str(&serde_json::to_string(&s).unwrap()).unwrap();
    assert_eq!(back, s);
    let again: steadfast_cluster::Decisions =
        serde_json::from_str(&serde_json::to_string(&d).unwrap()).unwrap();
    assert_eq!(again, d);
    assert!(d.actions.iter().all(|x| !x.why.is_empty()), "{d}");
    settle(&mut s);
}
