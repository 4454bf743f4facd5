//! A hot host is relieved: busy VMs that are all on one server, while another one has nothing to do.

use super::Report;
use super::steps::{ANSWER, ASK_EVERY, Stage, none};
use crate::error::Result;
use crate::failover::ensure;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A host must be hot for a minute, measured over half a minute; then memory is copied between two servers that are busy.
const RELIEVED: Duration = Duration::from_secs(600);
/// For so long nothing may go back and forth after that.
const QUIET: Duration = Duration::from_secs(240);

impl Stage<'_, '_> {
    /// Leaves one server to be used.
    pub(super) fn crowd(&mut self) -> Result<()> {
        let other = self.hosts.get(1).ok_or_else(none)?.name();
        self.hosts[0].run(&format!("host drain {other}"))?;
        self.wait("an empty host", |s| {
            let hosts = s["hosts"].as_array()?;
            let found = hosts.iter().find(|h| h["host"] == other)?;
            (found["admin"] == "maintenance").then_some(())
        })
    }

    pub(super) fn balance(&mut self, report: &mut Report) -> Result<()> {
        let (crowded, other) = (self.hosts[0].name(), self.hosts[1].name());
        let at_first = self.places()?;
        ensure(at_first.values().all(|h| h == crowded), || {
            format!("not all VMs are on {crowded}: {at_first:?}")
        })?;
        self.tell
            .doing(&format!("{other} is used again, and VMs may be moved"));
        self.hosts[0].run(&format!("host resume {other}"))?;
        self.hosts[0].run("pool set --balance true")?;
        let began = Instant::now();
        let mut moves: BTreeMap<String, usize> = BTreeMap::new();
        let mut last = at_first;
        let mut relieved = None;
        while relieved.is_none_or(|at: Instant| at.elapsed() < QUIET) {
            let now = self.places()?;
            for (vm, host) in &now {
                if last.get(vm).is_some_and(|h| h != host) {
                    *moves.entry(vm.clone()).or_default() += 1;
                    if relieved.is_none() {
                        relieved = Some(Instant::now());
                        report.relieved = began.elapsed();
                    }
                }
            }
            last = now;
            ensure(relieved.is_some() || began.elapsed() < RELIEVED, || {
                format!("nothing was moved off {crowded} within {} s", RELIEVED.as_secs())
            })?;
            std::thread::sleep(ASK_EVERY);
        }
        ensure(moves.values().all(|n| *n == 1), || {
            format!("VMs go back and forth: {moves:?}")
        })?;
        ensure(last.values().any(|h| h == crowded), || {
            format!("all left: {last:?}")
        })?;
        for guest in &self.guests {
            guest.mini.status(ANSWER)?;
        }
        let plan = self.hosts[0].run("events --limit 200")?;
        let why = plan
            .lines()
            .find(|l| l.contains("decided: move") || l.contains("move ") && l.contains("% of its CPU"));
        self.tell.done(&format!(
            "{crowded} was hot with all VMs; {} of them moved to {other} by itself, the first after {:.0} s, and none came back within {} s",
            moves.len(),
            report.relieved.as_secs_f64(),
            QUIET.as_secs()
        ));
        self.tell.more(why.unwrap_or_default());
        Ok(())
    }

    /// Where each VM runs; one that is between two hosts is left out.
    fn places(&self) -> Result<BTreeMap<String, String>> {
        let status = self.status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        let text = |v: &Value| v.as_str().map(str::to_string);
        Ok(vms
            .iter()
            .filter_map(|v| Some((text(&v["vm"])?, text(&v["host"])?)))
            .collect())
    }
}
