//! A large pool loses a rack: everything is decided in one go, and the time stays far below what detection takes.
//! The benchmark `pool-scale` measures the same in detail.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
use common::{check_all_run, check_apart, check_capacity, protected};
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;
use steadfast_cluster::model::{Power, Protection};
use steadfast_cluster::synthetic::{first_rack, kill, large, run};
use steadfast_cluster::{apply, decide};

/// Most CPU time for one decision, about ten times what was measured.
const BOUND: Duration = Duration::from_secs(2);

/// CPU time of this thread: others at work on the machine do not matter.
fn cpu() -> Duration {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

#[test]
fn a_thousand_hosts_lose_a_rack() {
    let mut s = large(1_000, 20).unwrap();
    let from = cpu();
    let first = decide(&s);
    println!(
        "10,000 VMs placed in {:?}, {} actions",
        cpu() - from,
        first.actions.len()
    );
    for x in &first.actions {
        apply(&mut s, &x.action);
    }
    run(&mut s, 20, |_| {});
    check_all_run(&s).unwrap();
    assert!(s.vms.values().all(|x| x.state.running()), "{}", decide(&s));
    let from = cpu();
    assert!(decide(&s).actions.is_empty());
    let idle = cpu() - from;
    for h in first_rack(&s) {
        kill(&mut s, &h, true);
    }
    let from = cpu();
    let d = decide(&s);
    let took = cpu() - from;
    println!(
        "nothing to do: {idle:?}; a rack lost: {took:?}, {} actions",
        d.actions.len()
    );
    assert!(took < BOUND && idle < BOUND, "{took:?}, {idle:?}");
    for x in &d.actions {
        apply(&mut s, &x.action);
    }
    // One round names a host and all standbys for every protected VM.
    for x in s
        .vms
        .values()
        .filter(|x| x.spec.power == Power::On && x.spec.protection != Protection::None)
    {
        let o = x.state.owner.as_ref().unwrap();
        assert!(s.hosts[o].record.reachable(), "{}", x.spec.id);
        let live = x
            .state
            .standbys
            .keys()
            .filter(|h| s.hosts[*h].record.reachable())
            .count();
        assert!(live >= x.spec.standbys_wanted(), "{}", x.spec.id);
    }
    assert!(decide(&s).actions.is_empty());
    run(&mut s, 20, |_| {});
    check_all_run(&s).unwrap();
    check_apart(&s).unwrap();
    check_capacity(&s, true).unwrap();
    assert!(
        s.vms
            .values()
            .all(|x| protected(&s, x) >= x.spec.standbys_wanted())
    );
}
