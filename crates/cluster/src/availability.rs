//! Availability of a VM, computed from its events: how long it was up, degraded, down, and the longest gap.

use crate::events::{Event, Service, What};
use serde::{Deserialize, Serialize};
use steadfast_types::VmId;

/// A report over `from_ms..to_ms`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Running with full protection, ms.
    pub up_ms: u64,
    /// Running with less, ms.
    pub degraded_ms: u64,
    /// Not running although it should, ms.
    pub down_ms: u64,
    /// Off as wanted, ms.
    pub off_ms: u64,
    /// Before the first event, or nobody looked: not known, ms. It counts for nothing.
    pub unknown_ms: u64,
    /// How often it went down.
    pub gaps: u32,
    /// The longest time down without a break, ms.
    pub longest_gap_ms: u64,
    /// The share of wanted time in which it ran; none when it was never wanted.
    pub availability: Option<f64>,
    /// The same in nines: 0.999 is 3. With no time down: what the length of the report allows to claim.
    pub nines: Option<f64>,
}

/// Computes the report of one VM. `events` in order of time, as the log keeps them; others' events are passed over. The state
/// before `from_ms` is taken from the last earlier event, if there is one.
#[must_use]
pub fn report<'a>(events: impl Iterator<Item = &'a Event>, vm: &VmId, from_ms: u64, to_ms: u64) -> Report {
    let mut r = Report::default();
    let mut state: Option<Service> = None;
    let mut at = from_ms;
    let mut gap = 0u64;
    for e in events.filter(|e| e.vm.as_ref() == Some(vm)) {
        let What::Service { now } = e.what else {
            continue;
        };
        if e.at_ms >= to_ms {
            break;
        }
        // A clock set back does not make time run backwards here.
        let until = e.at_ms.max(at);
        spend(&mut r, state, until - at, &mut gap);
        if now == Service::Down && state != Some(Service::Down) {
            r.gaps += 1;
        }
        state = Some(now);
        at = until;
    }
    spend(&mut r, state, to_ms.saturating_sub(at), &mut gap);
    let ran = r.up_ms.saturating_add(r.degraded_ms);
    let wanted = ran.saturating_add(r.down_ms);
    if wanted > 0 {
        r.availability = Some(ran as f64 / wanted as f64);
        // Never more nines than the time observed can show: one millisecond down is the least that could be told.
        let down = r.down_ms.max(1) as f64 / wanted as f64;
        r.nines = Some(-down.min(1.0).log10());
    }
    r
}

fn spend(r: &mut Report, state: Option<Service>, ms: u64, gap: &mut u64) {
    match state {
        None | Some(Service::Unknown) => r.unknown_ms += ms,
        Some(Service::Up) => r.up_ms += ms,
        Some(Service::Degraded) => r.degraded_ms += ms,
        Some(Service::Off) => r.off_ms += ms,
        Some(Service::Down) => {
            r.down_ms += ms;
            *gap += ms;
            r.longest_gap_ms = r.longest_gap_ms.max(*gap);
            return;
        }
    }
    *gap = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(list: &[(u64, Service)]) -> Vec<Event> {
        let event = |&(at_ms, now): &(u64, Service)| Event {
            id: 0,
            at_ms,
            vm: "db".parse().ok(),
            host: None,
            what: What::Service { now },
            why: String::new(),
            cause: None,
        };
        list.iter().map(event).collect()
    }

    fn of(list: &[(u64, Service)], from: u64, to: u64) -> Report {
        report(events(list).iter(), &"db".parse().unwrap(), from, to)
    }

    #[test]
    fn time_is_split_by_state_and_gaps_are_joined() {
        use Service::{Degraded, Down, Off, Up};
        let list = [
            (100, Up),
            (500, Down),
            (520, Down),
            (530, Degraded),
            (600, Up),
            (700, Off),
            (900, Down),
            (905, Up),
        ];
        let r = of(&list, 0, 1_000);
        assert_eq!(
            (r.unknown_ms, r.up_ms, r.degraded_ms, r.down_ms, r.off_ms),
            (100, 595, 70, 35, 200)
        );
        assert_eq!((r.gaps, r.longest_gap_ms), (2, 30));
        let wanted = 595.0 + 70.0 + 35.0;
        assert!((r.availability.unwrap() - (1.0 - 35.0 / wanted)).abs() < 1e-9);
        assert!((r.nines.unwrap() - (wanted / 35.0f64).log10()).abs() < 1e-9);
        // A window that begins in the middle of a state.
        let r = of(&list, 510, 525);
        assert_eq!((r.down_ms, r.gaps, r.unknown_ms), (15, 1, 0));
    }

    #[test]
    fn nothing_known_and_never_wanted_claim_nothing() {
        assert_eq!(of(&[], 0, 1_000).nines, None);
        assert_eq!(of(&[(0, Service::Off)], 0, 1_000).availability, None);
        let r = of(&[(0, Service::Up)], 0, 1_000_000);
        assert_eq!(r.availability, Some(1.0));
        assert!(
            (r.nines.unwrap() - 6.0).abs() < 1e-9,
            "as many nines as the time can show"
        );
        let back = of(
            &[(500, Service::Up), (100, Service::Down), (600, Service::Up)],
            0,
            1_000,
        );
        assert_eq!((back.up_ms, back.down_ms), (400, 100));
    }
}
