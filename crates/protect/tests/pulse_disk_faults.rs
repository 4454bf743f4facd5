//! Disks that fail under a protected guest (FAULTS rows 11, 12, 13, 14, 16): no error ever reaches it, nothing that its client
//! was told is lost, and what can be repaired is.

#![allow(clippy::unwrap_used, clippy::panic)]

mod disk_site;

use disk_site::{Count, Instance, Site, kvm, wait};
use pulse::shared::COUNTER_LBA;
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const DISK_BYTES: u64 = 12 << 20;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn disk_instance() {
    disk_site::instance_process();
}

/// The disk of the primary fails for good: the standby has the VM, and the old host comes back when its disk works.
fn moves_away(
    site: &mut Site,
    rules: &str,
    (primary, standby, count): (Instance, Instance, Count),
) -> (Instance, Instance, Count) {
    let (mut old, new, mut count) = (primary, standby, count);
    let host = old.host;
    count.one();
    site.faults(host, rules);
    count.until("the VM runs on the other host", || new.leads());
    wait("the old instance ends", || old.ended());
    let waited = std::mem::take(&mut count.longest);
    println!("{rules:?} on the primary: its client waited {waited:?} at most");
    assert!(waited < Duration::from_secs(8), "{waited:?}");
    site.faults(host, "");
    count.one();
    let old = site.spawn(host, false);
    count.until("protected again", || new.protects());
    (new, old, count)
}

/// Row 11: one error is tried again; errors for good move the VM to its standby. Row 12: so does a disk that hangs.
#[test]
fn pulse_disk_errors_primary() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    let (primary, standby, mut count) = site.pair();
    for rules in [
        "image read eio 1",
        "image write eio 1",
        "image sync eio 1",
        "journal write eio 1",
        "journal sync eio 1",
        "sums write eio 1",
    ] {
        site.faults(0, rules);
        count.during(Duration::from_millis(300));
    }
    site.faults(0, "");
    count.one();
    assert!(primary.protects(), "one error each is no reason to move");
    let mut trio = (primary, standby, count);
    for rules in [
        "image write eio",
        "journal write eio",
        "journal sync eio",
        "journal sync hang",
        "image write hang",
    ] {
        trio = moves_away(&mut site, rules, trio);
    }
    let (primary, standby, count) = trio;
    site.compare(primary, standby, count);
}

/// Row 11: blocks that the primary's disk does not give come from the standby's replica.
#[test]
fn pulse_disk_reads_from_peer() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    // Each restart of the guest's checks reads; `verify` reads its ring all the time.
    let (primary, standby, mut count) = site.pair();
    site.faults(0, "image read eio");
    count.until("blocks are served by the other host", || {
        primary.disk("served_blocks") + primary.disk("repaired_blocks") > 3
    });
    count.during(Duration::from_millis(500));
    assert!(primary.leads() || standby.leads());
    site.faults(0, "");
    count.one();
    println!(
        "served {}, repaired {}, longest wait {:?}",
        primary.disk("served_blocks"),
        primary.disk("repaired_blocks"),
        count.longest
    );
    site.compare(primary, standby, count);
}

/// Rows 11, 12, 14 on the standby: it drops out with an alarm, the VM runs on, and it is back when its disk works.
#[test]
fn pulse_disk_errors_standby() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    let (primary, standby, mut count) = site.pair();
    for rules in ["journal write eio", "image write full", "journal sync hang"] {
        site.faults(1, rules);
        count.until("the standby is out", || !primary.protects());
        count.until("an alarm", || standby.alarm().is_some());
        let alarm = standby.alarm();
        count.during(Duration::from_millis(500));
        assert!(!primary.protects(), "I8");
        assert!(primary.leads());
        site.faults(1, "");
        count.until("protected again", || primary.protects());
        // The standby says so when it next looks at its disks, which may be after its last acknowledgement.
        wait("the alarm is over", || standby.alarm().is_none());
        println!(
            "{rules:?} on the standby: {alarm:?}, its client waited {:?}",
            count.longest
        );
        assert!(count.longest < Duration::from_secs(5), "{:?}", count.longest);
        count.longest = Duration::ZERO;
    }
    site.compare(primary, standby, count);
}

/// Rows 11, 12, 14 without a standby: the guest's request waits, with an alarm, and nothing is lost.
#[test]
fn pulse_disk_errors_alone() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    let (primary, mut standby, mut count) = site.pair();
    standby.kill();
    count.until("alone", || primary.protocol()["members"][0]["in_sync"] == false);
    for rules in ["journal sync eio", "journal write full", "journal sync hang"] {
        count.one();
        let before = count.last.unwrap().counter;
        site.faults(0, rules);
        // One request is under way, and stays so: what cannot be made durable is not answered.
        let client = std::thread::spawn(move || {
            count.one();
            count
        });
        wait("an alarm", || primary.alarm().is_some());
        println!("{rules:?} alone: {:?}", primary.alarm());
        assert!(!client.is_finished(), "answered though it is not durable (I5)");
        assert!(primary.leads());
        site.faults(0, "");
        count = client.join().unwrap();
        assert_eq!(count.last.unwrap().counter, before + 1);
        wait("the alarm is over", || primary.alarm().is_none());
    }
    // The image takes nothing, the journal does: the VM runs on.
    site.faults(0, "image write full");
    count.until("an alarm", || primary.alarm().is_some());
    count.during(Duration::from_millis(500));
    site.faults(0, "");
    count.until("the alarm is over", || primary.alarm().is_none());
    let standby = site.spawn(1, false);
    count.until("protected", || primary.protects());
    site.compare(primary, standby, count);
}

/// Row 13: a disk that is 100 times slower, on either host, stops nothing.
#[test]
fn pulse_disk_slow() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    let (primary, standby, mut count) = site.pair();
    count.during(Duration::from_secs(1));
    for host in [0, 1] {
        count.longest = Duration::ZERO;
        site.faults(host, "* write slow 20\n* sync slow 60\n* read slow 20");
        let before = count.last.unwrap().counter;
        count.during(Duration::from_secs(4));
        let done = count.last.unwrap().counter - before;
        println!(
            "host {host} slow: {done} counts in 4 s, longest wait {:?}",
            count.longest
        );
        assert!(
            done >= 4 && count.longest < Duration::from_secs(3),
            "{:?}",
            count.longest
        );
        assert!(primary.leads(), "no failover for a slow disk");
        site.faults(host, "");
        count.until("protected", || primary.protects());
    }
    site.compare(primary, standby, count);
}

/// Row 16: a bit flipped at rest is found, by the guest's read or by the scrub, and repaired from the other host.
#[test]
fn pulse_disk_rot() {
    if !kvm() {
        return;
    }
    let mut site = Site::new(DISK_BYTES);
    site.extra = json!({"suspect_ms": 3000, "scrub_bytes_per_s": 64 << 20, "scrub_pause_s": 0});
    let (primary, standby, mut count) = site.pair();
    let walks = |i: &Instance| i.disks()["scrub"]["walks"].as_u64().unwrap();
    // All checksums are known after one walk.
    count.until("a walk over both", || walks(&primary) > 0 && walks(&standby) > 0);
    for (host, instance) in [(0, &primary), (1, &standby)] {
        let before = instance.disk("repaired_blocks");
        // One block that the guest never touches, and one beside its counter.
        let places = [DISK_BYTES - 4096 + 7, COUNTER_LBA * 512 - 4096 + 5];
        let image = File::options()
            .read(true)
            .write(true)
            .open(site.image(host))
            .unwrap();
        for at in places {
            let mut byte = [0];
            image.read_exact_at(&mut byte, at).unwrap();
            image.write_all_at(&[byte[0] ^ 4], at).unwrap();
        }
        count.until("found and repaired", || {
            instance.disk("repaired_blocks") >= before + 2
        });
        for at in places {
            let mut byte = [0];
            image.read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte[0], 0, "host {host} at {at}");
        }
    }
    assert!(primary.protects());
    println!("{}", primary.disks()["scrub"]);
    site.compare(primary, standby, count);
}
