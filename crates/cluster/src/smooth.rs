//! Smoothing of measured loads, kept by the node and passed in: an exponential mean, and since when a host has been hot.

use crate::model::{BalanceSettings, HostLoad, HostRecord, VmLoad};

/// One smoothed number.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, value: u64, weight: f64) -> u64 {
        let v = value as f64;
        let next = self.0.map_or(v, |old| old + (v - old) * weight);
        self.0 = Some(next);
        next.max(0.0) as u64
    }
}

/// How much of a new sample enters a mean with this half life.
fn weight(step_ms: u64, half_life_ms: u64) -> f64 {
    1.0 - 0.5f64.powf(step_ms as f64 / half_life_ms.max(1) as f64)
}

/// Smooths one VM.
#[derive(Clone, Debug)]
pub struct VmSmoother {
    half_life_ms: u64,
    last_ms: Option<u64>,
    parts: [Mean; 4],
}

impl VmSmoother {
    /// With this half life; 30 s is a good one.
    #[must_use]
    pub fn new(half_life_ms: u64) -> Self {
        Self {
            half_life_ms,
            last_ms: None,
            parts: [Mean::default(); 4],
        }
    }

    /// Takes a sample and returns the mean.
    pub fn sample(&mut self, now_ms: u64, x: &VmLoad) -> VmLoad {
        let step = self.last_ms.map_or(0, |t| now_ms.saturating_sub(t));
        self.last_ms = Some(now_ms);
        let w = weight(step, self.half_life_ms);
        VmLoad {
            cpu_milli: self.parts[0].add(x.cpu_milli, w),
            memory_bytes: self.parts[1].add(x.memory_bytes, w),
            dirty_bytes_per_s: self.parts[2].add(x.dirty_bytes_per_s, w),
            net_bytes_per_s: self.parts[3].add(x.net_bytes_per_s, w),
        }
    }
}

/// Smooths one host.
#[derive(Clone, Debug)]
pub struct HostSmoother {
    half_life_ms: u64,
    last_ms: Option<u64>,
    parts: [Mean; 3],
    hot_since_ms: Option<u64>,
}

impl HostSmoother {
    /// With this half life; 30 s is a good one.
    #[must_use]
    pub fn new(half_life_ms: u64) -> Self {
        Self {
            half_life_ms,
            last_ms: None,
            parts: [Mean::default(); 3],
            hot_since_ms: None,
        }
    }

    /// Takes a sample (its `hot_since_ms` is not looked at) and returns the mean, with since when it has been hot.
    pub fn sample(&mut self, now_ms: u64, x: &HostLoad, host: &HostRecord, b: &BalanceSettings) -> HostLoad {
        let step = self.last_ms.map_or(0, |t| now_ms.saturating_sub(t));
        self.last_ms = Some(now_ms);
        let w = weight(step, self.half_life_ms);
        let mut mean = HostLoad {
            cpu_milli: self.parts[0].add(x.cpu_milli, w),
            memory_bytes: self.parts[1].add(x.memory_bytes, w),
            net_bytes_per_s: self.parts[2].add(x.net_bytes_per_s, w),
            hot_since_ms: None,
        };
        if permille(&mean, host) >= u64::from(b.hot_permille) {
            self.hot_since_ms.get_or_insert(now_ms);
        } else {
            self.hot_since_ms = None;
        }
        mean.hot_since_ms = self.hot_since_ms;
        mean
    }
}

/// The highest of CPU, memory and network, in thousandths of what the host has.
#[must_use]
pub fn permille(load: &HostLoad, host: &HostRecord) -> u64 {
    let part = |used: u64, has: u64| used.saturating_mul(1000) / has.max(1);
    part(load.cpu_milli, host.capacity.cpu_milli)
        .max(part(load.memory_bytes, host.capacity.memory_bytes))
        .max(part(load.net_bytes_per_s, host.link()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_not_hot_and_a_long_load_is() {
        let host = crate::synthetic::host("h").unwrap().record;
        let b = BalanceSettings::default();
        let mut s = HostSmoother::new(30_000);
        let load = |permille: u64| HostLoad {
            cpu_milli: host.capacity.cpu_milli * permille / 1000,
            ..HostLoad::default()
        };
        let mut at = |t: u64, p: u64| s.sample(t * 1000, &load(p), &host, &b).hot_since_ms;
        for t in 0..100 {
            assert_eq!(at(t, 300), None);
        }
        for t in 100..105 {
            assert_eq!(at(t, 1000), None, "five seconds are a spike");
        }
        let mut since = None;
        for t in 105..300 {
            since = at(t, 1000).or(since);
        }
        assert!((140_000..175_000).contains(&since.unwrap()), "{since:?}");
        let mut v = VmSmoother::new(30_000);
        v.sample(0, &VmLoad::default());
        let full = VmLoad {
            cpu_milli: 1000,
            ..VmLoad::default()
        };
        let half = v.sample(30_000, &full).cpu_milli;
        assert!((499..=501).contains(&half), "{half}");
    }
}
