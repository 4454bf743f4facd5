//! A protected guest on this machine's KVM: its primary is killed, again and again, and its client notices a short wait.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::client::Load;
use common::{Instance, Random, Site, kvm, print_percentiles, wait};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

/// Two hosts, one guest, one client.
struct Pair {
    site: Site,
    load: Load,
    primary: Instance,
    standby: Instance,
    random: Random,
}

impl Pair {
    fn new(test: &str) -> Self {
        let mut random = Random::seeded(test);
        let site = Site::new(&mut random);
        Self::at(site, random)
    }

    fn at(mut site: Site, random: Random) -> Self {
        let load = Load::start(site.path().join("client"), [site.nic("a"), site.nic("b")]);
        let primary = site.spawn("a", true);
        let standby = site.spawn("b", false);
        let pair = Self {
            site,
            load,
            primary,
            standby,
            random,
        };
        pair.protected();
        pair
    }

    /// Waits until the VM runs at the primary, is protected, and answers.
    fn protected(&self) {
        let since = Instant::now();
        wait("protected", LONG, || self.primary.role() == (true, true));
        self.answers(since);
    }

    /// No instance that runs has found a page that differs from its epoch (I3).
    fn audit(&self) {
        for instance in [&self.primary, &self.standby] {
            let status = instance.status().unwrap_or_default();
            let stale = status["audit_stale_pages"].as_u64().unwrap_or(0);
            assert_eq!(stale, 0, "{} has stale pages: {status:#}", instance.host);
        }
    }

    /// Waits for a reply of the primary after `since`; says how long it took.
    fn answers(&self, since: Instant) -> Duration {
        self.load
            .reply_from(self.primary.host, since, LONG)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Runs on for a random time.
    fn go_on(&mut self, most_ms: u64) {
        let us = self.random.below(most_ms * 1000);
        std::thread::sleep(Duration::from_micros(us));
    }

    fn swap(&mut self) {
        std::mem::swap(&mut self.primary, &mut self.standby);
    }

    /// Kills the primary at a random instant, waits for the standby to answer, brings a new standby up.
    fn failover(&mut self) -> Duration {
        self.go_on(60);
        let killed = self.primary.kill();
        self.swap();
        let gap = self.answers(killed);
        self.audit();
        let _ = self.standby.ended(LONG);
        self.standby = self.site.spawn(self.standby.host, false);
        self.protected();
        gap
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.site.logs());
            for instance in [&self.primary, &self.standby] {
                let status = instance.status().unwrap_or_default();
                eprintln!("--- status of {}: {status:#}", instance.host);
            }
        }
    }
}

fn kill_primaries(test: &str, rounds: usize, most: Duration) {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new(test);
    let (mut gaps, began) = (Vec::new(), Instant::now());
    for round in 0..rounds {
        if began.elapsed() > most {
            println!("{test}: {round} of {rounds} rounds fitted into {most:?}");
            break;
        }
        gaps.push(pair.failover());
    }
    let seen = pair.load.seen();
    println!("{test}: {} replies, counter {}", seen.replies, seen.counter);
    print_percentiles("kill -9 of the primary to the first reply", gaps);
}

/// kill -9 of the primary: the standby goes on, nothing acknowledged is lost or done twice; a new standby is filled.
#[test]

fn primary_killed() {
    kill_primaries("primary_killed", 12, Duration::from_secs(100));
}

/// kill -9 of the standby: the primary goes on once the store lets it, and the returning standby is filled.
#[test]

fn standby_killed() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new("standby_killed");
    let mut gaps = Vec::new();
    for _ in 0..6 {
        pair.go_on(60);
        let killed = pair.standby.kill();
        gaps.push(pair.answers(killed));
        // Not an answer that was under way: the service itself is back.
        pair.answers(killed + Duration::from_millis(300));
        let _ = pair.standby.ended(LONG);
        pair.standby = pair.site.spawn(pair.standby.host, false);
        pair.protected();
        assert!(pair.primary.runs());
    }
    print_percentiles("kill -9 of the standby to the next reply", gaps);
}

/// [`primary_killed`], 500 times (or as often as fits into `STEADFAST_TEST_SECONDS`).
#[test]
#[ignore = "long"]
fn long_primary_killed() {
    let seconds = std::env::var("STEADFAST_TEST_SECONDS").ok();
    let most = seconds.and_then(|s| s.parse().ok()).unwrap_or(3600);
    kill_primaries("long_primary_killed", 500, Duration::from_secs(most));
}
