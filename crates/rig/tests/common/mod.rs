//! What the plays on simulated servers need as tests.

#![allow(dead_code)]

use std::time::Instant;
use steadfast_rig::artifacts::initramfs::steadfast_program;
use steadfast_rig::failover::Tell;
use steadfast_rig::tools;

/// Whether simulated servers with a client and our program can run here; says loudly when not.
pub fn can_run(test: &str) -> bool {
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

/// Tells a play into the test's output, with times.
pub struct Lines(Instant);

impl Lines {
    /// Times are since now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

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
