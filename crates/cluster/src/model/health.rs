//! Health of applications as the operator writes it down; the state machine over it is [`crate::health`].

use serde::{Deserialize, Serialize};

/// How a service is checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// A TCP connection to the guest is accepted.
    Tcp {
        /// `address:port` of the guest.
        to: String,
    },
    /// An HTTP GET answers with 2xx or 3xx.
    Http {
        /// URL in the guest.
        url: String,
    },
    /// A command in the guest, over vsock by its agent, exits with 0.
    Command {
        /// Program and arguments.
        argv: Vec<String>,
    },
    /// The application says over vsock that it is well, again and again.
    Heartbeat {
        /// It has done so within so long, ms.
        within_ms: u64,
    },
}

/// What to do about a service that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remedy {
    /// Restart the service in the guest, by the agent.
    RestartService,
    /// Reboot the VM.
    RebootVm,
    /// Promote the standby. Helps when the host is at fault; the guest's memory goes along.
    RollOver,
    /// Only tell people.
    Alert,
}

/// One rung of the ladder: a remedy and how often it is tried before the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rung {
    /// What to do.
    pub remedy: Remedy,
    /// How often, at least once.
    pub tries: u8,
}

/// A policy. Times in ms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthPolicy {
    /// The checks; all must succeed.
    pub checks: Vec<Check>,
    /// Time between two rounds.
    pub interval_ms: u64,
    /// A round that takes longer has failed.
    pub timeout_ms: u64,
    /// Failed rounds in a row that make the service failed.
    pub failures: u8,
    /// Good rounds in a row that make it healthy again.
    pub successes: u8,
    /// After a start or a remedy, failures do not count for so long (until the first success).
    pub grace_ms: u64,
    /// What to do, step by step.
    pub ladder: Vec<Rung>,
    /// The command in the guest (program and arguments) that restarts the service. Without it that remedy is left out.
    pub restart: Vec<String>,
    /// Pause before the second remedy; doubles for each further one.
    pub backoff_ms: u64,
    /// Longest pause.
    pub backoff_max_ms: u64,
    /// Remedies (alerts do not count) within `window_ms`; more are not made, people are told.
    pub remedies_max: u8,
    /// The window of that limit, and the time of health after which the ladder starts from its foot.
    pub window_ms: u64,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        let rung = |remedy, tries| Rung { remedy, tries };
        Self {
            checks: Vec::new(),
            interval_ms: 5_000,
            timeout_ms: 3_000,
            failures: 3,
            successes: 2,
            grace_ms: 60_000,
            ladder: vec![
                rung(Remedy::RestartService, 2),
                rung(Remedy::RebootVm, 2),
                rung(Remedy::RollOver, 1),
                rung(Remedy::Alert, 1),
            ],
            restart: Vec::new(),
            backoff_ms: 10_000,
            backoff_max_ms: 600_000,
            remedies_max: 8,
            window_ms: 3_600_000,
        }
    }
}
