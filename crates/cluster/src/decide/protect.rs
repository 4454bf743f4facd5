//! Standbys: as many as wanted, on hosts that count; new ones at once when one is lost; surplus ones go when no longer needed.
//!
//! A standby is removed only while enough others are in sync, so that nothing here ever lessens protection. A standby on a dead
//! host stays listed until its replacement is in sync: if the host comes back before, it needs only what has changed.

use super::fit::{Obstacle, Role};
use super::world::{World, elapsed};
use crate::action::{Action, Because, Wanted};
use crate::model::{AlarmKey, DrainWhy, HostAdmin, HostHealth, Phase, Resources};
use crate::sabotage::Sabotage;

/// Standbys that a VM can have at a time: the protocol's bound.
const STANDBYS_MAX: usize = 3;

/// Decides for all VMs, the most urgent first.
pub(crate) fn protect(w: &mut World) {
    let dead: Vec<usize> = (0..w.hosts.len())
        .filter(|&h| w.hosts[h].host.record.dead())
        .collect();
    let all: Vec<usize> = (0..w.vms.len())
        .filter(|&v| {
            let vm = &w.vms[v];
            vm.on() && vm.owner.is_some_and(|o| w.health(o) == HostHealth::Up)
        })
        .collect();
    for v in w.by_priority(all) {
        let alive = matches!(
            w.vms[v].vm.state.primary().map(|i| i.phase),
            Some(Phase::Running | Phase::Starting | Phase::Standby)
        );
        if !alive {
            continue;
        }
        add(w, v, &dead);
        if w.vms[v].migrating.is_none() {
            remove_surplus(w, v);
        }
    }
}

fn add(w: &mut World, v: usize, dead: &[usize]) {
    let wanted = w.vms[v].vm.spec.standbys_wanted();
    if w.broken(Sabotage::NoReprotection) && !w.vms[v].standbys.is_empty() {
        return;
    }
    let mut have = w.vms[v]
        .standbys
        .iter()
        .filter(|&&h| w.standby_counts(v, h))
        .count();
    // During a move to a host without a standby, that host will be one of the copies.
    if let Some(m) = w.vms[v].migrating
        && !w.vms[v].standbys.contains(&m.to)
        && !w.hosts[m.from].host.record.leaving()
    {
        have += 1;
    }
    // One more than wanted, where there is room, while its host is emptied: it is in sync before the VM leaves.
    let asked = wanted + w.spare_wanted(v);
    while have < asked {
        // Room that a dead host's VMs still wait for is not free.
        let owed = |h: usize| {
            let room = w.hosts[h].free().minus(w.owed(v, h, dead));
            let extra = w.extra(v, h, Role::Standby);
            (!extra.fits(room)).then(|| Obstacle::Room(extra.minus(room)))
        };
        match w.best_of(v, Role::Standby, 0..w.hosts.len(), owed) {
            Ok(h) => {
                let why = match have < wanted {
                    true => why_added(w, v, have, wanted),
                    false => "its host is being emptied: this one is filled before it leaves".into(),
                };
                let (vm, host) = (w.vms[v].id().clone(), w.host_id(h));
                if !w.act(Action::AddStandby { vm, host }, why) {
                    return;
                }
                have += 1;
            }
            Err(_) if have >= wanted => return,
            Err(none) => {
                w.alarms_wanted
                    .insert(AlarmKey::VmDegraded(w.vms[v].id().clone()));
                w.refuse(Some(v), None, Wanted::Standby, Because::NoHost(*none));
                return;
            }
        }
    }
}

fn why_added(w: &World, v: usize, have: usize, wanted: usize) -> String {
    let lost: Vec<String> = w.vms[v]
        .standbys
        .iter()
        .filter(|&&h| !w.standby_counts(v, h))
        .map(|&h| {
            let record = &w.hosts[h].host.record;
            let how = match (record.dead(), record.admin) {
                (true, _) => "is dead",
                (false, HostAdmin::Draining(_)) => "is being emptied",
                (false, HostAdmin::Maintenance(_)) => "is in maintenance",
                (false, HostAdmin::InUse) => "does not serve it any more",
            };
            format!("; {} {how}", w.hosts[h].id())
        })
        .collect();
    format!("it has {have} of {wanted} standbys{}", lost.concat())
}

/// Removes what is more than wanted, the least useful first.
fn remove_surplus(w: &mut World, v: usize) {
    let wanted = w.vms[v].vm.spec.standbys_wanted();
    let kept = wanted + w.spare_wanted(v);
    loop {
        let listed = w.vms[v].standbys.clone();
        let good = w.good_standbys(v);
        let worst = listed
            .iter()
            .copied()
            .max_by_key(|&h| (uselessness(w, v, h), w.score_as_standby(v, h), h));
        let Some(h) = worst else { return };
        let counts = w.standby_counts(v, h);
        let useful = counts && w.in_sync(v, h);
        // One that was never filled protects nothing; unless its host is dead (it may come back with most of the data),
        // it can go as soon as there are others.
        let empty_and_leaving = !counts && !w.in_sync(v, h) && !w.hosts[h].host.record.dead();
        let removable = if w.broken(Sabotage::DrainUnprotects) && !counts {
            true
        } else if useful {
            good > kept
        } else {
            good >= kept && listed.len() > kept || empty_and_leaving || wanted == 0
        };
        if !removable {
            return;
        }
        let why = if wanted == 0 {
            "its class wants none".to_owned()
        } else if counts {
            format!("it has {good} in sync and wants {wanted}; this one is the least useful")
        } else {
            format!("this host cannot keep it, and {good} of {wanted} others are in sync")
        };
        let (vm, host) = (w.vms[v].id().clone(), w.host_id(h));
        if !w.act(Action::RemoveStandby { vm, host }, why) {
            return;
        }
    }
}

/// Higher is less useful.
fn uselessness(w: &World, v: usize, h: usize) -> u32 {
    let home = w.vms[v]
        .vm
        .state
        .home
        .as_ref()
        .is_some_and(|home| home.host == *w.hosts[h].id());
    match (w.standby_counts(v, h), w.in_sync(v, h)) {
        _ if w.hosts[h].host.record.dead() => 6,
        (false, false) => 5,
        (false, true) => 4,
        (true, false) => 3,
        (true, true) if !home => 2,
        (true, true) => 1,
    }
}

impl World<'_> {
    /// Standbys beyond those wanted while a VM waits to leave its host, or to go home to a host where a standby of it is: a move takes its old
    /// host's copy along, so that without one more it would be unprotected until another is filled. Not where the host is expected to
    /// fail: there it leaves at once.
    pub(super) fn spare_wanted(&self, v: usize) -> usize {
        let vm = &self.vms[v];
        let leaves = |h: usize| {
            let record = &self.hosts[h].host.record;
            let waits = matches!(
                record.admin,
                HostAdmin::Draining(DrainWhy::Operator | DrainWhy::Upgrade)
            );
            waits && record.reachable() && self.hosts[h].host.status.prediction.is_none()
        };
        // No more than a VM can have; those that do not count any more are listed until they are replaced.
        let others = vm
            .standbys
            .iter()
            .filter(|&&h| !self.standby_counts(v, h))
            .count();
        let room = vm.vm.spec.standbys_wanted() + others < STANDBYS_MAX;
        let goes_home = || self.home_bound(v).is_some_and(|h| vm.standbys.contains(&h));
        usize::from(vm.vm.spec.protection.hot() && room && (vm.owner.is_some_and(leaves) || goes_home()))
    }

    /// Where a VM was before a drain, and could be again. Not during a rolling upgrade: the next host to be emptied may be that one.
    pub(super) fn home_bound(&self, v: usize) -> Option<usize> {
        let (vm, limit) = (&self.vms[v], self.pool.bring_back_ms);
        let home = vm.vm.state.home.as_ref().filter(|_| limit != 0)?;
        let h = self.host(&home.host)?;
        let from = vm.owner.filter(|&o| o != h && self.health(o) == HostHealth::Up)?;
        let movable = vm.vm.state.fixed.is_none();
        let settled = movable && vm.on() && vm.vm.state.running() && vm.migrating.is_none();
        let fits = settled
            && elapsed(self.now_ms, home.left_ms) <= limit
            && self.pool.upgrade_to.is_none()
            && !self.hosts[from].host.record.leaving()
            && self.obstacle(v, h, Role::Move).is_none()
            && self.keeps_reserve(v, h, Role::Move);
        fits.then_some(h)
    }

    /// Fullness of a host that has the standby already.
    fn score_as_standby(&self, v: usize, h: usize) -> (bool, u64) {
        let rack = self.hosts[h].rack;
        let same = rack.is_some() && self.vms[v].owner.is_some_and(|o| self.hosts[o].rack == rack);
        let part = |used: u64, cap: u64| used.saturating_mul(1000) / cap.max(1);
        let host = &self.hosts[h];
        let Resources { memory_bytes, .. } = host.used;
        (same, part(memory_bytes, host.cap.memory_bytes))
    }
}
