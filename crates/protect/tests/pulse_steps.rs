//! One host is killed at every step of an epoch and of a promotion (FAULTS 38, 39): nothing that a client was told is lost
//! or done twice, memory and disk agree, and protection is built up again.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::duo::{Duo, LONG};
use common::{Random, Site, kvm, wait};
use steadfast_vmm::control::Request;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

fn site(random: &mut Random) -> Site {
    let mut site = Site::new(random);
    site.audit = true;
    site.disk = true;
    site.cmdline = "pages=60 loop=dirty rate=200 disk=1 udp=1 tcp=1 ip=10.0.0.2".into();
    site
}

/// The host that dies, at a random one of the first times that it reaches the step while the VM is mirrored.
fn one_dies(random: &mut Random, host: usize, step: &str) {
    let at = format!("{step}:{}", 1 + random.below(25));
    println!("{} dies at {at}", ["a", "b"][host]);
    let mut die_at = [None, None];
    die_at[host] = Some(at);
    let mut duo = Duo::new(site(random), die_at);
    // Flushes and replies make epochs until the step was reached often enough.
    let mut counted = 0;
    while duo.hosts[host].runs() {
        duo.one();
        counted += 1;
        assert!(counted < 3000, "step {step} was never reached");
    }
    for _ in 0..5 {
        duo.one();
    }
    duo.no_stale_page();
    duo.again(host, false);
    duo.protected();
    for _ in 0..3 {
        duo.one();
    }
    // The other host's turn: what it was given since must be whole.
    let (owner, _) = duo.owner().expect("somebody runs it");
    duo.hosts[owner].kill();
    for _ in 0..5 {
        duo.one();
    }
}

#[test]
fn the_primary_dies_at_every_step_of_an_epoch() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_primary_dies_at_every_step_of_an_epoch");
    for step in ["pause", "capture", "seal", "send", "fsync", "commit", "release"] {
        one_dies(&mut random, 0, step);
    }
}

#[test]
fn the_standby_dies_at_every_step_of_an_epoch() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_standby_dies_at_every_step_of_an_epoch");
    for step in ["receive", "stage", "ack", "apply"] {
        one_dies(&mut random, 1, step);
    }
}

/// The primary is killed, and the standby dies while it takes over: both are started again, in either order, and the VM
/// comes up from a disk that has all that was ever answered (I5), on the one host that has the right.
#[test]
fn the_standby_dies_at_every_step_of_its_promotion() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_standby_dies_at_every_step_of_its_promotion");
    for step in ["suspect", "grant", "load", "resume", "announce"] {
        println!("b dies at {step} of its promotion");
        let mut duo = Duo::new(site(&mut random), [None, Some(step.into())]);
        for _ in 0..10 {
            duo.one();
        }
        duo.hosts[0].kill();
        assert_eq!(duo.hosts[1].ended(LONG), None, "killed");
        let first = random.below(2) as usize;
        for host in [first, 1 - first] {
            duo.again(host, true);
        }
        duo.one_after_boot();
        wait("one owner, protected", LONG, || {
            duo.owner().is_some_and(|(_, p)| p)
        });
        for _ in 0..3 {
            duo.one();
        }
        let (owner, _) = duo.owner().unwrap();
        duo.hosts[owner].kill();
        for _ in 0..3 {
            duo.one();
        }
    }
}

/// The VM is handed over, and its primary dies at every step of that: whoever then has the right goes on, and nothing is lost.
#[test]
fn the_primary_dies_at_every_step_of_a_switch() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_primary_dies_at_every_step_of_a_switch");
    for step in ["freeze", "give", "handed"] {
        println!("a dies at {step} of its switch to b");
        let mut duo = Duo::new(site(&mut random), [Some(step.into()), None]);
        for _ in 0..10 {
            duo.one();
        }
        duo.hosts[0].ask(&hand_over());
        assert_eq!(duo.hosts[0].ended(LONG), None, "killed");
        for _ in 0..5 {
            duo.one();
        }
        assert_eq!(duo.owner().map(|(owner, _)| owner), Some(1));
        duo.no_stale_page();
        duo.again(0, false);
        duo.protected();
        for _ in 0..3 {
            duo.one();
        }
    }
}

/// The VM is handed over, and its target dies once it has the right: who handed it over goes on from the same epoch, and nothing is lost.
#[test]
fn the_target_dies_at_every_step_of_a_switch() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_target_dies_at_every_step_of_a_switch");
    for step in ["grant", "load", "resume", "announce"] {
        println!("b dies at {step} of the switch from a");
        let mut duo = Duo::new(site(&mut random), [None, Some(step.into())]);
        for _ in 0..10 {
            duo.one();
        }
        duo.hosts[0].ask(&hand_over());
        assert_eq!(duo.hosts[1].ended(LONG), None, "killed");
        for _ in 0..5 {
            duo.one();
        }
        assert_eq!(duo.owner().map(|(owner, _)| owner), Some(0));
        duo.no_stale_page();
        duo.again(1, false);
        duo.protected();
        duo.hosts[0].kill();
        for _ in 0..3 {
            duo.one();
        }
    }
}

fn hand_over() -> Request {
    Request::HandOver {
        to: steadfast_types::HostId::new("b").unwrap(),
    }
}
