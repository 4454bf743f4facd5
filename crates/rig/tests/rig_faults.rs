//! Faults on three simulated servers under a protected Linux with redis, a web server and an open TCP session: after each, clients
//! have lost nothing and were never reset, one server owns the VM, and it is protected again by itself or with one new standby.
//!
//! The table is `steadfast_rig::faults::rows`; the numbers are those of the faults in `docs/testing.md` (where: rig).

#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Instant;
use steadfast_rig::artifacts::initramfs::steadfast_program;
use steadfast_rig::failover::Tell;
use steadfast_rig::faults::rows::ROWS;
use steadfast_rig::faults::{Ending, Row, play};
use steadfast_rig::tools;

/// The rows that `./test` plays; all others, with these, are in the long test.
const QUICK: [u32; 8] = [27, 26, 28, 2, 7, 22, 41, 11];

fn can_run(test: &str) -> bool {
    // SAFETY: no memory is passed, it cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let why = if !tools::qemu_present() {
        "qemu-system-x86_64 is not installed; run `steadfast-rig setup`"
    } else if !root {
        "a client on the client switch takes root"
    } else if steadfast_program().is_none() {
        "the program steadfast is not built; run `cargo build --release -p steadfast`"
    } else {
        return true;
    };
    println!("SKIPPED: {test}: {why}");
    false
}

/// Into the test's output, with times.
struct Lines(Instant);

impl Tell for Lines {
    fn title(&mut self, text: &str) {
        println!("--- {text}");
    }
    fn doing(&mut self, _: &str) {}
    fn done(&mut self, text: &str) {
        println!("{:6.1} s  {text}", self.0.elapsed().as_secs_f64());
    }
    fn more(&mut self, text: &str) {
        println!("          {text}");
    }
}

fn faults(test: &str, wanted: impl Fn(&Row) -> bool, endings: &[Ending]) {
    if !can_run(test) {
        return;
    }
    // Some rows alone, to look at: STEADFAST_FAULT=22,23.
    let only = std::env::var("STEADFAST_FAULT").ok();
    let chosen = |r: &Row| {
        only.as_ref()
            .map(|o| o.split(',').any(|n| n == r.number.to_string()))
    };
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|r| chosen(r).unwrap_or_else(|| wanted(r)))
        .collect();
    let outcomes = play(&rows, endings, &mut Lines(Instant::now())).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(outcomes.len(), rows.len());
}

#[test]
fn rig_faults_one_after_another() {
    faults(
        "rig_faults_one_after_another",
        |r| QUICK.contains(&r.number),
        &[Ending::StandbyReturns],
    );
}

#[test]
#[ignore = "long: every row of the table"]
fn long_rig_faults_all() {
    faults("long_rig_faults_all", |_| true, &[Ending::StandbyReturns]);
}

#[test]
#[ignore = "long: the other order of the quick test's power loss"]
fn long_rig_faults_primary_returns() {
    faults(
        "long_rig_faults_primary_returns",
        |_| false,
        &[Ending::PrimaryReturns],
    );
}

#[test]
#[ignore = "long, and known to fail on a busy machine: the reset stalls the primary, its standby takes over (docs/known-problems.md)"]
fn long_rig_faults_guest_panics() {
    faults("long_rig_faults_guest_panics", |_| false, &[Ending::GuestPanics]);
}
