//! Admission: a VM may be powered on only if any `host_failures` hosts can fail afterwards with every protected VM going on.
//!
//! What has a standby or a replica has its place: the demand is in that host's [`super::reserve::Reserve`], so the check is
//! `used + reserve <= capacity` on the hosts that the new VM touches. `restart` VMs on shared storage ("floating") have no
//! place of their own; for them the loss of each host is played through: first by counting slots of the largest such VM, which
//! nearly always suffices, else by placing them one by one as the failover would.

use super::fit::{Obstacle, Role};
use super::world::World;
use crate::action::Because;
use crate::model::Resources;

/// Of how many hosts sets are formed, when more than one may fail.
const SETS_OF: usize = 64;
/// How many sets are played through at most.
const SETS_MAX: usize = 2_016;

/// The next set of positions below `n`, in order; false after the last.
fn next_set(set: &mut [usize], n: usize) -> bool {
    let k = set.len();
    for i in (0..k).rev() {
        if set[i] + k - i < n {
            set[i] += 1;
            for j in i + 1..k {
                set[j] = set[j - 1] + 1;
            }
            return true;
        }
    }
    false
}

impl World<'_> {
    /// Whether failures can be absorbed on the hosts given (or, with none, on all).
    pub fn absorbs(&self, hosts: &[usize]) -> Result<(), Because> {
        if self.pool.host_failures == 0 {
            return Ok(());
        }
        for &t in hosts {
            let host = &self.hosts[t];
            let needed = host.used.plus(host.reserve.sum());
            if !needed.fits(host.cap) && !host.reserve.sum().is_zero() {
                let short = needed.minus(host.cap);
                let failed = host.reserve.worst(short).unwrap_or(t);
                return Err(Because::NoFailoverRoom {
                    failed: self.host_id(failed),
                    vm: self.largest_of(failed, t),
                    host: Some(self.host_id(t)),
                    short,
                });
            }
        }
        self.floating_fit()
    }

    /// The VM on `failed` that would need most on `t`; for the message.
    fn largest_of(&self, failed: usize, t: usize) -> steadfast_types::VmId {
        let copies = self.hosts[failed].copies.iter().copied();
        let here = copies.filter(|&v| self.vms[v].owner == Some(failed) && self.vms[v].standbys.contains(&t));
        let largest = here.max_by_key(|&v| self.vms[v].vm.spec.resources.memory_bytes);
        let any = largest
            .or_else(|| self.hosts[t].copies.first().copied())
            .unwrap_or(0);
        self.vms[any].id().clone()
    }

    /// What `t` could take of floating VMs after the failure of `lost`; of any hosts, if that is empty.
    fn slack(&self, t: usize, lost: &[usize]) -> Resources {
        let host = &self.hosts[t];
        let reserve = if lost.is_empty() {
            host.reserve.sum()
        } else {
            lost.iter()
                .fold(Resources::ZERO, |sum, &f| sum.plus(host.reserve.of(f)))
        };
        host.free().minus(reserve)
    }

    fn floating_fit(&self) -> Result<(), Because> {
        if self.floating.is_empty() {
            return Ok(());
        }
        let floating: Vec<usize> = self.floating.iter().copied().collect();
        let n = usize::from(self.pool.host_failures);
        let mut count: Vec<u64> = self.hosts.iter().map(|h| h.floating).collect();
        let mut largest = Resources::ZERO;
        let mut plain = true;
        for &v in &floating {
            largest = largest.max(self.vms[v].vm.spec.demand());
            plain &= self.vms[v].plain;
        }
        if plain {
            let mut slots: Vec<u64> = (0..self.hosts.len())
                .filter(|&t| self.hosts[t].usable())
                .map(|t| slots(self.slack(t, &[]), largest))
                .collect();
            slots.sort_unstable_by(|a, b| b.cmp(a));
            count.sort_unstable_by(|a, b| b.cmp(a));
            let left: u64 = slots.iter().skip(n).fold(0, |s, v| s.saturating_add(*v));
            if count.iter().take(n).sum::<u64>() <= left {
                return Ok(());
            }
        }
        self.play_failures(&floating)
    }

    /// The exact check: every set of hosts that may fail together, while there are not too many such sets; else the sets of
    /// the hosts with the most floating VMs.
    fn play_failures(&self, floating: &[usize]) -> Result<(), Because> {
        let n = usize::from(self.pool.host_failures);
        let mut by_host: Vec<Vec<usize>> = vec![Vec::new(); self.hosts.len()];
        for &v in floating {
            if let Some(o) = self.vms[v].owner {
                by_host[o].push(v);
            }
        }
        let weight = |h: usize| -> u64 {
            let memory = by_host[h]
                .iter()
                .map(|&v| self.vms[v].vm.spec.resources.memory_bytes);
            memory.fold(0, u64::saturating_add)
        };
        let mut hosts: Vec<usize> = (0..self.hosts.len())
            .filter(|&h| self.hosts[h].usable())
            .collect();
        hosts.sort_by_key(|&h| (std::cmp::Reverse(weight(h)), h));
        if n == 1 {
            return hosts.iter().try_for_each(|&h| self.play(&[h], &by_host));
        }
        hosts.truncate(SETS_OF);
        let mut set: Vec<usize> = (0..n.min(hosts.len())).collect();
        for _ in 0..SETS_MAX {
            let lost: Vec<usize> = set.iter().map(|&i| hosts[i]).collect();
            self.play(&lost, &by_host)?;
            if !next_set(&mut set, hosts.len()) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn play(&self, lost: &[usize], by_host: &[Vec<usize>]) -> Result<(), Because> {
        let vms: Vec<usize> = lost.iter().flat_map(|&h| by_host[h].iter().copied()).collect();
        let Err(v) = self.pack(&vms, lost, false) else {
            return Ok(());
        };
        let demand = self.vms[v].vm.spec.demand();
        let others = (0..self.hosts.len()).filter(|t| !lost.contains(t) && self.hosts[*t].usable());
        let short = others
            .map(|t| demand.minus(self.slack(t, lost)))
            .min_by_key(|s| (s.memory_bytes, s.cpu_milli, s.disk_bytes));
        Err(Because::NoFailoverRoom {
            failed: self.host_id(lost[0]),
            vm: self.vms[v].id().clone(),
            host: None,
            short: short.filter(|s| !s.is_zero()).unwrap_or(demand),
        })
    }

    /// Places for VMs that float, off the hosts `lost`: spread by load if that is wanted and works, else as tightly as possible,
    /// the largest first or those first that fit on fewest hosts.
    ///
    /// Admission asks for a tight packing only: that depends on room and rules alone, which are the same before and after the
    /// failure. So what was admitted fits, whatever the loads are by then.
    ///
    /// `Err` names one that has no place.
    pub fn pack(&self, vms: &[usize], lost: &[usize], spread: bool) -> Result<Vec<(usize, usize)>, usize> {
        if spread && let Ok(places) = self.pack_in_order(&self.by_priority(vms.to_vec()), lost, false) {
            return Ok(places);
        }
        let size = |v: usize| (std::cmp::Reverse(self.vms[v].vm.spec.resources.memory_bytes), v);
        let mut order = vms.to_vec();
        order.sort_by_key(|&v| size(v));
        self.pack_in_order(&order, lost, true).or_else(|v| {
            if vms.iter().all(|&v| self.vms[v].plain) {
                return Err(v);
            }
            let open = |v: usize| {
                let here = (0..self.hosts.len()).filter(|t| !lost.contains(t) && self.may_boot(v, *t));
                here.count()
            };
            order.sort_by_cached_key(|&v| (open(v), size(v)));
            self.pack_in_order(&order, lost, true)
        })
    }

    fn pack_in_order(
        &self,
        vms: &[usize],
        lost: &[usize],
        tight: bool,
    ) -> Result<Vec<(usize, usize)>, usize> {
        let mut taken: Vec<Resources> = vec![Resources::ZERO; self.hosts.len()];
        let mut placed: Vec<(usize, usize)> = Vec::new();
        for &v in vms {
            let demand = self.vms[v].vm.spec.demand();
            let room = |t: usize| self.slack(t, lost).minus(taken[t]);
            let fits = |t: usize| {
                let mut here = placed.iter().filter(|(_, h)| *h == t);
                !lost.contains(&t)
                    && demand.fits(room(t))
                    && self.may_boot(v, t)
                    && !here.any(|(other, _)| self.apart(v, *other))
            };
            let memory = |r: Resources, t: usize| {
                r.memory_bytes.saturating_mul(1000) / self.hosts[t].cap.memory_bytes.max(1)
            };
            let key = |t: usize| {
                if tight {
                    (memory(room(t), t), t)
                } else {
                    (
                        self.score(v, t, Role::Primary)
                            .saturating_add(memory(taken[t], t)),
                        t,
                    )
                }
            };
            let best = (0..self.hosts.len())
                .filter(|&t| fits(t))
                .min_by_key(|&t| key(t))
                .ok_or(v)?;
            taken[best] = taken[best].plus(demand);
            placed.push((v, best));
        }
        Ok(placed)
    }

    /// The rules for a boot, room apart.
    fn may_boot(&self, v: usize, t: usize) -> bool {
        matches!(self.obstacle(v, t, Role::Primary), None | Some(Obstacle::Room(_)))
    }
}

fn slots(room: Resources, one: Resources) -> u64 {
    let part = |room: u64, one: u64| room.checked_div(one).unwrap_or(u64::MAX);
    part(room.cpu_milli, one.cpu_milli)
        .min(part(room.memory_bytes, one.memory_bytes))
        .min(part(room.disk_bytes, one.disk_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_once() {
        let mut set = vec![0, 1];
        let mut all = vec![set.clone()];
        while next_set(&mut set, 4) {
            all.push(set.clone());
        }
        assert_eq!(all, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
        assert!(!next_set(&mut [], 4) && !next_set(&mut [0], 1));
    }

    #[test]
    fn slots_are_of_the_scarcest_part() {
        let one = Resources::new(1, 512, 0);
        assert_eq!(slots(Resources::new(10, 1024, 0), one), 2);
        assert_eq!(slots(Resources::new(1, 9000, 0), one), 1);
    }
}
