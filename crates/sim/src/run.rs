//! One run: a seed, faults, then healing; what was found and what was covered.

use crate::faults::{BEGIN, Coverage, HEAL, Plan, Profile};
use crate::invariants::{Violation, i7, liveness};
use crate::rng::Rng;
use crate::world::World;
use std::panic::{AssertUnwindSafe, catch_unwind};
use steadfast_epoch::policy::PolicySettings;
use steadfast_epoch::{Sabotage, Settings};

/// What a run was like.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The first broken promise.
    pub violation: Option<Violation>,
    /// What went wrong in the world.
    pub coverage: Coverage,
    /// Replies that clients received.
    pub replies: u64,
    /// Takeovers and handovers.
    pub promotions: u64,
    /// Boots from disk, without the first.
    pub cold_boots: u64,
    /// The longest wait of a client in a run with a single fault, in microseconds.
    pub longest_us: u64,
    /// How much went wrong.
    pub profile: Profile,
}

fn settings(rng: &mut Rng, standbys: usize, sabotage: Sabotage) -> Settings {
    let acks_required = if standbys > 1 { rng.pick(&[0, 0, 1]) } else { 0 };
    Settings {
        heartbeat_us: 10_000,
        // The rule is that the primary gives up first; nothing may depend on it.
        standby_lost_us: rng.pick(&[60_000, 60_000, 150_000]),
        ack_timeout_us: 300_000,
        suspect_us: 80_000,
        step_cap_us: 20_000,
        resend_us: 10_000,
        hello_retry_us: 25_000,
        store_timeout_us: 50_000,
        record_check_us: 300_000,
        window_epochs: rng.pick(&[4, 8, 16]),
        chunk_window: rng.pick(&[1, 4]),
        base_threshold_bytes: 2 << 20,
        acks_required,
        speculate: rng.per_mille(700),
        can_roll_back: rng.per_mille(500),
        handover_timeout_us: 200_000,
        policy: PolicySettings { idle_interval_us: 100_000, ..PolicySettings::default() },
        sabotage,
        ..Settings::default()
    }
}

/// Runs a seed.
#[must_use]
pub fn run(seed: u64, sabotage: Sabotage, trace: bool) -> Report {
    let mut rng = Rng::new(seed);
    let hosts = rng.pick(&[2, 3, 3, 4]);
    let want = if hosts == 2 { 1 } else { rng.range(1, hosts as u64 - 1) as usize };
    let settings = settings(&mut rng, want, sabotage);
    let plan = Plan::draw(&mut rng);
    let carry = rng.per_mille(500);
    let mut w = World::new(rng, hosts, settings, plan, trace);
    w.carry_frames = carry;
    w.want = want;
    for h in &mut w.hosts {
        h.fsync_us = w.rng.pick(&[400, 400, 3_000, 10_000]);
    }
    if trace {
        println!("hosts {hosts}, standbys {want}, {:?}\n{:?}", w.settings, w.plan);
    }
    let result = catch_unwind(AssertUnwindSafe(|| drive(&mut w)));
    if let Err(p) = result {
        let how = p
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| p.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_default();
        let what = how.split(':').next().filter(|s| s.starts_with('I')).unwrap_or("panic").to_owned();
        w.checks.fail(&what, how);
    }
    Report {
        seed,
        violation: w.checks.failed.clone(),
        coverage: w.coverage.clone(),
        replies: w.clients.iter().map(|c| c.replies).sum(),
        promotions: w.checks.promotions,
        cold_boots: w.checks.cold_boots.saturating_sub(1),
        longest_us: w.clients.iter().map(|c| c.longest_us).max().unwrap_or(0),
        profile: w.plan.profile,
    }
}

fn drive(w: &mut World) {
    let mut protected_before = false;
    while w.now < HEAL && w.checks.failed.is_none() {
        w.run_until(w.now + 5_000);
        w.come_back();
        if w.now == BEGIN {
            protected_before = !w.store.record.in_sync.is_empty();
        }
    }
    if w.checks.failed.is_some() {
        return;
    }
    if !protected_before {
        w.checks.fail("liveness", "not protected before the first fault".to_owned());
        return;
    }
    if w.plan.profile == Profile::Slow {
        i7::ended(w);
    }
    single_fault(w);
    w.heal();
    let before: Vec<u64> = w.clients.iter().map(|c| c.replies).collect();
    let bound = w.now + 8_000_000;
    while w.now < bound && w.checks.failed.is_none() {
        w.run_until(w.now + 25_000);
        if liveness::recovered(w, &before) {
            return;
        }
    }
    if w.checks.failed.is_none() {
        liveness::failed(w);
    }
}

/// A single fault never costs the VM its memory: it is not booted again (I4), unless all hosts lost power.
fn single_fault(w: &mut World) {
    let all = w.plan.faults.iter().any(|f| f.kind == crate::faults::Kind::PowerAll);
    if w.plan.profile == Profile::Single && !all && w.checks.cold_boots > 1 {
        w.checks.fail("I4", "one fault cost the VM its memory: it was booted from disk".to_owned());
    }
}
