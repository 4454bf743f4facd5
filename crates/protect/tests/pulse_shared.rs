//! A VM whose disk all hosts reach as one: it moves, and nobody takes it over.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::duo::{Duo, LONG};
use common::{Random, Site, kvm, wait};
use rustix::process::Signal;
use std::process::Command;
use std::time::{Duration, Instant};
use steadfast_types::HostId;
use steadfast_vmm::control::Request;

const CMDLINE: &str = "pages=60 loop=dirty rate=200 disk=verify ring=64 udp=1 tcp=1 ip=10.0.0.2";
/// Many times what a standby waits before it takes over, where it may.
const LONG_SILENCE: Duration = Duration::from_secs(2);

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

fn site(random: &mut Random, format: &'static str) -> Site {
    let mut site = Site::new(random);
    (site.audit, site.disk, site.shared) = (true, true, Some(format));
    site.cmdline = CMDLINE.into();
    site
}

fn ask_to_move(duo: &Duo, from: usize) -> serde_json::Value {
    let to = HostId::new(duo.hosts[1 - from].host).unwrap();
    duo.hosts[from].ask(&Request::HandOver { to })
}

/// Moves it to the other host while the client goes on; says where it is now.
fn move_it(duo: &mut Duo, random: &mut Random) -> usize {
    let (from, _) = duo.owner().unwrap();
    let asked = ask_to_move(duo, from);
    assert_eq!(asked["ok"], true, "{asked}");
    for _ in 0..random.below(8) {
        duo.one();
    }
    wait("moved", LONG, || duo.owner().is_some_and(|(h, _)| h != from));
    1 - from
}

fn held(duo: &Duo, host: usize) -> String {
    let status = duo.hosts[host].status().unwrap_or_default();
    status["disks"]["shared"][0]["held"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// How often its disk was let go for nothing.
fn taken_back(duo: &Duo, host: usize) -> usize {
    let log = duo.hosts[host].status().unwrap_or_default()["log"].to_string();
    log.matches("the shared disks are taken back").count()
}

/// Nobody runs it, for many times as long as a takeover would take.
fn stays_down(duo: &Duo) {
    let until = Instant::now() + LONG_SILENCE;
    while Instant::now() < until {
        assert_eq!(duo.owner(), None, "nobody may take it over");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is powered on again finds all that was flushed.
fn boots_again(duo: &mut Duo, host: usize) {
    duo.again(host, true);
    wait("powered on", LONG, || duo.owner().is_some_and(|(h, _)| h == host));
    duo.one_after_boot();
    for _ in 0..3 {
        duo.one();
    }
}

fn there_and_back(test: &str, format: &'static str) {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded(test);
    let mut duo = Duo::new(site(&mut random, format), [None, None]);
    for _ in 0..12 {
        let now = move_it(&mut duo, &mut random);
        duo.could_move();
        assert_eq!(
            (held(&duo, now), held(&duo, 1 - now)),
            ("here".into(), "not here".into())
        );
        assert_eq!(duo.owner(), Some((now, false)), "that is no protection (I8)");
        duo.one();
        duo.no_stale_page();
    }
    let (owner, _) = duo.owner().unwrap();
    duo.hosts[owner].kill();
    assert_eq!(duo.hosts[owner].ended(LONG), None);
    stays_down(&duo);
    boots_again(&mut duo, owner);
    duo.hosts[owner].ask(&Request::Stop);
    assert_eq!(duo.hosts[owner].ended(LONG), Some(0));
    if format == "qcow2" {
        let image = duo.site.path().join("shared.qcow2");
        match Command::new("qemu-img").arg("check").arg(&image).output() {
            Ok(checked) => assert!(checked.status.success(), "{checked:?}"),
            Err(e) => eprintln!("SKIPPED: the image is not checked, qemu-img: {e}"),
        }
    }
}

#[test]
fn with_a_shared_disk_it_moves_there_and_back_and_nobody_takes_it_over() {
    there_and_back(
        "with_a_shared_disk_it_moves_there_and_back_and_nobody_takes_it_over",
        "raw",
    );
}

#[test]
fn with_a_shared_qcow2_disk_it_moves_there_and_back() {
    there_and_back("with_a_shared_qcow2_disk_it_moves_there_and_back", "qcow2");
}

/// Requests that are at the disk when it moves come to their end before, and those that wait are issued again.
#[test]
fn with_a_shared_disk_it_moves_with_many_requests_in_flight() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("with_a_shared_disk_it_moves_with_many_requests_in_flight");
    for op in ["randread", "randwrite"] {
        let mut site = site(&mut random, "raw");
        site.cmdline =
            format!("pages=20 loop=diskbench op={op} bs=4096 qd=32 disk=1 udp=1 tcp=1 ip=10.0.0.2");
        let mut duo = Duo::new(site, [None, None]);
        for _ in 0..8 {
            move_it(&mut duo, &mut random);
            duo.could_move();
            duo.one();
            duo.no_stale_page();
        }
    }
}

/// A path that leads to another disk on the other host: the VM stays where it is.
#[test]
fn it_does_not_move_to_another_disk() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("it_does_not_move_to_another_disk");
    let mut site = site(&mut random, "raw");
    let other = site.path().join("other.raw");
    std::fs::write(&other, vec![0; 12 << 20]).unwrap();
    site.elsewhere.insert("b", other);
    let mut duo = Duo::new(site, [None, None]);
    for _ in 0..3 {
        for _ in 0..5 {
            duo.one();
        }
        assert_eq!(ask_to_move(&duo, 0)["ok"], true);
        wait("called off", LONG, || {
            let log = duo.hosts[0].status().unwrap_or_default()["log"].to_string();
            log.contains("it is not the disk that the VM has") && held(&duo, 0) == "here"
        });
        wait("why it stays", LONG, || {
            let status = duo.hosts[0].status().unwrap_or_default();
            status["protocol"]["stays"]
                .to_string()
                .contains("it is not the disk")
        });
        for _ in 0..5 {
            duo.one();
        }
        assert_eq!(duo.owner(), Some((0, false)));
    }
}

/// The other host stands still in the middle: the guest has its disk again, here; and later it moves.
#[test]
fn a_move_that_comes_to_nothing_gives_the_disk_back() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_move_that_comes_to_nothing_gives_the_disk_back");
    let mut duo = Duo::new(site(&mut random, "raw"), [None, None]);
    for _ in 0..4 {
        duo.could_move();
        let (from, _) = duo.owner().unwrap();
        let other = 1 - from;
        duo.hosts[other].signal(Signal::STOP);
        let before = taken_back(&duo, from);
        let asked = ask_to_move(&duo, from);
        assert_eq!(asked["ok"], true, "{asked}");
        for _ in 0..5 {
            duo.one();
        }
        assert_eq!(duo.owner(), Some((from, false)));
        wait("taken back", LONG, || taken_back(&duo, from) > before);
        assert_eq!(held(&duo, from), "here");
        duo.hosts[other].signal(Signal::CONT);
        duo.could_move();
        move_it(&mut duo, &mut random);
        duo.one();
    }
    duo.no_stale_page();
}

/// At each step of a switch either host dies: the VM is where the record says, and is booted there if that host died; never elsewhere.
#[test]
fn with_a_shared_disk_either_host_dies_at_every_step_of_a_switch() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("with_a_shared_disk_either_host_dies_at_every_step_of_a_switch");
    for (dies, step) in [
        (0, "freeze"),
        (0, "give"),
        (0, "handed"),
        (1, "grant"),
        (1, "load"),
        (1, "resume"),
    ] {
        println!("{} dies at {step}", ["a", "b"][dies]);
        let mut at = [None, None];
        at[dies] = Some(step.into());
        let mut duo = Duo::new(site(&mut random, "raw"), at);
        for _ in 0..5 {
            duo.one();
        }
        ask_to_move(&duo, 0);
        assert_eq!(duo.hosts[dies].ended(LONG), None, "killed");
        if (dies, step) == (0, "handed") {
            // It is b's already, told or not.
            for _ in 0..5 {
                duo.one();
            }
            assert_eq!(duo.owner(), Some((1, false)));
            continue;
        }
        stays_down(&duo);
        boots_again(&mut duo, dies);
    }
}
