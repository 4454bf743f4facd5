//! Moves by choice, drains and the way home: nobody is without protection for longer than a switch.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use common::{check_capacity, fixpoint, h, owner, protected, small, v};
use steadfast_cluster::model::{
    AlarmKey, DrainWhy, Home, Host, HostAdmin, MoveCause, Phase, Protection, Snapshot, Task,
};
use steadfast_cluster::synthetic::{describe, run};
use steadfast_cluster::{Action, decide};
use steadfast_types::HostId;

#[test]
fn a_drain_empties_the_host_without_unprotecting_and_the_vms_come_home() {
    let mut s = small(
        4,
        &[
            ("a", Protection::Ft),
            ("b", Protection::Restart),
            ("c", Protection::Checkpoint { interval_ms: 1000 }),
            ("d", Protection::None),
            ("e", Protection::Ft),
        ],
    );
    let before: Vec<_> = s.vms.values().map(|x| x.state.owner.clone()).collect();
    for n in 1..=4 {
        s.hosts.get_mut(&h(n)).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
        run(&mut s, 30, |s| {
            check_capacity(s, true).unwrap();
            for x in s.vms.values() {
                assert!(x.state.running());
                assert!(protected(s, x) >= x.spec.standbys_wanted(), "{}", describe(s));
            }
        });
        assert_eq!(
            s.hosts[&h(n)].record.admin,
            HostAdmin::Maintenance(DrainWhy::Operator),
            "{}",
            describe(&s)
        );
        assert!(s.vms.values().all(|x| !common::copies(&s, x).contains_key(&h(n))));
        s.hosts.get_mut(&h(n)).unwrap().record.admin = HostAdmin::InUse;
        run(&mut s, 30, |s| {
            for x in s.vms.values() {
                assert!(protected(s, x) >= x.spec.standbys_wanted(), "{}", describe(s));
            }
        });
        let after: Vec<_> = s.vms.values().map(|x| x.state.owner.clone()).collect();
        assert_eq!(before, after, "all are home");
    }
    fixpoint(&s);
}

#[test]
fn what_is_left_of_a_vm_where_its_spare_standby_could_be_is_waited_for() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let x = &s.vms[&v("a")].state;
    let (from, standby) = (
        x.owner.clone().unwrap(),
        x.standbys.keys().next().unwrap().clone(),
    );
    let third = s
        .hosts
        .keys()
        .find(|n| **n != from && **n != standby)
        .unwrap()
        .clone();
    s.hosts.get_mut(&from).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    let mut left = s.vms[&v("a")].state.instances[&standby];
    left.phase = Phase::Stopping;
    s.vms
        .get_mut(&v("a"))
        .unwrap()
        .state
        .instances
        .insert(third.clone(), left);
    let moves = |s: &Snapshot| {
        let decisions = decide(s);
        let moves = decisions
            .actions
            .iter()
            .any(|d| matches!(d.action, Action::Migrate { .. }));
        (moves, decisions.to_string())
    };
    let (moved, text) = moves(&s);
    assert!(!moved && text.contains("what is left of it"), "{text}");
    s.vms.get_mut(&v("a")).unwrap().state.instances.remove(&third);
    run(&mut s, 30, |s| {
        let x = &s.vms[&v("a")];
        assert!(protected(s, x) >= 1, "{}", describe(s));
    });
    assert_ne!(owner(&s, "a"), from.to_string());
    // Where it never could be it is not waited for: that host serves nobody.
    let mut s = small(3, &[("a", Protection::Ft)]);
    s.hosts.get_mut(&from).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    s.hosts.get_mut(&third).unwrap().record.admin = HostAdmin::Maintenance(DrainWhy::Operator);
    s.vms
        .get_mut(&v("a"))
        .unwrap()
        .state
        .instances
        .insert(third, left);
    let (moved, text) = moves(&s);
    assert!(moved, "{text}");
}

#[test]
fn who_goes_home_to_its_standby_takes_another_one_along() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let x = &mut s.vms.get_mut(&v("a")).unwrap().state;
    let home = x.standbys.keys().next().unwrap().clone();
    x.home = Some(Home {
        host: home.clone(),
        left_ms: s.now_ms,
    });
    let actions = |s: &Snapshot| -> Vec<Action> { decide(s).actions.into_iter().map(|d| d.action).collect() };
    let first = actions(&s);
    let [Action::AddStandby { host: third, .. }] = first.as_slice() else {
        panic!("{first:?}");
    };
    let third = third.clone();
    let x = &mut s.vms.get_mut(&v("a")).unwrap().state;
    let mut other = x.standbys[&home];
    let instance = x.instances[&home];
    other.in_sync = false;
    x.standbys.insert(third.clone(), other);
    x.instances.insert(third.clone(), instance);
    assert!(actions(&s).is_empty(), "it is being filled");
    let x = &mut s.vms.get_mut(&v("a")).unwrap().state;
    x.standbys.get_mut(&third).unwrap().in_sync = true;
    let then = actions(&s);
    assert!(
        matches!(then.as_slice(), [Action::Migrate { to, .. }] if *to == home),
        "{then:?}"
    );
}

#[test]
fn nobody_goes_home_in_the_middle_of_a_rolling_upgrade() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let home = s.vms[&v("a")].state.owner.clone().unwrap();
    s.hosts.get_mut(&home).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    run(&mut s, 30, |_| {});
    assert_ne!(owner(&s, "a"), home.to_string());
    s.hosts.get_mut(&home).unwrap().record.admin = HostAdmin::InUse;
    s.pool.upgrade_to = Some(s.hosts[&home].status.versions.steadfast.clone());
    let mut during = s.clone();
    run(&mut during, 30, |_| {});
    assert_ne!(owner(&during, "a"), home.to_string());
    during.pool.upgrade_to = None;
    run(&mut during, 30, |_| {});
    assert_eq!(owner(&during, "a"), home.to_string());
}

/// A pool of two: the VM leaves the host that is emptied, and its standby stays there, in sync, until the host is turned off.
#[test]
fn the_last_standby_stays_on_a_host_that_is_emptied() {
    let mut s = small(2, &[("a", Protection::Ft)]);
    s.hosts.get_mut(&h(1)).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    run(&mut s, 10, |s| {
        assert!(protected(s, &s.vms[&v("a")]) <= 1);
    });
    assert_eq!(owner(&s, "a"), h(2).to_string());
    assert_eq!(protected(&s, &s.vms[&v("a")]), 1, "it protects its VM");
    let admin = s.hosts[&h(1)].record.admin;
    assert_eq!(admin, HostAdmin::Maintenance(DrainWhy::Operator));
    assert!(!s.alarms.contains(&AlarmKey::DrainStuck(h(1))), "{:?}", s.alarms);
    assert!(s.alarms.contains(&AlarmKey::VmDegraded(v("a"))), "people know");
    fixpoint(&s);
}

/// Where there is another place, a host is not empty before the standby there is in sync.
#[test]
fn a_standby_with_another_place_keeps_its_host_until_that_is_filled() {
    for why in [DrainWhy::Upgrade, DrainWhy::Operator] {
        let mut s = small(3, &[("a", Protection::Ft)]);
        let state = &mut s.vms.get_mut(&v("a")).unwrap().state;
        let standby = state.standbys.keys().next().unwrap().clone();
        let third = s
            .hosts
            .keys()
            .find(|id| Some(*id) != state.owner.as_ref() && **id != standby);
        state.standbys.insert(third.unwrap().clone(), Default::default());
        s.hosts.get_mut(&standby).unwrap().record.admin = HostAdmin::Draining(why);
        let said = decide(&s).to_string();
        assert!(!said.contains("nothing is on it any more"), "{said}");
    }
}

/// A pool of two is upgraded: its VM is never without its standby but while that begins anew.
#[test]
fn a_pool_of_two_is_upgraded() {
    let mut s = small(2, &[("a", Protection::Ft)]);
    s.pool.upgrade_to = Some("2".into());
    run(&mut s, 60, |_| {});
    let done = |x: &Host| x.status.versions.steadfast == "2" && !x.record.leaving();
    assert!(s.hosts.values().all(done), "{}", describe(&s));
    assert_eq!(protected(&s, &s.vms[&v("a")]), 1);
    fixpoint(&s);
}

/// Who cannot be moved keeps a drain waiting, with the reason; a rolling upgrade leaves it, and also who has no other place.
#[test]
fn a_vm_that_cannot_move_holds_up_a_drain_and_no_upgrade() {
    let mut s = small(2, &[("a", Protection::Restart)]);
    let from = s.vms[&v("a")].state.owner.clone().unwrap();
    let mut upgrade = s.clone();
    s.vms.get_mut(&v("a")).unwrap().state.fixed = Some("its disk is shared".into());
    s.hosts.get_mut(&from).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    run(&mut s, 10, |_| {});
    assert_eq!(owner(&s, "a"), from.to_string());
    assert!(s.alarms.contains(&AlarmKey::DrainStuck(from.clone())));
    assert!(
        decide(&s).to_string().contains("its disk is shared"),
        "{}",
        decide(&s)
    );
    // No room elsewhere.
    for (id, host) in &mut upgrade.hosts {
        if *id != from {
            host.record.capacity.memory_bytes = 1;
        }
    }
    upgrade.pool.upgrade_to = Some("2".into());
    run(&mut upgrade, 50, |_| {});
    assert_eq!(owner(&upgrade, "a"), from.to_string());
    let done = |x: &Host| x.status.versions.steadfast == "2" && !x.record.leaving();
    assert!(upgrade.hosts.values().all(done), "{}", describe(&upgrade));
}

/// A move that comes to nothing each time does not hold up an upgrade for ever; an operator's drain waits for somebody.
#[test]
fn an_upgrade_gives_up_on_a_move_that_never_comes_about() {
    let moves = |why: DrainWhy, since_ms: u64| {
        let mut s = small(2, &[("a", Protection::Restart)]);
        s.now_ms = 10_000_000;
        let from = s.vms[&v("a")].state.owner.clone().unwrap();
        let host = s.hosts.get_mut(&from).unwrap();
        host.record.admin = HostAdmin::Draining(why);
        host.status.admin_since_ms = Some(since_ms);
        s.pool.upgrade_to = (why == DrainWhy::Upgrade).then(|| "2".into());
        let all = decide(&s).actions;
        all.iter().any(|x| matches!(x.action, Action::Migrate { .. }))
    };
    assert!(moves(DrainWhy::Upgrade, 9_990_000), "it has a place");
    assert!(!moves(DrainWhy::Upgrade, 0), "it was tried for long enough");
    assert!(moves(DrainWhy::Operator, 0));
}

#[test]
fn a_drain_that_waits_for_too_long_has_an_alarm() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    s.now_ms = 10_000_000;
    let from = s.vms[&v("a")].state.owner.clone().unwrap();
    for standby in s.vms.get_mut(&v("a")).unwrap().state.standbys.values_mut() {
        standby.in_sync = false;
    }
    let bound = s.pool.limits.drain_alarm_ms;
    let mut alarm_after = |ms: u64| {
        let host = s.hosts.get_mut(&from).unwrap();
        host.record.admin = HostAdmin::Draining(DrainWhy::Operator);
        host.status.admin_since_ms = Some(s.now_ms - ms);
        let raised = decide(&s).actions.into_iter();
        raised
            .filter(|d| matches!(&d.action, Action::RaiseAlarm { alarm } if *alarm == AlarmKey::DrainStuck(from.clone())))
            .map(|d| d.why)
            .next()
    };
    assert_eq!(alarm_after(bound - 1), None, "it waits");
    let why = alarm_after(bound + 1).expect("an alarm");
    assert!(why.contains("is being filled"), "{why}");
}

/// A host that cannot show a guest's CPU is no standby of it, and no target.
#[test]
fn a_host_that_cannot_show_a_guests_cpu_is_passed_over() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let x = &s.vms[&v("a")].state;
    let (from, unfit) = (
        x.owner.clone().unwrap(),
        x.standbys.keys().next().unwrap().clone(),
    );
    let state = &mut s.vms.get_mut(&v("a")).unwrap().state;
    state.unfit.insert(unfit.clone());
    // It never came to be filled.
    state.standbys.get_mut(&unfit).unwrap().in_sync = false;
    state.replicas.remove(&unfit);
    run(&mut s, 30, |_| {});
    let x = &s.vms[&v("a")];
    assert!(!x.state.standbys.contains_key(&unfit), "{}", describe(&s));
    assert_eq!(protected(&s, x), 1, "{}", describe(&s));
    fixpoint(&s);
    // Both others are no place for it: it stays, and why is said.
    let third = x.state.standbys.keys().next().unwrap().clone();
    let state = &mut s.vms.get_mut(&v("a")).unwrap().state;
    state.unfit.insert(third.clone());
    state.standbys.get_mut(&third).unwrap().in_sync = false;
    s.hosts.get_mut(&from).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    run(&mut s, 5, |_| {});
    let d = decide(&s);
    assert!(
        d.refusals
            .iter()
            .any(|r| r.to_string().contains("2 that cannot show its guest's CPU")),
        "{d}"
    );
    assert!(
        !d.actions
            .iter()
            .any(|x| matches!(x.action, Action::Migrate { .. } | Action::AddStandby { .. })),
        "{d}"
    );
}

/// Nor is it a target of a VM whose disks it has: those stay there, and the VM goes to another host.
#[test]
fn a_copy_of_the_disks_stays_on_a_host_that_cannot_show_the_cpu() {
    let mut s = small(3, &[("a", Protection::Restart)]);
    let x = &s.vms[&v("a")].state;
    let (from, unfit) = (
        x.owner.clone().unwrap(),
        x.standbys.keys().next().unwrap().clone(),
    );
    s.vms.get_mut(&v("a")).unwrap().state.unfit.insert(unfit.clone());
    fixpoint(&s);
    s.hosts.get_mut(&from).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
    run(&mut s, 30, |s| {
        assert!(
            s.vms[&v("a")].state.standbys.contains_key(&unfit),
            "{}",
            describe(s)
        );
    });
    let owner = s.vms[&v("a")].state.owner.clone().unwrap();
    assert!(owner != from && owner != unfit, "{}", describe(&s));
}

/// What has arrived is not called off.
#[test]
fn a_move_that_has_arrived_is_over() {
    let mut s = small(3, &[("a", Protection::Ft)]);
    let from = s.vms[&v("a")].state.owner.clone().unwrap();
    let to = s.vms[&v("a")].state.standbys.keys().next().unwrap().clone();
    let task = |from: &HostId, to: &HostId| Task::Migrate {
        vm: v("a"),
        from: from.clone(),
        to: to.clone(),
        cause: MoveCause::Operator,
        since_ms: s.now_ms,
    };
    let (arrived, elsewhere) = (task(&to, &from), task(&to, &to));
    let cancels = |s: &Snapshot| {
        let d = decide(s);
        d.actions
            .iter()
            .filter(|x| matches!(x.action, Action::CancelMigration { .. }))
            .count()
    };
    s.tasks = vec![arrived];
    assert_eq!(cancels(&s), 0);
    s.tasks = vec![elsewhere];
    assert_eq!(cancels(&s), 1, "it is not where it came from");
}
