//! The main job, played on three simulated servers: a protected Linux with a real service survives the death of its server, and
//! of the next one, and its clients notice a short wait.
//!
//! ```text
//!   s1 starts it ── protect on s2 ── kill s1 ──> s2 goes on ── s1 is powered on, protect on s3 ── kill s2 ──> s3 goes on
//!                                                                    protect on s1 ── audit: writes, disks, processes
//! ```
//! redis writers, a web client and a TCP session work all the time. What does not hold is an error: [`play`] comes back with a
//! [`Report`] only if nothing was lost, repeated or reset, if each server took over exactly once and when it should, and if
//! the replicas are equal at the end.

mod measure;
mod steps;

pub use measure::{Failover, Protection};
pub(crate) use steps::{crashes, leftovers};

use crate::error::{Result, RigError};
use crate::load::{Audited, LoadOptions};
use crate::protected::Plan;
use std::net::Ipv4Addr;
use std::time::Duration;

/// Hears how the play goes.
pub trait Tell {
    /// A new part begins.
    fn title(&mut self, text: &str);
    /// What is happening now.
    fn doing(&mut self, text: &str);
    /// That has happened.
    fn done(&mut self, text: &str);
    /// More about it.
    fn more(&mut self, text: &str);
}

/// How to play it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The VM, and how fast its standby suspects.
    pub plan: Plan,
    /// What its clients do.
    pub load: LoadOptions,
    /// How long it is looked at in each state.
    pub look: Duration,
    /// Megabytes of memory of each server.
    pub server_mib: u32,
    /// Where the logs of the VM's processes are copied to, with more in them.
    pub logs: Option<std::path::PathBuf>,
    /// Whether the store's leader dies with the first server: then the grant waits for an election.
    pub leader_dies: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            plan: Plan {
                name: "web".to_string(),
                address: Ipv4Addr::new(10, 90, 0, 101),
                mac: [0x52, 0x54, 0, 0x5f, 0, 1],
                memory_mib: 96,
                // It checks its own memory all the time; its ticks show on the console.
                words: "mini.mem=8 mini.mem_rate=50 mini.tick_ms=1000".to_string(),
                suspect: SUSPECT,
            },
            load: LoadOptions::default(),
            look: Duration::from_secs(8),
            server_mib: 800,
            logs: None,
            leader_dies: false,
        }
    }
}

/// Simulated servers share few real CPUs, and each is one thread of software emulation: one that is well can be silent for
/// hundreds of milliseconds. A real host's default is a tenth of this.
pub const SUSPECT: Duration = Duration::from_millis(1500);

/// What was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// From power-on to the first answer of every service.
    pub boot: Duration,
    /// Each time that a standby was made: on s2, s3, and s1 again.
    pub protections: Vec<Protection>,
    /// Each time that a server was killed.
    pub failovers: Vec<Failover>,
    /// What the clients did, audited at the end.
    pub audited: Audited,
}

/// Plays it.
///
/// # Errors
/// Whatever did not hold, or could not be set up.
pub fn play(options: &Options, tell: &mut dyn Tell) -> Result<Report> {
    steps::play(options, tell)
}

pub(crate) fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(RigError::Unknown(otherwise()))
    }
}

/// A time in milliseconds, for people.
pub fn ms(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}
