//! From a snapshot to decisions.
//!
//! ```text
//!   hosts::mark       what was observed is written down; hosts that expect to fail are emptied
//!   hosts::upgrade    the rolling upgrade's next step
//!   moves::cancel     migrations that cannot succeed
//!   power::leftovers  instances that should not be; VMs that shall be off
//!   recover           lost VMs: promote, reset, boot
//!   protect           standbys: add, remove
//!   moves             drain, relief, back home
//!   power::on         new starts, with admission
//!   balance           only if nothing more urgent was decided
//!   hosts::drained    empty hosts go into maintenance
//!   alarms
//! ```
//! A pass sees the effects of its own earlier decisions. Passes are repeated until one decides nothing, so that the whole is a
//! fixpoint; the second pass usually finds nothing.

mod admission;
mod alarms;
mod balance;
mod fit;
mod hosts;
mod moves;
mod power;
mod protect;
mod recover;
mod reserve;
mod world;

use crate::action::{Because, Decisions, Refusal, Wanted};
use crate::model::{Power, Snapshot, Vm, VmSpecRecord, VmState};
use steadfast_types::HostId;
use world::World;

/// More passes than any chain of decisions needs; a bound, not a number to tune.
const PASSES_MAX: usize = 8;

/// What to do now. See the crate's documentation for what holds.
///
/// Time grows with hosts times the VMs that need a new place, plus the sizes of both (see `docs/pool.md` for numbers).
#[must_use]
pub fn decide(snapshot: &Snapshot) -> Decisions {
    let mut w = World::new(snapshot);
    for _ in 0..PASSES_MAX {
        let before = w.out.actions.len();
        w.out.refusals.clear();
        w.alarms_wanted.clear();
        pass(&mut w);
        if w.out.actions.len() == before {
            break;
        }
    }
    w.out
}

fn pass(w: &mut World) {
    let before = w.out.actions.len();
    hosts::mark(w);
    hosts::upgrade(w);
    moves::cancel_hopeless(w);
    power::end_leftovers(w);
    power::power_off(w);
    recover::recover(w);
    protect::protect(w);
    moves::drain(w);
    moves::relieve(w);
    moves::bring_back(w);
    power::power_on(w);
    if w.out.actions.len() == before {
        balance::balance(w);
    }
    hosts::drained(w);
    alarms::update(w);
}

/// Where a VM would start and stand by.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Placement {
    /// The host that would run it.
    pub host: HostId,
    /// The hosts that would stand by.
    pub standbys: Vec<HostId>,
}

/// Whether a VM that is new (or off) may be powered on now, and where it would be: what `vm create`, `vm start` and
/// `protect` ask before they write anything.
///
/// For a VM that runs, the question is whether it could be admitted anew with this specification, for example with a higher
/// class; its present copies stay where they are.
///
/// # Errors
/// The refusal, with its reason and the shortfall in numbers.
pub fn admit(snapshot: &Snapshot, spec: &VmSpecRecord) -> Result<Placement, Box<Refusal>> {
    let mut with = snapshot.clone();
    let state = snapshot
        .vms
        .get(&spec.id)
        .map(|v| v.state.clone())
        .unwrap_or_default();
    let mut spec = spec.clone();
    spec.power = Power::On;
    let id = spec.id.clone();
    let running = state.owner.clone();
    let mut state = VmState { owner: None, ..state };
    if running.is_none() {
        // What is left of it on its hosts is on its way out. It is started once that is gone; it is no reason to refuse.
        state.instances.clear();
        state.standbys.clear();
    }
    with.vms.insert(id.clone(), Vm { spec, state });
    let mut w = World::new(&with);
    let refusal = |because: Because| {
        Box::new(Refusal {
            vm: Some(id.clone()),
            host: None,
            wanted: Wanted::PowerOn,
            because,
        })
    };
    let Some(v) = w.vms.iter().position(|vm| *vm.id() == id) else {
        return Err(refusal(Because::Other("it is not in the snapshot".into())));
    };
    let (host, standbys) = match running.as_ref().and_then(|h| w.host(h)) {
        Some(owner) => (owner, power::plan_protection(&mut w, v, owner).map_err(refusal)?),
        None => power::plan_power_on(&mut w, v).map_err(refusal)?,
    };
    let mut all: Vec<HostId> = w.vms[v].standbys.iter().map(|&h| w.host_id(h)).collect();
    all.extend(standbys.iter().map(|&h| w.host_id(h)));
    all.retain(|h| *h != w.host_id(host));
    Ok(Placement {
        host: w.host_id(host),
        standbys: all,
    })
}
