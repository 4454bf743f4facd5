//! A pool of three simulated servers and a witness with ten Linux guests of all classes: a server dies, comes back, another one is
//! drained; nobody types anything in between but what an operator would.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Lines, can_run};
use steadfast_rig::pool::{Options, play};

/// Ten VMs of all classes: a drill, a server is killed, it comes back; nobody types anything.
#[test]
fn long_rig_pool_of_ten() {
    if !can_run("long_rig_pool_of_ten") {
        return;
    }
    let report = play(&Options::ten(), &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    println!("{report:?}");
    assert!(report.steps > 0 && report.ft_longest < report.restarted);
}

/// Drain and rolling upgrade under load: no session breaks, nobody is without a standby for longer than the switch.
#[test]
fn long_rig_pool_upkeep() {
    if !can_run("long_rig_pool_upkeep") {
        return;
    }
    let report = play(&Options::upkeep(), &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    println!("{report:?}");
    assert!(report.steps > 0);
}

/// Busy VMs on one server, and another one that is idle: one of them is moved there, by measured loads, and nothing goes back and forth.
#[test]
fn long_rig_pool_balance() {
    if !can_run("long_rig_pool_balance") {
        return;
    }
    let report = play(&Options::balance(), &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    println!("{report:?}");
    assert!(report.relieved > std::time::Duration::ZERO);
}

/// Faults of hosts, one after another: an `ft` VM with a disk goes on where it is, and the pool is well again by itself.
#[test]
fn long_rig_pool_faults() {
    if !can_run("long_rig_pool_faults") {
        return;
    }
    let report = play(&Options::faults(), &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    assert!(report.steps > 0);
}

/// An hour of load that comes and goes on slow servers: nobody takes a VM over, and no host counts as dead (I7). `STEADFAST_MINUTES`: another
/// time.
#[test]
fn long_rig_pool_hour() {
    if !can_run("long_rig_pool_hour") {
        return;
    }
    let minutes = std::env::var("STEADFAST_MINUTES").map_or(60, |m| m.parse().unwrap());
    let report = play(&Options::hour(minutes), &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    println!("{report:?}");
    assert!(report.steps > 0);
}
