//! Failures of VMs: what runs no more goes on where it can, by the smallest means.
//!
//! | what happened | `ft`, `checkpoint` | `restart` | `none` |
//! |---|---|---|---|
//! | guest crashed or hangs | reset in place | reset in place | alarm |
//! | process died, host up | promote a standby; without one, boot where it was | boot where it was | alarm |
//! | host dead | promote a standby at once (the arbiter decides) | boot elsewhere once the host is fenced | alarm; booted again when its host is back |
//! | host suspect | nothing (I7) | nothing | nothing |
//! | disk fault, guest runs | planned promote (`moves`) | moved (`moves`) | - |

use super::fit::{Obstacle, Role};
use super::world::{World, elapsed};
use crate::action::{Action, Because, Wanted};
use crate::model::{AlarmKey, FailureClass, HostHealth, Phase, Protection, Resources};
use crate::sabotage::Sabotage;
use std::collections::BTreeMap;
use steadfast_types::HostId;

/// How a VM that should run is lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lost {
    HostDead,
    Process(FailureClass),
    Guest(FailureClass),
    /// Its host is up and knows nothing of it: it was booted, or the process left no trace.
    Gone,
}

/// Decides for all VMs that are lost; `ft` first, since that is quickest and needs no room.
pub(crate) fn recover(w: &mut World) {
    let lost: Vec<(usize, Lost)> = (0..w.vms.len()).filter_map(|v| Some((v, lost(w, v)?))).collect();
    for &(v, _) in &lost {
        w.alarms_wanted.insert(AlarmKey::VmDown(w.vms[v].id().clone()));
    }
    // What is on a host that is suspect is not known: an alarm that is up stays up.
    let unknown = w.vms.iter().filter(|vm| {
        vm.owner
            .is_some_and(|o| vm.on() && w.health(o) == HostHealth::Suspect)
    });
    let down = unknown.map(|vm| AlarmKey::VmDown(vm.id().clone()));
    let kept: Vec<AlarmKey> = down.filter(|alarm| w.alarms.contains(alarm)).collect();
    w.alarms_wanted.extend(kept);
    let order = w.by_priority(lost.iter().map(|(v, _)| *v).collect());
    let mut boots = Vec::new();
    for v in order {
        let Ok(at) = lost.binary_search_by_key(&v, |(x, _)| *x) else {
            continue;
        };
        let l = lost[at].1;
        cancel_migration(w, v);
        if !promote(w, v, l) {
            boots.push((v, l));
        }
    }
    // Who has the fewest hosts to choose from goes first, among those of one priority: the others leave it its room.
    boots.sort_by_key(|&(v, _)| (std::cmp::Reverse(w.vms[v].vm.spec.priority), choices(w, v)));
    let places = places_for_floating(w, &boots);
    for (v, l) in boots {
        if let Lost::Guest(class) = l {
            reset(w, v, class);
        } else {
            boot(w, v, l, &places);
        }
    }
}

/// Hosts that hold its disks and can be used; no bound for a VM that is not bound to any.
fn choices(w: &World, v: usize) -> usize {
    let vm = &w.vms[v];
    if !vm.bound_to_disks() {
        return usize::MAX;
    }
    let replicas = vm.vm.state.replicas.iter();
    replicas
        .filter(|host| w.host(host).is_some_and(|h| w.hosts[h].usable()))
        .count()
}

/// Floating VMs are placed together, so that what was admitted fits. Those that have to wait keep their room meanwhile.
fn places_for_floating(w: &mut World, boots: &[(usize, Lost)]) -> BTreeMap<usize, usize> {
    for h in &mut w.hosts {
        h.pending = Resources::ZERO;
    }
    let floating: Vec<usize> = boots
        .iter()
        .filter(|(v, l)| *l == Lost::HostDead && w.vms[*v].floats())
        .map(|(v, _)| *v)
        .collect();
    let dead: Vec<usize> = (0..w.hosts.len())
        .filter(|&h| w.hosts[h].host.record.dead())
        .collect();
    let places: BTreeMap<usize, usize> = w
        .pack(&floating, &dead, true)
        .unwrap_or_default()
        .into_iter()
        .collect();
    for (&v, &h) in &places {
        let waits = place_for_boot(w, v, Lost::HostDead, &places).is_err();
        if waits {
            w.hosts[h].pending = w.hosts[h].pending.plus(w.vms[v].vm.spec.demand());
        }
    }
    places
}

fn lost(w: &World, v: usize) -> Option<Lost> {
    let vm = &w.vms[v];
    let owner = vm.owner.filter(|_| vm.on())?;
    match w.health(owner) {
        HostHealth::Dead { .. } => return Some(Lost::HostDead),
        HostHealth::Suspect if w.broken(Sabotage::PromoteOnSuspect) => return Some(Lost::HostDead),
        HostHealth::Suspect => return None,
        HostHealth::Up => {}
    }
    match vm.vm.state.primary().map(|i| i.phase) {
        None => Some(Lost::Gone),
        Some(Phase::Failed(class @ (FailureClass::GuestCrashed | FailureClass::GuestHung))) => {
            Some(Lost::Guest(class))
        }
        Some(Phase::Failed(class)) => Some(Lost::Process(class)),
        Some(Phase::Starting | Phase::Running | Phase::Standby | Phase::Stopping) => None,
    }
}

fn cancel_migration(w: &mut World, v: usize) {
    if let Some(m) = w.vms[v].migrating {
        let (vm, to) = (w.vms[v].id().clone(), w.host_id(m.to));
        w.act(
            Action::CancelMigration { vm, to },
            "the VM is lost on its way".into(),
        );
    }
}

/// Promotes a standby if that is the means.
fn promote(w: &mut World, v: usize, lost: Lost) -> bool {
    let vm = &w.vms[v];
    // A guest that crashed has crashed on its standby too.
    if !vm.vm.spec.protection.hot() || matches!(lost, Lost::Guest(_)) {
        return false;
    }
    let up: Vec<usize> = vm
        .standbys
        .iter()
        .copied()
        .filter(|&h| w.in_sync(v, h) && w.health(h) == HostHealth::Up)
        .collect();
    let staying: Vec<usize> = up.iter().copied().filter(|&h| w.hosts[h].usable()).collect();
    let list = if staying.is_empty() { up } else { staying };
    let Some(to) = w.emptiest(v, Role::Move, &list) else {
        return false;
    };
    let vm = &w.vms[v];
    let why = format!(
        "{}; its standby on {} is in sync",
        what(w, v, lost),
        w.hosts[to].id()
    );
    let (id, term) = (vm.id().clone(), vm.vm.state.term);
    let to = w.host_id(to);
    w.act(Action::Promote { vm: id, to, term }, why)
}

fn what(w: &World, v: usize, lost: Lost) -> String {
    let host = w.vms[v]
        .owner
        .map_or_else(String::new, |o| w.host_id(o).to_string());
    match lost {
        Lost::HostDead => format!("its host {host} is dead"),
        Lost::Process(FailureClass::DiskFault) => format!("its disk on {host} failed"),
        Lost::Process(_) => format!("its process on {host} died"),
        Lost::Guest(FailureClass::GuestCrashed) => format!("its guest crashed on {host}"),
        Lost::Guest(_) => format!("its guest hangs on {host}"),
        Lost::Gone => format!("{host} is up and does not run it"),
    }
}

fn reset(w: &mut World, v: usize, class: FailureClass) {
    if w.vms[v].vm.spec.protection == Protection::None {
        w.refuse(Some(v), None, Wanted::Recover, Because::ClassNone);
        return;
    }
    let Some(owner) = w.vms[v].owner else { return };
    let host = w.host_id(owner);
    if let Err(because) = may_start(w, v, &host) {
        w.refuse(Some(v), None, Wanted::Recover, because);
        return;
    }
    let why = format!(
        "{}; the smallest means is a reset in place",
        what(w, v, Lost::Guest(class))
    );
    let (vm, term) = (w.vms[v].id().clone(), w.vms[v].vm.state.term);
    w.act(Action::ResetVm { vm, host, term }, why);
}

/// Boots it: on its own host if that is up, else elsewhere.
fn boot(w: &mut World, v: usize, lost: Lost, places: &BTreeMap<usize, usize>) {
    match place_for_boot(w, v, lost, places) {
        Ok(h) => {
            let vm = &w.vms[v];
            let same = vm.owner == Some(h);
            let why = format!(
                "{}; {}",
                what(w, v, lost),
                match (vm.vm.spec.protection.hot(), same) {
                    (true, _) => "no standby is in sync, so it boots from its committed disks",
                    (false, true) => "it boots where it was",
                    (false, false) => "that host is fenced, and this one suits best",
                }
            );
            let (vm, term) = (vm.id().clone(), vm.vm.state.term);
            let host = w.host_id(h);
            if w.act(Action::StartVm { vm, host, term }, why) {
                w.expect_load(v, h);
            }
        }
        Err(because) => w.refuse(Some(v), None, Wanted::Recover, because),
    }
}

fn place_for_boot(
    w: &World,
    v: usize,
    lost: Lost,
    places: &BTreeMap<usize, usize>,
) -> Result<usize, Because> {
    let vm = &w.vms[v];
    let class = vm.vm.spec.protection;
    let Some(owner) = vm.owner else {
        return Err(Because::Other("it has no owner".into()));
    };
    if class == Protection::None && lost != Lost::Gone {
        return Err(Because::ClassNone);
    }
    waits_for(w, v)?;
    let own = w.host_id(owner);
    if lost != Lost::HostDead {
        let disk = lost == Lost::Process(FailureClass::DiskFault);
        match may_start(w, v, &own) {
            Ok(()) if !disk => return Ok(owner),
            Err(Because::GaveUp(_)) if class != Protection::None => {}
            Err(because) => return Err(because),
            Ok(()) => {}
        }
    } else if !w.hosts[owner].host.record.fenced() && !w.broken(Sabotage::StartBeforeFence) {
        return Err(match w.health(owner) {
            HostHealth::Suspect => Because::HostSuspect(own),
            _ => Because::NotFenced(own),
        });
    }
    let dead: Vec<usize> = (0..w.hosts.len())
        .filter(|&h| w.hosts[h].host.record.dead())
        .collect();
    // Where a standby waits for the room that its own host's failure asks for, that room is not free.
    let owed = |h: usize| {
        let room = w.hosts[h].free().minus(w.owed(v, h, &dead));
        let extra = w.extra(v, h, Role::Primary);
        (!extra.fits(room)).then(|| Obstacle::Room(extra.minus(room)))
    };
    let found = if let Some(&h) = places.get(&v) {
        Ok(h)
    } else if vm.bound_to_disks() {
        let replicas: Vec<usize> = vm.vm.state.replicas.iter().filter_map(|h| w.host(h)).collect();
        if !replicas.iter().any(|&h| w.hosts[h].usable()) {
            return Err(Because::DisksUnreachable(
                replicas.iter().map(|&h| w.host_id(h)).collect(),
            ));
        }
        // Not on the disk that has just failed, if there is another.
        let failing = |h: usize| {
            (h == owner && lost == Lost::Process(FailureClass::DiskFault)).then_some(Obstacle::Disks)
        };
        w.best_of(v, Role::Primary, 0..w.hosts.len(), failing)
            .or_else(|none| {
                if failing(owner).is_some() {
                    w.best(v, Role::Primary)
                } else {
                    Err(none)
                }
            })
    } else {
        w.best_of(v, Role::Primary, 0..w.hosts.len(), owed)
            .or_else(|_| w.best(v, Role::Primary))
    };
    let h = found.map_err(|none| {
        let failures = vm.vm.state.start_failures.values().map(|f| f.count).sum();
        if none.failed_there > 0 && none.room == 0 {
            Because::GaveUp(failures)
        } else {
            Because::NoHost(*none)
        }
    })?;
    may_start(w, v, &w.host_id(h))?;
    Ok(h)
}

/// Back-off after failed starts on a host.
pub(crate) fn may_start(w: &World, v: usize, host: &HostId) -> Result<(), Because> {
    let Some(f) = w.vms[v].vm.state.start_failures.get(host) else {
        return Ok(());
    };
    let limits = &w.pool.limits;
    if f.count >= limits.start_failures_per_host {
        return Err(Because::GaveUp(f.count));
    }
    if f.count == 0 {
        return Ok(());
    }
    let pause = limits.start_backoff_ms.saturating_mul(1 << (f.count - 1).min(5));
    let passed = elapsed(w.now_ms, f.last_ms);
    if passed < pause {
        return Err(Because::BackingOff {
            host: host.clone(),
            count: f.count,
            wait_ms: pause - passed,
        });
    }
    Ok(())
}

/// What must be ready before it starts.
pub(crate) fn waits_for(w: &World, v: usize) -> Result<(), Because> {
    for need in &w.vms[v].needs {
        match need {
            Err(name) => return Err(Because::UnknownDependency(name.clone())),
            Ok(n) if w.vms[*n].vm.state.ready && w.vms[*n].on() => {}
            Ok(n) => {
                return Err(match circle(w, v, *n) {
                    Some(by) => Because::Circle(w.vms[by].id().clone()),
                    None => Because::WaitsFor(w.vms[*n].id().clone()),
                });
            }
        }
    }
    Ok(())
}

/// Whether the needs of `first` lead back to `v`; if so, `first`.
fn circle(w: &World, v: usize, first: usize) -> Option<usize> {
    let mut seen = std::collections::BTreeSet::new();
    let mut next = vec![first];
    while let Some(n) = next.pop() {
        if n == v {
            return Some(first);
        }
        if seen.insert(n) {
            next.extend(w.vms[n].needs.iter().filter_map(|x| x.as_ref().ok()).copied());
        }
    }
    None
}
