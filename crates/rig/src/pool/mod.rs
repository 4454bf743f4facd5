//! A pool on simulated servers: three that run VMs and a witness, ten Linux guests of all classes, and nobody who types anything
//! when a server dies.
//!
//! ```text
//! init on s1, join on s2, s3, s4 (witness) ── ten VMs ── the axe ──> ft go on, restart are booted elsewhere, all protected again
//!        ── the server is powered on ──> used again ── drain a server under load ──> empty, nobody noticed
//! ```
//! Clients hold a TCP session to each `ft` VM all the time: a step lost, done twice or a reset is an error. What does not hold is
//! an error; what did is in the [`Report`], with its times.

mod host;
mod steps;

pub use host::PoolHost;

use crate::error::Result;
use crate::failover::Tell;
use std::time::Duration;

/// How to play it.
#[derive(Clone, Debug)]
pub struct Options {
    /// VMs of class `ft`, `restart`, `checkpoint` and `none`.
    pub vms: [usize; 4],
    /// Megabytes of memory of each server.
    pub server_mib: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            vms: [4, 3, 1, 2],
            server_mib: 2000,
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// From the first `pool init` to four hosts that are up.
    pub formed: Duration,
    /// From the first `vm create` to ten VMs that run, protected where they shall be.
    pub placed: Duration,
    /// A drill of one of them.
    pub drill: Duration,
    /// The server that was killed, and how many VMs of each class ran there.
    pub killed: (String, [usize; 4]),
    /// The longest silence of an `ft` VM's session.
    pub ft_longest: Duration,
    /// From the kill until every `restart` VM answered.
    pub restarted: Duration,
    /// From the kill until everything that shall be protected was.
    pub protected: Duration,
    /// From power-on until the pool said that all is well.
    pub returned: Duration,
    /// From `host drain` to an empty host.
    pub drained: Duration,
    /// The longest wait of a session during the drain.
    pub drain_longest: Duration,
    /// The longest that an `ft` VM had no standby during the drain, as its availability says.
    pub drain_degraded: Duration,
    /// Steps of all sessions.
    pub steps: u64,
}

/// Plays it.
///
/// # Errors
/// Whatever did not hold, or could not be set up.
pub fn play(options: &Options, tell: &mut dyn Tell) -> Result<Report> {
    steps::play(options, tell)
}
