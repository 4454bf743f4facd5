//! The pool's decisions at scale, in simulation: time and store writes against the size of the pool.
//!
//! Pools of 10 to 1,000 hosts with ten VMs each (see `steadfast_cluster::synthetic::large`) are started, left alone, lose a host, lose a
//! rack, have hot hosts. After the loss of a rack it is checked that one round of decisions names a new host and new standbys for every
//! VM that it hit, and that in the end all run and are protected.

use super::row::{Goal, Row, median};
use super::svg::{Bar, Chart};
use super::{Bench, Extent, Report};
use anyhow::{Result, bail, ensure};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};
use steadfast_cluster::model::{Protection, Snapshot};
use steadfast_cluster::synthetic::{first_rack, kill, large, run as run_pool};
use steadfast_cluster::{Action, Decisions, apply, decide, detector, lease};

const NAME: &str = "pool-scale";
/// Longest time for one decision with 1,000 hosts and 10,000 VMs, ms of CPU.
const DECIDE_MS: f64 = 500.0;
/// From the death of a rack until every action is in the store, ms.
const ANSWER_MS: f64 = 15_000.0;
/// What the computed answer time assumes of the store, writes per second: etcd with an SSD does several thousand.
const WRITES_PER_S: f64 = 1_000.0;

/// The benchmark's entry in the list.
pub fn bench() -> Bench {
    Bench {
        name: NAME,
        what: "the pool's decisions by size: time, and writes to the store",
        run,
    }
}

/// CPU time and wall time of a decision, ms, median of some; and the decision.
struct Timed {
    cpu_ms: f64,
    wall_ms: f64,
    decisions: Decisions,
}

fn cpu_now() -> Duration {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(t.tv_sec).unwrap_or(0),
        u32::try_from(t.tv_nsec).unwrap_or(0),
    )
}

fn timed(s: &Snapshot, rounds: usize) -> Timed {
    let (mut cpu, mut wall) = (Vec::new(), Vec::new());
    let mut decisions = Decisions::default();
    for _ in 0..rounds.max(1) {
        let (c, w) = (cpu_now(), Instant::now());
        decisions = decide(s);
        cpu.push(cpu_now().saturating_sub(c).as_secs_f64() * 1e3);
        wall.push(w.elapsed().as_secs_f64() * 1e3);
    }
    Timed {
        cpu_ms: median(&mut cpu),
        wall_ms: median(&mut wall),
        decisions,
    }
}

/// Each action writes one record in the store, by one compare-and-swap; a migration also its task.
fn writes(d: &Decisions) -> usize {
    let of = |a: &Action| match a {
        Action::Migrate { .. } | Action::UpgradeHost { .. } => 2,
        _ => 1,
    };
    d.actions.iter().map(|d| of(&d.action)).sum()
}

fn all_served(s: &Snapshot) -> Result<()> {
    for (id, vm) in s
        .vms
        .iter()
        .filter(|(_, vm)| vm.spec.protection != Protection::None)
    {
        let host = vm.state.owner.as_ref().and_then(|o| s.hosts.get(o));
        ensure!(
            host.is_some_and(|h| h.record.reachable()) && vm.state.running(),
            "{id} does not run after the failure"
        );
        let live = vm
            .state
            .in_sync()
            .filter(|h| s.hosts[*h].record.reachable())
            .count();
        ensure!(live >= vm.spec.standbys_wanted(), "{id} is not protected again");
    }
    Ok(())
}

fn one_round_names_all(s: &Snapshot, d: &Decisions) -> Result<()> {
    let mut after = s.clone();
    for x in &d.actions {
        apply(&mut after, &x.action);
    }
    for (id, vm) in after
        .vms
        .iter()
        .filter(|(_, vm)| vm.spec.protection != Protection::None)
    {
        let up = |h: &steadfast_types::HostId| after.hosts[h].record.reachable();
        let standbys = vm.state.standbys.keys().filter(|h| up(h)).count();
        ensure!(
            vm.state.owner.as_ref().is_some_and(up) && standbys >= vm.spec.standbys_wanted(),
            "one round left {id} out"
        );
    }
    ensure!(decide(&after).actions.is_empty(), "the round was no fixpoint");
    Ok(())
}

fn hot_hosts(s: &mut Snapshot) {
    let now = s.now_ms;
    let hot = (s.hosts.len() / 20).max(1);
    for vm in s.vms.values_mut() {
        vm.state.load.cpu_milli = 600;
        vm.state.load.memory_bytes = 1 << 30;
    }
    for (i, h) in s.hosts.values_mut().enumerate() {
        let permille = if i < hot { 950 } else { 300 };
        h.status.load.cpu_milli = h.record.capacity.cpu_milli * permille / 1000;
        h.status.load.hot_since_ms = (i < hot).then(|| now.saturating_sub(600_000));
    }
}

fn run(extent: &Extent) -> Result<Report> {
    let sizes: &[usize] = if extent.quick {
        &[10, 100]
    } else {
        &[10, 30, 100, 300, 1_000]
    };
    let rounds = if extent.quick { 2 } else { 5 };
    let (mut rows, mut bars, mut store) = (Vec::new(), Vec::new(), Vec::new());
    for &hosts in sizes {
        let case = format!("hosts={hosts} vms={}", hosts * 10);
        if !case.contains(extent.case) {
            continue;
        }
        let per_rack = (hosts / 5).clamp(2, 20);
        let mut s = large(hosts, per_rack)?;
        let start = timed(&s, 1);
        run_pool(&mut s, 30, |_| {});
        all_served(&s)?;
        let idle = timed(&s, rounds);
        ensure!(
            idle.decisions.actions.is_empty(),
            "an idle pool decides something"
        );
        let mut one = s.clone();
        let Some(first) = s.hosts.keys().next().cloned() else {
            bail!("no host");
        };
        kill(&mut one, &first, true);
        let one = timed(&one, rounds);
        let mut hot = s.clone();
        hot_hosts(&mut hot);
        let hot = timed(&hot, rounds);
        ensure!(!hot.decisions.actions.is_empty(), "hot hosts are not relieved");
        let rack = first_rack(&s);
        for h in &rack {
            kill(&mut s, h, true);
        }
        let lost = timed(&s, rounds);
        one_round_names_all(&s, &lost.decisions)?;
        run_pool(&mut s, 30, |_| {});
        all_served(&s)?;

        let large = hosts == 1_000;
        let judged = |row: Row, goal: f64| if large { row.goal(Goal::AtMost(goal)) } else { row };
        let row = |metric: &str, value: f64, unit: &str| Row::new(NAME, metric, &case, value, unit);
        let written = writes(&lost.decisions) as f64;
        let detect = lease::Settings::default()
            .fence_after_ms()
            .max(detector::Settings::default().dead_bound_ms(false));
        let answered = detect as f64 + lost.cpu_ms + written / WRITES_PER_S * 1e3;
        rows.push(judged(row("idle", idle.cpu_ms, "ms CPU"), DECIDE_MS));
        rows.push(row("one host lost", one.cpu_ms, "ms CPU"));
        rows.push(row("its writes", writes(&one.decisions) as f64, "writes"));
        rows.push(row("hosts in it", rack.len() as f64, "hosts"));
        rows.push(judged(row("rack lost", lost.cpu_ms, "ms CPU"), DECIDE_MS));
        rows.push(row("rack lost, wall", lost.wall_ms, "ms"));
        rows.push(row("rack's writes", written, "writes"));
        rows.push(judged(row("rack answered", answered, "ms, computed"), ANSWER_MS));
        rows.push(judged(row("hot hosts", hot.cpu_ms, "ms CPU"), DECIDE_MS));
        rows.push(row("first start of all", start.cpu_ms, "ms CPU"));
        rows.push(row(
            "its writes at start",
            writes(&start.decisions) as f64,
            "writes",
        ));
        eprintln!(
            "{case}: idle {:.1} ms, rack {:.1} ms, {written} writes",
            idle.cpu_ms, lost.cpu_ms
        );
        for (what, t) in [
            ("idle", &idle),
            ("one host lost", &one),
            ("rack lost", &lost),
            ("5% hot", &hot),
        ] {
            bars.push(Bar {
                label: format!("{hosts} hosts, {what}"),
                parts: vec![t.cpu_ms],
            });
        }
        store.push(Bar {
            label: format!("{hosts} hosts, rack of {}", rack.len()),
            parts: vec![written],
        });
    }
    let time = Chart {
        title: "One decision, by size of the pool (ten VMs a host)",
        unit: "ms of CPU",
        parts: &["decide()"],
        bars,
    };
    let load = Chart {
        title: "Writes to the store after the loss of a rack",
        unit: "writes",
        parts: &["compare-and-swaps"],
        bars: store,
    };
    Ok(Report {
        rows,
        pictures: vec![
            ("pool-scale.svg".into(), time.svg()),
            ("pool-scale-store.svg".into(), load.svg()),
        ],
        notes: format!(
            "In simulation; medians of {rounds} runs of `decide()` on one thread, CPU time, because the machine has other work. An idle \
             pool costs no write. After the loss of a rack it is checked that one round names a new host and new standbys for \
             every protected VM, and that in the end all run and are protected. `rack answered` is computed, not measured: the \
             longest of the detector's bound and the lease's (`docs/pool.md`), plus the decision, plus the writes at {WRITES_PER_S} a \
             second; `ft` VMs do not wait for it (their standbys suspect by themselves)."
        ),
    })
}
