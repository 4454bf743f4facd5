//! The detector and the lease over simulated time: bounds, no false verdict, and what breaks them.

use proptest::prelude::*;
use steadfast_cluster::Sabotage;
use steadfast_cluster::detector::{
    FailureClass, HostEvidence, OwnClock, OwnSample, Peer, PeerClass, SelfReport, Settings, View, answer,
    verdict,
};
use steadfast_cluster::lease::{self, Duty, Holder, Watcher};
use steadfast_cluster::model::{HostHealth, Network};

const PATHS: [Network; 3] = [Network::Management, Network::ReplicationA, Network::ReplicationB];

/// A small generator, so that a run is told by its seed.
struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// One observer and one peer whose heartbeats may be late, lost, or held up while either side does not run.
struct World {
    s: Settings,
    own: OwnClock,
    peer: Peer,
    /// Heartbeats on their way: when they arrive, on which path, what they say.
    wire: Vec<(u64, Network, SelfReport)>,
    /// The observer sleeps until then.
    asleep_until: u64,
    /// The peer sends nothing before then.
    frozen_until: u64,
    dead: bool,
    cut: Vec<Network>,
    peer_starved: bool,
    next_beat: u64,
    next_tick: u64,
}

impl World {
    fn new(s: Settings) -> Self {
        let mut own = OwnClock::new();
        own.tick(0, OwnSample::default(), &s);
        let peer = Peer::new(&PATHS, &own, &s);
        Self {
            s,
            own,
            peer,
            wire: Vec::new(),
            asleep_until: 0,
            frozen_until: 0,
            dead: false,
            cut: Vec::new(),
            peer_starved: false,
            next_beat: 0,
            next_tick: 0,
        }
    }

    /// A millisecond. Returns the view after a tick.
    fn step(&mut self, now: u64, rng: &mut Rng, jitter: u64, loss_percent: u64) -> Option<View> {
        if now >= self.next_beat && now >= self.frozen_until && !self.dead {
            self.next_beat = now + self.s.heartbeat_ms;
            let report = SelfReport {
                starved: self.peer_starved,
                boot_id: 7,
            };
            for path in PATHS {
                if !self.cut.contains(&path) && rng.below(100) >= loss_percent {
                    self.wire.push((now + 1 + rng.below(jitter), path, report));
                }
            }
        }
        if now < self.next_tick || now < self.asleep_until {
            return None;
        }
        self.next_tick = now + self.s.tick_ms;
        // What has arrived is read first, then the clock is looked at.
        let (here, later) = self.wire.drain(..).partition(|(t, _, _)| *t <= now);
        self.wire = later;
        let here: Vec<(u64, Network, SelfReport)> = here;
        for (_, path, report) in here {
            self.peer.heartbeat(path, report, &self.own, &self.s);
        }
        self.own.tick(now, OwnSample::default(), &self.s);
        Some(self.peer.view(&self.own, &self.s))
    }
}

fn judge(s: &Settings, before: HostHealth, view: &View, lease_age: Option<u64>) -> HostHealth {
    let e = HostEvidence {
        views: vec![(0, view.clone())],
        lease_age_ms: lease_age,
        ..HostEvidence::default()
    };
    verdict(before, &e, s).health
}

#[test]
fn a_dead_host_is_found_within_the_bound_whatever_the_jitter_was() {
    for seed in 0..60u64 {
        let s = Settings::default();
        let mut rng = Rng(seed);
        let mut w = World::new(s);
        w.peer_starved = seed % 3 == 0;
        let jitter = 1 + seed * 10;
        let dies = 20_000 + rng.below(500);
        let (mut health, mut found) = (HostHealth::Up, None);
        for now in 0..60_000 {
            w.dead = now >= dies;
            if let Some(view) = w.step(now, &mut rng, jitter, 5) {
                health = judge(&s, health, &view, Some(now.saturating_sub(dies)));
                assert!(now >= dies || health == HostHealth::Up, "seed {seed} at {now}");
                if found.is_none() && matches!(health, HostHealth::Dead { .. }) {
                    found = Some(now - dies);
                }
            }
        }
        let took = found.unwrap();
        assert!(
            took <= s.dead_bound_ms(w.peer_starved) + jitter,
            "seed {seed}: {took}"
        );
    }
}

#[test]
fn an_hour_of_load_and_jitter_without_a_false_verdict() {
    // Loss of a fifth, delays up to 0.8 s, the observer and the peer freeze for up to 2 s and 1.5 s at any time, a path goes.
    for seed in 0..4u64 {
        let s = Settings::default();
        let mut rng = Rng(seed);
        let mut w = World::new(s);
        let mut health = HostHealth::Up;
        let mut steps = 0u32;
        for now in 0..3_600_000u64 {
            if rng.below(20_000) == 0 {
                w.asleep_until = now + 500 + rng.below(20_000);
            }
            if rng.below(20_000) == 0 {
                w.frozen_until = now + rng.below(1_500);
            }
            if rng.below(30_000) == 0 {
                w.cut = if w.cut.is_empty() {
                    vec![PATHS[rng.below(3) as usize]]
                } else {
                    Vec::new()
                };
            }
            if let Some(view) = w.step(now, &mut rng, 800, 20) {
                health = judge(&s, health, &view, Some(500));
                steps += 1;
                assert!(
                    !matches!(health, HostHealth::Dead { .. }),
                    "seed {seed} at {now}: {view:?}"
                );
                assert_ne!(view.class, PeerClass::Silent, "seed {seed} at {now}");
            }
        }
        assert!(steps > 10_000);
    }
}

#[test]
fn a_host_that_renews_its_lease_is_cut_off_and_not_dead() {
    let s = Settings::default();
    let silent = View {
        class: PeerClass::Silent,
        lost: PATHS.to_vec(),
        ..View::default()
    };
    let of = |views: Vec<(u64, View)>, lease: Option<u64>, over| {
        let e = HostEvidence {
            views,
            lease_age_ms: lease,
            lease_over: over,
            fenced: false,
        };
        let v = verdict(HostHealth::Up, &e, &s);
        (v.health, v.class)
    };
    assert_eq!(
        of(vec![(0, silent.clone())], Some(900), false),
        (HostHealth::Suspect, Some(FailureClass::AllPathsLost))
    );
    assert_eq!(
        of(vec![(0, silent.clone())], Some(3_000), false),
        (HostHealth::Dead { fenced: false }, Some(FailureClass::HostDead))
    );
    assert_eq!(
        of(vec![(0, silent.clone())], Some(9_000), true).0,
        HostHealth::Dead { fenced: true }
    );
    let heard = View {
        lost: vec![Network::ReplicationA],
        ..View::default()
    };
    assert_eq!(
        of(vec![(0, silent.clone()), (0, heard)], None, false),
        (HostHealth::Up, Some(FailureClass::PathLost))
    );
    let refused = View {
        class: PeerClass::DaemonDown,
        ..silent.clone()
    };
    assert_eq!(
        of(vec![(0, silent.clone()), (0, refused)], None, false),
        (HostHealth::Suspect, Some(FailureClass::ProcessDied))
    );
    let blind = View {
        blind: true,
        ..silent.clone()
    };
    assert_eq!(
        of(vec![(0, blind), (99_000, silent)], None, false),
        (HostHealth::Up, None)
    );
    assert_eq!(of(vec![], None, true), (HostHealth::Up, None));
}

#[test]
fn only_two_classes_are_answered_by_a_failover() {
    use FailureClass::{
        AllPathsLost, DiskFault, GuestCrashed, GuestHung, HostDead, HostStarved, PathLost, ProcessDied,
    };
    for class in [
        PathLost,
        HostStarved,
        DiskFault,
        GuestCrashed,
        GuestHung,
        AllPathsLost,
    ] {
        assert!(!answer(class).is_failover(), "{class}");
    }
    assert!(answer(HostDead).is_failover() && answer(ProcessDied).is_failover());
    Settings::default().check().unwrap();
    Settings::slow().check().unwrap();
    lease::Settings::default().check().unwrap();
}

/// Whether an observer with these naps calls a peer silent that sends all the time.
fn suspects(naps: &[(u64, u64)], sabotage: Sabotage) -> bool {
    let s = Settings::default();
    let mut w = World::new(s);
    let mut rng = Rng(1);
    w.own = OwnClock::sabotaged(sabotage);
    let mut naps = naps.iter().copied();
    let mut next = naps.next();
    for now in 0..60_000u64 {
        if let Some((at, long)) = next
            && now == at
        {
            w.asleep_until = now + long;
            // Nothing can be read from a full socket buffer: what arrived in the nap is lost.
            w.cut = PATHS.to_vec();
            next = naps.next();
        }
        if now >= w.asleep_until {
            w.cut.clear();
        }
        if let Some(view) = w.step(now, &mut rng, 5, 0)
            && !view.blind
            && matches!(view.class, PeerClass::Silent | PeerClass::Fading)
        {
            return true;
        }
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// I7: however an observer is starved, it does not suspect a peer that sends.
    #[test]
    fn own_starvation_never_leads_to_suspicion(
        gaps in prop::collection::vec((200u64..8_000, 50u64..20_000), 1..12)
    ) {
        let mut at = 0;
        let naps: Vec<(u64, u64)> = gaps.iter().map(|(gap, long)| {
            at += gap;
            let nap = (at, *long);
            at += long;
            nap
        }).collect();
        prop_assert!(!suspects(&naps, Sabotage::None), "{naps:?}");
    }

    /// The lease: with any drift within the bound, any delays, freezes of the daemon and lost messages, VMs do not run when
    /// somebody else may start them.
    #[test]
    fn nobody_starts_what_may_still_run(seed in 0u64..1_000_000) {
        let s = lease::Settings::default();
        prop_assert_eq!(lease_world(seed, s, false), None);
    }
}

#[test]
fn the_checkers_catch_what_is_broken() {
    assert!(
        suspects(&[(5_000, 10_000)], Sabotage::CountOwnStarvation),
        "with own starvation counted, a nap must lead to a false suspicion"
    );
    let s = lease::Settings::default();
    let late = (0..300).filter_map(|seed| lease_world(seed, s, true)).count();
    assert!(
        late > 0,
        "counting from the answer instead of the request must be caught"
    );
    let careless = lease::Settings {
        margin_ms: 0,
        drift_ppm: 0,
        ..s
    };
    assert!(worst_case(s) >= 0, "{}", worst_case(s));
    assert!(worst_case(careless) < 0, "no allowance for drift must be caught");
}

/// The last renewal is written and seen at once, then nothing; the holder's clock is as slow as allowed, the watcher's as fast, and
/// the VM takes its whole kill time. Real ms from the VM's end to the moment at which others may start it.
fn worst_case(s: lease::Settings) -> i64 {
    let drift = 10_000;
    let clock = |now: i64, ppm: i64| u64::try_from(now + now * ppm / 1_000_000).unwrap();
    let mut holder = Holder::new(s);
    let mut watcher = Watcher::new(s);
    holder.sent(0);
    holder.granted(0, 0);
    watcher.read(1, 0);
    let gone = (0..)
        .find(|&t| clock(t, -drift) >= holder.deadline_ms().unwrap() + s.kill_ms)
        .unwrap();
    let free = (0..).find(|&t| watcher.over(clock(t, drift))).unwrap();
    free - gone
}

/// A holder and a watcher over real time in ms. Returns when both were allowed to run a VM, if ever.
fn lease_world(seed: u64, s: lease::Settings, from_answer: bool) -> Option<u64> {
    let mut rng = Rng(seed);
    let drift = i64::from(lease::Settings::default().drift_ppm);
    let mut speed = || (rng.below(2 * drift as u64 + 1) as i64) - drift;
    let (slow, fast) = (speed(), speed());
    // The worst pair is drawn often.
    let (slow, fast) = if seed % 2 == 0 {
        (-drift, drift)
    } else {
        (slow, fast)
    };
    let clock = |now: u64, ppm: i64| (now as i64 + now as i64 * ppm / 1_000_000) as u64 + 77;
    let mut holder = Holder::new(s);
    let mut watcher = Watcher::new(s);
    let mut stored = 0u64;
    // Writes and answers on their way: when, and the local time at which the request was sent.
    let mut writes: Vec<(u64, u64, u64)> = Vec::new();
    let mut answers: Vec<(u64, u64)> = Vec::new();
    let mut reads: Vec<(u64, u64, u64)> = Vec::new();
    let (mut cut_until, mut nap_until, mut next_read) = (0, 0, 0);
    let mut vm_gone_at: Option<u64> = None;
    let mut running = false;
    for now in 0..60_000u64 {
        let local = clock(now, slow);
        if rng.below(4_000) == 0 {
            cut_until = now + rng.below(15_000);
        }
        if rng.below(6_000) == 0 {
            nap_until = now + rng.below(10_000);
        }
        // The daemon.
        if now >= nap_until {
            match holder.duty(local) {
                Duty::Run => {}
                Duty::Renew | Duty::Stop => {
                    if holder_due(&holder, local, &mut rng) {
                        holder.sent(local);
                        if now >= cut_until {
                            writes.push((now + rng.below(800), local, rng.below(800)));
                        }
                    }
                }
            }
            for (at, sent) in std::mem::take(&mut answers) {
                if at > now {
                    answers.push((at, sent));
                } else {
                    holder.granted(if from_answer { local } else { sent }, local);
                }
            }
            if holder.may_run(local) && !running {
                running = true;
                vm_gone_at = None;
            }
        }
        // The process of the VM: it has the deadline, and takes all of its kill time to be gone (on its own clock).
        if running && vm_gone_at.is_none() && holder.deadline_ms().is_none_or(|d| local >= d) {
            vm_gone_at = Some(local + s.kill_ms.saturating_sub(1));
        }
        if vm_gone_at.is_some_and(|t| local >= t) {
            running = false;
            vm_gone_at = None;
        }
        // The store.
        for (at, sent, back) in std::mem::take(&mut writes) {
            if at > now {
                writes.push((at, sent, back));
            } else {
                stored += 1;
                answers.push((now + back, sent));
            }
        }
        // The watcher: reads every 300 ms or so.
        let there = clock(now, fast);
        if now >= next_read {
            next_read = now + 200 + rng.below(200);
            reads.push((now + rng.below(300), there, stored));
        }
        for (at, sent, counter) in std::mem::take(&mut reads) {
            if at > now {
                reads.push((at, sent, counter));
                continue;
            }
            watcher.read(counter, there);
            if counter == stored && watcher.over(sent) && running {
                return Some(now);
            }
        }
    }
    None
}

fn holder_due(holder: &Holder, local: u64, rng: &mut Rng) -> bool {
    // While stopped a daemon tries again every half second or so.
    holder.may_run(local) || rng.below(500) == 0
}
