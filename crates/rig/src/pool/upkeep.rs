//! What an operator does with a pool that is well: empty a host, bring all to another build of the program. The clients of its `ft` VMs
//! are at work meanwhile.

use super::Report;
use super::steps::{ANSWER, ASK_EVERY, Guest, Stage, none, program};
use crate::error::{Result, RigError};
use crate::failover::{ensure, ms};
use serde_json::Value;
use std::time::{Duration, Instant};

const ANOTHER: &str = "/data/another-program";
/// Three servers of one emulated CPU are emptied and filled again, one after the other.
const UPGRADE_BOUND: Duration = Duration::from_secs(900);
/// From a service that fails to its restart.
const SERVICE_BOUND: Duration = Duration::from_secs(120);
/// Most that a VM is without a standby. By the moves themselves it is not: the host that it leaves stays one, in sync, until another one is.
/// But a server that is given a hundred megabytes, and has one emulated CPU, may be given up for a while.
const WITHOUT_STANDBY: Duration = Duration::from_secs(20);

impl Stage<'_, '_> {
    /// The service in an ft VM fails by what its agent says; the agent restarts it, and nobody else notices.
    pub(super) fn service(&mut self, report: &mut Report) -> Result<()> {
        let guest = self.guests.iter().find(|g| g.class == 0).ok_or_else(none)?;
        let name = guest.name.clone();
        self.tell.doing(&format!("the service in {name} is looked after"));
        self.hosts[0].run(&format!(
            "vm health {name} --command service-well --restart-command service-restart --interval-ms 3000 --timeout-ms 3000 \
             --failures 2 --grace-ms 5000 --do restart-service --do alert"
        ))?;
        let is = |wanted: &'static str| {
            let name = name.clone();
            move |s: &Value| {
                let vm = s["vms"].as_array()?.iter().find(|v| v["vm"] == name.as_str())?;
                vm["service"].as_str()?.starts_with(wanted).then_some(())
            }
        };
        self.wait("its agent to say that its service is well", is("healthy"))?;
        self.look_away();
        let before = guest.mini.status(ANSWER)?;
        let began = Instant::now();
        let said = guest.mini.command("service_ill", ANSWER)?;
        ensure(said.trim() == "ok", || said.clone())?;
        loop {
            let now = guest.mini.status(ANSWER)?;
            ensure(now.uptime_ms > before.uptime_ms, || {
                format!("{name} was booted anew")
            })?;
            if now.service_restarts == before.service_restarts + 1 {
                break;
            }
            ensure(began.elapsed() < SERVICE_BOUND, || {
                format!(
                    "the service in {name} was restarted {} times",
                    now.service_restarts
                )
            })?;
            std::thread::sleep(ASK_EVERY);
        }
        self.wait("its service to be well again", is("healthy"))?;
        report.service = began.elapsed();
        self.tell.done(&format!(
            "the service in {name} failed and was restarted by its agent, over vsock: well after {:.0} s; longest wait of a session {}",
            report.service.as_secs_f64(),
            ms(self.longest())
        ));
        Ok(())
    }

    /// Where most ft VMs run.
    pub(super) fn drain(&mut self, report: &mut Report) -> Result<()> {
        let status = self.status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        let count = |host: &str| {
            vms.iter()
                .filter(|v| v["host"] == host && v["class"] == "ft")
                .count()
        };
        let host = self.hosts[..self.workers]
            .iter()
            .max_by_key(|h| count(h.name()))
            .ok_or_else(none)?
            .clone();
        let moved = count(host.name());
        ensure(moved > 0, || format!("no server runs an ft VM: {vms:?}"))?;
        self.tell.doing(&format!("{} is drained", host.name()));
        let before = self.degraded()?;
        self.look_away();
        let began = Instant::now();
        self.hosts[0].run(&format!("host drain {}", host.name()))?;
        self.wait("an empty host", |s| {
            let hosts = s["hosts"].as_array()?;
            let found = hosts.iter().find(|h| h["host"] == host.name())?;
            (found["admin"] == "maintenance").then_some(())
        })?;
        report.drained = began.elapsed();
        self.wait("every ft VM to be protected elsewhere", |s| {
            let vms = s["vms"].as_array()?;
            let mut hot = vms.iter().filter(|v| v["class"] == "ft");
            hot.all(|v| v["protection"] == "protected" && v["host"] != host.name())
                .then_some(())
        })?;
        report.drain_longest = self.longest();
        report.drain_degraded = self.longest_degraded(&before)?;
        ensure(report.drain_degraded < WITHOUT_STANDBY, || {
            format!("a VM was without a standby for {}", ms(report.drain_degraded))
        })?;
        self.drained = Some(host.name().to_string());
        self.tell.done(&format!(
            "{} is empty: {moved} ft VMs moved under load in {:.0} s; longest wait of a session {}, longest without a standby {}",
            host.name(),
            report.drained.as_secs_f64(),
            ms(report.drain_longest),
            ms(report.drain_degraded)
        ));
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<()> {
        let name = self.drained.take().ok_or_else(none)?;
        self.tell.doing(&format!("{name} is used again"));
        let began = Instant::now();
        self.hosts[0].run(&format!("host resume {name}"))?;
        self.well("the pool to be well")?;
        let took = began.elapsed().as_secs_f64();
        self.tell.done(&format!("{name} is used again ({took:.0} s)"));
        Ok(())
    }

    /// One host after the other is emptied, its daemon becomes the other build, and new instances run in that.
    pub(super) fn upgrade(&mut self, report: &mut Report) -> Result<()> {
        self.tell.doing("another build is given to all hosts");
        let first = &self.hosts[0];
        let another = [&program()?[..], b"another build"].concat();
        first.server.put_bytes(&another, ANOTHER, 0o755)?;
        let before = self.degraded()?;
        let old = versions(&self.status()?);
        self.look_away();
        let began = Instant::now();
        first.run(&format!("pool upgrade --binary {ANOTHER}"))?;
        let mut said = String::new();
        loop {
            // The daemon that is asked becomes another in between.
            let tasks = self.asker()?.json("pool tasks")?.unwrap_or_default();
            let task = tasks.as_array().and_then(|all| {
                all.iter()
                    .find(|t| t["id"].as_str().is_some_and(|id| id.starts_with("upgrade-")))
            });
            let (state, text) = task.map_or(("", ""), |t| {
                (
                    t["state"].as_str().unwrap_or_default(),
                    t["text"].as_str().unwrap_or_default(),
                )
            });
            if !text.is_empty() && text != said {
                said = text.to_string();
                self.tell.doing(&said);
            }
            match state {
                "done" => break,
                "failed" | "cancelled" => {
                    return Err(RigError::Unknown(format!("the upgrade has {state}: {said}")));
                }
                _ => {}
            }
            ensure(began.elapsed() < UPGRADE_BOUND, || {
                format!("the upgrade does not end: {said}")
            })?;
            std::thread::sleep(ASK_EVERY);
        }
        self.well("the pool to be well after the upgrade")?;
        report.upgraded = began.elapsed();
        report.upgrade_longest = self.longest();
        report.upgrade_degraded = self.longest_degraded(&before)?;
        ensure(report.upgrade_degraded < WITHOUT_STANDBY, || {
            format!("a VM was without a standby for {}", ms(report.upgrade_degraded))
        })?;
        let new = versions(&self.status()?);
        ensure(
            new.len() == self.hosts.len() && new.iter().all(|v| *v == new[0] && !old.contains(v)),
            || format!("versions before {old:?}, after {new:?}"),
        )?;
        self.tell.done(&format!(
            "all hosts run another build ({:.0} s); longest wait of a session {}, longest without a standby {}",
            report.upgraded.as_secs_f64(),
            ms(report.upgrade_longest),
            ms(report.upgrade_degraded)
        ));
        Ok(())
    }

    pub(super) fn longest_degraded(&self, before: &[Duration]) -> Result<Duration> {
        let now = self.degraded()?;
        let since = now.iter().zip(before).map(|(a, b)| a.saturating_sub(*b));
        Ok(since.max().unwrap_or_default())
    }

    /// How long each ft VM was without a standby so far.
    pub(super) fn degraded(&self) -> Result<Vec<Duration>> {
        let of = |guest: &Guest| {
            let found = self.asker()?.json(&format!("availability {}", guest.name))?;
            let value = found.unwrap_or_default();
            let ms = value["degraded_ms"].as_u64();
            ms.map(Duration::from_millis)
                .ok_or_else(|| RigError::malformed("availability", value))
        };
        self.guests.iter().filter(|g| g.class == 0).map(of).collect()
    }
}

fn versions(status: &Value) -> Vec<String> {
    let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
    let of = |h: &Value| h["version"].as_str().map(str::to_string);
    hosts.iter().filter_map(of).collect()
}
