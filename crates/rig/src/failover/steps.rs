//! The steps of the play.

use super::measure::{self, Failover, Protection, Stream};
use super::{Options, Report, Tell, ensure, ms};
use crate::error::{IoContext, Result, RigError};
use crate::etcd;
use crate::host::qemu::DiskCache;
use crate::host::server::Server;
use crate::load::Load;
use crate::protected::Protected;
use crate::rig::Rig;
use crate::vm::Mini;
use serde_json::Value;
use std::time::{Duration, Instant};

const BOOT_BOUND: Duration = Duration::from_secs(180);
const COPY_BOUND: Duration = Duration::from_secs(180);
const FAILOVER_BOUND: Duration = Duration::from_secs(60);
const STATUS_BOUND: Duration = Duration::from_secs(60);
/// Replicas may differ while the last epochs are being applied.
const EQUAL_BOUND: Duration = Duration::from_secs(60);
/// Answers that every client must have had again before a failover counts as over.
const ANSWERS: u64 = 2;

/// What all steps need.
struct Stage<'a, 'r> {
    rig: &'r Rig,
    vm: Protected<'r>,
    load: Load,
    options: &'a Options,
    tell: &'a mut dyn Tell,
    /// Term of the primary, as last seen: it must grow with each change of hands and with nothing else unseen.
    term: u64,
}

pub(super) fn play(options: &Options, tell: &mut dyn Tell) -> Result<Report> {
    tell.doing("three simulated servers start");
    let began = Instant::now();
    let rig = Rig::builder()
        .servers(3)
        .memory_mib(options.server_mib)
        .service_disk(true)
        // Servers are killed, never this machine: what reached its page cache is as durable as it needs to be.
        .data_cache(DiskCache::Unsafe)
        .start_without_waiting()?;
    for server in rig.servers() {
        server.wait_ready(BOOT_BOUND)?;
    }
    let kernel = rig.kernel().release.clone();
    etcd::start(rig.servers())?;
    tell.done(&format!(
        "three servers are up ({:.1} s): Debian's kernel {kernel}, each with its own /dev/kvm, disk, etcd, two replication networks",
        began.elapsed().as_secs_f64()
    ));
    let report = on_stage(&rig, options, tell)?;
    let left = leftovers(&rig)?;
    ensure(left.is_empty(), || {
        format!("processes are left on servers: {left}")
    })?;
    rig.end();
    ensure(rig.servers().iter().all(|s| !s.is_on()), || {
        "a server does not go off".to_string()
    })?;
    tell.done("the VM is stopped; no process of it is left on any server, and no server either");
    Ok(report)
}

fn on_stage(rig: &Rig, options: &Options, tell: &mut dyn Tell) -> Result<Report> {
    let [s1, s2, s3] = [rig.server(0), rig.server(1), rig.server(2)];
    tell.doing("a Linux guest boots on s1 under our monitor");
    let began = Instant::now();
    let vm = Protected::start(rig, s1, options.plan.clone(), options.logs.is_some())?;
    let plan = &options.plan;
    let load =
        Load::start(rig.client()?, plan.address, plan.mac, &options.load, BOOT_BOUND).map_err(|e| {
            let why = vm.trouble(s1, "the service", began.elapsed());
            RigError::Unknown(format!("{e}; {why}"))
        })?;
    let boot = began.elapsed();
    tell.done(&format!(
        "VM {} runs on s1 ({:.1} s to the first answers): redis with appendfsync always, a web server, a TCP session",
        plan.name,
        boot.as_secs_f64()
    ));
    let mut stage = Stage {
        rig,
        vm,
        load,
        options,
        tell,
        term: 0,
    };
    stage.unprotected(s1)?;
    let mut report = Report {
        boot,
        protections: Vec::new(),
        failovers: Vec::new(),
        audited: crate::load::Audited::default(),
    };
    stage.tell.title("Protect it");
    report.protections.push(stage.protect(s1, s2, true)?);
    stage.tell.title("The axe: s1 dies");
    report
        .failovers
        .push(stage.kill(s1, s2, if options.leader_dies { s1 } else { s3 })?);
    stage.tell.title("Protect it again, on s3");
    stage.power_on(s1)?;
    report.protections.push(stage.protect(s2, s3, true)?);
    stage.tell.title("The axe again: s2 dies");
    report.failovers.push(stage.kill(s2, s3, s3)?);
    stage.tell.title("Protect it on s1, which is back, and audit");
    report.protections.push(stage.protect(s3, s1, false)?);
    report.audited = stage.audit(s3, s1)?;
    Ok(report)
}

impl Stage<'_, '_> {
    fn unprotected(&mut self, on: &Server) -> Result<()> {
        self.tell.doing("clients write, and nobody mirrors it yet");
        self.load.look_away();
        self.look()?;
        let seen = self.load.seen();
        let term = self.vm.wait_status(on, "running", STATUS_BOUND, |s| {
            let p = &s["protocol"];
            (p["role"] == "primary" && p["protected"] == false).then(|| p["term"].as_u64())
        })?;
        self.term = term.unwrap_or(0);
        self.tell.done(&format!(
            "clients write: {} redis writes, one in {} (median); its status says: not protected",
            seen.writes.measured,
            ms(seen.writes.median)
        ));
        Ok(())
    }

    /// Lets some time pass under load; a client with an error ends it.
    fn look(&self) -> Result<()> {
        let until = Instant::now() + self.options.look;
        while Instant::now() < until {
            self.load.alive()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn protect(&mut self, primary: &Server, standby: &Server, look: bool) -> Result<Protection> {
        let (from, to) = (primary.name(), standby.name());
        self.tell.doing(&format!("a standby is made on {to}"));
        let began = Instant::now();
        self.vm.protect(standby)?;
        let mut copied_bytes = 0;
        let tell = &mut *self.tell;
        let term = self.vm.wait_status(primary, "protected", COPY_BOUND, |status| {
            let p = &status["protocol"];
            let member = p["members"].as_array()?.iter().find(|m| m["host"] == to)?;
            if let Some(left) = member["copying_bytes"].as_u64() {
                copied_bytes = copied_bytes.max(left);
                tell.doing(&format!("a standby is made on {to}: {} MiB to copy", left >> 20));
            }
            (p["protected"] == true && member["in_sync"] == true).then(|| p["term"].as_u64())
        });
        let term = term.map_err(|e| {
            let why = self.vm.trouble(standby, "the copy", began.elapsed());
            RigError::Unknown(format!("{e}; {why}"))
        })?;
        let warm_up = began.elapsed();
        self.load.alive()?;
        self.term = term.unwrap_or(0);
        self.tell.done(&format!(
            "protected: {to} mirrors memory, CPU, devices and disk of the running VM ({:.1} s, one command on {to})",
            warm_up.as_secs_f64()
        ));
        let stream = if look { Some(self.stream(primary)?) } else { None };
        if let Some(s) = &stream {
            self.tell.more(&format!(
                "{from} to {to}: {:.0} epochs/s of {:.0} pages; the guest pauses {:.1} ms for each; outputs wait {} for their commit",
                s.epochs_per_s,
                s.pages_per_epoch,
                s.pause.as_secs_f64() * 1e3,
                ms(s.lag)
            ));
            self.tell.more(&format!(
                "clients: one redis write in {} (median), synced on both servers' disks",
                ms(s.seen.writes.median)
            ));
        }
        Ok(Protection {
            standby: to.to_string(),
            warm_up,
            copied_bytes,
            stream,
        })
    }

    fn stream(&mut self, primary: &Server) -> Result<Stream> {
        self.tell
            .doing("clients write, and every answer waits for its epoch");
        let look = |s: &Value| (s["protocol"]["protected"] == true).then(|| s.clone());
        let before = self.vm.wait_status(primary, "protected", STATUS_BOUND, look)?;
        self.load.look_away();
        self.look()?;
        let seen = self.load.seen();
        let after = self.vm.wait_status(primary, "protected", STATUS_BOUND, look)?;
        measure::stream(&before, &after, seen)
    }

    /// The server's power is gone; the standby must go on.
    fn kill(&mut self, server: &Server, to: &Server, leader: &Server) -> Result<Failover> {
        self.ready_for_the_axe(server, to, leader)?;
        self.tell.doing(&format!("{} is killed", server.name()));
        self.load.look_away();
        let killed = Instant::now();
        server.kill()?;
        // At the clients first: a question to the new server costs the time that it needs now.
        self.load.wait_answers(ANSWERS, FAILOVER_BOUND).map_err(|e| {
            let _ = self.keep_log(to);
            let why = self.vm.trouble(to, "the takeover", killed.elapsed());
            RigError::Unknown(format!("{e}; {why}"))
        })?;
        let seen = self.load.seen();
        let silence = self.load.frames().longest_silence(killed);
        let silence = silence.ok_or_else(|| RigError::Unknown("the guest says nothing".to_string()))?;
        let status = self.vm.wait_status(to, "the takeover", STATUS_BOUND, |s| {
            let done =
                s["protocol"]["role"] == "primary" && s["timeline"]["takeover"]["first_output_us"].is_u64();
            done.then(|| s.clone())
        })?;
        self.keep_log(to)?;
        let failover = Failover::of(server.name(), to.name(), &status, silence, seen)?;
        let term = status["protocol"]["term"].as_u64().unwrap_or(0);
        ensure(term > self.term, || {
            format!("{} runs under term {term}, not above {}", to.name(), self.term)
        })?;
        self.term = term;
        failover.check()?;
        self.checked()?;
        self.tell.done(&format!(
            "{} was killed (SIGKILL); {} goes on from the last committed epoch, clients were answered again",
            failover.killed, failover.to
        ));
        self.tell.more(&format!(
            "failover {} = detect {} + grant {} + resume {} + first packet {}; the cable was silent for {}",
            ms(failover.total()),
            ms(failover.detect),
            ms(failover.grant),
            ms(failover.resume),
            ms(failover.first_packet),
            ms(failover.silence)
        ));
        self.tell.more(&format!(
            "the longest wait of a client: redis {}, web {}, session {}",
            ms(failover.seen.writes.longest),
            ms(failover.seen.pages.longest),
            ms(failover.seen.step_longest)
        ));
        Ok(failover)
    }

    fn keep_log(&self, server: &Server) -> Result<()> {
        let Some(folder) = &self.options.logs else {
            return Ok(());
        };
        std::fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
        server.get(&self.vm.log(), &folder.join(format!("{}.log", server.name())))
    }

    /// No takeover has happened unseen, and the store survives what comes.
    fn ready_for_the_axe(&self, server: &Server, to: &Server, leader: &Server) -> Result<()> {
        self.vm
            .wait_status(server, "still the primary, and protected", STATUS_BOUND, |s| {
                let p = &s["protocol"];
                (p["role"] == "primary" && p["protected"] == true).then_some(())
            })?;
        let role = self.vm.status(to)?.map(|s| s["protocol"]["role"].clone());
        ensure(role.as_ref().is_some_and(|r| r == "standby"), || {
            format!("{} should be the standby; it says {role:?}", to.name())
        })?;
        etcd::move_leader(self.rig.servers(), leader)
    }

    fn power_on(&mut self, server: &Server) -> Result<()> {
        self.tell.doing(&format!("{} is powered on again", server.name()));
        let began = Instant::now();
        server.start()?;
        etcd::start_member(server, self.rig.servers())?;
        etcd::wait_ready(server, etcd::READY_BOUND)?;
        self.tell.done(&format!(
            "{} is powered on again and back in the store ({:.1} s): two of three must be, or nobody may take over",
            server.name(),
            began.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// What the guest has found out about itself.
    fn checked(&self) -> Result<()> {
        let status = Mini::new(self.rig.client()?, self.options.plan.address).status(STATUS_BOUND)?;
        ensure(status.faults.is_empty() && status.clock_jumps == 0, || {
            format!(
                "the guest found {} clock jumps and: {}",
                status.clock_jumps,
                status.faults.join("; ")
            )
        })
    }

    fn audit(self, primary: &Server, standby: &Server) -> Result<crate::load::Audited> {
        let Stage {
            vm,
            load,
            tell,
            rig,
            options,
            ..
        } = self;
        tell.doing("every write is read back");
        let audited = load.end()?;
        tell.done(&format!(
            "audit: {} redis writes, each there once and in order; {} pages; one TCP session of {} steps; 0 lost, 0 repeated, 0 reset",
            audited.writes, audited.pages, audited.steps
        ));
        tell.doing("the replicas are compared");
        let hash =
            |server: &Server| server.exec_within(&format!("sync; sha256sum < {}", vm.disk()), EQUAL_BOUND);
        let began = Instant::now();
        loop {
            let (one, other) = (hash(primary)?, hash(standby)?);
            if one == other {
                tell.done(&format!(
                    "the disks of {} and {} are equal ({})",
                    primary.name(),
                    standby.name(),
                    one.get(..16).unwrap_or(&one)
                ));
                break;
            }
            ensure(began.elapsed() < EQUAL_BOUND, || {
                format!(
                    "the disks differ: {} has {one}, {} has {other}",
                    primary.name(),
                    standby.name()
                )
            })?;
            std::thread::sleep(Duration::from_millis(500));
        }
        let status = Mini::new(rig.client()?, options.plan.address).status(STATUS_BOUND)?;
        ensure(status.faults.is_empty(), || status.faults.join("; "))?;
        // The standby first: it must not take over from a primary that is stopped.
        for server in [standby, primary] {
            vm.stop(server)?;
        }
        Ok(audited)
    }
}

/// Processes of VMs on the servers that are on.
pub(crate) fn leftovers(rig: &Rig) -> Result<String> {
    let mut found = Vec::new();
    for server in rig.servers().iter().filter(|s| s.is_ready()) {
        let list = server.exec("ps -eo pid,args | grep '[s]teadfast vmm' || true")?;
        if !list.is_empty() {
            found.push(format!("{}: {list}", server.name()));
        }
    }
    Ok(found.join("; "))
}

/// Processes of servers that are on which died of a fault of their own since the server started: the kernel tells of each that
/// would leave a core dump, and of what it killed for want of memory; ours say when a thread panics.
pub(crate) fn crashes(rig: &Rig) -> Result<String> {
    const LOOK: &str = "dmesg | grep -E 'segfault at|general protection fault|trap invalid opcode|Out of memory: Killed|oom-kill'; \
                        grep -H 'panicked at [^ ]*[.]rs:' /run/*.log 2>/dev/null; ls /core* /run/core* /data/core* 2>/dev/null; true";
    let mut found = Vec::new();
    for server in rig.servers().iter().filter(|s| s.is_ready()) {
        let list = server.exec(LOOK)?;
        if !list.is_empty() {
            found.push(format!("{}: {list}", server.name()));
        }
    }
    Ok(found.join("; "))
}
