//! What the leader tells about hosts and VMs: health and service that changed, takeovers, and times in which nobody looked.
//!
//! It only tells. A VM's service is judged from the same reports as `steadfast status`; what is not known is not claimed:
//! while a host is only suspect nothing is said of its VMs, and a new owner's VM is told of with its own report.

use crate::api::types::vm_status;
use crate::error::Result;
use crate::journal::{self, About};
use crate::node::Node;
use crate::paths::{self, Pairs};
use crate::pool::{Pool, PoolVm};
use crate::records::{Takeover, WATCHED, json, now_ms};
use std::collections::{BTreeMap, HashMap, HashSet};
use steadfast_cluster::detector::FailureClass;
use steadfast_cluster::events::{Service, What};
use steadfast_cluster::model::{HostHealth, Phase, Power};
use steadfast_store::Commit;
use steadfast_types::{HostId, VmId};
use steadfast_vmm::guest_care::Mishaps;

/// Looks that are further apart leave a time of which nothing is known, ms. Longer than a change of leaders.
const UNWATCHED_MS: u64 = 30_000;
/// How often it is written down that somebody looks, ms.
const WATCHED_EVERY_MS: u64 = 10_000;
/// A takeover is told once; its time is reckoned anew with each report, to about so many ms.
const TAKEOVER_JITTER_MS: u64 = 500;

/// See the module.
#[derive(Default)]
pub struct Watch {
    /// What was told last of each VM; none: to be read from the store.
    services: Option<HashMap<VmId, Service>>,
    takeovers: HashMap<VmId, u64>,
    health: BTreeMap<HostId, HostHealth>,
    /// Replication paths that were told to be down; and those that were silent at the last look.
    lost_paths: Pairs,
    silent_paths: Pairs,
    failed: HashSet<(VmId, HostId)>,
    /// What was told of each guest's mishaps.
    mishaps: HashMap<(VmId, HostId), Mishaps>,
    watched_ms: u64,
}

impl Watch {
    /// Tells what is new. `observed`: each host's health, and for how long it was not heard of, ms. Blocks.
    ///
    /// # Errors
    /// The store's.
    pub fn look(
        &mut self,
        node: &Node,
        pool: &Pool,
        observed: &BTreeMap<HostId, HostHealth>,
        silent_ms: &BTreeMap<HostId, u64>,
    ) -> Result<()> {
        self.begin(node, pool)?;
        self.hosts(node, observed, silent_ms);
        self.paths(node, pool);
        self.instances(node, pool);
        let services = self.services.get_or_insert_default();
        services.retain(|id, _| pool.vms.contains_key(id));
        self.takeovers.retain(|id, _| pool.vms.contains_key(id));
        for (id, vm) in &pool.vms {
            let mut last = services.get(id).copied();
            if let Some((owner, t)) = takeover(pool, id, vm)
                && t.at_ms > self.takeovers.get(id).copied().unwrap_or(0) + TAKEOVER_JITTER_MS
            {
                self.takeovers.insert(id.clone(), t.at_ms);
                let about = || About::On(id.clone(), owner.clone());
                let (from, why) = (t.at_ms.saturating_sub(t.gap_ms().max(1)), t.to_string());
                node.event_at(
                    from,
                    about(),
                    What::Service { now: Service::Down },
                    "its host was lost",
                );
                node.event_at(
                    t.at_ms,
                    about(),
                    What::Service {
                        now: Service::Degraded,
                    },
                    why,
                );
                last = Some(Service::Degraded);
            }
            // What has not run yet has no service that could be lost.
            let news = |now: Service| Some(now) != last && (last.is_some() || now != Service::Down);
            if let Some((now, why)) = service(pool, id, vm).filter(|(now, _)| news(*now)) {
                let about = match vm.owner() {
                    Some(owner) => About::On(id.clone(), owner.clone()),
                    None => id.into(),
                };
                node.event(about, What::Service { now }, why);
                last = Some(now);
            }
            if let Some(last) = last {
                services.insert(id.clone(), last);
            }
        }
        let now = now_ms();
        if now.saturating_sub(self.watched_ms) >= WATCHED_EVERY_MS {
            node.kv().commit(&Commit::default().put(WATCHED, json(&now)?))?;
            self.watched_ms = now;
        }
        Ok(())
    }

    /// A new leader goes on from what was told before.
    fn begin(&mut self, node: &Node, pool: &Pool) -> Result<()> {
        if self.services.is_some() {
            return Ok(());
        }
        let events = journal::all(&*node.kv())?;
        let mut services = journal::services(&events);
        for told in &events {
            if let (Some(vm), What::Service { .. }) = (&told.event.vm, &told.event.what) {
                self.takeovers.insert(vm.clone(), told.event.at_ms);
            }
        }
        let now = now_ms();
        let unwatched = pool
            .watched_ms
            .filter(|at| now.saturating_sub(*at) > UNWATCHED_MS);
        if let Some(at) = unwatched {
            let why = format!("no host decided for the pool for {} s", (now - at) / 1000);
            for (vm, service) in &mut services {
                if *service != Service::Off && pool.vms.contains_key(vm) {
                    *service = Service::Unknown;
                    node.event_at(at, vm, What::Service { now: *service }, why.clone());
                }
            }
        }
        self.services = Some(services);
        Ok(())
    }

    fn hosts(
        &mut self,
        node: &Node,
        observed: &BTreeMap<HostId, HostHealth>,
        silent_ms: &BTreeMap<HostId, u64>,
    ) {
        for (host, now) in observed {
            let before = self.health.insert(host.clone(), *now);
            let took_ms = silent_ms.get(host).copied().unwrap_or(0);
            let dead = |h: Option<HostHealth>| matches!(h, Some(HostHealth::Dead { .. }));
            match now {
                _ if before == Some(*now) => {}
                HostHealth::Up if before.is_none() => {}
                HostHealth::Up => node.note(host, "it is heard of again"),
                HostHealth::Suspect => node.note(host, "it is suspect: it does not report any more"),
                HostHealth::Dead { fenced } if dead(before) => {
                    let also = if *fenced {
                        "it is fenced: its lease is out"
                    } else {
                        "it is dead"
                    };
                    node.note(host, also);
                }
                HostHealth::Dead { fenced } => {
                    let class = FailureClass::HostDead;
                    let why = match fenced {
                        true => "its lease is out",
                        false => "no path to it works, and it does not report",
                    };
                    node.event(host, What::Detected { class, took_ms }, why);
                }
            }
        }
        self.health.retain(|host, _| observed.contains_key(host));
    }

    /// A path is told of when it was found lost twice in a row: reports of a host that has just come back are from before.
    fn paths(&mut self, node: &Node, pool: &Pool) {
        let now = paths::lost(pool);
        let (new, back) = path_news(pool, &now, &self.silent_paths, &mut self.lost_paths);
        let told = [(&new, "is down"), (&back, "works again")];
        for (host, text) in told
            .into_iter()
            .flat_map(|(pairs, what)| paths::told(pool, pairs, what))
        {
            node.note(&host, text);
        }
        self.silent_paths = now;
    }

    fn instances(&mut self, node: &Node, pool: &Pool) {
        let mut failed = HashSet::new();
        let mut mishaps = HashMap::new();
        for (host, report) in &pool.reports {
            for (vm, instance) in &report.instances {
                let whose = (vm.clone(), host.clone());
                // A new leader does not know which were told.
                let told = self.mishaps.get(&whose).copied().unwrap_or(instance.mishaps);
                for (class, why) in news(told, instance.mishaps) {
                    let about = About::On(vm.clone(), host.clone());
                    node.event(about, What::Detected { class, took_ms: 0 }, why);
                }
                mishaps.insert(whose, instance.mishaps);
                let Phase::Failed(class) = instance.phase else {
                    continue;
                };
                let key = (vm.clone(), host.clone());
                if !self.failed.contains(&key) {
                    let about = About::On(vm.clone(), host.clone());
                    node.event(
                        about,
                        What::Detected { class, took_ms: 0 },
                        "its host's daemon says so",
                    );
                }
                failed.insert(key);
            }
        }
        (self.failed, self.mishaps) = (failed, mishaps);
    }
}

/// What happened to a guest since it was told. Counts of a new process begin at nothing.
fn news(told: Mishaps, now: Mishaps) -> Vec<(FailureClass, &'static str)> {
    let more = |count: fn(Mishaps) -> u64| match count(now) < count(told) {
        true => count(now) > 0,
        false => count(now) > count(told),
    };
    let crashed = FailureClass::GuestCrashed;
    let mut news = Vec::new();
    // A guest can say so in a loop: it is told each time that the count has doubled.
    let doubled = now.panics.checked_ilog2() != told.panics.checked_ilog2();
    if more(|m| m.panics) && doubled {
        news.push((crashed, "its kernel says that it panicked"));
    }
    if more(|m| m.panic_resets) {
        news.push((crashed, "it did not start itself anew, and was reset in place"));
    }
    if more(|m| m.watchdog_resets) {
        let why = "it did not feed its watchdog, and was reset in place";
        news.push((FailureClass::GuestHung, why));
    }
    news
}

/// The takeover that made the owner what it is, if it was one.
fn takeover<'p>(pool: &'p Pool, id: &VmId, vm: &'p PoolVm) -> Option<(&'p HostId, Takeover)> {
    let owner = vm.owner()?;
    Some((owner, pool.reports.get(owner)?.instances.get(id)?.takeover?))
}

/// How a VM's service is now, and why; none: it is not known now, and what was told before holds.
fn service(pool: &Pool, id: &VmId, vm: &PoolVm) -> Option<(Service, String)> {
    let status = vm_status(pool, id, vm);
    let off = vm.stored.record.power == Power::Off;
    let health = vm
        .owner()
        .and_then(|o| pool.hosts.get(o))
        .map(|h| h.record.health);
    let phase = vm
        .owner()
        .and_then(|o| pool.reports.get(o)?.instances.get(id))
        .map(|i| &i.phase);
    let service = match status.state.as_str() {
        "running" => match status.protection.as_str() {
            "protected" | "restart elsewhere" | "none promised" => Service::Up,
            _ => Service::Degraded,
        },
        "off" => Service::Off,
        "unknown" if matches!(health, Some(HostHealth::Dead { .. })) => Service::Down,
        "unknown" => return None,
        // It has just become the owner: its next report tells.
        "starting" if vm.stored.record.standbys_wanted() > 0 && phase == Some(&Phase::Standby) => {
            return None;
        }
        _ if off => Service::Off,
        _ => Service::Down,
    };
    Some((service, format!("{}; {}", status.state, status.protection)))
}

/// Which paths are to be told of, as down and as well again, after `told`: those that were silent before too, and those between hosts that both
/// could say so.
fn path_news(pool: &Pool, now: &Pairs, before: &Pairs, told: &mut Pairs) -> (Pairs, Pairs) {
    let of = |pairs: &Pairs, path: u8, pair: &(HostId, HostId)| {
        pairs.get(&path).is_some_and(|all| all.contains(pair))
    };
    let (mut new, mut back) = (Pairs::new(), Pairs::new());
    for (path, pairs) in told.iter_mut() {
        pairs.retain(|pair| {
            let known = pool.hosts.contains_key(&pair.0) && pool.hosts.contains_key(&pair.1);
            let judged = paths::counts(pool, &pair.0) && paths::counts(pool, &pair.1);
            let works = judged && !of(now, *path, pair);
            if works {
                back.entry(*path).or_default().insert(pair.clone());
            }
            known && !works
        });
    }
    for (path, pairs) in now {
        let twice = |pair: &&_| !of(told, *path, pair) && of(before, *path, pair);
        for pair in pairs.iter().filter(twice) {
            new.entry(*path).or_default().insert(pair.clone());
        }
    }
    for (path, pairs) in &new {
        told.entry(*path).or_default().extend(pairs.iter().cloned());
    }
    (new, back)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_of_once_and_back_when_both_hosts_could_say_so() {
        let mut pool = crate::pool::testing::two_hosts(1, 1);
        let (a, b) = (HostId::new("a").unwrap(), HostId::new("b").unwrap());
        for report in pool.reports.values_mut() {
            report.lost_paths = Some(Vec::new());
        }
        let up = |pool: &mut Pool, health| {
            let hosts = pool.hosts.values_mut();
            hosts.for_each(|info| info.record.health = health);
        };
        up(&mut pool, HostHealth::Up);
        let silent = Pairs::from([(1, [(a.clone(), b.clone())].into())]);
        let (none, mut told) = (Pairs::new(), Pairs::new());
        let news = path_news(&pool, &silent, &none, &mut told);
        assert_eq!(news, (none.clone(), none.clone()), "once may be from before");
        let news = path_news(&pool, &silent, &silent, &mut told);
        assert_eq!(news, (silent.clone(), none.clone()));
        let news = path_news(&pool, &silent, &silent, &mut told);
        assert_eq!(news, (none.clone(), none.clone()), "it was told");
        up(&mut pool, HostHealth::Suspect);
        let news = path_news(&pool, &none, &silent, &mut told);
        assert_eq!(news, (none.clone(), none.clone()), "nobody says that it works");
        up(&mut pool, HostHealth::Up);
        let news = path_news(&pool, &none, &none, &mut told);
        assert_eq!(news, (none, silent));
    }

    #[test]
    fn what_happened_to_a_guest_is_told_once() {
        let with = |panics, panic_resets, watchdog_resets| Mishaps {
            panics,
            panic_resets,
            watchdog_resets,
        };
        let classes = |told, now| -> Vec<FailureClass> { news(told, now).iter().map(|(c, _)| *c).collect() };
        use FailureClass::{GuestCrashed, GuestHung};
        assert!(classes(with(2, 1, 0), with(2, 1, 0)).is_empty());
        assert!(classes(with(2, 1, 0), with(3, 1, 0)).is_empty());
        assert_eq!(classes(with(3, 1, 0), with(4, 1, 0)), [GuestCrashed]);
        assert_eq!(
            classes(with(2, 1, 0), with(4, 2, 1)),
            [GuestCrashed, GuestCrashed, GuestHung]
        );
        // Another process counts from nothing.
        assert!(classes(with(2, 1, 1), with(0, 0, 0)).is_empty());
        assert_eq!(classes(with(2, 1, 1), with(1, 0, 0)), [GuestCrashed]);
    }

    #[test]
    fn a_takeover_tells_its_parts() {
        let t = Takeover {
            at_ms: 10_000,
            detect_us: Some(160_000),
            grant_us: Some(4_000),
            resume_us: Some(900),
            first_output_us: None,
        };
        assert_eq!(t.gap_ms(), 165);
        let text = t.to_string();
        assert!(
            text.contains("detected in 160.0 ms") && text.contains("granted in 4.0 ms"),
            "{text}"
        );
        assert!(
            !text.contains("output"),
            "what was not measured is not told: {text}"
        );
    }
}
