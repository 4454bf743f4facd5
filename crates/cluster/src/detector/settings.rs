//! Settings of the detector, and the bound on detection time that follows from them.

use serde::{Deserialize, Serialize};

/// All times in ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Interval of heartbeats, on every path.
    pub heartbeat_ms: u64,
    /// The observer looks at its clocks at least so often.
    pub tick_ms: u64,
    /// A path is never called lost sooner.
    pub path_timeout_min_ms: u64,
    /// A path is called lost at the latest then, however irregular its heartbeats were.
    pub path_timeout_max_ms: u64,
    /// Patience beyond the mean interval, in multiples of its mean deviation.
    pub deviations: u32,
    /// All paths must have been lost for so long before the observer calls the peer silent.
    pub confirm_ms: u64,
    /// A peer that says it is starved gets so many times the patience.
    pub starved_factor: u32,
    /// A step of the observer longer than this means that it did not run; the step counts for nothing.
    pub step_cap_ms: u64,
    /// After that, nothing counts for so long: what has arrived meanwhile is read first.
    pub settle_ms: u64,
    /// CPU, memory or I/O pressure (PSI "some", 10 s average) above this is starvation, in thousandths.
    pub pressure_permille: u32,
    /// Time stolen by a hypervisor above this is starvation, in thousandths.
    pub steal_permille: u32,
    /// Views of observers older than this do not count.
    pub view_max_ms: u64,
    /// A lease that was seen renewed within this time proves that its host is alive. Below `path_timeout_min_ms + confirm_ms`,
    /// so that the last renewal of a host that died does not delay the verdict; above two renewals.
    pub lease_fresh_ms: u64,
    /// A virtual CPU that is neither halted nor gets on for so long is hung.
    pub vcpu_hung_ms: u64,
    /// A guest agent that was heard and is silent for so long means a hung guest.
    pub agent_silent_ms: u64,
    /// A disk request in flight for so long is a disk fault.
    pub disk_hung_ms: u64,
    /// A disk whose slowest request stays above this ...
    pub disk_slow_ms: u64,
    /// ... for so long is a disk fault.
    pub disk_slow_for_ms: u64,
    /// A disk fault is over when nothing was seen for so long.
    pub disk_well_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat_ms: 200,
            tick_ms: 100,
            path_timeout_min_ms: 1_000,
            path_timeout_max_ms: 3_000,
            deviations: 6,
            confirm_ms: 1_500,
            starved_factor: 3,
            step_cap_ms: 400,
            settle_ms: 1_000,
            pressure_permille: 600,
            steal_permille: 300,
            view_max_ms: 2_000,
            lease_fresh_ms: 2_200,
            vcpu_hung_ms: 10_000,
            agent_silent_ms: 30_000,
            disk_hung_ms: 10_000,
            disk_slow_ms: 1_000,
            disk_slow_for_ms: 10_000,
            disk_well_ms: 60_000,
        }
    }
}

impl Settings {
    /// For simulated servers and others that are slow and jittery: everything takes its time.
    #[must_use]
    pub fn slow() -> Self {
        Self {
            heartbeat_ms: 500,
            tick_ms: 250,
            path_timeout_min_ms: 4_000,
            path_timeout_max_ms: 10_000,
            confirm_ms: 4_000,
            step_cap_ms: 1_500,
            settle_ms: 2_000,
            view_max_ms: 5_000,
            lease_fresh_ms: 6_000,
            vcpu_hung_ms: 60_000,
            agent_silent_ms: 120_000,
            ..Self::default()
        }
    }

    /// Longest time from a host's death to the verdict "dead", if at least one observer is not starved: the last heartbeat's
    /// age, the longest patience for a path, the confirmation, two ticks (one of the path, one of the peer), and the age of
    /// a view. With a peer that had called itself starved, patience counts `starved_factor` times.
    ///
    /// Defaults: 200 + 3000 + 1500 + 200 + 2000 = 6.9 s at the worst; 1.0 s patience and fresh views make it 3 s as a rule.
    /// A standby of `ft` does not wait for this: it suspects by itself, and the arbiter decides.
    #[must_use]
    pub fn dead_bound_ms(&self, starved: bool) -> u64 {
        let factor = if starved {
            u64::from(self.starved_factor)
        } else {
            1
        };
        self.heartbeat_ms
            .saturating_add(self.path_timeout_max_ms.saturating_mul(factor))
            .saturating_add(self.confirm_ms)
            .saturating_add(self.tick_ms.saturating_mul(2))
            .saturating_add(self.view_max_ms)
    }

    /// What makes no sense together, with the way out.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn check(&self) -> Result<(), String> {
        let three = self.heartbeat_ms.saturating_mul(3);
        if self.path_timeout_min_ms < three {
            return Err(format!(
                "path_timeout_min_ms is {}, less than three heartbeats ({three}): one lost frame would count as a lost path; raise it",
                self.path_timeout_min_ms
            ));
        }
        if self.path_timeout_max_ms < self.path_timeout_min_ms {
            return Err("path_timeout_max_ms is below path_timeout_min_ms; raise it".into());
        }
        if self.lease_fresh_ms > self.path_timeout_min_ms.saturating_add(self.confirm_ms) {
            return Err("lease_fresh_ms is above path_timeout_min_ms + confirm_ms: it would delay the verdict; lower it".into());
        }
        if self.step_cap_ms < self.tick_ms.saturating_mul(2) {
            return Err(
                "step_cap_ms is less than two ticks: ordinary steps would count as starvation; raise it"
                    .into(),
            );
        }
        if self.heartbeat_ms == 0 || self.tick_ms == 0 || self.starved_factor == 0 {
            return Err("heartbeat_ms, tick_ms and starved_factor must be above zero".into());
        }
        Ok(())
    }
}
