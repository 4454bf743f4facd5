//! Balancing: a hot host is relieved, by measured CPU, memory and network (replication included).
//!
//! **Load** of a host is the highest of the three in thousandths of what it has. **Pressure** is `(load - target)^2 / 1000`
//! above the highest load that a target may reach. **Gain** of a move is the pressure it takes off times the horizon. **Cost** is the
//! time that the move fills a link, at full pressure, plus a fixed price for the pause. A move is made when gain is at least
//! `gain_over_cost` times cost.
//!
//! **No thrash**: only hosts that were hot for a while give; no move brings its target above `target_max`, which is well below
//! `hot`; source and target rest after a move until their measured load has settled; a VM stays where it was put for a while. So
//! each move lowers the sum of all pressures by what it cost at least, and the sequence ends.

use super::fit::Role;
use super::world::{World, elapsed};
use crate::action::{Action, Because, Wanted};
use crate::model::{
    BalanceSettings, GroupRule, MoveCause, Phase, Protection, Task, VmLoad, VmSpecRecord, size,
};
use crate::sabotage::Sabotage;

/// CPU, memory, network, in absolute units.
type Load = [i64; 3];
const NAMES: [&str; 3] = ["CPU", "memory", "network"];
/// Price of the switch itself.
const PAUSE_COST: u64 = 1_000;
/// A live migration of a VM that dirties more than this share of the link (in thousandths) would not converge.
const CONVERGES_PERMILLE: u64 = 700;

/// What moving a unit of VMs would do.
struct Offer {
    vms: Vec<usize>,
    to: usize,
    gain: u64,
    cost: u64,
    bytes: u64,
    seconds: f64,
    delta_from: Load,
    delta_to: Load,
}

/// Relieves hot hosts, the hottest first.
pub(crate) fn balance(w: &mut World) {
    let set = w.pool.balance;
    if !set.enabled {
        return;
    }
    let damped = !w.broken(Sabotage::BalanceWithoutDamping);
    let mut hot: Vec<usize> = (0..w.hosts.len())
        .filter(|&h| is_hot(w, h, &set, damped))
        .collect();
    hot.sort_by_key(|&h| (std::cmp::Reverse(load(w, h).0), h));
    for h in hot {
        let moving = |t: &&Task| {
            matches!(
                t,
                Task::Migrate {
                    cause: MoveCause::Balance,
                    ..
                }
            )
        };
        let under_way = w.tasks.iter().filter(moving).count();
        if under_way >= set.moves_max as usize || w.migrations() >= w.pool.limits.migrations_in_pool {
            return;
        }
        match best_offer(w, h, &set, damped) {
            Some(offer) => accept(w, h, &offer),
            None => {
                let (permille, part) = load(w, h);
                let text = format!(
                    "it is at {} of its {}, and no move is worth its cost or fits",
                    percent(permille),
                    NAMES[part]
                );
                w.refuse(None, Some(h), Wanted::Balance, Because::Other(text));
            }
        }
    }
}

fn percent(permille: u64) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

/// What a host has of CPU, memory, network.
fn has(w: &World, h: usize) -> [u64; 3] {
    let r = &w.hosts[h].host.record;
    [r.capacity.cpu_milli, r.capacity.memory_bytes, r.link()]
}

fn load_after(w: &World, h: usize, delta: Load) -> (u64, usize) {
    let l = &w.hosts[h].host.status.load;
    let measured = [l.cpu_milli, l.memory_bytes, l.net_bytes_per_s];
    let has = has(w, h);
    let shift = w.hosts[h].shift;
    let part = |i: usize| {
        let add = shift[i].saturating_add(delta[i]);
        measured[i].saturating_add_signed(add).saturating_mul(1000) / has[i].max(1)
    };
    (0..3).map(|i| (part(i), i)).max().unwrap_or((0, 0))
}

fn load(w: &World, h: usize) -> (u64, usize) {
    load_after(w, h, [0; 3])
}

fn rests(w: &World, h: usize, set: &BalanceSettings) -> bool {
    let last = w.hosts[h].host.status.balanced_ms;
    w.hosts[h].migrations > 0 || last.is_some_and(|t| elapsed(w.now_ms, t) < set.settle_ms)
}

fn is_hot(w: &World, h: usize, set: &BalanceSettings, damped: bool) -> bool {
    let host = &w.hosts[h];
    if !host.usable() {
        return false;
    }
    let l = load(w, h).0;
    if !damped {
        return l > u64::from(set.target_max_permille);
    }
    let since = host.host.status.load.hot_since_ms;
    let long = since.is_some_and(|t| elapsed(w.now_ms, t) >= set.hot_for_ms);
    l >= u64::from(set.hot_permille) && long && !rests(w, h, set)
}

fn pressure(permille: u64, set: &BalanceSettings) -> u64 {
    let over = permille.saturating_sub(u64::from(set.target_max_permille));
    over.saturating_mul(over) / 1000
}

fn best_offer(w: &World, h: usize, set: &BalanceSettings, damped: bool) -> Option<Offer> {
    let mut best: Option<Offer> = None;
    for unit in units(w, h, set, damped) {
        for to in 0..w.hosts.len() {
            let rests = damped && rests(w, to, set);
            if to == h || rests || !w.hosts[to].usable() || w.hosts[to].host.status.starved {
                continue;
            }
            let Some(offer) = offer(w, h, to, &unit, set, damped) else {
                continue;
            };
            let net = |o: &Offer| o.gain.saturating_sub(o.cost);
            if best.as_ref().is_none_or(|b| net(&offer) > net(b)) {
                best = Some(offer);
            }
        }
    }
    best
}

/// VMs that can move: alone, or all of a group that is to stay together.
fn units(w: &World, h: usize, set: &BalanceSettings, damped: bool) -> Vec<Vec<usize>> {
    let mut units: Vec<Vec<usize>> = Vec::new();
    let mut seen = Vec::new();
    for &v in &w.hosts[h].copies {
        if w.vms[v].owner != Some(h) || seen.contains(&v) {
            continue;
        }
        let together = |x: &usize| {
            let mine = w.vms[v].groups.iter().filter(|(_, r)| *r == GroupRule::Together);
            w.vms[*x].owner == Some(h) && mine.into_iter().any(|g| w.vms[*x].groups.contains(g))
        };
        let mut unit: Vec<usize> = w.hosts[h].copies.iter().copied().filter(together).collect();
        if unit.is_empty() {
            unit.push(v);
        }
        seen.extend(unit.iter().copied());
        let limit = w.pool.limits.migrations_per_host as usize;
        if unit.len() <= limit && unit.iter().all(|&v| movable(w, v, set, damped)) {
            units.push(unit);
        }
    }
    units
}

fn movable(w: &World, v: usize, set: &BalanceSettings, damped: bool) -> bool {
    let vm = &w.vms[v];
    let s = &vm.vm.state;
    let resident = s
        .moved_ms
        .is_none_or(|t| elapsed(w.now_ms, t) >= set.residence_ms);
    vm.on()
        && !vm.vm.spec.pinned
        && s.fixed.is_none()
        && vm.migrating.is_none()
        && s.home.is_none()
        && s.primary().map(|i| i.phase) == Some(Phase::Running)
        && (resident || !damped)
        && w.good_standbys(v) >= vm.vm.spec.standbys_wanted()
}

fn offer(
    w: &World,
    h: usize,
    to: usize,
    unit: &[usize],
    set: &BalanceSettings,
    damped: bool,
) -> Option<Offer> {
    let mut o = Offer {
        vms: unit.to_vec(),
        to,
        gain: 0,
        cost: 0,
        bytes: 0,
        seconds: 0.0,
        delta_from: [0; 3],
        delta_to: [0; 3],
    };
    let link = w.hosts[h]
        .host
        .record
        .link()
        .min(w.hosts[to].host.record.link())
        .max(1);
    for &v in unit {
        let vm = &w.vms[v];
        let (spec, l) = (&vm.vm.spec, &vm.vm.state.load);
        let standby = vm.standbys.contains(&to);
        if standby && !w.in_sync(v, to) {
            return None;
        }
        // Its standby has the disks only.
        let follows = standby && !spec.disks_suffice();
        let bytes = transfer(spec, l, follows, link)?;
        o.bytes = o.bytes.saturating_add(bytes);
        shift(&mut o, spec, l, vm.standbys.len() as i64, standby);
    }
    // Cheap checks first: this runs for every hot host, VM and target.
    let (after_to, _) = load_after(w, to, o.delta_to);
    if damped && after_to > u64::from(set.target_max_permille) {
        return None;
    }
    let (before, after) = (load(w, h).0, load_after(w, h, o.delta_from).0);
    let (before_to, to_pressure) = (pressure(load(w, to).0, set), pressure(after_to, set));
    let now = pressure(before, set).saturating_add(before_to);
    let then = pressure(after, set).saturating_add(to_pressure);
    o.gain = now.checked_sub(then)?.saturating_mul(u64::from(set.horizon_s));
    o.seconds = o.bytes as f64 / link as f64;
    // A link that is full for a second is a pressure of 1000 for a second, on both hosts.
    o.cost = PAUSE_COST
        .saturating_mul(unit.len() as u64)
        .saturating_add((o.seconds * 2000.0) as u64);
    let worth = o.gain.saturating_mul(10) >= o.cost.saturating_mul(u64::from(set.gain_over_cost_tenths));
    if o.gain == 0 || damped && !worth {
        return None;
    }
    unit.iter().all(|&v| may_go(w, v, to)).then_some(o)
}

fn may_go(w: &World, v: usize, to: usize) -> bool {
    let reserve = w.pool.host_failures == 0 || w.keeps_reserve(v, to, Role::Move);
    let alone = w.vms[v].standbys.contains(&to) || room_for_all(w, v, to);
    w.obstacle(v, to, Role::Move).is_none() && reserve && alone
}

/// With a new host, the present one keeps the standby: its reserve must hold too.
fn room_for_all(w: &World, v: usize, to: usize) -> bool {
    let vm = &w.vms[v];
    let Some(from) = vm.owner.filter(|_| vm.vm.spec.standbys_wanted() > 0) else {
        return true;
    };
    let host = &w.hosts[from];
    let promotion = vm.vm.spec.promotion_demand();
    let used = host.used.minus(promotion);
    used.plus(host.reserve.sum_with(to, promotion)).fits(host.cap)
}

/// Bytes that a move sends; none when it would not converge.
fn transfer(spec: &VmSpecRecord, l: &VmLoad, standby: bool, link: u64) -> Option<u64> {
    if standby {
        // What is in flight: it follows already.
        return Some(l.dirty_bytes_per_s);
    }
    let share = l.dirty_bytes_per_s.saturating_mul(1000) / link;
    if share >= CONVERGES_PERMILLE {
        return None;
    }
    let memory = if l.memory_bytes == 0 {
        spec.resources.memory_bytes
    } else {
        l.memory_bytes
    };
    // What changes while it is sent is sent again: a geometric series.
    let memory = memory.saturating_mul(1000) / (1000 - share);
    Some(memory.saturating_add(spec.local_disk_bytes()))
}

/// What it changes on both hosts.
fn shift(o: &mut Offer, spec: &VmSpecRecord, l: &VmLoad, standbys: i64, standby: bool) {
    let signed = |v: u64| i64::try_from(v).unwrap_or(i64::MAX / 4);
    let memory = if l.memory_bytes == 0 {
        spec.resources.memory_bytes
    } else {
        l.memory_bytes
    };
    // A standby in RAM has the memory already; afterwards it is the old host that has it.
    let keeps = spec.protection.hot() && spec.standby_memory == crate::model::StandbyMemory::Ram;
    let stream = match spec.protection {
        Protection::Ft | Protection::Checkpoint { .. } => signed(l.dirty_bytes_per_s),
        _ => 0,
    };
    let out = signed(l.net_bytes_per_s).saturating_add(stream.saturating_mul(standbys));
    let gets = [
        signed(l.cpu_milli),
        if standby && keeps { 0 } else { signed(memory) },
        out.saturating_sub(if standby { stream } else { 0 }),
    ];
    let loses = [
        signed(l.cpu_milli),
        if keeps { 0 } else { signed(memory) },
        // Its old host becomes the standby and receives the stream.
        out.saturating_sub(if standbys > 0 { stream } else { 0 }),
    ];
    for i in 0..3 {
        o.delta_to[i] = o.delta_to[i].saturating_add(gets[i]);
        o.delta_from[i] = o.delta_from[i].saturating_sub(loses[i]);
    }
}

fn accept(w: &mut World, h: usize, o: &Offer) {
    let (before, part) = load(w, h);
    let (after, _) = load_after(w, h, o.delta_from);
    let (to_before, to_after) = (load(w, o.to).0, load_after(w, o.to, o.delta_to).0);
    let mut any = false;
    for &v in &o.vms {
        let vm = &w.vms[v];
        let why = format!(
            "{} is at {} of its {} ({} after the move), {} at {} ({} after); gain {}, cost {} ({} in {:.1} s)",
            w.hosts[h].id(),
            percent(before),
            NAMES[part],
            percent(after),
            w.hosts[o.to].id(),
            percent(to_before),
            percent(to_after),
            o.gain,
            o.cost,
            size(o.bytes),
            o.seconds,
        );
        let action = Action::Migrate {
            vm: vm.id().clone(),
            from: w.host_id(h),
            to: w.host_id(o.to),
            term: vm.vm.state.term,
            cause: MoveCause::Balance,
        };
        any |= w.act(action, why);
    }
    if any {
        for i in 0..3 {
            w.hosts[h].shift[i] = w.hosts[h].shift[i].saturating_add(o.delta_from[i]);
            w.hosts[o.to].shift[i] = w.hosts[o.to].shift[i].saturating_add(o.delta_to[i]);
        }
    }
}
