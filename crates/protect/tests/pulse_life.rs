//! What a protected guest and its operator may do with it, short of a failure: it resets itself, is turned off and on,
//! gets another standby, moves to another host.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::switch::{self, Switch};
use common::{Instance, Random, Site, kvm, wait};
use pulse::client::Client;
use pulse::kind;
use std::time::{Duration, Instant};
use steadfast_machine::memory::{Ram, RamBacking};
use steadfast_machine::state::SaveReader;
use steadfast_types::HostId;
use steadfast_vmm::control::Request;

const LONG: Duration = Duration::from_secs(20);

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

struct Pair {
    site: Site,
    client: Client<Switch>,
    a: Instance,
    b: Instance,
}

impl Pair {
    fn new(test: &str) -> Self {
        Self::with(test, |_| {})
    }

    fn with(test: &str, set: impl FnOnce(&mut Site)) -> Self {
        let mut site = Site::new(&mut Random::seeded(test));
        set(&mut site);
        site.audit = true;
        let client = switch::client(site.path().join("client"), vec![site.nic("a"), site.nic("b")]);
        let a = site.spawn("a", true);
        let b = site.spawn("b", false);
        wait("protected", LONG, || a.role() == (true, true));
        Self { site, client, a, b }
    }

    /// Adds one to the guest's counter.
    fn one(&mut self) -> u64 {
        let reply = self.client.ask(kind::INC, LONG).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(reply.errors, 0, "the guest's own checks: {reply:?}");
        reply.counter
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.site.logs());
        }
    }
}

fn no_stale_page(instance: &Instance) {
    let status = instance.status().unwrap();
    assert_eq!(status["audit_stale_pages"], 0, "{status:#}");
    assert!(
        status["audit_epochs"].as_u64().unwrap() > 0,
        "nothing was compared: {status:#}"
    );
}

/// A triple fault of the guest is a reset in place: the same primary, the same standby, which goes on from the guest that
/// was started anew when the primary dies (FAULTS 9).
#[test]
fn a_reset_is_no_failover() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("a_reset_is_no_failover");
    for n in 1..=5 {
        assert_eq!(pair.one(), n);
    }
    let term = |i: &Instance| i.status().unwrap()["protocol"]["term"].clone();
    let before = term(&pair.a);
    pair.client.tell(kind::PANIC).unwrap();
    wait("reset", LONG, || pair.a.status().unwrap()["guest_resets"] == 1);
    // The counter lives in memory, and this guest has no disk.
    assert_eq!(pair.one(), 1);
    assert_eq!(pair.a.role(), (true, true), "the same primary, protected");
    assert_eq!(term(&pair.a), before, "nobody took over");
    for n in 2..=20 {
        assert_eq!(pair.one(), n);
    }
    no_stale_page(&pair.b);
    pair.a.kill();
    assert_eq!(
        pair.one(),
        21,
        "the standby goes on from the guest that was started anew"
    );
    assert!(pair.b.role().0);
}

/// A guest that panicked and does not start itself anew, and one that hangs and does not feed its watchdog, are reset in place: nobody takes
/// over, and the standby goes on from the guest that was started anew, with its watchdog (FAULTS 9).
#[test]
fn a_guest_that_cannot_help_itself_is_reset_and_taken_over_by_nobody() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::with("a_guest_that_cannot_help_itself", |site| {
        site.cmdline.push_str(" watchdog=2000");
        site.watchdog = true;
    });
    for n in 1..=5 {
        assert_eq!(pair.one(), n);
    }
    let status = |i: &Instance| i.status().unwrap();
    let before = status(&pair.a)["protocol"]["term"].clone();
    // Well for two of its periods: it feeds its watchdog.
    let fed = Instant::now();
    wait("a while", LONG, || fed.elapsed() > Duration::from_secs(4));
    assert_eq!(status(&pair.a)["guest_resets"], 0);
    pair.client.tell(kind::HANG).unwrap();
    wait("its watchdog to reset it", LONG, || {
        status(&pair.a)["guest_resets"] == 1
    });
    let mishaps = |i: &Instance| status(i)["mishaps"].clone();
    assert_eq!(mishaps(&pair.a)["watchdog_resets"], 1);
    assert_eq!(pair.one(), 1, "started anew");
    pair.client.tell(kind::PVPANIC).unwrap();
    wait("its panic to be heard", LONG, || mishaps(&pair.a)["panics"] == 1);
    wait("it to be reset after its grace", LONG, || {
        status(&pair.a)["guest_resets"] == 2
    });
    assert_eq!(mishaps(&pair.a)["panic_resets"], 1);
    assert_eq!(pair.one(), 1, "started anew");
    assert_eq!(pair.a.role(), (true, true), "the same primary, protected");
    assert_eq!(status(&pair.a)["protocol"]["term"], before, "nobody took over");
    no_stale_page(&pair.b);
    pair.a.kill();
    assert_eq!(pair.one(), 2);
    // What it is in is in the state of an epoch: it guards the guest on the standby's host too.
    pair.client.tell(kind::HANG).unwrap();
    wait("its watchdog to reset it there", LONG, || {
        pair.b
            .status()
            .is_some_and(|s| s["mishaps"]["watchdog_resets"] == 1)
    });
    assert_eq!(pair.one(), 1);
}

/// What a standby holds is copied, again and again, while it follows a guest that changes its memory: each copy is of one epoch (the
/// audit compares RAM after each with the digest of that epoch), and neither the guest nor a takeover notices.
#[test]
fn a_standby_is_copied_while_it_follows() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("a_standby_is_copied_while_it_follows");
    let mut epochs = vec![0];
    for n in 1..=5 {
        assert_eq!(pair.one(), n);
        let before = epochs.last().copied();
        wait("the standby to apply more", LONG, || {
            pair.b.status().unwrap()["protocol"]["applied"].as_u64() > before
        });
        let folder = pair.site.path().join(format!("copy{n}"));
        std::fs::create_dir(&folder).unwrap();
        let done = pair.b.ask(&Request::CopyState {
            folder: folder.clone(),
        });
        epochs.push(done["epoch"].as_u64().unwrap());
        let saved = SaveReader::open(&folder.join("state")).unwrap();
        let ram = Ram::new(saved.ram_bytes, &RamBacking::Memfd).unwrap();
        saved.load(&ram).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
    assert!(epochs.windows(2).all(|w| w[0] < w[1]), "it goes on: {epochs:?}");
    no_stale_page(&pair.b);
    assert_eq!(pair.a.role(), (true, true), "protected all the time");
    pair.a.kill();
    assert_eq!(pair.one(), 6);
    assert!(pair.b.role().0);
}

/// What an operator stops stays stopped: the standby does not take it for a failure. It is powered on again where it was,
/// and the standby that waited is filled anew.
#[test]
fn a_stop_is_no_failure() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("a_stop_is_no_failure");
    assert_eq!(pair.one(), 1);
    assert_eq!(pair.a.ask(&Request::Stop)["ok"], true);
    assert_eq!(pair.a.ended(LONG), Some(0));
    // Longer than the detector needs (160 ms) to declare a primary dead.
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(700) {
        let status = pair.b.status().unwrap();
        assert_eq!(status["protocol"]["role"], "standby", "{status:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
    pair.a = pair.site.spawn("a", true);
    let a = &pair.a;
    wait("protected again", LONG, || a.role() == (true, true));
    assert_eq!(pair.one(), 1, "powered on anew");
    pair.a.kill();
    assert_eq!(pair.one(), 2);
}

/// Planned promote: the guest goes on at the standby, nothing lost, and the former primary is its standby at once. Without its
/// standby the VM refuses to move. A standby is taken away and given back while the VM runs.
#[test]
fn it_moves_and_standbys_come_and_go() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("it_moves_and_standbys_come_and_go");
    let b = HostId::new("b").unwrap();
    for n in 1..=10 {
        assert_eq!(pair.one(), n);
    }
    assert_eq!(
        pair.a.ask(&Request::RemovePeer { host: b.clone() })["was_peer"],
        true
    );
    let a = &pair.a;
    wait("unprotected", LONG, || {
        a.status().unwrap()["protocol"]["phase"] == "Alone"
    });
    assert_eq!(pair.one(), 11);
    let add = Request::AddPeer {
        host: b.clone(),
        paths: pair.site.paths[0].to_vec(),
        standby: true,
    };
    assert_eq!(pair.a.ask(&add)["ok"], true);
    let a = &pair.a;
    wait("protected again", LONG, || a.role() == (true, true));
    assert_eq!(pair.one(), 12);
    assert_eq!(pair.a.ask(&Request::HandOver { to: b })["ok"], true);
    for n in 13..=30 {
        assert_eq!(pair.one(), n);
    }
    let b = &pair.b;
    wait("moved", LONG, || b.role().0);
    no_stale_page(&pair.b);
    wait("protected the other way", LONG, || b.role() == (true, true));
    assert_eq!(pair.a.status().unwrap()["fills"], 0, "nothing was copied back");
    pair.b.kill();
    assert_eq!(pair.one(), 31);
    no_stale_page(&pair.a);
}

/// Bytes that a standby still lacks; none if it is not being filled.
fn to_copy(instance: &Instance) -> Option<u64> {
    let status = instance.status()?;
    let members = status["protocol"]["members"].as_array()?.clone();
    members.iter().find_map(|m| m["copying_bytes"].as_u64())
}

impl Pair {
    /// Takes the standby away and begins to fill it anew, slowly.
    fn begin_slow_move(&mut self) -> HostId {
        let b = HostId::new("b").unwrap();
        self.a.ask(&Request::RemovePeer { host: b.clone() });
        let a = &self.a;
        wait("unprotected", LONG, || {
            a.status().unwrap()["protocol"]["phase"] == "Alone"
        });
        // One that has nothing: what the old one has could be enough.
        self.b.kill();
        self.b.ended(LONG);
        self.b = self.site.spawn("b", false);
        let slow = Request::CopyRate {
            bytes_per_s: steadfast_protect::config::COPY_RATE_MIN,
        };
        assert_eq!(self.a.ask(&slow)["ok"], true);
        let add = Request::AddPeer {
            host: b.clone(),
            paths: self.site.paths[0].to_vec(),
            standby: true,
        };
        assert_eq!(self.a.ask(&add)["ok"], true);
        let a = &self.a;
        wait("the copy to begin", LONG, || {
            to_copy(a).is_some_and(|left| left > 0)
        });
        b
    }
}

/// A move whose copy never ends is cancelled: the VM runs on where it was, as before, and the move can be made again
/// (FAULTS 42).
#[test]
fn a_move_that_cannot_end_is_cancelled_and_made_again() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("a_move_that_cannot_end_is_cancelled_and_made_again");
    assert_eq!(pair.one(), 1);
    let b = pair.begin_slow_move();
    // What is not filled cannot be moved to: asked too early, nothing happens.
    pair.a.ask(&Request::HandOver { to: b.clone() });
    for n in 2..=20 {
        assert_eq!(pair.one(), n);
    }
    assert!(to_copy(&pair.a).is_some(), "the copy was to be slow");
    assert!(pair.a.role().0 && !pair.b.role().0);
    assert_eq!(
        pair.a.ask(&Request::RemovePeer { host: b.clone() })["was_peer"],
        true
    );
    let a = &pair.a;
    wait("cancelled", LONG, || {
        let status = a.status().unwrap();
        status["protocol"]["phase"] == "Alone" && to_copy(a).is_none()
    });
    for n in 21..=25 {
        assert_eq!(pair.one(), n);
    }
    // Again, as fast as the link.
    pair.a.ask(&Request::CopyRate { bytes_per_s: 0 });
    let add = Request::AddPeer {
        host: b.clone(),
        paths: pair.site.paths[0].to_vec(),
        standby: true,
    };
    assert_eq!(pair.a.ask(&add)["ok"], true);
    let a = &pair.a;
    wait("protected again", LONG, || a.role() == (true, true));
    assert_eq!(pair.a.ask(&Request::HandOver { to: b })["ok"], true);
    for n in 26..=40 {
        assert_eq!(pair.one(), n);
    }
    let b = &pair.b;
    wait("moved", LONG, || b.role().0);
    no_stale_page(&pair.b);
}

/// The target of a move dies while it is filled: the VM does not notice, and the move can be made again. The source dies
/// while the target is not yet filled: the target does not take over what it does not have (FAULTS 41).
#[test]
fn who_dies_in_a_move_takes_nothing_along() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("who_dies_in_a_move_takes_nothing_along");
    assert_eq!(pair.one(), 1);
    pair.begin_slow_move();
    pair.b.kill();
    for n in 2..=10 {
        assert_eq!(pair.one(), n);
    }
    pair.b.ended(LONG);
    pair.b = pair.site.spawn("b", false);
    pair.a.ask(&Request::CopyRate { bytes_per_s: 0 });
    let a = &pair.a;
    wait("protected after the target's death", LONG, || {
        a.role() == (true, true)
    });
    for n in 11..=20 {
        assert_eq!(pair.one(), n);
    }
    no_stale_page(&pair.b);
    pair.begin_slow_move();
    assert_eq!(pair.one(), 21);
    pair.a.kill();
    pair.a.ended(LONG);
    // Longer than the detector needs (160 ms) to declare a primary dead.
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(700) {
        let status = pair.b.status().unwrap();
        assert_eq!(status["protocol"]["role"], "standby", "{status:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What was not protected is lost with its host; it boots where it was.
    pair.a = pair.site.spawn("a", true);
    let a = &pair.a;
    wait("protected again", LONG, || a.role() == (true, true));
    assert_eq!(pair.one(), 1, "powered on anew");
}
