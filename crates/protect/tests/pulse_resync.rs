//! A standby that comes back receives of its disks what changed, and no more: after a short absence, after a failover, after a
//! new start of the primary's process. Killed in any phase of that (FAULTS row 40) it comes back again. A copy can be held
//! to a rate while it runs.

#![allow(clippy::unwrap_used, clippy::panic)]

mod disk_site;

use disk_site::{Site, kvm, wait};
use std::time::{Duration, Instant};
use steadfast_vmm::control::Request;

const DISK_BYTES: u64 = 48 << 20;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn disk_instance() {
    disk_site::instance_process();
}

/// What was sent of the disk in the last copy to this host, and whether it was all of it.
fn sent(primary: &disk_site::Instance, to: &str) -> (u64, bool) {
    let copy = primary.copy(to);
    (copy["sent_bytes"].as_u64().unwrap(), copy["full"] == true)
}

fn is_small((bytes, full): (u64, bool)) {
    assert!(
        !full && bytes <= DISK_BYTES / 8,
        "{bytes} bytes of {DISK_BYTES}, full: {full}"
    );
}

/// Standby away; failover and back; the primary's process started anew: each time only changes are sent, and the images
/// are equal in the end.
#[test]
fn pulse_resync_delta() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    let (primary, mut standby, mut count) = site.pair();
    let (bytes, full) = sent(&primary, "b");
    assert!(full, "the first copy is whole");
    println!("first copy: {bytes} bytes of {DISK_BYTES}");
    // The standby is away for a while.
    for round in 0..2 {
        count.during(Duration::from_millis(400));
        standby.kill();
        count.during(Duration::from_millis(400));
        standby = site.spawn(1, false);
        count.until("protected again", || primary.protects());
        let got = sent(&primary, "b");
        println!("absence {round}: {got:?}");
        is_small(got);
    }
    // The primary is killed: it comes back as a standby, and lacks what happened since.
    count.during(Duration::from_millis(700));
    let mut old = primary;
    old.kill();
    let mut primary = standby;
    count.during(Duration::from_millis(400));
    let mut standby = site.spawn(0, false);
    count.until("protected the other way", || primary.protects());
    let got = sent(&primary, "a");
    println!("after a failover: {got:?}");
    is_small(got);
    // The standby ends, then the primary's process: the VM is started from its disk, and still knows what the standby lacks.
    count.during(Duration::from_millis(1500));
    standby.kill();
    count.until("alone", || primary.protocol()["members"][0]["in_sync"] == false);
    count.during(Duration::from_millis(300));
    primary.kill();
    let primary = site.spawn(1, true);
    wait("started again", || primary.leads());
    count.rebooted();
    count.during(Duration::from_millis(300));
    let standby = site.spawn(0, false);
    count.until("protected after a new start", || primary.protects());
    let got = sent(&primary, "a");
    println!("after a new start of the primary: {got:?}");
    is_small(got);
    site.compare(primary, standby, count);
}

/// Row 40: the standby is killed at random instants of its copy, the primary's process in the middle of one.
#[test]
fn pulse_resync_killed() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    // Slow enough to be hit in each phase.
    site.extra["copy_bytes_per_s"] = (64_u64 << 20).into();
    let (mut primary, mut standby, mut count) = site.pair();
    for round in 0..10_u64 {
        count.one();
        standby.kill();
        count.one();
        standby = site.spawn(1, false);
        let since = Instant::now();
        let after = Duration::from_millis(20 + round * 110);
        count.until("the instant to kill", || since.elapsed() >= after);
        let state = standby.disks()["list"][0]["state"].as_str().map(str::to_owned);
        println!("round {round}: killed {after:?} after its start, its disk was {state:?}");
    }
    standby.kill();
    standby = site.spawn(1, false);
    wait("a copy is under way", || {
        standby.disks()["list"][0]["state"] == "copying" || primary.protects()
    });
    let copying = standby.disks()["list"][0]["state"] == "copying";
    println!("the primary's process is killed; the standby's disk is copying: {copying}");
    if copying {
        // In the middle of its copy it cannot take over; the VM is started again where its disk is.
        primary.kill();
        primary = site.spawn(0, true);
        wait("started again", || primary.leads());
        count.rebooted();
    }
    count.until("protected", || primary.protects());
    site.compare(primary, standby, count);
}

/// A rate of the copy, set while it runs; progress is seen in bytes.
#[test]
fn pulse_resync_rate() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    site.extra["copy_bytes_per_s"] = (4_u64 << 20).into();
    let mut count = site.count();
    let primary = site.spawn(0, true);
    let mut standby = site.spawn(1, false);
    wait("the copy has begun", || {
        primary.copy("b")["sent_bytes"].as_u64().unwrap_or(0) > 0
    });
    let (before, since) = (sent(&primary, "b").0, Instant::now());
    count.during(Duration::from_secs(2));
    let (bytes, took) = (sent(&primary, "b").0 - before, since.elapsed());
    let rate = bytes as f64 / took.as_secs_f64();
    println!("{bytes} bytes of disk in {took:?}");
    assert!(
        rate < 4.5e6 && bytes > 0,
        "the copy goes at {rate} bytes a second"
    );
    assert!(!primary.protects(), "protected before the copy was over");
    let left = primary.copy("b")["remaining_bytes"].as_u64().unwrap();
    assert!(left > 0 && left < DISK_BYTES, "{left} bytes remain");
    let refused = primary.ask(&Request::CopyRate { bytes_per_s: 1000 });
    assert!(refused.is_null(), "refused, which is no answer here: {refused}");
    let since = Instant::now();
    assert_eq!(primary.ask(&Request::CopyRate { bytes_per_s: 0 })["ok"], true);
    count.until("protected at full speed", || primary.protects());
    println!("the rest took {:?}", since.elapsed());
    assert!(!standby.ended());
    site.compare(primary, standby, count);
}
