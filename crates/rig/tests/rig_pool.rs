//! A pool of three simulated servers and a witness with ten Linux guests of all classes: a server dies, comes back, another one is
//! drained; nobody types anything in between but what an operator would.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Instant;
use steadfast_rig::artifacts::initramfs::steadfast_program;
use steadfast_rig::failover::Tell;
use steadfast_rig::pool::{Options, play};
use steadfast_rig::tools;

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

#[test]
#[ignore = "long: four servers and ten guests in software emulation"]
fn long_rig_pool_of_ten() {
    if !can_run("long_rig_pool_of_ten") {
        return;
    }
    let report = play(&Options::default(), &mut Lines(Instant::now())).unwrap_or_else(|e| panic!("{e}"));
    println!("{report:?}");
    assert!(report.steps > 0 && report.ft_longest < report.restarted);
}
