//! What instances said last. One that is late with its answer, on a host that is busy, is still what it was: it does not start anew.
//! How its protection stands is believed for a moment only.

use crate::records::InstanceReport;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_types::VmId;

/// So long an old answer counts in full.
const BELIEVED: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Default)]
pub struct Heard(Mutex<HashMap<VmId, Last>>);

struct Last {
    /// The process that said so, if its number is known.
    pid: Option<u32>,
    at: Instant,
    report: InstanceReport,
}

impl Heard {
    /// It answered.
    pub fn note(&self, vm: &VmId, pid: Option<u32>, at: Instant, report: &InstanceReport) {
        let last = Last {
            pid,
            at,
            report: report.clone(),
        };
        self.lock().insert(vm.clone(), last);
    }

    /// It runs, and does not answer: what is known of this process.
    pub fn instead(&self, vm: &VmId, pid: Option<u32>, now: Instant) -> Option<InstanceReport> {
        let all = self.lock();
        let last = all.get(vm).filter(|l| pid.is_some() && l.pid == pid)?;
        let mut report = last.report.clone();
        if now.saturating_duration_since(last.at) > BELIEVED {
            (report.protected, report.filled) = (false, false);
        }
        Some(report)
    }

    /// What was heard of it a moment ago, from whichever process.
    pub fn lately(&self, vm: &VmId, now: Instant) -> Option<InstanceReport> {
        let all = self.lock();
        let last = all
            .get(vm)
            .filter(|l| now.saturating_duration_since(l.at) <= BELIEVED);
        last.map(|l| l.report.clone())
    }

    /// Only these are left.
    pub fn keep(&self, wanted: impl Fn(&VmId) -> bool) {
        self.lock().retain(|vm, _| wanted(vm));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Last>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use steadfast_cluster::model::Phase;
    use steadfast_types::Term;

    #[test]
    fn an_instance_that_is_late_is_what_it_was() {
        let vm = VmId::new("web").unwrap();
        let said = InstanceReport {
            phase: Phase::Running,
            term: Term(3),
            protected: true,
            filled: true,
            lag_epochs: 1,
            copying: BTreeMap::new(),
            unfit: BTreeMap::new(),
            stays: None,
            takeover: None,
            service: None,
            load: Default::default(),
            mishaps: Default::default(),
        };
        let (heard, now) = (Heard::default(), Instant::now());
        assert!(heard.instead(&vm, Some(7), now).is_none(), "it never spoke");
        heard.note(&vm, Some(7), now, &said);
        let soon = heard.instead(&vm, Some(7), now + BELIEVED).unwrap();
        assert_eq!(
            (soon.phase, soon.protected, soon.term),
            (Phase::Running, true, Term(3))
        );
        let late = heard.instead(&vm, Some(7), now + BELIEVED * 2).unwrap();
        assert_eq!(
            (late.phase, late.protected, late.filled),
            (Phase::Running, false, false)
        );
        assert!(heard.instead(&vm, Some(8), now).is_none(), "another process");
        heard.note(&vm, None, now, &said);
        assert!(heard.instead(&vm, None, now).is_none(), "who knows which process");
        heard.note(&vm, Some(7), now, &said);
        heard.keep(|_| false);
        assert!(heard.instead(&vm, Some(7), now).is_none());
    }
}
