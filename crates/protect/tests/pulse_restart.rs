//! A guest of which only the disk is mirrored (class `restart`): it is booted where a copy of its disk is, and has there all that a client
//! was ever told.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::duo::{Duo, LONG};
use common::{Instance, Random, Site, kvm, wait};
use serde_json::Value;
use std::time::{Duration, Instant};
use steadfast_types::HostId;
use steadfast_vmm::control::Request;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

fn site(random: &mut Random, boot_after_ms: u64) -> Site {
    let mut site = Site::new(random);
    (site.disk, site.memory, site.boot_after_ms) = (true, false, boot_after_ms);
    site.cmdline = "pages=60 loop=dirty rate=200 disk=1 udp=1 tcp=1 ip=10.0.0.2".into();
    site
}

fn status(instance: &Instance) -> Value {
    instance.status().unwrap_or_default()
}

/// Host after host dies, at any moment: the guest is booted on the other one, which then is mirrored by what changed.
#[test]
fn the_host_dies_and_the_guest_is_booted_where_its_disk_is() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_host_dies_and_the_guest_is_booted_where_its_disk_is");
    let mut duo = Duo::new(site(&mut random, 300), [None, None]);
    for round in 0..5 {
        for _ in 0..1 + random.below(20) {
            duo.one();
        }
        let (owner, protected) = duo.owner().unwrap();
        assert!(protected, "round {round}");
        let now = status(&duo.hosts[owner]);
        assert_eq!(
            (&now["whole"], &now["pages"]),
            (&false.into(), &0.into()),
            "{now:#}"
        );
        assert!(now["cuts"].as_u64().unwrap() > 0);
        assert_eq!(status(&duo.hosts[1 - owner])["whole"], false);
        // A standby that is asked for too much says so.
        let folder = duo.site.path().to_owned();
        let copied = duo.hosts[1 - owner].ask(&Request::CopyState { folder });
        assert!(copied.is_null(), "there is no running guest to copy: {copied}");
        duo.hosts[owner].kill();
        duo.one_after_boot();
        assert_eq!(duo.owner().map(|(o, _)| o), Some(1 - owner));
        duo.again(owner, false);
        duo.protected();
    }
}

/// The primary dies at every step of an epoch: what was answered is on the disk from which the guest is booted (I5).
#[test]
fn the_primary_dies_at_every_step_of_an_epoch_of_disks() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_primary_dies_at_every_step_of_an_epoch_of_disks");
    for step in ["seal", "send", "fsync", "commit", "release"] {
        let at = format!("{step}:{}", 1 + random.below(20));
        println!("a dies at {at}");
        let mut duo = Duo::new(site(&mut random, 300), [Some(at), None]);
        let began = Instant::now();
        while duo.hosts[0].runs() {
            duo.one_after_boot();
            assert!(began.elapsed() < LONG, "step {step} was never reached");
        }
        for _ in 0..3 {
            duo.one_after_boot();
        }
        duo.again(0, false);
        duo.protected();
        duo.hosts[1].kill();
        duo.one_after_boot();
    }
}

/// A process that dies is started again where it was, before its standby boots the guest.
#[test]
fn a_process_that_dies_is_started_again_where_it_was() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_process_that_dies_is_started_again_where_it_was");
    let mut duo = Duo::new(site(&mut random, 10_000), [None, None]);
    for _ in 0..10 {
        duo.one();
    }
    duo.hosts[0].kill();
    duo.again(0, true);
    duo.one_after_boot();
    duo.protected();
    assert_eq!(duo.owner(), Some((0, true)));
    assert_eq!(
        status(&duo.hosts[1])["promote_us"],
        Value::Null,
        "it never ran it"
    );
}

/// The primary's disk fails: its process ends, one that is started there again takes no right that it could not use, and the guest is booted
/// where the copy is.
#[test]
fn a_disk_that_fails_costs_a_boot_and_nothing_else() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_disk_that_fails_costs_a_boot_and_nothing_else");
    for rules in ["journal write eio", "image write eio"] {
        println!("{rules} on the primary");
        let mut duo = Duo::new(site(&mut random, 5000), [None, None]);
        for _ in 0..5 {
            duo.one();
        }
        duo.site.faults("a", rules);
        duo.poke();
        assert_eq!(duo.hosts[0].ended(LONG), Some(common::DISK_FAULT));
        duo.site.faults("a", "journal any eio");
        duo.again(0, true);
        assert_eq!(duo.hosts[0].ended(LONG), Some(common::DISK_FAULT));
        duo.one_after_boot();
        assert_eq!(duo.owner().map(|(o, _)| o), Some(1));
        duo.site.faults("a", "");
        duo.again(0, false);
        duo.protected();
        duo.one();
    }
}

/// The guest starts itself anew: in place, with its disk, and mirrored all the time.
#[test]
fn a_reset_of_a_guest_whose_disk_is_mirrored() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_reset_of_a_guest_whose_disk_is_mirrored");
    let mut duo = Duo::new(site(&mut random, 300), [None, None]);
    for _ in 0..5 {
        duo.one();
    }
    assert_eq!(duo.hosts[0].ask(&Request::Reset)["ok"], true);
    wait("reset", LONG, || status(&duo.hosts[0])["guest_resets"] == 1);
    duo.one_after_boot();
    for _ in 0..5 {
        duo.one();
    }
    assert_eq!(duo.owner(), Some((0, true)));
    duo.hosts[0].kill();
    duo.one_after_boot();
}

/// For a move all of it is mirrored: it goes on elsewhere without a boot. After that its disk is enough again.
#[test]
fn all_of_it_is_mirrored_for_a_move() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("all_of_it_is_mirrored_for_a_move");
    let mut duo = Duo::new(site(&mut random, 300), [None, None]);
    duo.one();
    let hand_over = |to: &str| Request::HandOver {
        to: HostId::new(to).unwrap(),
    };
    let refused = duo.hosts[0].ask(&hand_over("b"));
    assert!(refused.is_null(), "it cannot go on elsewhere: {refused}");
    let set = |duo: &Duo, memory: bool| {
        let class = Request::Class {
            hold_outputs: true,
            max_interval_us: None,
            memory,
        };
        for host in &duo.hosts {
            assert_eq!(host.ask(&class)["ok"], true);
        }
    };
    let is = |duo: &Duo, owner: usize, whole: bool| {
        let (here, there) = (status(&duo.hosts[owner]), status(&duo.hosts[1 - owner]));
        duo.owner() == Some((owner, true)) && here["whole"] == whole && there["whole"] == whole
    };
    // Wanted for a moment only: as before, and with its standby.
    for _ in 0..5 {
        set(&duo, true);
        set(&duo, false);
        duo.one();
    }
    wait("its disk to be mirrored as before", LONG, || is(&duo, 0, false));
    for (from, to) in [(0, 1), (1, 0)] {
        set(&duo, true);
        wait("all of it to be mirrored", LONG, || is(&duo, from, true));
        let host = duo.hosts[to].host;
        assert_eq!(duo.hosts[from].ask(&hand_over(host))["ok"], true);
        for _ in 0..20 {
            duo.one();
        }
        wait("moved", LONG, || is(&duo, to, true));
        set(&duo, false);
        for _ in 0..10 {
            duo.one();
        }
        wait("its disk to be mirrored", LONG, || is(&duo, to, false));
        assert!(status(&duo.hosts[to])["pause_p50_us"].as_u64() > Some(0));
        // Nobody went on from where it stood by the other measure, not even for a moment.
        for host in &duo.hosts {
            let log = status(host)["log"].to_string();
            assert!(!log.contains("another extent"), "{log}");
        }
    }
    for _ in 0..5 {
        duo.one();
    }
    duo.hosts[0].kill();
    duo.one_after_boot();
    // Turned off in order it is booted nowhere.
    duo.again(0, false);
    duo.protected();
    assert_eq!(duo.hosts[1].ask(&Request::Stop)["ok"], true);
    duo.hosts[1].ended(LONG);
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(900) {
        assert_eq!(status(&duo.hosts[0])["protocol"]["role"], "standby");
        std::thread::sleep(Duration::from_millis(20));
    }
}
