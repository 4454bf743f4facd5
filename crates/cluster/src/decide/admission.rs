//! Admission: a VM may be powered on only if any `host_failures` hosts can fail afterwards with every protected VM going on.
//!
//! What has a standby or a replica has its place: the demand is in that host's [`super::reserve::Reserve`], so the check is
//! `used + reserve <= capacity` on the hosts that the new VM touches. `restart` VMs on shared storage ("floating") have no
//! place of their own; for them the loss of each host is played through: first by counting slots of the largest such VM, which
//! nearly always suffices, else by placing them one by one as the failover would.

use super::fit::Role;
use super::world::{Why, World};
use crate::action::Because;
use crate::model::{GroupRule, Resources};

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

    /// What `t` could take of floating VMs after the failure of `failed`.
    fn slack(&self, t: usize, failed: Option<usize>) -> Resources {
        let host = &self.hosts[t];
        let reserve = match failed {
            Some(f) if self.pool.host_failures == 1 => host.reserve.of(f),
            _ => host.reserve.sum(),
        };
        host.free().minus(reserve)
    }

    fn floating_fit(&self) -> Result<(), Because> {
        let floating: Vec<usize> = (0..self.vms.len()).filter(|&v| self.vms[v].floats()).collect();
        if floating.is_empty() {
            return Ok(());
        }
        let n = usize::from(self.pool.host_failures);
        let mut count = vec![0u64; self.hosts.len()];
        let mut largest = Resources::ZERO;
        let mut plain = true;
        for &v in &floating {
            let vm = &self.vms[v];
            largest = largest.max(vm.vm.spec.demand());
            plain &= !vm.groups.iter().any(|(_, r)| *r == GroupRule::Apart);
            plain &= vm
                .admissible
                .iter()
                .all(|w| matches!(w, Why::Fits | Why::Witness));
            if let Some(o) = vm.owner {
                count[o] += 1;
            }
        }
        if plain {
            let mut slots: Vec<u64> = (0..self.hosts.len())
                .filter(|&t| self.hosts[t].usable())
                .map(|t| slots(self.slack(t, None), largest))
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

    /// The exact check for the loss of each one host; for more failures at once, of the hosts with the most floating VMs.
    fn play_failures(&self, floating: &[usize]) -> Result<(), Because> {
        let n = usize::from(self.pool.host_failures);
        let mut by_host: Vec<Vec<usize>> = vec![Vec::new(); self.hosts.len()];
        for &v in floating {
            if let Some(o) = self.vms[v].owner {
                by_host[o].push(v);
            }
        }
        let mut hosts: Vec<usize> = (0..self.hosts.len())
            .filter(|&h| !by_host[h].is_empty())
            .collect();
        let weight = |h: usize| -> u64 {
            let memory = by_host[h]
                .iter()
                .map(|&v| self.vms[v].vm.spec.resources.memory_bytes);
            memory.fold(0, u64::saturating_add)
        };
        hosts.sort_by_key(|&h| (std::cmp::Reverse(weight(h)), h));
        if n > 1 {
            let lost: Vec<usize> = hosts.iter().copied().take(n).collect();
            return self.play(&lost, &by_host);
        }
        hosts.iter().try_for_each(|&h| self.play(&[h], &by_host))
    }

    fn play(&self, lost: &[usize], by_host: &[Vec<usize>]) -> Result<(), Because> {
        let one = if lost.len() == 1 {
            lost.first().copied()
        } else {
            None
        };
        let mut taken: Vec<Option<Resources>> = vec![None; self.hosts.len()];
        let vms = self.by_priority(lost.iter().flat_map(|&h| by_host[h].iter().copied()).collect());
        for v in vms {
            let demand = self.vms[v].vm.spec.demand();
            let room = |t: usize| self.slack(t, one).minus(taken[t].unwrap_or_default());
            let fits = |t: usize| {
                let vm = &self.vms[v];
                self.hosts[t].usable()
                    && !lost.contains(&t)
                    && vm.admissible[t] == Why::Fits
                    && demand.fits(room(t))
                    && self.apart_from(v, t).next().is_none()
            };
            let open = (0..self.hosts.len()).filter(|&t| fits(t));
            match open.min_by_key(|&t| (self.score(v, t, Role::Primary), t)) {
                Some(t) => taken[t] = Some(taken[t].unwrap_or_default().plus(demand)),
                None => {
                    let others =
                        (0..self.hosts.len()).filter(|t| !lost.contains(t) && self.hosts[*t].usable());
                    let short = others
                        .map(|t| demand.minus(room(t)))
                        .min_by_key(|s| (s.memory_bytes, s.cpu_milli, s.disk_bytes));
                    return Err(Because::NoFailoverRoom {
                        failed: self.host_id(lost[0]),
                        vm: self.vms[v].id().clone(),
                        host: None,
                        short: short.unwrap_or(demand),
                    });
                }
            }
        }
        Ok(())
    }
}

fn slots(room: Resources, one: Resources) -> u64 {
    let part = |room: u64, one: u64| room.checked_div(one).unwrap_or(u64::MAX);
    part(room.cpu_milli, one.cpu_milli)
        .min(part(room.memory_bytes, one.memory_bytes))
        .min(part(room.disk_bytes, one.disk_bytes))
}
