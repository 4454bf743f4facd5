//! Placement: which hosts may hold a copy of a VM, and which is best.
//!
//! Hard rules first ([`World::obstacle`]); among the hosts that pass, the lowest [`World::score`] wins, ties by name. The score is
//! the fullness that the host would have (the highest of what is promised and what is measured, in thousandths) plus penalties
//! that are far apart: failover room that would be lost, the rack of another copy, a group that should be apart, starvation.

use super::world::{Why, World};
use crate::action::NoHost;
use crate::model::{GroupRule, Phase, Resources};
use crate::sabotage::Sabotage;
use std::cmp::Reverse;

/// As what a VM comes to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Boots there.
    Primary,
    /// Stands by there.
    Standby,
    /// Moves there while it runs.
    Move,
}

/// The first rule that a host fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    NotInUse,
    Baseline,
    Site,
    Storage,
    HasCopy,
    Apart,
    Version,
    Cpu,
    FailedThere,
    Disks,
    Room(Resources),
}

/// Failover room would be lost.
const NO_RESERVE: u64 = 1_000_000;
/// The host's own starvation, or a rest after a move.
const STARVED: u64 = 100_000;
/// Another copy of the VM is in the same rack.
const SAME_RACK: u64 = 20_000;
/// A group that should be apart where possible, per member.
const NOT_APART: u64 = 10_000;
/// What a member of a group that should be together takes off.
const TOGETHER: u64 = 5_000;

impl World<'_> {
    /// What `v` takes in this role.
    pub fn demand(&self, v: usize, role: Role) -> Resources {
        let spec = &self.vms[v].vm.spec;
        match role {
            Role::Primary | Role::Move => spec.demand(),
            Role::Standby => spec.standby_demand(),
        }
    }

    /// What it takes in addition to what it has there.
    pub fn extra(&self, v: usize, h: usize, role: Role) -> Resources {
        self.demand(v, role).minus(self.taken(v, h))
    }

    /// The first rule that `h` fails as a place for `v`.
    pub fn obstacle(&self, v: usize, h: usize, role: Role) -> Option<Obstacle> {
        let (vm, host) = (&self.vms[v], &self.hosts[h]);
        match vm.admissible[h] {
            Why::Witness => return Some(Obstacle::NotInUse),
            Why::Baseline => return Some(Obstacle::Baseline),
            Why::Site => return Some(Obstacle::Site),
            Why::Storage => return Some(Obstacle::Storage),
            Why::Fits => {}
        }
        if !host.usable() {
            return Some(Obstacle::NotInUse);
        }
        if self.wrong_site(v, h, role) {
            return Some(Obstacle::Site);
        }
        let is_copy = vm.owner == Some(h) || vm.standbys.contains(&h);
        if is_copy && role == Role::Standby || vm.owner == Some(h) && role == Role::Move {
            return Some(Obstacle::HasCopy);
        }
        // What is on its way down there must be gone first.
        let state = &vm.vm.state;
        if vm.has_copy(h)
            && state
                .instances
                .get(host.id())
                .is_some_and(|i| i.phase == Phase::Stopping)
        {
            return Some(Obstacle::HasCopy);
        }
        if role == Role::Primary {
            let failed = vm.vm.state.start_failures.get(host.id()).map_or(0, |f| f.count);
            if failed >= self.pool.limits.start_failures_per_host {
                return Some(Obstacle::FailedThere);
            }
            if vm.bound_to_disks() && !vm.vm.state.replicas.contains(host.id()) {
                return Some(Obstacle::Disks);
            }
        } else if self.unfit(v, h, role) {
            return Some(Obstacle::Cpu);
        } else if let Some(o) = vm.owner {
            let versions = &self.hosts[o].host.status.versions;
            if !versions.speaks_with(&host.host.status.versions) {
                return Some(Obstacle::Version);
            }
        }
        if !self.broken(Sabotage::IgnoreApart) && self.apart_from(v, h).next().is_some() {
            return Some(Obstacle::Apart);
        }
        let extra = self.extra(v, h, role);
        if !extra.fits(host.free()) && !self.broken(Sabotage::IgnoreCapacity) {
            return Some(Obstacle::Room(extra.minus(host.free())));
        }
        None
    }

    /// It cannot show the guest's CPU. A copy of the disks alone can be there: a guest that is booted gets that host's.
    pub fn unfit(&self, v: usize, h: usize, role: Role) -> bool {
        let vm = &self.vms[v].vm;
        let boots = role == Role::Primary || role == Role::Standby && vm.spec.disks_suffice();
        !boots && vm.state.unfit.contains(self.hosts[h].id())
    }

    fn wrong_site(&self, v: usize, h: usize, role: Role) -> bool {
        let vm = &self.vms[v];
        let rules = &vm.vm.spec.sites;
        let site = &self.hosts[h].host.record.site;
        let allowed = if role == Role::Standby && !rules.standby_at.is_empty() {
            &rules.standby_at
        } else {
            &rules.run_at
        };
        if !allowed.is_empty() && !allowed.contains(site) {
            return true;
        }
        let elsewhere = role == Role::Standby && rules.standby_elsewhere;
        elsewhere && vm.owner.is_some_and(|o| self.hosts[o].host.record.site == *site)
    }

    /// Whether the pool could still absorb failures, as far as `h` is concerned, with `v` there in this role.
    pub fn keeps_reserve(&self, v: usize, h: usize, role: Role) -> bool {
        let (vm, host) = (&self.vms[v], &self.hosts[h]);
        let promotion = vm.vm.spec.promotion_demand();
        let reserve = match (role, vm.owner) {
            (Role::Standby, Some(o)) => host.reserve.sum_with(o, promotion),
            // What is kept for it is what it now takes.
            (Role::Move | Role::Primary, Some(o)) if vm.standbys.contains(&h) => {
                host.reserve.sum_without(o, promotion)
            }
            _ => host.reserve.sum(),
        };
        host.used
            .plus(self.extra(v, h, role))
            .plus(reserve)
            .fits(host.cap)
    }

    /// What hosts that are down now still ask `h` for, `v` itself apart. That room is not anybody else's.
    pub fn owed(&self, v: usize, h: usize, dead: &[usize]) -> Resources {
        let vm = &self.vms[v];
        let host_pending = self.hosts[h].pending;
        dead.iter()
            .fold(Resources::ZERO, |sum, &d| {
                let mut of = self.hosts[h].reserve.of(d);
                if vm.owner == Some(d) && vm.standbys.contains(&h) {
                    of = of.minus(vm.vm.spec.promotion_demand());
                }
                sum.plus(of)
            })
            .plus(host_pending)
    }

    /// How well `h` suits; lower is better.
    pub fn score(&self, v: usize, h: usize, role: Role) -> u64 {
        let (vm, host) = (&self.vms[v], &self.hosts[h]);
        let mut score = self.fullness(v, h, role);
        if !self.keeps_reserve(v, h, role) {
            score += NO_RESERVE;
        }
        if host.host.status.starved {
            score += STARVED;
        }
        if host.rack.is_some() && role != Role::Primary {
            let mut others = vm.owner.iter().chain(&vm.standbys).filter(|&&c| c != h);
            if others.any(|&c| self.hosts[c].rack == host.rack) {
                score += SAME_RACK;
            }
        }
        if !vm.groups.is_empty() {
            score += NOT_APART * self.group_members(v, h, GroupRule::PreferApart) as u64;
            if self.group_members(v, h, GroupRule::Together) == 0
                && vm.groups.iter().any(|(_, r)| *r == GroupRule::Together)
            {
                score += TOGETHER;
            }
        }
        score
    }

    /// The highest of CPU, memory and disk that the host would have promised, and of the CPU that it would be measured to
    /// use, in thousandths.
    fn fullness(&self, v: usize, h: usize, role: Role) -> u64 {
        let host = &self.hosts[h];
        let then = host.used.plus(self.extra(v, h, role));
        let part = |used: u64, cap: u64| used.saturating_mul(1000) / cap.max(1);
        let cpus = host.host.record.capacity.cpu_milli;
        let own = if role == Role::Standby {
            0
        } else {
            self.vms[v].vm.state.load.cpu_milli
        };
        // Also of what was put there a moment ago.
        let now = host
            .host
            .status
            .load
            .cpu_milli
            .saturating_add_signed(host.shift[0]);
        let measured = now.saturating_add(own);
        part(then.cpu_milli, host.cap.cpu_milli)
            .max(part(then.memory_bytes, host.cap.memory_bytes))
            .max(part(then.disk_bytes, host.cap.disk_bytes.max(then.disk_bytes)) / 2)
            .max(part(measured, cpus))
    }

    /// The best host of `among` that passes all rules and `also`.
    pub fn best_of(
        &self,
        v: usize,
        role: Role,
        among: impl Iterator<Item = usize>,
        also: impl Fn(usize) -> Option<Obstacle>,
    ) -> Result<usize, Box<NoHost>> {
        let mut best: Option<(u64, usize)> = None;
        let mut none = NoHost::default();
        for h in among {
            match self.obstacle(v, h, role).or_else(|| also(h)) {
                None => {
                    let key = (self.score(v, h, role), h);
                    if best.is_none_or(|b| key < b) {
                        best = Some(key);
                    }
                }
                Some(o) => self.note(&mut none, h, o),
            }
        }
        best.map(|(_, h)| h).ok_or_else(|| Box::new(none))
    }

    /// The best host of the pool.
    pub fn best(&self, v: usize, role: Role) -> Result<usize, Box<NoHost>> {
        self.best_of(v, role, 0..self.hosts.len(), |_| None)
    }

    /// The hosts of `list`, the emptiest first: for choosing among a VM's standbys.
    pub fn emptiest(&self, v: usize, role: Role, list: &[usize]) -> Option<usize> {
        list.iter().copied().min_by_key(|&h| (self.score(v, h, role), h))
    }

    fn note(&self, none: &mut NoHost, h: usize, obstacle: Obstacle) {
        let count = match obstacle {
            Obstacle::NotInUse => &mut none.not_in_use,
            Obstacle::Baseline => &mut none.baseline,
            Obstacle::Site => &mut none.site,
            Obstacle::Storage => &mut none.storage,
            Obstacle::HasCopy => &mut none.has_copy,
            Obstacle::Apart => &mut none.apart,
            Obstacle::Version => &mut none.version,
            Obstacle::Cpu => &mut none.cpu,
            Obstacle::FailedThere => &mut none.failed_there,
            Obstacle::Disks => &mut none.disks,
            Obstacle::Room(_) => &mut none.room,
        };
        *count += 1;
        if let Obstacle::Room(short) = obstacle {
            let key = |r: &Resources| (r.memory_bytes, r.disk_bytes, r.cpu_milli);
            if none.closest.is_none() || Reverse(key(&short)) > Reverse(key(&none.short)) {
                none.short = short;
                none.closest = Some(self.host_id(h));
            }
        }
    }
}
