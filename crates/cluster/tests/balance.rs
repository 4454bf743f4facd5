//! Balancing over simulated time: relief, its cost model, and no thrash in an hour of changing load.

mod common;
use common::{check_capacity, h, protected, v};
use std::collections::BTreeMap;
use steadfast_cluster::model::{
    BalanceSettings, HostLoad, MoveCause, Power, Protection, Snapshot, Task, VmLoad,
};
use steadfast_cluster::smooth::{HostSmoother, VmSmoother, permille};
use steadfast_cluster::synthetic::{add, describe, pool, run, vm};
use steadfast_cluster::{Action, Sabotage, Wanted, apply, decide, settle};
use steadfast_types::{HostId, VmId};

/// Sets the measured load of every VM, and of the hosts from it.
fn measure(s: &mut Snapshot, load: impl Fn(&VmId) -> VmLoad) {
    for (id, x) in &mut s.vms {
        x.state.load = load(id);
    }
    let now = s.now_ms;
    let raw = host_loads(s);
    for (id, host) in &mut s.hosts {
        let hot_since = host.status.load.hot_since_ms;
        host.status.load = raw[id];
        let hot = permille(&host.status.load, &host.record) >= u64::from(s.pool.balance.hot_permille);
        host.status.load.hot_since_ms = hot.then(|| hot_since.unwrap_or(now));
    }
}

fn host_loads(s: &Snapshot) -> BTreeMap<HostId, HostLoad> {
    let mut loads: BTreeMap<HostId, HostLoad> =
        s.hosts.keys().map(|h| (h.clone(), HostLoad::default())).collect();
    for x in s.vms.values().filter(|x| x.spec.power == Power::On) {
        let l = &x.state.load;
        let Some(owner) = &x.state.owner else { continue };
        let host = loads.get_mut(owner).unwrap();
        host.cpu_milli += l.cpu_milli;
        host.memory_bytes += l.memory_bytes;
        host.net_bytes_per_s += l.net_bytes_per_s;
        if x.spec.protection.hot() {
            host.net_bytes_per_s += l.dirty_bytes_per_s * x.state.standbys.len() as u64;
            for standby in x.state.standbys.keys() {
                let host = loads.get_mut(standby).unwrap();
                host.net_bytes_per_s += l.dirty_bytes_per_s;
                host.memory_bytes += l.memory_bytes;
            }
        }
    }
    loads
}

fn cpu(milli: u64) -> VmLoad {
    VmLoad {
        cpu_milli: milli,
        memory_bytes: 2 << 30,
        dirty_bytes_per_s: 10 << 20,
        net_bytes_per_s: 1 << 20,
    }
}

/// Eight VMs of a class on one host of four, with a standby each on another where the class wants one.
fn crowded(class: Protection) -> Snapshot {
    let mut s = pool(4, 0).unwrap();
    for n in 0..8 {
        let mut x = vm(&format!("v{n}"), class).unwrap();
        x.spec.resources.cpu_milli = 4000;
        x.spec.disks[0].bytes = 2 << 30;
        add(&mut s, x);
    }
    // The other hosts come later.
    for n in 3..=4 {
        s.hosts.get_mut(&h(n)).unwrap().record.admin =
            steadfast_cluster::model::HostAdmin::Maintenance(steadfast_cluster::model::DrainWhy::Operator);
    }
    run(&mut s, 20, |_| {});
    // All primaries to the first host.
    for x in s.vms.values_mut() {
        if x.state.owner == Some(h(2)) {
            let mine = x.state.instances.remove(&h(2)).unwrap();
            let other = x.state.instances.remove(&h(1));
            x.state.instances.insert(h(1), mine);
            x.state.owner = Some(h(1));
            x.state.replicas = [h(1)].into();
            if let Some(o) = other {
                let standby = x.state.standbys.remove(&h(1)).unwrap();
                x.state.standbys.insert(h(2), standby);
                x.state.instances.insert(h(2), o);
                x.state.replicas.insert(h(2));
            }
        }
    }
    for n in 3..=4 {
        s.hosts.get_mut(&h(n)).unwrap().record.admin = steadfast_cluster::model::HostAdmin::InUse;
    }
    s
}

fn hottest(s: &Snapshot) -> u64 {
    s.hosts
        .values()
        .map(|x| permille(&x.status.load, &x.record))
        .max()
        .unwrap()
}

#[test]
fn a_hot_host_is_relieved_of_every_class_and_it_ends() {
    for class in [
        Protection::None,
        Protection::Restart,
        Protection::Checkpoint { interval_ms: 100 },
        Protection::Ft,
    ] {
        let mut s = crowded(class);
        let mut moves = 0;
        let mut last = 0;
        for minute in 0..120u64 {
            s.now_ms += 60_000;
            measure(&mut s, |_| cpu(1_900));
            if minute == 0 {
                assert!(hottest(&s) > 900, "{}", hottest(&s));
            }
            let d = decide(&s);
            for x in &d.actions {
                apply(&mut s, &x.action);
                if let Action::Migrate { cause, .. } = &x.action {
                    assert_eq!(*cause, MoveCause::Balance, "{x}");
                    assert!(x.why.contains("gain") && x.why.contains("cost"), "{x}");
                    moves += 1;
                    last = minute;
                }
            }
            check_capacity(&s, true).unwrap();
            settle(&mut s);
            for x in s.vms.values() {
                assert!(protected(&s, x) >= x.spec.standbys_wanted());
            }
        }
        measure(&mut s, |_| cpu(1_900));
        assert!(hottest(&s) < 800, "{class:?}: {}\n{}", hottest(&s), describe(&s));
        assert!((1..=5).contains(&moves), "{class:?}: {moves} moves");
        assert!(last < 30, "{class:?}: the last in minute {last}");
    }
}

#[test]
fn network_and_dirty_rate_count_and_what_would_not_converge_stays() {
    let mut s = crowded(Protection::None);
    // The link of the first host is full of one VM's traffic.
    for x in s.hosts.values_mut() {
        x.record.link_bytes_per_s = 1000 << 20;
    }
    let traffic = |id: &VmId| VmLoad {
        net_bytes_per_s: if *id == v("v0") { 300 << 20 } else { 90 << 20 },
        dirty_bytes_per_s: if *id == v("v0") { 900 << 20 } else { 10 << 20 },
        ..cpu(100)
    };
    measure(&mut s, traffic);
    s.now_ms += 120_000;
    let d = decide(&s);
    let moved: Vec<_> = d.actions.iter().filter_map(|x| x.action.vm()).collect();
    assert!(!moved.is_empty() && !moved.contains(&&v("v0")), "{d}");
    assert!(d.actions[0].why.contains("network"), "{d}");
    // Nothing is worth a move when all are small and the disks are huge.
    let mut s = crowded(Protection::None);
    for x in s.vms.values_mut() {
        x.spec.disks[0].bytes = 100 << 30;
    }
    for x in s.hosts.values_mut() {
        x.record.link_bytes_per_s = 10 << 20;
        x.record.capacity.disk_bytes = 10 << 40;
    }
    measure(&mut s, |_| VmLoad {
        dirty_bytes_per_s: 0,
        net_bytes_per_s: 0,
        ..cpu(1_700)
    });
    s.now_ms += 120_000;
    let d = decide(&s);
    assert!(d.actions.is_empty(), "{d}");
    assert!(d.refusals.iter().any(|r| r.wanted == Wanted::Balance), "{d}");
}

/// An hour of changing load, sampled every 5 s and decided every 10 s; a migration takes 20 s. Returns the moves per VM.
fn an_hour(seed: u64, sabotage: Sabotage) -> Vec<(VmId, Vec<u64>)> {
    let mut s = pool(8, 0).unwrap();
    s.pool.sabotage = sabotage;
    for n in 0..48 {
        let class = [Protection::Ft, Protection::Restart, Protection::None][n % 3];
        let mut x = vm(&format!("v{n:02}"), class).unwrap();
        x.spec.resources.memory_bytes = 3 << 30;
        add(&mut s, x);
    }
    run(&mut s, 20, |_| {});
    let mut vms: BTreeMap<VmId, VmSmoother> = BTreeMap::new();
    let mut hosts: BTreeMap<HostId, HostSmoother> = BTreeMap::new();
    let mut moves: BTreeMap<VmId, Vec<u64>> = BTreeMap::new();
    let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |n: u64| {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        rng % n
    };
    let phases: BTreeMap<VmId, (u64, u64, u64)> = s
        .vms
        .keys()
        .map(|id| {
            (
                id.clone(),
                (random(3_600), 300 + random(1_500), 500 + random(2_500)),
            )
        })
        .collect();
    let start = s.now_ms;
    for t in (0..3_600u64).step_by(5) {
        s.now_ms = start + t * 1000;
        // A slow wave, a spike now and then, and noise.
        for (id, x) in &mut s.vms {
            let (phase, period, height) = phases[id];
            let wave = ((t + phase) % period) * 2;
            let level = if wave < period { wave } else { 2 * period - wave } * height / period;
            let spike = if random(60) == 0 { 4_000 } else { 0 };
            let raw = VmLoad {
                cpu_milli: level + spike + random(300),
                memory_bytes: 2 << 30,
                dirty_bytes_per_s: (level / 20) << 20,
                net_bytes_per_s: (level / 50) << 20,
            };
            x.state.load = raw;
        }
        let raw = host_loads(&s);
        let now = s.now_ms;
        let balance = s.pool.balance;
        for (id, host) in &mut s.hosts {
            let smoother = hosts
                .entry(id.clone())
                .or_insert_with(|| HostSmoother::new(30_000));
            host.status.load = smoother.sample(now, &raw[id], &host.record, &balance);
        }
        for (id, x) in &mut s.vms {
            let smoother = vms.entry(id.clone()).or_insert_with(|| VmSmoother::new(30_000));
            x.state.load = smoother.sample(now, &x.state.load);
        }
        if t % 10 == 0 {
            for d in decide(&s).actions {
                if let Action::Migrate { vm, .. } = &d.action
                    && apply(&mut s, &d.action)
                {
                    moves.entry(vm.clone()).or_default().push(t);
                } else {
                    apply(&mut s, &d.action);
                }
            }
        }
        let old =
            |t: &Task| matches!(t, Task::Migrate { since_ms, .. } if now.saturating_sub(*since_ms) >= 20_000);
        let (done, rest): (Vec<Task>, Vec<Task>) = s.tasks.drain(..).partition(old);
        s.tasks = done;
        settle(&mut s);
        s.tasks = rest;
    }
    moves.into_iter().collect()
}

/// No VM moves twice within its residence, none more than a few times in the hour, and the pool not all the time.
fn thrash(moves: &[(VmId, Vec<u64>)]) -> Option<String> {
    let set = BalanceSettings::default();
    let total: usize = moves.iter().map(|(_, m)| m.len()).sum();
    for (vm, m) in moves {
        if m.windows(2).any(|w| (w[1] - w[0]) * 1000 < set.residence_ms) || m.len() > 4 {
            return Some(format!("{vm} moved at {m:?}"));
        }
    }
    (total > 48).then(|| format!("{total} moves in an hour"))
}

#[test]
fn no_thrash_in_an_hour_of_changing_load() {
    let mut all = 0;
    for seed in 1..6 {
        let moves = an_hour(seed, Sabotage::None);
        assert_eq!(thrash(&moves), None, "seed {seed}");
        all += moves.iter().map(|(_, m)| m.len()).sum::<usize>();
    }
    println!("{all} moves in five hours of 48 VMs");
    assert!(all > 0, "a test without a single move shows nothing");
    assert!(thrash(&an_hour(1, Sabotage::BalanceWithoutDamping)).is_some());
}
