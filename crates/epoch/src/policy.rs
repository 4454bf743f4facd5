//! When to cut: a pure function, adaptive, with no timer of its own.
//!
//! - Soon after output: a reply waits for one cut, one transfer and one acknowledgement. A short coalescing
//!   delay lets a burst share one cut; it is a share of what a cut costs, so it shrinks where cuts are cheap.
//! - A flush alone is no hurry: it was done at once for the guest, and nobody outside knows of it before output says so. It is cut within the
//!   maximum interval, also of a VM that is idle otherwise.
//! - When much is dirty: the record should not grow past what the link carries in one interval.
//! - At a maximum interval, which grows (backs off) while the VM changes little of its memory.
//! - Never faster than cuts cost: the pause may take at most a set share of the time.
//! - Never when the window is full: the guest runs on, and is throttled (bounded) when it dirties faster than the
//!   link carries.

use crate::Micros;

/// The policy's knobs.
#[derive(Clone, Copy, Debug)]
pub struct PolicySettings {
    /// Longest interval between cuts of a VM that is not idle.
    pub max_interval_us: Micros,
    /// Longest interval between cuts of an idle VM.
    pub idle_interval_us: Micros,
    /// Shortest and longest coalescing delay after an output.
    pub coalesce_min_us: Micros,
    /// See `coalesce_min_us`.
    pub coalesce_max_us: Micros,
    /// Cut when so many bytes are dirty, at the latest.
    pub dirty_max_bytes: u64,
    /// Largest share of time, in per mille, that pauses may take.
    pub pause_per_mille: u32,
    /// Strongest throttle, in percent.
    pub throttle_max_percent: u8,
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self {
            max_interval_us: 25_000,
            idle_interval_us: 500_000,
            coalesce_min_us: 50,
            coalesce_max_us: 1_000,
            dirty_max_bytes: 64 << 20,
            pause_per_mille: 250,
            throttle_max_percent: 90,
        }
    }
}

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug, Default)]
pub struct PolicyInput {
    /// Now.
    pub now: Micros,
    /// When the last epoch was sealed.
    pub last_cut: Micros,
    /// Since when held output waits for a cut.
    pub output_since: Option<Micros>,
    /// Since when somebody else waits for a cut (a guest's request that finds no room).
    pub wanted_since: Option<Micros>,
    /// Since when a flush, which nobody waits for, is in no cut.
    pub flush_since: Option<Micros>,
    /// Estimate of the bytes dirtied in the open epoch.
    pub dirty_bytes: u64,
    /// Epochs in flight, and the most allowed.
    pub in_flight: usize,
    /// See `in_flight`.
    pub window: usize,
    /// Bytes in flight have reached their limit.
    pub bytes_full: bool,
    /// Mean pause of a cut.
    pub cut_cost_us: Micros,
    /// Mean rate of the link in bytes per second; 0 while unknown.
    pub link_bytes_per_s: u64,
    /// Cuts in a row that held almost no dirt.
    pub idle_cuts: u32,
}

/// The decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Cut now.
    Now,
    /// Ask again at this time, or when something has happened.
    NotBefore(Micros),
    /// Ask again when the window has room.
    WhenRoom,
}

/// Decides. Total, no side effects.
#[must_use]
pub fn decide(s: &PolicySettings, i: &PolicyInput) -> Cut {
    if i.in_flight >= i.window || i.bytes_full {
        return Cut::WhenRoom;
    }
    // The pause's share of the time bounds how often cuts may come at all.
    let share = u64::from(s.pause_per_mille.clamp(1, 1000));
    let floor = i
        .last_cut
        .saturating_add(i.cut_cost_us.saturating_mul(1000) / share);

    let wait = (i.cut_cost_us / 4).clamp(s.coalesce_min_us, s.coalesce_max_us.max(s.coalesce_min_us));
    // The more is in flight, the more a cut costs the link: then let bursts gather longer.
    let wait = wait.saturating_mul(1 + i.in_flight as u64 / 4);
    let urgent = [i.output_since, i.wanted_since]
        .into_iter()
        .flatten()
        .min()
        .map(|t| t.saturating_add(wait));

    let backoff = s.max_interval_us << i.idle_cuts.min(8);
    let interval = backoff.clamp(s.max_interval_us, s.idle_interval_us.max(s.max_interval_us));
    let mut due = i.last_cut.saturating_add(interval);
    if let Some(t) = urgent {
        due = due.min(t);
    }
    if let Some(t) = i.flush_since {
        due = due.min(t.saturating_add(s.max_interval_us));
    }
    if i.dirty_bytes >= dirty_limit(s, i) {
        due = i.now;
    }
    let due = due.max(floor);
    if i.now >= due {
        Cut::Now
    } else {
        Cut::NotBefore(due)
    }
}

/// Bytes of dirt at which a cut is due: what the link carries in one interval, within the set limit.
fn dirty_limit(s: &PolicySettings, i: &PolicyInput) -> u64 {
    if i.link_bytes_per_s == 0 {
        return s.dirty_max_bytes;
    }
    let carried = i.link_bytes_per_s / 1_000 * (s.max_interval_us / 1_000).max(1);
    carried.clamp(1 << 20, s.dirty_max_bytes.max(1 << 20))
}

/// How much to slow the guest down, in percent: none until three quarters of the window are in flight, then in steps
/// that follow the excess of dirt over what the link carries; never more than the set maximum, so it always makes progress.
#[must_use]
pub fn throttle(s: &PolicySettings, i: &PolicyInput) -> u8 {
    let max = u64::from(s.throttle_max_percent.min(90));
    let pressure = (i.in_flight as u64).saturating_mul(100) / (i.window.max(1) as u64);
    let limit = dirty_limit(s, i).max(1);
    let over = i.dirty_bytes.saturating_mul(100) / limit;
    if i.bytes_full || (pressure >= 75 && over >= 100) {
        (over / 4).clamp(20.min(max), max) as u8
    } else {
        0
    }
}

/// A running mean: `old` moved an eighth of the way to `new`.
#[must_use]
pub fn ewma(old: u64, new: u64) -> u64 {
    if old == 0 { new } else { old - old / 8 + new / 8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input() -> PolicyInput {
        PolicyInput {
            now: 1_000_000,
            last_cut: 990_000,
            window: 8,
            cut_cost_us: 300,
            ..Default::default()
        }
    }

    #[test]
    fn output_is_cut_soon_and_bursts_share_a_cut() {
        let s = PolicySettings::default();
        let mut i = input();
        i.output_since = Some(i.now);
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.now + 75));
        i.now += 75;
        assert_eq!(decide(&s, &i), Cut::Now);
        i.in_flight = 4;
        assert_eq!(decide(&s, &i), Cut::NotBefore(1_000_150));
    }

    #[test]
    fn a_flush_alone_waits_for_the_interval_and_no_longer() {
        let s = PolicySettings::default();
        let mut i = input();
        i.flush_since = Some(i.now);
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.last_cut + 25_000));
        i.idle_cuts = u32::MAX;
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.now + 25_000));
        i.wanted_since = Some(i.now);
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.now + 75));
    }

    #[test]
    fn pause_share_is_bounded_even_under_constant_output() {
        let s = PolicySettings::default();
        let mut i = input();
        i.cut_cost_us = 4_000;
        i.output_since = Some(i.last_cut);
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.last_cut + 16_000));
    }

    #[test]
    fn idle_backs_off_to_its_limit() {
        let s = PolicySettings::default();
        let mut i = input();
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.last_cut + 25_000));
        i.idle_cuts = 3;
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.last_cut + 200_000));
        i.idle_cuts = u32::MAX;
        assert_eq!(decide(&s, &i), Cut::NotBefore(i.last_cut + 500_000));
    }

    #[test]
    fn a_full_window_never_cuts() {
        let s = PolicySettings::default();
        let mut i = input();
        i.in_flight = 8;
        i.output_since = Some(0);
        assert_eq!(decide(&s, &i), Cut::WhenRoom);
    }

    #[test]
    fn much_dirt_is_cut_and_throttled_within_bounds() {
        let s = PolicySettings::default();
        let mut i = input();
        i.dirty_bytes = 64 << 20;
        assert_eq!(decide(&s, &i), Cut::Now);
        assert_eq!(throttle(&s, &i), 0);
        i.in_flight = 7;
        let t = throttle(&s, &i);
        assert!((20..=90).contains(&t), "{t}");
        i.dirty_bytes = u64::MAX;
        assert_eq!(throttle(&s, &i), 90);
    }
}
