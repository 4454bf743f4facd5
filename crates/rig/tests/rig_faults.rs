//! Faults on three simulated servers under a protected Linux with redis, a web server and an open TCP session: after each, clients
//! have lost nothing and were never reset, one server owns the VM, and it is protected again by itself or with one new standby.
//!
//! The table is `steadfast_rig::faults::rows`; the numbers are those of the faults in `docs/testing.md` (where: rig).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Lines, can_run};
use steadfast_rig::faults::rows::ROWS;
use steadfast_rig::faults::{Ending, Row, play};

/// The rows that `./test` plays; all others, with these, are in the long test.
const QUICK: [u32; 4] = [27, 2, 7, 41];

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
    let outcomes = play(&rows, endings, &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
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
#[ignore = "long: another ending of the quick test"]
fn long_rig_faults_guest_panics() {
    faults("long_rig_faults_guest_panics", |_| false, &[Ending::GuestPanics]);
}
