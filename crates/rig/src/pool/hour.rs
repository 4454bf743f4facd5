//! Load that comes and goes on servers that are well: nobody takes a VM over, and no host counts as dead (I7).

use super::Report;
use super::steps::{ASK_EVERY, SUSPECT, Stage, none};
use crate::error::Result;
use crate::failover::{ensure, ms};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One server after the other, and now and then none, is busy for so long.
const TURN: Duration = Duration::from_secs(40);
/// Where what a server is busy with says what it has to say.
const LOG: &str = "/data/busy.log";

/// What keeps a server with one CPU busy, its CPU or its disk; `{}`: seconds.
const LOADS: [(&str, &str); 4] = [
    ("computes", "timeout {} sh -c 'while :; do :; done'"),
    (
        "computes three times over",
        "timeout {} sh -c '(while :; do :; done) & (while :; do :; done) & while :; do :; done'",
    ),
    (
        "writes to its disk",
        "timeout {} sh -c 'while :; do dd if=/dev/zero of=/data/busy bs=64k count=400 conv=fsync; done'",
    ),
    (
        "starts processes",
        "timeout {} sh -c 'while :; do cat /proc/self/maps > /dev/null; done'",
    ),
];

/// Where each `ft` VM runs, and under which term the right to it was given last.
type Owners = BTreeMap<String, (String, u64)>;

impl Stage<'_, '_> {
    /// The clients are at work all the while.
    pub(super) fn hour(&mut self, how_long: Duration, report: &mut Report) -> Result<()> {
        let at_first = self.owners()?;
        let hot = self.guests.iter().filter(|g| g.class == 0).count();
        ensure(hot > 0 && at_first.len() == hot, || {
            format!("the pool tells of {at_first:?}, and {hot} ft VMs run")
        })?;
        let before = self.degraded()?;
        self.look_away();
        let began = Instant::now();
        let (mut turn, mut looked, mut turned) = (0, 0_u64, None::<Instant>);
        let mut last = at_first.clone();
        while began.elapsed() < how_long {
            if turned.is_none_or(|at| at.elapsed() >= TURN) {
                turned = Some(Instant::now());
                self.next_load(turn)?;
                turn += 1;
            }
            let status = self.status()?;
            let now = owners(&status);
            let place = |all: &Owners| {
                all.iter()
                    .map(|(vm, (host, _))| (vm.clone(), host.clone()))
                    .collect::<Vec<_>>()
            };
            ensure(place(&now) == place(&at_first), || {
                format!(
                    "a false failover after {:.0} s: {at_first:?} became {now:?}",
                    began.elapsed().as_secs_f64()
                )
            })?;
            last = now;
            let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
            let dead = |h: &&Value| h["health"].as_str().is_some_and(|s| s.starts_with("dead"));
            ensure(
                hosts.len() == self.hosts.len() && !hosts.iter().any(|h| dead(&h)),
                || format!("a host that is well is missing, or counts as dead: {hosts:?}"),
            )?;
            looked += 1;
            std::thread::sleep(ASK_EVERY);
        }
        self.well("the pool to be well")?;
        report.hour = began.elapsed();
        report.hour_longest = self.longest();
        report.hour_degraded = self.longest_degraded(&before)?;
        // Each grant is a term: a standby that was given up and taken again is two.
        let grants: u64 = last
            .iter()
            .map(|(vm, (_, term))| term.saturating_sub(at_first.get(vm).map_or(*term, |f| f.1)))
            .sum();
        self.tell.done(&format!(
            "{:.0} minutes of load, looked at {looked} times: every VM is where it was, no host counted as dead",
            report.hour.as_secs_f64() / 60.0
        ));
        self.tell.more(&format!(
            "longest wait of a session {} (a host counts as silent after {}); {} changes of who is in sync, longest without a standby {}",
            ms(report.hour_longest),
            ms(SUSPECT),
            grants,
            ms(report.hour_degraded)
        ));
        Ok(())
    }

    /// Of five turns one is quiet.
    fn next_load(&mut self, turn: usize) -> Result<()> {
        let Some((what, load)) = LOADS.get(turn % (LOADS.len() + 1)) else {
            self.tell.doing("no server is busy");
            return Ok(());
        };
        let host = self.hosts.get(turn % self.workers).ok_or_else(none)?;
        let command = load.replace("{}", &TURN.as_secs().to_string());
        host.server.spawn(&command, LOG)?;
        self.tell.doing(&format!("{} {what}", host.name()));
        Ok(())
    }

    fn owners(&self) -> Result<Owners> {
        Ok(owners(&self.status()?))
    }
}

fn owners(status: &Value) -> Owners {
    let vms = status["vms"].as_array().cloned().unwrap_or_default();
    let hot = vms.iter().filter(|v| v["class"] == "ft");
    hot.filter_map(|v| {
        let text = |v: &Value| v.as_str().map(str::to_string);
        Some((text(&v["vm"])?, (text(&v["host"])?, v["term"].as_u64()?)))
    })
    .collect()
}
