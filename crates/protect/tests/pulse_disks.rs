//! A protected guest with a writable disk on this machine's KVM: its primary is killed at random instants, and memory, disk
//! and replies must agree ever after. At the end the images of both hosts are compared, byte by byte.

#![allow(clippy::unwrap_used, clippy::panic)]

mod disk_site;

use disk_site::{Site, kvm, wait};
use serde_json::json;
use std::time::{Duration, Instant};
use steadfast_protect::store::random_u64;

const ROUNDS: usize = 8;
const DISK_BYTES: u64 = 12 << 20;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn disk_instance() {
    disk_site::instance_process();
}

#[test]
fn pulse_disks() {
    killed_at_random(|| Site::new(DISK_BYTES));
}

/// Images that are no plain files of the disk's bytes.
#[test]
fn pulse_disks_in_qcow2() {
    killed_at_random(|| Site::with_format("qcow2", DISK_BYTES));
}

fn killed_at_random(site: impl FnOnce() -> Site) {
    if !kvm() {
        return;
    }
    let mut site = site();
    // A standby takes over as soon as by default.
    site.extra = json!({});
    let (mut primary, mut standby, mut count) = site.pair();
    let began = Instant::now();
    for round in 0..ROUNDS {
        for _ in 0..3 {
            count.one();
        }
        let pid = rustix::process::Pid::from_child(&primary.child);
        let delay = Duration::from_micros(random_u64().unwrap() % 60_000);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(delay);
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        while !killer.is_finished() {
            count.one();
        }
        killer.join().unwrap();
        for _ in 0..5 {
            count.one();
        }
        std::mem::swap(&mut primary, &mut standby);
        let host = standby.host;
        // Dead and waited for before the next one takes its image.
        let _ = standby.child.wait();
        standby = site.spawn(host, false);
        wait("protected again", || primary.protects());
        println!(
            "round {round}: killed after {delay:?}, counter {:?}, {:?} since the start",
            count.last.map(|r| r.counter),
            began.elapsed()
        );
    }
    count.one();
    let last = count.last.unwrap();
    assert!(
        last.verify_seq > 100 && last.disk_writes > 100,
        "the ring was at work: {last:?}"
    );
    println!(
        "longest wait {:?}, {} ring writes in {:?}",
        count.longest,
        last.verify_seq,
        began.elapsed()
    );
    site.compare(primary, standby, count);
}
