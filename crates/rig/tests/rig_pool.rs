//! A pool of three simulated servers and a witness with ten Linux guests of all classes: a server dies, comes back, another one is
//! drained; nobody types anything in between but what an operator would.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Lines, can_run};
use steadfast_rig::pool::{Options, play};

#[test]
#[ignore = "long, and not yet seen passing to its end: after the kill the servers are overloaded (docs/known-problems.md)"]
fn long_rig_pool_of_ten() {
    if !can_run("long_rig_pool_of_ten") {
        return;
    }
    let report = play(&Options::default(), &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    println!("{report:?}");
    assert!(report.steps > 0 && report.ft_longest < report.restarted);
}
