//! The host lease: a host that cannot renew stops its `restart` VMs before anybody may start them elsewhere.
//!
//! ```text
//!   holder   send renewal ---------------> written in the store          holder's clock runs up to `drift` slow
//!            |<------------- ttl --------------->| stop VMs (kill_ms before it, so that they are gone by then)
//!   watcher            sees it renewed |<---- ttl * (1 + 3 drift) + margin ---->| fenced: others may start them
//!                                                                        watcher's clock runs up to `drift` fast
//! ```
//! The holder counts from the moment it *sent* the renewal that succeeded, the watcher from the moment it *saw* it written: sent
//! is before written, written is before seen. No clocks are compared, only spans on each one's own monotonic clock. The clock
//! must go on during suspend (CLOCK_BOOTTIME).
//!
//! **Who stops the VMs.** The deadline is handed to each VM's process, which ends itself when it passes: a frozen or dead daemon
//! cannot keep a VM running beyond it. A host that freezes as a whole runs nothing meanwhile; after it thaws, the first thing a
//! VM's process does is look at its deadline. In between a few instructions of a guest may run: with replicated disks their writes
//! go to a replica of an old term, which is thrown away; on shared storage use a hardware watchdog or a fence agent.
//!
//! `ft` and `checkpoint` VMs need no lease: the arbiter's term decides about their output.

use serde::{Deserialize, Serialize};

/// Settings; all hosts of a pool have the same. Times in ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// How long a lease is good for.
    pub ttl_ms: u64,
    /// A renewal is sent this often.
    pub renew_ms: u64,
    /// How long it may take until the VMs are gone, once they are to be stopped.
    pub kill_ms: u64,
    /// Most that a clock can be wrong in its speed, in millionths. Quartz: 200; 10,000 covers clocks being slewed.
    pub drift_ppm: u32,
    /// Added on the watcher's side.
    pub margin_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ttl_ms: 5_000,
            renew_ms: 1_000,
            kill_ms: 1_000,
            drift_ppm: 10_000,
            margin_ms: 500,
        }
    }
}

impl Settings {
    /// Time after which a watcher that saw no renewal calls the host fenced.
    #[must_use]
    pub fn fence_after_ms(&self) -> u64 {
        let drift = u128::from(self.ttl_ms) * 3 * u128::from(self.drift_ppm) / 1_000_000;
        self.ttl_ms
            .saturating_add(u64::try_from(drift).unwrap_or(u64::MAX))
            .saturating_add(1)
            .saturating_add(self.margin_ms)
    }

    /// What makes no sense together.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn check(&self) -> Result<(), String> {
        let needed = self.kill_ms.saturating_add(self.renew_ms.saturating_mul(2));
        if self.ttl_ms < needed {
            return Err(format!(
                "ttl_ms is {}: with kill_ms and two renewals it must be {needed} at least, or one lost renewal stops all VMs",
                self.ttl_ms
            ));
        }
        if self.drift_ppm > 100_000 {
            return Err("drift_ppm is more than a tenth; no clock is that wrong: lower it".into());
        }
        Ok(())
    }
}

/// What the holder has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Duty {
    /// Nothing.
    Run,
    /// Send a renewal; VMs run.
    Renew,
    /// Stop the `restart` VMs at once. Renewals are sent on; when one succeeds, VMs that the store still gives this host
    /// may be started again, each by its compare-and-swap.
    Stop,
}

/// The holder's half, on the host whose lease it is.
#[derive(Clone, Debug)]
pub struct Holder {
    settings: Settings,
    /// When the last renewal that succeeded was sent.
    held_from_ms: Option<u64>,
    last_sent_ms: Option<u64>,
    stopped: bool,
}

impl Holder {
    /// A host without a lease: nothing may run until one is granted.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self {
            settings,
            held_from_ms: None,
            last_sent_ms: None,
            stopped: true,
        }
    }

    /// A renewal was sent.
    pub fn sent(&mut self, now_ms: u64) {
        self.last_sent_ms = Some(now_ms);
    }

    /// The renewal that was sent at `sent_ms` is written. Answers that come late or out of order never shorten it. A lease that
    /// had run out begins anew only if this renewal is still good.
    pub fn granted(&mut self, sent_ms: u64, now_ms: u64) {
        if self.held_from_ms.is_none_or(|t| t < sent_ms) {
            self.held_from_ms = Some(sent_ms);
        }
        if self.stopped && self.deadline_ms().is_some_and(|d| now_ms < d) {
            self.stopped = false;
        }
    }

    /// When the VMs must begin to stop; to be handed to their processes. None: no lease is held.
    #[must_use]
    pub fn deadline_ms(&self) -> Option<u64> {
        let good = self.settings.ttl_ms.saturating_sub(self.settings.kill_ms);
        self.held_from_ms.map(|t| t.saturating_add(good))
    }

    /// What to do now. Once it said [`Duty::Stop`] it says so until a renewal succeeds.
    pub fn duty(&mut self, now_ms: u64) -> Duty {
        if self.deadline_ms().is_none_or(|d| now_ms >= d) {
            self.stopped = true;
        }
        if self.stopped {
            return Duty::Stop;
        }
        match self.last_sent_ms {
            Some(t) if now_ms.saturating_sub(t) < self.settings.renew_ms => Duty::Run,
            _ => Duty::Renew,
        }
    }

    /// VMs may run.
    #[must_use]
    pub fn may_run(&self, now_ms: u64) -> bool {
        !self.stopped && self.deadline_ms().is_some_and(|d| now_ms < d)
    }
}

/// The watcher's half, on the host that would start the VMs elsewhere. It starts to count when it first looks, so a new leader
/// is never too early.
#[derive(Clone, Debug)]
pub struct Watcher {
    settings: Settings,
    seen: Option<(u64, u64)>,
}

impl Watcher {
    /// Knows nothing yet.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self { settings, seen: None }
    }

    /// A linearizable read of the lease's record: its renewal counter, and when the *answer* arrived.
    pub fn read(&mut self, counter: u64, now_ms: u64) {
        if self.seen.is_none_or(|(c, _)| c != counter) {
            self.seen = Some((counter, now_ms));
        }
    }

    /// Time since the last renewal was seen.
    #[must_use]
    pub fn age_ms(&self, now_ms: u64) -> Option<u64> {
        self.seen.map(|(_, t)| now_ms.saturating_sub(t))
    }

    /// The host's VMs cannot be running any more. `read_ms`: when the latest read of the record, which still showed the old
    /// counter, was *sent*: an older one proves nothing.
    #[must_use]
    pub fn over(&self, read_ms: u64) -> bool {
        let Some((_, seen)) = self.seen else {
            return false;
        };
        read_ms.saturating_sub(seen) > self.settings.fence_after_ms()
    }
}
