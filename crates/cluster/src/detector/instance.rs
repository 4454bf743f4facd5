//! What the daemon of a host sees of an instance on it: process, virtual CPUs, guest, disks.

use super::{FailureClass, Settings};
use serde::{Deserialize, Serialize};

/// The process of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Process {
    /// It is there.
    #[default]
    Alive,
    /// It ended although nobody asked.
    Gone,
}

/// What the disks did since the last sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSample {
    /// Requests that failed.
    pub errors: u32,
    /// The slowest request that ended, ms.
    pub slowest_ms: u64,
    /// Age of the oldest request in flight, ms.
    pub in_flight_ms: u64,
}

/// A sample, taken every tick or so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSample {
    /// The process.
    pub process: Process,
    /// Something that grows while a virtual CPU gets on: exits, or time in the guest. The sum over all.
    pub progress: u64,
    /// All virtual CPUs are halted (an idle guest makes no progress and is well), or stopped on purpose.
    pub idle: bool,
    /// The guest's kernel panicked or triple-faulted.
    pub panicked: bool,
    /// The guest's watchdog barked.
    pub watchdog: bool,
    /// Heartbeats of the guest's agent so far; none: it was never heard.
    pub agent_beats: Option<u64>,
    /// The disks.
    pub disk: DiskSample,
}

/// What follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// The instance is down, or as good as down.
    pub failed: Option<FailureClass>,
    /// Its disk answers late or with errors; it runs on.
    pub disk_fault: bool,
}

/// Watches one instance. All times are the host's waking time ([`super::OwnClock`]): while the host itself is starved, nothing
/// is hung.
#[derive(Clone, Debug)]
pub struct InstanceWatch {
    progress: u64,
    progress_ms: u64,
    agent: Option<(u64, u64)>,
    slow_since_ms: Option<u64>,
    disk_bad_ms: Option<u64>,
}

impl InstanceWatch {
    /// From its start.
    #[must_use]
    pub const fn new(awake_ms: u64) -> Self {
        Self {
            progress: 0,
            progress_ms: awake_ms,
            agent: None,
            slow_since_ms: None,
            disk_bad_ms: None,
        }
    }

    /// Takes a sample.
    pub fn sample(&mut self, awake_ms: u64, x: &InstanceSample, s: &Settings) -> Findings {
        if x.idle || x.progress != self.progress {
            self.progress = x.progress;
            self.progress_ms = awake_ms;
        }
        if let Some(beats) = x.agent_beats
            && self.agent.is_none_or(|(b, _)| b != beats)
        {
            self.agent = Some((beats, awake_ms));
        }
        let stuck = awake_ms.saturating_sub(self.progress_ms) > s.vcpu_hung_ms;
        let agent_silent = self
            .agent
            .is_some_and(|(_, t)| awake_ms.saturating_sub(t) > s.agent_silent_ms);
        let failed = if x.process == Process::Gone {
            Some(FailureClass::ProcessDied)
        } else if x.panicked {
            Some(FailureClass::GuestCrashed)
        } else if x.watchdog || stuck || agent_silent {
            Some(FailureClass::GuestHung)
        } else {
            None
        };
        Findings {
            failed,
            disk_fault: self.disk(awake_ms, x.disk, s),
        }
    }

    fn disk(&mut self, awake_ms: u64, d: DiskSample, s: &Settings) -> bool {
        if d.slowest_ms.max(d.in_flight_ms) > s.disk_slow_ms {
            self.slow_since_ms.get_or_insert(awake_ms);
        } else {
            self.slow_since_ms = None;
        }
        let slow = self
            .slow_since_ms
            .is_some_and(|t| awake_ms.saturating_sub(t) >= s.disk_slow_for_ms);
        if d.errors > 0 || d.in_flight_ms > s.disk_hung_ms || slow {
            self.disk_bad_ms = Some(awake_ms);
        }
        self.disk_bad_ms
            .is_some_and(|t| awake_ms.saturating_sub(t) < s.disk_well_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(mut f: impl FnMut(u64) -> InstanceSample) -> Vec<(u64, Findings)> {
        let s = Settings::default();
        let mut w = InstanceWatch::new(0);
        let mut out = Vec::new();
        for t in (0..200_000).step_by(100) {
            let found = w.sample(t, &f(t), &s);
            if out.last().is_none_or(|(_, last)| *last != found) {
                out.push((t, found));
            }
        }
        out
    }

    fn failed(f: impl FnMut(u64) -> InstanceSample) -> Option<(u64, FailureClass)> {
        watch(f).into_iter().find_map(|(t, x)| Some((t, x.failed?)))
    }

    #[test]
    fn each_class_has_its_evidence() {
        let well = |t: u64| InstanceSample {
            progress: t,
            ..InstanceSample::default()
        };
        assert_eq!(failed(well), None);
        let idle = |_| InstanceSample {
            idle: true,
            ..InstanceSample::default()
        };
        assert_eq!(failed(idle), None, "an idle guest is well");
        let stuck = |t: u64| well(t.min(5_000));
        let (at, class) = failed(stuck).unwrap();
        assert!(
            class == FailureClass::GuestHung && (15_000..15_300).contains(&at),
            "{at}"
        );
        let agent = |t: u64| InstanceSample {
            agent_beats: Some(t.min(10_000)),
            ..well(t)
        };
        assert_eq!(failed(agent).unwrap().1, FailureClass::GuestHung);
        let panics = |t: u64| InstanceSample {
            panicked: t >= 700,
            ..well(t)
        };
        assert_eq!(failed(panics), Some((700, FailureClass::GuestCrashed)));
        let barks = |t: u64| InstanceSample {
            watchdog: t >= 700,
            ..well(t)
        };
        assert_eq!(failed(barks), Some((700, FailureClass::GuestHung)));
        let gone = |t: u64| InstanceSample {
            process: if t < 900 { Process::Alive } else { Process::Gone },
            panicked: true,
            ..well(t)
        };
        assert_eq!(failed(gone), Some((0, FailureClass::GuestCrashed)));
    }

    #[test]
    fn disk_faults_by_error_hang_and_slowness_and_their_end() {
        let with = |d: fn(u64) -> DiskSample| {
            watch(move |t| InstanceSample {
                progress: t,
                disk: d(t),
                ..InstanceSample::default()
            })
            .into_iter()
            .map(|(t, f)| (t, f.disk_fault))
            .collect::<Vec<_>>()
        };
        let error = with(|t| DiskSample {
            errors: u32::from(t == 1_000),
            ..DiskSample::default()
        });
        assert_eq!(error, [(0, false), (1_000, true), (61_000, false)]);
        let hung = with(|t| DiskSample {
            in_flight_ms: t.saturating_sub(5_000),
            ..DiskSample::default()
        });
        assert_eq!(hung[1].0, 15_100, "{hung:?}");
        let slow = with(|t| DiskSample {
            slowest_ms: if (20_000..40_000).contains(&t) { 2_000 } else { 5 },
            ..DiskSample::default()
        });
        assert_eq!(slow[1].0, 30_000, "{slow:?}");
        let blip = with(|t| DiskSample {
            slowest_ms: if t % 10_000 == 0 { 2_000 } else { 5 },
            ..DiskSample::default()
        });
        assert_eq!(blip, [(0, false)], "a single slow request is no fault");
    }
}
