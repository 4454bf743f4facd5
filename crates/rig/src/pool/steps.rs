//! The steps of the play.

use super::{Act, Options, PoolHost, Report};
use crate::artifacts::initramfs::{steadfast_program, stripped};
use crate::error::{IoContext, Result, RigError};
use crate::failover::{Tell, ensure, ms};
use crate::host::qemu::DiskCache;
use crate::rig::Rig;
use crate::vm::{CPU, Counting, Mini};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

pub(super) const BOOT_BOUND: Duration = Duration::from_secs(180);
const BOUND: Duration = Duration::from_secs(900);
pub(super) const ANSWER: Duration = Duration::from_secs(60);
/// Simulated servers share few real CPUs: one that is well may not get to renew its lease for seconds.
const LEASE: Duration = Duration::from_secs(20);
/// Each step is two epochs on two servers, which have one emulated CPU each.
const STEP_EVERY: Duration = Duration::from_millis(400);
/// As do their VMs' instances.
pub(super) const SUSPECT: Duration = Duration::from_secs(4);
/// Asking is a program that runs on a server, which has other things to do.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(1);
/// The disk of an `ft` VM, on every host.
pub(super) const IMAGE: &str = "/data/ft.raw";
pub(super) const CLASSES: [&str; 4] = ["ft", "restart", "checkpoint", "none"];

/// A VM of the play.
pub(super) struct Guest {
    pub name: String,
    pub class: usize,
    pub mini: Mini,
    pub session: Option<Counting>,
}

pub(super) struct Stage<'a, 'r> {
    pub rig: &'r Rig,
    pub hosts: Vec<PoolHost<'r>>,
    /// So many of the hosts, the first, run VMs.
    pub workers: usize,
    pub guests: Vec<Guest>,
    /// The host that was emptied.
    pub drained: Option<String>,
    pub tell: &'a mut dyn Tell,
}

/// The program that all servers get, without what is for debuggers.
pub(super) fn program() -> Result<Vec<u8>> {
    let path = steadfast_program().ok_or_else(none)?;
    let bytes = std::fs::read(&path).what(|| format!("read {}", path.display()))?;
    Ok(stripped(bytes))
}

pub(super) fn play(options: &Options, tell: &mut dyn Tell) -> Result<Report> {
    let servers = options.servers + usize::from(options.witness);
    tell.doing(&format!("{servers} simulated servers start"));
    let rig = Rig::builder()
        .servers(servers)
        .memory_mib(options.server_mib)
        .mini_guest(true)
        .data_cache(DiskCache::Unsafe)
        .start_without_waiting()?;
    for server in rig.servers() {
        server.wait_ready(BOOT_BOUND)?;
    }
    tell.done(&format!(
        "{servers} servers are up: Debian, KVM, two replication networks, one for clients"
    ));
    let mut stage = Stage {
        rig: &rig,
        hosts: rig.servers().iter().map(PoolHost::new).collect(),
        workers: options.servers,
        guests: Vec::new(),
        drained: None,
        tell,
    };
    if options.watchdog {
        for host in &mut stage.hosts {
            *host = host.clone().watchdog()?;
        }
    }
    if options.acts.contains(&Act::Upgrade) {
        let bytes = program()?;
        for host in &mut stage.hosts {
            *host = host.clone().own_program(&bytes)?;
        }
    }
    let mut report = Report::default();
    let played = stage.play(options, &mut report);
    if let Err(error) = played {
        return Err(RigError::Unknown(format!("{error}; {}", stage.story())));
    }
    drop(stage);
    rig.end();
    ensure(rig.servers().iter().all(|s| !s.is_on()), || {
        "a server does not go off".to_string()
    })?;
    Ok(report)
}

impl Stage<'_, '_> {
    fn play(&mut self, options: &Options, report: &mut Report) -> Result<()> {
        self.form(report)?;
        let crowded = options.acts.contains(&Act::Balance);
        if crowded {
            self.crowd()?;
        }
        self.place(options, report)?;
        for act in &options.acts {
            match act {
                Act::Service => self.service(report)?,
                Act::Drill => self.drill(report)?,
                Act::Kill => self.kill(report)?,
                Act::Return => self.bring_back(report)?,
                Act::Drain => self.drain(report)?,
                Act::Resume => self.resume()?,
                Act::Upgrade => self.upgrade(report)?,
                Act::Faults => self.faults()?,
                Act::Balance => self.balance(report)?,
                Act::Hour(minutes) => self.hour(Duration::from_secs(minutes * 60), report)?,
            }
        }
        for guest in &mut self.guests {
            let Some(session) = guest.session.take() else {
                continue;
            };
            report.steps += session.steps();
            session
                .stop()
                .map_err(|e| RigError::Unknown(format!("session of {}: {e}", guest.name)))?;
        }
        self.tell.done(&format!(
            "{} steps over the {} sessions of the ft VMs: none lost, none repeated, no connection reset",
            report.steps, options.vms[0]
        ));
        Ok(())
    }

    fn form(&mut self, report: &mut Report) -> Result<()> {
        self.tell.doing("a pool is made");
        let began = Instant::now();
        let (first, others) = self.hosts.split_first().ok_or_else(none)?;
        first.init(LEASE, SUSPECT)?;
        for (i, host) in others.iter().enumerate() {
            host.join(first, i + 1 >= self.workers)?;
        }
        let all = self.hosts.len();
        self.wait("all hosts to be up", |s| {
            let hosts = s["hosts"].as_array()?;
            (hosts.len() == all && hosts.iter().all(|h| h["health"] == "up") && s["leader"].is_string())
                .then_some(())
        })?;
        // Guests that wait most of the time, on servers with one CPU each.
        self.hosts[0].run("pool set --cpu-overcommit-permille 8000")?;
        report.formed = began.elapsed();
        self.tell.done(&format!(
            "a pool of {} hosts{}: `pool init` on one, `pool join` on each other ({:.0} s)",
            all,
            if self.workers < all {
                ", one of them a witness"
            } else {
                ""
            },
            report.formed.as_secs_f64()
        ));
        Ok(())
    }

    fn place(&mut self, options: &Options, report: &mut Report) -> Result<()> {
        let began = Instant::now();
        for (class, count) in options.vms.iter().enumerate() {
            for i in 0..*count {
                let name = format!("{}{i}", CLASSES[class]);
                self.tell.doing(&format!("VM {name} is made"));
                let number = self.guests.len() as u8;
                let address = Ipv4Addr::new(10, 90, 0, 120 + number);
                let disk = if options.disk && class == 0 {
                    for host in &self.hosts[..self.workers] {
                        host.server.exec(&format!("truncate -s 16M {IMAGE}"))?;
                    }
                    format!("--disk {IMAGE},format=raw")
                } else {
                    String::new()
                };
                let agent = match class == 0 && options.acts.contains(&Act::Service) {
                    true => "--agent",
                    false => "",
                };
                let busy = match options.acts.contains(&Act::Balance) {
                    true => "mini.mem=4 mini.mem_rate=0",
                    false => "",
                };
                let create = format!(
                    "vm create --name {name} --class {} --memory 96MiB --cpu {CPU} --rng false --nic br0 {disk} {agent} \
                     --kernel /guests/mini/bzImage --initrd /guests/mini/initrd \
                     --cmdline 'console=ttyS0 quiet loglevel=4 panic=-1 net.ifnames=0 {} mini.ip={address}/24 mini.tick_ms=5000 mini.clock_ms=200 {busy}'",
                    CLASSES[class],
                    crate::inside::mini::WORD,
                );
                self.hosts[0].run(&create)?;
                // One boot and one copy at a time: four servers share two CPUs here.
                let hot = CLASSES[class] == "ft" || CLASSES[class] == "checkpoint";
                self.wait(&format!("{name} to run"), |s| {
                    let vm = s["vms"].as_array()?.iter().find(|v| v["vm"] == name.as_str())?;
                    (vm["state"] == "running" && (!hot || vm["protection"] == "protected")).then_some(())
                })?;
                self.guests.push(Guest {
                    name,
                    class,
                    mini: Mini::new(self.rig.client()?, address),
                    session: None,
                });
            }
        }
        self.tell.doing("they boot, and standbys are filled");
        self.well("all VMs running and protected")?;
        for guest in &mut self.guests {
            guest.mini.status(ANSWER)?;
            if guest.class == 0 {
                let session = guest.mini.counter(ANSWER)?.go_on(STEP_EVERY);
                guest.session = Some(session.map_err(|e| RigError::Unknown(e.to_string()))?);
            }
        }
        report.placed = began.elapsed();
        let counts: Vec<String> = CLASSES
            .iter()
            .zip(options.vms)
            .map(|(c, n)| format!("{n} {c}"))
            .collect();
        self.tell.done(&format!(
            "{} VMs run, every Linux answers, all that shall be protected is ({:.0} s): {}",
            self.guests.len(),
            report.placed.as_secs_f64(),
            counts.join(", ")
        ));
        self.show()
    }

    /// The standby of an ft VM is tried: an isolated copy of it, whose service is checked from its own island.
    fn drill(&mut self, report: &mut Report) -> Result<()> {
        let Some(guest) = self.guests.iter().find(|g| g.class == 0) else {
            return Ok(());
        };
        let name = guest.name.clone();
        self.tell.doing(&format!("{name} is drilled"));
        let at = guest.mini.address();
        let port = crate::vm::COUNT_PORT;
        self.hosts[0].run(&format!("vm health {name} --tcp {at}:{port} --do alert"))?;
        self.look_away();
        let drilled = self.hosts[0].json(&format!("drill {name}"))?.unwrap_or_default();
        let checks = drilled["checks"].as_array().cloned().unwrap_or_default();
        let passed = |c: &Value| c.as_str().is_some_and(|c| c.ends_with("passed"));
        ensure(
            drilled["ok"] == true && checks.len() == 1 && checks.iter().all(passed),
            || format!("the drill: {drilled}"),
        )?;
        report.drill = Duration::from_millis(drilled["took_ms"].as_u64().unwrap_or_default());
        let session = guest.session.as_ref().ok_or_else(none)?;
        session
            .wait_steps(session.steps() + 5, ANSWER)
            .map_err(|e| RigError::Unknown(format!("session of {name}: {e}")))?;
        self.tell.done(&format!(
            "{name} was drilled ({:.1} s): {}; its clients' longest wait meanwhile {}",
            report.drill.as_secs_f64(),
            drilled["text"].as_str().unwrap_or_default(),
            ms(self.longest())
        ));
        Ok(())
    }

    /// The server with the most VMs that must survive loses its power.
    fn kill(&mut self, report: &mut Report) -> Result<()> {
        self.well("all to be protected before")?;
        let on = |host: &str, class: usize, vms: &[Value]| {
            let here = |v: &&Value| v["host"] == host && v["class"] == CLASSES[class];
            vms.iter().filter(here).count()
        };
        let status = self.status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        let victim = self.hosts[..self.workers]
            .iter()
            .max_by_key(|h| {
                on(h.name(), 0, &vms).min(1) * 100 + on(h.name(), 1, &vms) * 10 + on(h.name(), 0, &vms)
            })
            .ok_or_else(none)?
            .clone();
        let counts = [0, 1, 2, 3].map(|c| on(victim.name(), c, &vms));
        report.killed = (victim.name().to_string(), counts);
        ensure(counts[0] > 0 && counts[1] > 0, || {
            format!("no server runs both an ft and a restart VM: {vms:?}")
        })?;
        self.tell.doing(&format!("{} is killed", victim.name()));
        self.look_away();
        let killed = Instant::now();
        victim.server.kill()?;
        // At the clients: the sessions go on, and what was booted again answers.
        for guest in self.guests.iter().filter(|g| g.class == 0) {
            let session = guest.session.as_ref().ok_or_else(none)?;
            let steps = session.steps();
            session
                .wait_steps(steps + 5, ANSWER)
                .map_err(|e| RigError::Unknown(format!("session of {}: {e}", guest.name)))?;
        }
        report.ft_longest = self.longest();
        let lost: Vec<String> = vms
            .iter()
            .filter(|v| v["host"] == victim.name() && v["class"] == "restart")
            .filter_map(|v| v["vm"].as_str().map(str::to_string))
            .collect();
        self.wait("every restart VM to run elsewhere", |s| {
            let vms = s["vms"].as_array()?;
            let runs = |name: &String| {
                let vm = vms.iter().find(|v| v["vm"] == name.as_str());
                vm.is_some_and(|v| v["state"] == "running" && v["host"] != victim.name())
            };
            lost.iter().all(runs).then_some(())
        })?;
        for guest in self.guests.iter().filter(|g| lost.contains(&g.name)) {
            guest.mini.status(BOOT_BOUND)?;
        }
        report.restarted = killed.elapsed();
        self.wait("every ft VM to be protected again", |s| {
            let vms = s["vms"].as_array()?;
            let mut hot = vms
                .iter()
                .filter(|v| v["class"] == "ft" || v["class"] == "checkpoint");
            hot.all(|v| v["protection"] == "protected").then_some(())
        })?;
        report.protected = killed.elapsed();
        self.tell.done(&format!(
            "{} was killed with {} ft and {} restart VMs on it; nobody typed anything",
            victim.name(),
            counts[0],
            counts[1]
        ));
        self.tell.more(&format!(
            "ft: sessions went on, longest wait {}; restart: answered elsewhere after {:.0} s; all protected again after {:.0} s",
            ms(report.ft_longest),
            report.restarted.as_secs_f64(),
            report.protected.as_secs_f64()
        ));
        self.show()
    }

    fn bring_back(&mut self, report: &mut Report) -> Result<()> {
        let name = report.killed.0.clone();
        self.tell.doing(&format!("{name} is powered on"));
        let began = Instant::now();
        let host = self.host(&name)?;
        host.server.start()?;
        host.start_daemon()?;
        self.well("the pool to be well again")?;
        report.returned = began.elapsed();
        self.tell.done(&format!(
            "{name} is powered on, and used again ({:.0} s)",
            report.returned.as_secs_f64()
        ));
        self.show()
    }

    pub(super) fn host(&self, name: &str) -> Result<PoolHost<'_>> {
        let found = self.hosts.iter().find(|h| h.name() == name);
        found.cloned().ok_or_else(none)
    }

    /// A host that is on, to ask about the pool.
    pub(super) fn asker(&self) -> Result<&PoolHost<'_>> {
        let answers = |h: &&PoolHost<'_>| h.server.is_ready() && !h.server.is_frozen();
        self.hosts.iter().find(answers).ok_or_else(none)
    }

    pub(super) fn status(&self) -> Result<Value> {
        Ok(self.asker()?.json("pool status")?.unwrap_or_default())
    }

    pub(super) fn look_away(&self) {
        for session in self.guests.iter().filter_map(|g| g.session.as_ref()) {
            session.take_longest();
        }
    }

    pub(super) fn longest(&self) -> Duration {
        let sessions = self.guests.iter().filter_map(|g| g.session.as_ref());
        sessions.map(Counting::longest).max().unwrap_or_default()
    }

    pub(super) fn well(&self, what: &str) -> Result<()> {
        self.wait(what, |s| (s["healthy"] == true).then_some(()))
    }

    /// Waits until the pool says so; a session that ended ends it.
    pub(super) fn wait<T>(&self, what: &str, wanted: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let began = Instant::now();
        loop {
            let status = self.status()?;
            if let Some(found) = wanted(&status) {
                return Ok(found);
            }
            if let Some(guest) = self
                .guests
                .iter()
                .find(|g| g.session.as_ref().is_some_and(Counting::ended))
            {
                return Err(RigError::Unknown(format!("the session of {} broke", guest.name)));
            }
            if began.elapsed() > BOUND {
                return Err(RigError::Timeout {
                    what: what.to_string(),
                    after_ms: began.elapsed().as_millis() as u64,
                    detail: format!("; the pool says {status}"),
                });
            }
            std::thread::sleep(ASK_EVERY);
        }
    }

    fn show(&mut self) -> Result<()> {
        let status = self.status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        for host in &self.hosts[..self.workers] {
            let mut here: Vec<&str> = Vec::new();
            for vm in vms.iter().filter(|v| v["host"] == host.name()) {
                here.extend(vm["vm"].as_str());
            }
            self.tell.more(&format!("{}: {}", host.name(), here.join(" ")));
        }
        Ok(())
    }

    /// What the pool and the daemons said last, for who looks for a fault.
    fn story(&self) -> String {
        let mut text = String::new();
        for host in self
            .hosts
            .iter()
            .filter(|h| h.server.is_ready() && !h.server.is_frozen())
        {
            let tail = "tail -n 12 /data/steadfast-node.log; uptime; free -m | sed -n 2p; tail -n 8 /data/steadfast/vm/*/log";
            let said = host
                .server
                .shell(tail, ANSWER)
                .map_or_else(|e| e.to_string(), |o| o.text());
            text.push_str(&format!("\n--- {}\n{said}", host.name()));
        }
        if let Ok(asker) = self.asker() {
            let events = asker.run("events --limit 150").unwrap_or_else(|e| e.to_string());
            text.push_str(&format!("\n--- events\n{events}"));
        }
        text
    }
}

pub(super) fn none() -> RigError {
    RigError::Unknown("there is none".to_string())
}
