//! Health of an application: from the results of checks to remedies, with back-off and limits. A pure state machine.
//!
//! ```text
//!              first success                failures in a row
//!   Grace -------------------> Healthy ------------------------> Failed --- remedy ---> Grace
//!     | grace over, failing      ^  |                              |  ^                   |
//!     +--------------------------|--+---------> Failed             |  +-- back-off -------+
//!                                +--- successes in a row ----------+
//! ```
//! The ladder of remedies is climbed rung by rung, `tries` times each; at its end, and beyond `remedies_max` in `window_ms`, people
//! are told, once per failure. A time of health as long as `window_ms` starts the ladder from its foot.

use crate::model::{HealthPolicy, Remedy};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What the service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Started or remedied a short while ago: failures do not count yet.
    Grace,
    /// It answers.
    Healthy,
    /// It does not.
    Failed,
}

/// What can be done about this VM now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Means {
    /// Its agent answers: a service can be restarted.
    pub agent: bool,
    /// A standby is in sync: it can be rolled over.
    pub standby: bool,
}

/// The machine; one per VM with a policy. All times from one monotonic clock, in ms.
#[derive(Clone, Debug)]
pub struct Health {
    policy: HealthPolicy,
    state: State,
    grace_until_ms: u64,
    bad: u8,
    good: u8,
    healthy_since_ms: Option<u64>,
    rung: usize,
    tries: u8,
    remedies: VecDeque<u64>,
    in_a_row: u32,
    next_ms: u64,
    alerted: bool,
}

/// What was tried so far, in wall-clock time: it outlives the process that tried it, and the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    rung: usize,
    tries: u8,
    remedies: VecDeque<u64>,
    in_a_row: u32,
    next_ms: u64,
    alerted: bool,
}

impl Health {
    /// What was tried so far. `wall_ms` is the wall clock at `now_ms`.
    #[must_use]
    pub fn tried(&self, now_ms: u64, wall_ms: u64) -> Tried {
        let wall = |t: u64| match t {
            0 => 0,
            t => (wall_ms + t.saturating_sub(now_ms)).saturating_sub(now_ms.saturating_sub(t)),
        };
        Tried {
            rung: self.rung,
            tries: self.tries,
            remedies: self.remedies.iter().map(|t| wall(*t)).collect(),
            in_a_row: self.in_a_row,
            next_ms: wall(self.next_ms),
            alerted: self.alerted,
        }
    }

    /// Goes on where another one, on another host or before a restart, stood; failures do not count for a while, as after a start.
    #[must_use]
    pub fn resumed(policy: HealthPolicy, tried: &Tried, now_ms: u64, wall_ms: u64) -> Self {
        let most = policy.backoff_max_ms.max(policy.backoff_ms);
        let here = |t: u64| now_ms.saturating_sub(wall_ms.saturating_sub(t));
        let bound = usize::from(policy.remedies_max);
        Self {
            rung: tried.rung,
            tries: tried.tries,
            remedies: tried.remedies.iter().take(bound).map(|t| here(*t)).collect(),
            in_a_row: tried.in_a_row,
            // A clock that is wrong must not hold a remedy up for longer than a pause can be.
            next_ms: now_ms.saturating_add(tried.next_ms.saturating_sub(wall_ms).min(most)),
            alerted: tried.alerted,
            ..Self::new(policy, now_ms)
        }
    }

    /// From the start of the VM.
    #[must_use]
    pub fn new(policy: HealthPolicy, now_ms: u64) -> Self {
        let grace_until_ms = now_ms.saturating_add(policy.grace_ms);
        Self {
            policy,
            state: State::Grace,
            grace_until_ms,
            bad: 0,
            good: 0,
            healthy_since_ms: None,
            rung: 0,
            tries: 0,
            remedies: VecDeque::new(),
            in_a_row: 0,
            next_ms: 0,
            alerted: false,
        }
    }

    /// What the service is.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The VM was started or moved by somebody else: failures do not count for a while.
    pub fn restarted(&mut self, now_ms: u64) {
        self.state = State::Grace;
        self.bad = 0;
        self.good = 0;
        self.healthy_since_ms = None;
        self.grace_until_ms = now_ms.saturating_add(self.policy.grace_ms);
    }

    /// A round of checks ended. Returns what to do, if anything. While the observer was starved, do not call this at all.
    pub fn result(&mut self, now_ms: u64, good: bool, means: Means) -> Option<Remedy> {
        if good {
            self.succeeded(now_ms);
            return None;
        }
        self.good = 0;
        self.healthy_since_ms = None;
        self.bad = self.bad.saturating_add(1);
        match self.state {
            State::Grace if now_ms < self.grace_until_ms => return None,
            State::Grace | State::Healthy if self.bad < self.policy.failures.max(1) => return None,
            State::Grace | State::Healthy => {
                self.state = State::Failed;
                self.alerted = false;
            }
            State::Failed => {}
        }
        if now_ms < self.next_ms {
            return None;
        }
        self.remedy(now_ms, means)
    }

    fn succeeded(&mut self, now_ms: u64) {
        self.bad = 0;
        self.good = self.good.saturating_add(1);
        let enough = self.good >= self.policy.successes.max(1);
        if self.state != State::Healthy && (enough || self.state == State::Grace) {
            self.state = State::Healthy;
        }
        let since = *self.healthy_since_ms.get_or_insert(now_ms);
        if self.state == State::Healthy && now_ms.saturating_sub(since) >= self.policy.window_ms {
            self.rung = 0;
            self.tries = 0;
            self.in_a_row = 0;
            self.next_ms = 0;
        }
    }

    fn remedy(&mut self, now_ms: u64, means: Means) -> Option<Remedy> {
        let window = self.policy.window_ms;
        while self
            .remedies
            .front()
            .is_some_and(|t| now_ms.saturating_sub(*t) >= window)
        {
            self.remedies.pop_front();
        }
        if self.remedies.len() >= usize::from(self.policy.remedies_max) {
            return self.alert();
        }
        while let Some(rung) = self.policy.ladder.get(self.rung).copied() {
            let possible = match rung.remedy {
                Remedy::RestartService => means.agent,
                Remedy::RollOver => means.standby,
                Remedy::RebootVm | Remedy::Alert => true,
            };
            if !possible || self.tries >= rung.tries.max(1) {
                self.rung += 1;
                self.tries = 0;
                continue;
            }
            self.tries += 1;
            if rung.remedy == Remedy::Alert {
                return self.alert();
            }
            self.remedies.push_back(now_ms);
            let pause = self.policy.backoff_ms.saturating_mul(1 << self.in_a_row.min(20));
            self.in_a_row = self.in_a_row.saturating_add(1);
            let pause = pause.min(self.policy.backoff_max_ms.max(self.policy.backoff_ms));
            self.restarted(now_ms);
            self.next_ms = now_ms.saturating_add(pause);
            return Some(rung.remedy);
        }
        self.alert()
    }

    fn alert(&mut self) -> Option<Remedy> {
        (!std::mem::replace(&mut self.alerted, true)).then_some(Remedy::Alert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Rung;

    const ALL: Means = Means {
        agent: true,
        standby: true,
    };

    /// Checks every 5 s; returns what was done and when, in seconds.
    fn play(
        h: &mut Health,
        from_s: u64,
        to_s: u64,
        means: Means,
        good: impl Fn(u64) -> bool,
    ) -> Vec<(u64, Remedy)> {
        (from_s..to_s)
            .step_by(5)
            .filter_map(|t| Some((t, h.result(t * 1000, good(t), means)?)))
            .collect()
    }

    #[test]
    fn the_ladder_is_climbed_with_back_off_and_ends_in_one_alert() {
        let mut h = Health::new(HealthPolicy::default(), 0);
        let done = play(&mut h, 0, 3_000, ALL, |t| t < 100);
        let what: Vec<Remedy> = done.iter().map(|(_, r)| *r).collect();
        use Remedy::{Alert, RebootVm, RestartService, RollOver};
        assert_eq!(
            what,
            [
                RestartService,
                RestartService,
                RebootVm,
                RebootVm,
                RollOver,
                Alert
            ]
        );
        // The third failed check acts; then grace and back-off, whichever is longer.
        let times: Vec<u64> = done.iter().map(|(t, _)| *t).collect();
        assert_eq!(times[0], 110);
        let gaps: Vec<u64> = times.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.windows(2).all(|g| g[1] >= g[0]), "{gaps:?}");
    }

    #[test]
    fn what_cannot_help_is_left_out() {
        let mut h = Health::new(HealthPolicy::default(), 0);
        let done = play(&mut h, 0, 3_000, Means::default(), |_| false);
        let what: Vec<Remedy> = done.iter().map(|(_, r)| *r).collect();
        assert_eq!(what, [Remedy::RebootVm, Remedy::RebootVm, Remedy::Alert]);
        assert!(done[0].0 >= 60, "grace");
    }

    #[test]
    fn single_failures_do_nothing_and_health_starts_the_ladder_anew() {
        let mut h = Health::new(HealthPolicy::default(), 0);
        assert!(play(&mut h, 0, 20_000, ALL, |t| t % 15 != 0).is_empty());
        assert_eq!(h.state(), State::Healthy);
        let bad = |from: u64| move |t: u64| !(from..from + 30).contains(&t);
        let first = play(&mut h, 20_000, 25_000, ALL, bad(21_000));
        assert_eq!(first.len(), 1);
        let later = play(&mut h, 25_000, 32_000, ALL, bad(30_000));
        assert_eq!(later[0].1, Remedy::RestartService);
    }

    /// Another host, with another clock, goes on where the first one stood.
    #[test]
    fn what_was_tried_goes_along() {
        let whole = |moved_at: Option<u64>| {
            let mut h = Health::new(HealthPolicy::default(), 0);
            let (mut clock, mut done) = (0, Vec::new());
            for s in (0..3_000).step_by(5) {
                if moved_at == Some(s) {
                    let tried = h.tried(clock + s * 1000, 9_000_000 + s * 1000);
                    let text = serde_json::to_string(&tried).unwrap();
                    let tried: Tried = serde_json::from_str(&text).unwrap();
                    clock = 77_000;
                    h = Health::resumed(
                        HealthPolicy::default(),
                        &tried,
                        clock + s * 1000,
                        9_000_000 + s * 1000,
                    );
                }
                done.extend(h.result(clock + s * 1000, false, ALL));
            }
            done
        };
        let unmoved = whole(None);
        for at in (0..3_000).step_by(35) {
            let moved = whole(Some(at));
            let (Some(Remedy::Alert), true) =
                (moved.last(), moved.starts_with(&unmoved[..unmoved.len() - 1]))
            else {
                panic!("moved at {at} s: {moved:?}, else {unmoved:?}");
            };
            let remedies = moved.iter().filter(|r| **r != Remedy::Alert).count();
            assert_eq!(
                remedies,
                unmoved.len() - 1,
                "moved at {at} s: nothing is tried twice"
            );
        }
    }

    #[test]
    fn remedies_are_limited_in_any_window() {
        let policy = HealthPolicy {
            remedies_max: 3,
            grace_ms: 0,
            backoff_ms: 0,
            ladder: vec![Rung {
                remedy: Remedy::RebootVm,
                tries: 255,
            }],
            window_ms: 600_000,
            ..HealthPolicy::default()
        };
        let mut h = Health::new(policy, 0);
        let done = play(&mut h, 0, 6_000, ALL, |_| false);
        let reboots: Vec<u64> = done
            .iter()
            .filter(|(_, r)| *r == Remedy::RebootVm)
            .map(|(t, _)| *t)
            .collect();
        for w in reboots.windows(4) {
            assert!(w[3] - w[0] >= 600, "{reboots:?}");
        }
        assert!(reboots.len() > 10);
        assert!(done.iter().any(|(_, r)| *r == Remedy::Alert));
    }
}
