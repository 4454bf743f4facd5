//! A pool on simulated servers: three that run VMs and a witness, ten Linux guests of all classes, and nobody who types anything
//! when a server dies.
//!
//! ```text
//! init on s1, join on s2, s3, s4 (witness) ── ten VMs ── the axe ──> ft go on, restart are booted elsewhere, all protected again
//!        ── the server is powered on ──> used again
//! ```
//! Smaller plays: upkeep (a service fails and is restarted by its agent; each server is emptied for another build of the program and used
//! again), a hot host that is relieved; faults of hosts, one after another, under an `ft` VM with a disk;
//! and an hour of load on servers that are well.
//!
//! Clients hold a TCP session to each `ft` VM all the time: a step lost, done twice or a reset is an error. What does not hold is
//! an error; what did is in the [`Report`], with its times.

mod balance;
mod faults;
mod host;
mod hour;
mod steps;
mod upkeep;

pub use host::PoolHost;

use crate::error::Result;
use crate::failover::Tell;
use std::time::Duration;

/// A part of a play, after all VMs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The service in an `ft` VM fails, and its agent restarts it.
    Service,
    /// The standby of one is tried.
    Drill,
    /// A server loses its power.
    Kill,
    /// It is powered on again.
    Return,
    /// A server is emptied.
    Drain,
    /// It is used again.
    Resume,
    /// All hosts get another build of the program, one after the other.
    Upgrade,
    /// Faults of hosts, one after another.
    Faults,
    /// All VMs are on one server and busy, and the pool may move them.
    Balance,
    /// Load that comes and goes on servers that are well, for so many minutes.
    Hour(u64),
}

/// How to play it.
#[derive(Clone, Debug)]
pub struct Options {
    /// VMs of class `ft`, `restart`, `checkpoint` and `none`.
    pub vms: [usize; 4],
    /// Servers that run VMs.
    pub servers: usize,
    /// Whether there is a witness as well.
    pub witness: bool,
    /// Megabytes of memory of each server.
    pub server_mib: u32,
    /// Whether an `ft` VM has a disk; one VM can.
    pub disk: bool,
    /// Whether the servers have watchdog devices.
    pub watchdog: bool,
    /// What happens.
    pub acts: Vec<Act>,
}

impl Options {
    /// Ten VMs of all classes. Three that are mirrored, and as many copies of them, are what three servers of one emulated CPU can carry beside
    /// their members of the store and seven other guests.
    #[must_use]
    pub fn ten() -> Self {
        Options {
            vms: [2, 4, 1, 3],
            servers: 3,
            witness: true,
            server_mib: 2000,
            disk: false,
            watchdog: false,
            acts: vec![Act::Drill, Act::Kill, Act::Return],
        }
    }

    /// What an operator does with a pool that is well.
    #[must_use]
    pub fn upkeep() -> Self {
        Options {
            vms: [2, 0, 0, 0],
            servers: 3,
            witness: false,
            server_mib: 1600,
            disk: false,
            watchdog: false,
            acts: vec![Act::Service, Act::Drain, Act::Resume, Act::Upgrade],
        }
    }

    /// A hot host is relieved.
    #[must_use]
    pub fn balance() -> Self {
        Options {
            vms: [0, 0, 0, 3],
            servers: 2,
            witness: true,
            server_mib: 1200,
            disk: false,
            watchdog: false,
            acts: vec![Act::Balance],
        }
    }

    /// Load on servers that are well, for so many minutes.
    #[must_use]
    pub fn hour(minutes: u64) -> Self {
        Options {
            vms: [2, 0, 0, 0],
            servers: 3,
            witness: false,
            server_mib: 1400,
            disk: false,
            watchdog: false,
            acts: vec![Act::Hour(minutes)],
        }
    }

    /// Faults that an `ft` VM with a disk survives, most of them where it is. A `restart` VM is beside it.
    #[must_use]
    pub fn faults() -> Self {
        Options {
            vms: [1, 1, 0, 0],
            servers: 3,
            witness: false,
            server_mib: 1400,
            disk: true,
            watchdog: true,
            acts: vec![Act::Faults],
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
    /// From a service that failed to its health, restarted by the agent.
    pub service: Duration,
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
    /// From the word that VMs may be moved until one had been.
    pub relieved: Duration,
    /// From `host drain` to an empty host.
    pub drained: Duration,
    /// The longest wait of a session during the drain.
    pub drain_longest: Duration,
    /// The longest that an `ft` VM had no standby during the drain, as its availability says.
    pub drain_degraded: Duration,
    /// From `pool upgrade` to three hosts that run the other build and are in use.
    pub upgraded: Duration,
    /// The longest wait of a session during the upgrade.
    pub upgrade_longest: Duration,
    /// The longest that an `ft` VM had no standby during the upgrade.
    pub upgrade_degraded: Duration,
    /// How long there was load on servers that are well.
    pub hour: Duration,
    /// The longest wait of a session meanwhile.
    pub hour_longest: Duration,
    /// The longest that an `ft` VM had no standby meanwhile.
    pub hour_degraded: Duration,
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
