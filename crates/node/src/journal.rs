//! What was found, decided and done, kept in the store for people: `e/TIME-HOST-N`, bounded by the leader's housekeeping.

use crate::error::Result;
use crate::records::{json, parse};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use steadfast_cluster::events::{Event, Service, What};
use steadfast_store::{Commit, Kv};
use steadfast_types::{HostId, VmId};

/// Events kept. The newest change of service of each VM is kept beyond.
pub const EVENTS_MAX: usize = 5000;
/// All keys of events begin so.
pub const EVENTS: &str = "e/";

/// An event, and which host's daemon says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Who says so; times are of its wall clock.
    pub by: HostId,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// The pool as a whole.
    Pool,
    /// A VM.
    Vm(VmId),
    /// A host.
    Host(HostId),
    /// A VM on a host.
    On(VmId, HostId),
}

impl About {
    /// The VM and the host.
    #[must_use]
    pub fn split(self) -> (Option<VmId>, Option<HostId>) {
        match self {
            Self::Pool => (None, None),
            Self::Vm(vm) => (Some(vm), None),
            Self::Host(host) => (None, Some(host)),
            Self::On(vm, host) => (Some(vm), Some(host)),
        }
    }
}

impl From<&VmId> for About {
    fn from(vm: &VmId) -> Self {
        Self::Vm(vm.clone())
    }
}

impl From<&HostId> for About {
    fn from(host: &HostId) -> Self {
        Self::Host(host.clone())
    }
}

/// Something was done, and took so long.
#[must_use]
pub fn done(action: impl Into<String>, took_ms: u64, error: Option<String>) -> What {
    What::Done {
        action: action.into(),
        took_ms,
        error,
    }
}

/// Writes an event. A failure is only logged: events are for people.
pub fn write(kv: &dyn Kv, told: &mut Told) {
    let n = steadfast_store::random_u64().unwrap_or_default() as u32;
    // Unique in the pool for all purposes of reading, and in order of time.
    told.event.id = told.event.at_ms.saturating_mul(1024) + u64::from(n % 1024);
    told.event.bound();
    let key = format!("{EVENTS}{:015}-{}-{n:08x}", told.event.at_ms, told.by);
    let done = json(told).and_then(|v| Ok(kv.commit(&Commit::default().put(key, v))?));
    if let Err(error) = done {
        tracing::warn!(%error, event = %told.event, "an event could not be kept");
    }
}

/// All events, oldest first. One that cannot be read (of another version, say) is left out.
///
/// # Errors
/// The store's.
pub fn all(kv: &dyn Kv) -> Result<Vec<Told>> {
    let entries = kv.list(EVENTS)?.entries;
    let read = |e: &steadfast_store::Entry| parse::<Told>(&e.key, &e.value).ok();
    Ok(entries.iter().filter_map(read).collect())
}

/// The service of each VM as it was last told.
#[must_use]
pub fn services(events: &[Told]) -> HashMap<VmId, Service> {
    let change = |t: &Told| match (&t.event.vm, &t.event.what) {
        (Some(vm), What::Service { now }) => Some((vm.clone(), *now)),
        _ => None,
    };
    events.iter().filter_map(change).collect()
}

/// Keys of the oldest events beyond `max`; not those that alone tell how the service of a VM
/// in `known` is.
///
/// # Errors
/// The store's.
pub fn surplus(kv: &dyn Kv, max: usize, known: &HashSet<VmId>) -> Result<Vec<String>> {
    let entries = kv.list(EVENTS)?.entries;
    let surplus = entries.len().saturating_sub(max);
    if surplus == 0 {
        return Ok(Vec::new());
    }
    let mut last: HashMap<VmId, &str> = HashMap::new();
    for e in &entries {
        if let Ok(t) = parse::<Told>(&e.key, &e.value)
            && let (Some(vm), What::Service { .. }) = (t.event.vm, t.event.what)
            && known.contains(&vm)
        {
            last.insert(vm, &e.key);
        }
    }
    let keep: HashSet<&str> = last.into_values().collect();
    let old = entries[..surplus].iter().map(|e| &e.key);
    Ok(old.filter(|key| !keep.contains(key.as_str())).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(at_ms: u64, vm: &str, what: What) -> Told {
        let vm = VmId::new(vm).unwrap();
        Told {
            by: HostId::new("a").unwrap(),
            event: Event::new(at_ms, Some(vm), None, what, "because"),
        }
    }

    #[test]
    fn events_come_back_in_order_and_the_last_service_outlives_the_bound() {
        let folder = tempfile::tempdir().unwrap();
        let kv = steadfast_store::open(&steadfast_store::StoreSpec::Folder(folder.path().into())).unwrap();
        write(&*kv, &mut told(10, "quiet", What::Service { now: Service::Up }));
        write(&*kv, &mut told(11, "db", What::Service { now: Service::Up }));
        write(&*kv, &mut told(12, "db", What::Service { now: Service::Down }));
        for at in 0..20 {
            write(&*kv, &mut told(100 + at, "db", What::Note));
        }
        let events = all(&*kv).unwrap();
        assert_eq!(events.len(), 23);
        assert!(events.windows(2).all(|w| w[0].event.at_ms <= w[1].event.at_ms));
        let now = services(&events);
        assert_eq!(now[&VmId::new("quiet").unwrap()], Service::Up);
        assert_eq!(now[&VmId::new("db").unwrap()], Service::Down);
        let known = ["quiet", "db"].map(|vm| VmId::new(vm).unwrap()).into();
        let old = surplus(&*kv, 20, &known).unwrap();
        assert_eq!(old.len(), 1, "only the older change of db may go: {old:?}");
        let all = surplus(&*kv, 20, &HashSet::new()).unwrap();
        assert_eq!(
            all.len(),
            3,
            "of VMs that are gone nothing is kept beyond: {all:?}"
        );
        assert!(old[0].starts_with("e/000000000000011-"), "{old:?}");
    }
}
