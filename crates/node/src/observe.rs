//! What the leader observes of the other hosts: how long since each was heard of, on which path, by the leader's own monotonic
//! clock.
//!
//! ```text
//!   report in the store moves, or the host answers     Up
//!   nothing for suspect_ms                             Suspect   nothing is taken from it
//!   nothing for dead_ms, on no path                    Dead, not fenced: its `ft` VMs are taken over by the arbiter's word
//!   its report stands for lease + margin               Dead, fenced: it has ended its `restart` VMs itself
//! ```
//! Hosts that do not lead read the reports as well, so a new leader knows since when each stands, and need not begin with the lease of a
//! host that died with the leader. Who answers whom it does not know: silence counts from its election. A host that answers but cannot reach the store stays
//! suspect, not dead, until its lease is out: it has then stopped its `restart` VMs, and may not start any.
//!
//! A store that takes no reports, as while it elects its leader after the death of a host, makes nobody suspect: time in which no
//! report of any host moves, the leader's own among them, is the store's silence. A lease runs on all the same.
//!
//! Reading takes time, seconds while the store elects. A report that is new in what was read counts from the end of the reading: the host may have
//! asked for its lease while the store was read. How old what did not move is counts to the begin of the reading: it may have moved since.
//!
//! A host whose power an agent has cut (`fence.rs`) is fenced at once, until it reports again.
//!
//! A host that was let in and did not report yet owns nothing: until its daemon is up it is suspect, not dead.
//!
//! Bound on detection: `dead_ms` plus a report and a round of the leader; for `restart` VMs lease, margin and a round.

use crate::pool::Read;
use crate::records::Timings;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use steadfast_cluster::model::HostHealth;
use steadfast_types::HostId;

/// How long a host that was let in may take until its first report.
const NEWCOMER: Duration = Duration::from_secs(60);

/// One host.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Daemon's run and its counter.
    report: (u64, u64),
    /// When that was new.
    reported: Instant,
    /// When it last answered a question.
    answered: Instant,
    /// From when its report's age makes it suspect: when that was new, and later by what the store was silent since.
    doubted_from: Instant,
    /// Its power was cut after its report, by an agent.
    cut: bool,
}

/// See the module.
#[derive(Default)]
pub struct Observer {
    hosts: BTreeMap<HostId, Seen>,
    /// When the leader itself last looked: a long pause of its own says nothing about others (I7).
    looked: Option<Instant>,
    /// When a report of any host last moved.
    moved: Option<Instant>,
    /// What was counted as the store's silence since.
    counted: Duration,
}

impl Observer {
    /// A host answered a question.
    pub fn answered(&mut self, host: &HostId, now: Instant) {
        if let Some(seen) = self.hosts.get_mut(host) {
            seen.answered = seen.answered.max(now);
        }
    }

    /// Which report of a host was its last: its daemon's run and counter.
    #[must_use]
    pub fn last_report(&self, host: &HostId) -> Option<(u64, u64)> {
        self.hosts.get(host).map(|seen| seen.report)
    }

    /// A host's power was cut, after it had made this report. False: it has reported since, and counts as anybody else.
    pub fn was_cut(&mut self, host: &HostId, report: (u64, u64)) -> bool {
        let seen = self.hosts.get_mut(host).filter(|seen| seen.report == report);
        seen.map(|seen| seen.cut = true).is_some()
    }

    /// For how long each host was not heard of on any path, ms.
    #[must_use]
    pub fn silent_ms(&self, now: Instant) -> BTreeMap<HostId, u64> {
        let silent = |seen: &Seen| now.saturating_duration_since(seen.reported.max(seen.answered));
        let each = self.hosts.iter();
        each.map(|(h, seen)| (h.clone(), silent(seen).as_millis() as u64))
            .collect()
    }

    /// Hosts whose reports are overdue: to be asked. The others have said that they are there, and a question costs both sides a
    /// handshake.
    #[must_use]
    pub fn late(&self, report_ms: u64, now: Instant) -> BTreeSet<HostId> {
        let overdue = Duration::from_millis(report_ms * 3 / 2);
        let late = |seen: &Seen| now.saturating_duration_since(seen.reported) > overdue;
        let all = self.hosts.iter().filter(|(_, seen)| late(seen));
        all.map(|(host, _)| host.clone()).collect()
    }

    /// As a host that does not lead: only reports are looked at.
    pub fn follow(&mut self, read: &Read) {
        self.look(read);
        let ended = read.ended;
        self.hosts.values_mut().for_each(|seen| seen.answered = ended);
    }

    /// What is to be thought of each host now.
    pub fn look(&mut self, read: &Read) -> BTreeMap<HostId, HostHealth> {
        let Read {
            pool,
            began: now,
            ended,
        } = read;
        let (now, ended) = (*now, *ended);
        let ms = Duration::from_millis;
        let step = self
            .looked
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        // A longer one does not count as the others' silence: they were not asked meanwhile.
        let own_pause = step.saturating_sub(ms(pool.timings.suspect_ms));
        self.looked = Some(now);
        self.hosts.retain(|h, _| pool.hosts.contains_key(h));
        let report_of = |id: &HostId| pool.reports.get(id).map_or((0, 0), |r| (r.daemon, r.seq));
        let any_moved = self.hosts.iter().any(|(id, seen)| seen.report != report_of(id));
        let store_silent = self.store_silence(any_moved, ms(pool.timings.report_ms), read);
        let mut health = BTreeMap::new();
        for id in pool.hosts.keys() {
            let report = report_of(id);
            let seen = self.hosts.entry(id.clone()).or_insert(Seen {
                report,
                reported: ended,
                answered: ended,
                doubted_from: ended,
                cut: false,
            });
            if own_pause > Duration::ZERO {
                // It counts as if the host had been heard of that much later, on whatever path it was heard of last.
                seen.answered = (seen.reported.max(seen.answered) + own_pause).min(ended);
            }
            seen.doubted_from = (seen.doubted_from + store_silent).min(ended);
            if seen.report != report {
                seen.report = report;
                (seen.reported, seen.doubted_from) = (ended, ended);
                seen.cut = false;
            }
            let age = Age {
                stands: now.saturating_duration_since(seen.reported),
                doubted: now.saturating_duration_since(seen.doubted_from),
                silent: now.saturating_duration_since(seen.reported.max(seen.answered)),
            };
            let mut judged = judge(&pool.timings, &age);
            if !pool.reports.contains_key(id) && age.stands < NEWCOMER && judged != HostHealth::Up {
                judged = HostHealth::Suspect;
            }
            if seen.cut && judged == (HostHealth::Dead { fenced: false }) {
                judged = HostHealth::Dead { fenced: true };
            }
            health.insert(id.clone(), judged);
        }
        health
    }

    /// How much longer the store was silent than was counted before. Hosts report once in `every`.
    fn store_silence(&mut self, any_moved: bool, every: Duration, read: &Read) -> Duration {
        let moved = *self.moved.get_or_insert(read.ended);
        // What moved did so before the end of the reading; what did not had not at its begin.
        let until = if any_moved { read.ended } else { read.began };
        let gap = until.saturating_duration_since(moved);
        let new = match gap > every * 3 / 2 {
            true => (gap - every).saturating_sub(self.counted),
            false => Duration::ZERO,
        };
        self.counted += new;
        if any_moved {
            (self.moved, self.counted) = (Some(read.ended), Duration::ZERO);
        }
        new
    }
}

struct Age {
    /// Since its report moved.
    stands: Duration,
    /// The same, of the time in which the store took reports.
    doubted: Duration,
    /// Since it was heard of on any path.
    silent: Duration,
}

fn judge(t: &Timings, age: &Age) -> HostHealth {
    let ms = Duration::from_millis;
    if age.stands >= ms(t.lease_ms + t.lease_margin_ms) {
        // Fencing rests on the lease alone; that no path works is only the reason to look at it.
        HostHealth::Dead { fenced: true }
    } else if age.silent >= ms(t.dead_ms) {
        HostHealth::Dead { fenced: false }
    } else if age.doubted >= ms(t.suspect_ms) {
        HostHealth::Suspect
    } else {
        HostHealth::Up
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;
    use crate::pool::testing::two_hosts as pool;
    use std::sync::Arc;

    /// Read in no time.
    fn read(pool: Pool, at: Instant) -> Read {
        Read {
            pool: Arc::new(pool),
            began: at,
            ended: at,
        }
    }

    #[test]
    fn silence_is_graded_and_a_pause_of_ones_own_is_no_silence() {
        let (mut o, t0) = (Observer::default(), Instant::now());
        let id = HostId::new("a").unwrap();
        let at = |ms| t0 + Duration::from_millis(ms);
        // The other host reports all the time.
        let look = |o: &mut Observer, seq, ms| o.look(&read(pool(seq, ms), at(ms)))[&id];
        assert_eq!(look(&mut o, 1, 0), HostHealth::Up);
        for ms in (1000..=2000).step_by(1000) {
            assert_eq!(look(&mut o, 1, ms), HostHealth::Up);
        }
        assert_eq!(look(&mut o, 1, 3500), HostHealth::Suspect);
        o.answered(&id, at(4000));
        assert_eq!(look(&mut o, 1, 6500), HostHealth::Suspect);
        assert_eq!(look(&mut o, 1, 9000), HostHealth::Suspect);
        assert_eq!(look(&mut o, 1, 10_500), HostHealth::Dead { fenced: false });
        assert_eq!(look(&mut o, 1, 13_000), HostHealth::Dead { fenced: false });
        assert_eq!(look(&mut o, 1, 14_100), HostHealth::Dead { fenced: true });
        assert_eq!(look(&mut o, 2, 15_000), HostHealth::Up);
        // The leader stood still for 9 s: 3 of them count.
        assert_ne!(look(&mut o, 2, 24_000), HostHealth::Dead { fenced: false });
    }

    #[test]
    fn a_store_that_takes_no_reports_makes_nobody_suspect() {
        let (mut o, t0) = (Observer::default(), Instant::now());
        let (a, b) = (HostId::new("a").unwrap(), HostId::new("b").unwrap());
        let at = |ms| t0 + Duration::from_millis(ms);
        let mut look = |seq_a, seq_b, ms| {
            let health = o.look(&read(pool(seq_a, seq_b), at(ms)));
            if ms < 14_000 {
                // Both are asked, and answer.
                o.answered(&a, at(ms));
                o.answered(&b, at(ms));
            }
            (health[&a], health[&b])
        };
        use HostHealth::{Dead, Suspect, Up};
        for ms in (0..=1000).step_by(500) {
            assert_eq!(look(ms, ms, ms), (Up, Up));
        }
        // The store elects: none moves for 6 s, of which one would have been silence at any time.
        for ms in (1500..=6500).step_by(500) {
            assert_eq!(look(1000, 1000, ms), (Up, Up), "at {ms}");
        }
        for (seq, ms) in (0..).zip((7000..=8500).step_by(500)) {
            assert_eq!(look(1000, seq, ms), (Up, Up), "the other is heard again, at {ms}");
        }
        assert_eq!(look(1000, 9, 9000), (Suspect, Up));
        // Its lease was not longer for it.
        assert_eq!(look(1000, 10, 15_000), (Dead { fenced: true }, Up));
    }

    #[test]
    fn a_lease_asked_for_while_the_store_was_read_counts_from_the_end_of_the_reading() {
        let (mut o, t0) = (Observer::default(), Instant::now());
        let id = HostId::new("a").unwrap();
        let at = |ms| t0 + Duration::from_millis(ms);
        o.look(&read(pool(1, 1), at(0)));
        // The store elects for 6 s. Host a reports as soon as it can, with the lease from then on, and dies; the reading sees it.
        let slow = Read {
            pool: Arc::new(pool(2, 2)),
            began: at(500),
            ended: at(6500),
        };
        o.look(&slow);
        let fence = Timings::default().lease_ms + Timings::default().lease_margin_ms;
        let mut last = HostHealth::Up;
        for ms in (7000..6500 + fence).step_by(500) {
            last = o.look(&read(pool(2, ms), at(ms)))[&id];
            assert_ne!(
                last,
                HostHealth::Dead { fenced: true },
                "its lease may stand, at {ms}"
            );
        }
        assert_eq!(last, HostHealth::Dead { fenced: false });
        let after = o.look(&read(pool(2, 9), at(6500 + fence)))[&id];
        assert_eq!(after, HostHealth::Dead { fenced: true });
        // What did not move is not older than when the reading began.
        let slow = Read {
            pool: Arc::new(pool(3, 10)),
            began: at(21_000),
            ended: at(21_000),
        };
        o.look(&slow);
        let slow = Read {
            pool: Arc::new(pool(3, 11)),
            began: at(21_500),
            ended: at(27_500),
        };
        assert_eq!(o.look(&slow)[&id], HostHealth::Up);
    }

    #[test]
    fn a_host_whose_power_was_cut_is_fenced_until_it_reports() {
        let (mut o, t0) = (Observer::default(), Instant::now());
        let id = HostId::new("a").unwrap();
        let at = |ms| t0 + Duration::from_millis(ms);
        let look = |o: &mut Observer, seq, ms| o.look(&read(pool(seq, ms), at(ms)))[&id];
        look(&mut o, 1, 0);
        let last = o.last_report(&id).unwrap();
        for ms in (1000..=7000).step_by(1000) {
            look(&mut o, 1, ms);
        }
        assert_eq!(look(&mut o, 1, 8000), HostHealth::Dead { fenced: false });
        assert!(o.was_cut(&id, last));
        assert_eq!(look(&mut o, 1, 9000), HostHealth::Dead { fenced: true });
        // On again.
        assert_eq!(look(&mut o, 2, 9500), HostHealth::Up);
        for ms in (10_000..=17_000).step_by(1000) {
            look(&mut o, 2, ms);
        }
        assert_eq!(look(&mut o, 2, 17_500), HostHealth::Dead { fenced: false });
        assert!(
            !o.was_cut(&id, last),
            "an agent that took so long cut another life of it"
        );
        assert_eq!(look(&mut o, 2, 18_000), HostHealth::Dead { fenced: false });
    }

    #[test]
    fn a_host_that_was_let_in_is_not_dead_before_its_first_report() {
        let (mut o, t0) = (Observer::default(), Instant::now());
        let id = HostId::new("a").unwrap();
        let at = |ms| t0 + Duration::from_millis(ms);
        let look = |o: &mut Observer, reports: bool, ms| {
            let mut pool = pool(1, ms);
            if !reports {
                pool.reports.remove(&id);
            }
            o.look(&read(pool, at(ms)))[&id]
        };
        for ms in (0..=40_000).step_by(1000) {
            let expected = match ms {
                0..3000 => HostHealth::Up,
                _ => HostHealth::Suspect,
            };
            assert_eq!(look(&mut o, false, ms), expected, "{ms}");
        }
        assert_eq!(look(&mut o, true, 41_000), HostHealth::Up);
        // Reported once, and silent since.
        for ms in (42_000..60_000).step_by(1000) {
            look(&mut o, true, ms);
        }
        assert_eq!(look(&mut o, true, 60_000), HostHealth::Dead { fenced: true });
        // One that never comes.
        let mut o = Observer::default();
        let last = (0..=61_000).step_by(1000).map(|ms| look(&mut o, false, ms));
        assert_eq!(last.last(), Some(HostHealth::Dead { fenced: true }));
    }

    #[test]
    fn a_new_leader_knows_leases_and_no_silence() {
        let (mut o, t0) = (Observer::default(), Instant::now());
        let id = HostId::new("a").unwrap();
        let at = |ms| t0 + Duration::from_millis(ms);
        for ms in (0..=9000).step_by(1000) {
            o.follow(&read(pool(1, ms), at(ms)));
        }
        // Elected.
        let look = |o: &mut Observer, ms| o.look(&read(pool(1, ms), at(ms)))[&id];
        assert_eq!(look(&mut o, 10_000), HostHealth::Suspect);
        assert_eq!(look(&mut o, 12_500), HostHealth::Suspect);
        assert_eq!(look(&mut o, 14_000), HostHealth::Dead { fenced: true });
    }
}
