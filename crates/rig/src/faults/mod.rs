//! Faults on simulated servers, one after another, under one protected Linux whose clients never stop.
//!
//! ```text
//!   protected on two of three servers ──fault──> clients answered again ── whole again ──> next fault
//!                                                  │                          │
//!                    one primary, in the store too, term not lower;  a standby in sync, a third server free
//! ```
//! [`rows::ROWS`] is the table: each row is one fault of `docs/testing.md`, what it must not change, and its own checks. What is
//! the same for all is here, in [`Scene::whole_again`]: clients that never saw a reset, a write lost or done twice, one owner,
//! a guest that has found nothing wrong in its memory, disk and clock.

mod guest;
mod power;
pub mod rows;

use crate::error::{Result, RigError};
use crate::etcd;
use crate::failover::{Tell, crashes, ensure, leftovers};
use crate::host::qemu::DiskCache;
use crate::host::server::Server;
use crate::load::{Audited, Load, LoadOptions};
use crate::protected::{Plan, Protected};
use crate::rig::Rig;
use crate::vm::Mini;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

const BOOT_BOUND: Duration = Duration::from_secs(180);
const ANSWER_BOUND: Duration = Duration::from_secs(60);
const COPY_BOUND: Duration = Duration::from_secs(180);
/// How long the store may take to say who owns the VM.
const ASK_BOUND: Duration = Duration::from_secs(90);
const STATUS_BOUND: Duration = Duration::from_secs(60);
/// How long a disk that differs may be behind.
const EQUAL_BOUND: Duration = Duration::from_secs(60);
/// Answers that every client must have after a fault before it counts as survived.
const ANSWERS: u64 = 3;

/// A fault, and what must hold.
pub struct Row {
    /// Its number in the catalogue of faults.
    pub number: u32,
    /// In a few words.
    pub what: &'static str,
    /// Injects it, waits for what is particular about it, and takes it back.
    pub play: fn(&mut Scene<'_, '_>) -> Result<()>,
    /// Whether the VM may change its server.
    pub moves: Moves,
}

/// Where the VM runs after a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moves {
    /// Where it ran: anything else is a false failover (I7).
    Never,
    /// On its standby.
    Always,
    /// Either; the row's promise is another.
    Maybe,
}

/// Faults that break connections by their nature; they come after all rows, with new clients after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest's kernel panics and starts anew (fault 9): that is no failover.
    GuestPanics,
    /// Both servers lose their power (fault 3), and the standby's returns first and boots the VM.
    StandbyReturns,
    /// The same, and the primary's returns first.
    PrimaryReturns,
}

/// What a row did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The row.
    pub number: u32,
    /// Servers before and after.
    pub from: String,
    /// See `from`.
    pub to: String,
    /// The longest that any client waited.
    pub longest: Duration,
    /// Until it was protected again.
    pub whole: Duration,
}

/// What all rows need.
pub struct Scene<'a, 'r> {
    /// The servers.
    pub rig: &'r Rig,
    /// The VM.
    pub vm: Protected<'r>,
    /// Its clients.
    pub load: Load,
    /// Who hears of it.
    pub tell: &'a mut dyn Tell,
    primary: usize,
    standby: usize,
    term: u64,
}

/// Plays these rows, audits, and then plays what breaks connections; an audit and a look for what is left over end it.
///
/// # Errors
/// The first thing that did not hold, with its row.
pub fn play(rows: &[&Row], endings: &[Ending], tell: &mut dyn Tell) -> Result<Vec<Outcome>> {
    tell.doing("three simulated servers start");
    let rig = Rig::builder()
        .servers(3)
        .memory_mib(800)
        .service_disk(true)
        // Servers are killed, never this machine: what reached its page cache is as durable as it needs to be.
        .data_cache(DiskCache::Unsafe)
        .start_without_waiting()?;
    for server in rig.servers() {
        server.wait_ready(BOOT_BOUND)?;
    }
    etcd::start(rig.servers())?;
    tell.done("three servers are up, each with its own /dev/kvm, disk, etcd, two replication networks");
    let mut scene = Scene::set(&rig, tell)?;
    let mut outcomes = Vec::new();
    for row in rows {
        let outcome = scene
            .row(row)
            .map_err(|e| RigError::Unknown(format!("fault {} ({}): {e}", row.number, row.what)))?;
        outcomes.push(outcome);
    }
    if !endings.is_empty() {
        scene = scene.with_clients_audited()?;
    }
    for ending in endings {
        scene = match ending {
            Ending::GuestPanics => scene.guest_panics()?,
            Ending::StandbyReturns => scene.both_lose_power(true)?,
            Ending::PrimaryReturns => scene.both_lose_power(false)?,
        };
    }
    scene.audit()?;
    let left = leftovers(&rig)?;
    ensure(left.is_empty(), || {
        format!("processes are left on servers: {left}")
    })?;
    rig.end();
    ensure(rig.servers().iter().all(|s| !s.is_on()), || {
        "a server does not go off".to_string()
    })?;
    Ok(outcomes)
}

impl<'a, 'r> Scene<'a, 'r> {
    fn set(rig: &'r Rig, tell: &'a mut dyn Tell) -> Result<Self> {
        let plan = Plan {
            name: "web".to_string(),
            address: Ipv4Addr::new(10, 90, 0, 101),
            mac: [0x52, 0x54, 0, 0x5f, 0, 1],
            memory_mib: 96,
            words: "mini.mem=8 mini.mem_rate=50 mini.tick_ms=1000".to_string(),
            suspect: crate::failover::SUSPECT,
        };
        let mut vm = Protected::start(rig, rig.server(0), plan, false)?;
        let load = clients(rig, &vm, rig.server(0))?;
        vm.protect(rig.server(1))?;
        let mut scene = Scene {
            rig,
            vm,
            load,
            tell,
            primary: 0,
            standby: 1,
            term: 0,
        };
        scene.whole_again(Moves::Never)?;
        scene
            .tell
            .done("a Linux with redis and a web server runs on s1, protected on s2");
        Ok(scene)
    }

    fn row(&mut self, row: &Row) -> Result<Outcome> {
        self.tell.doing(row.what);
        let from = self.primary().name().to_string();
        self.load.look_away();
        (row.play)(self)?;
        // Every client had its answers again: how long it took is in the waits.
        self.answered()?;
        let longest = self.load.seen().longest();
        // Before a new instance takes the log of one that ended.
        self.nothing_crashed()?;
        let began = Instant::now();
        self.whole_again(row.moves)?;
        let outcome = Outcome {
            number: row.number,
            from,
            to: self.primary().name().to_string(),
            longest,
            whole: began.elapsed(),
        };
        self.tell.done(&format!(
            "fault {:2}, {}: {} to {}, longest wait {:.1} s, whole again after {:.1} s",
            outcome.number,
            row.what,
            outcome.from,
            outcome.to,
            outcome.longest.as_secs_f64(),
            outcome.whole.as_secs_f64()
        ));
        Ok(outcome)
    }

    /// The server that runs the VM, as far as is known.
    pub fn primary(&self) -> &'r Server {
        self.rig.server(self.primary)
    }

    /// The server of its standby.
    pub fn standby(&self) -> &'r Server {
        self.rig.server(self.standby)
    }

    /// The third.
    pub fn third(&self) -> &'r Server {
        self.rig.server(3 - self.primary - self.standby)
    }

    /// Lets time pass under load; a client with an error ends it.
    pub fn look(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.load.alive()?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Every client gets answers.
    pub fn answered(&self) -> Result<()> {
        self.load.wait_answers(ANSWERS, ANSWER_BOUND).map_err(|e| {
            let says = |server: &Server| self.vm.trouble(server, "its part", ANSWER_BOUND).to_string();
            RigError::Unknown(format!("{e}; {}; {}", says(self.primary()), says(self.standby())))
        })
    }

    /// The store's leader is elsewhere: an election is not what is tested.
    pub fn store_leader_elsewhere(&self) -> Result<()> {
        etcd::move_leader(self.rig.servers(), self.third())
    }

    /// A server that was off, on again, its member of the store too.
    pub fn power_on(&mut self, server: &Server) -> Result<()> {
        self.vm.lost(server)?;
        server.start()?;
        etcd::start_member(server, self.rig.servers())?;
        etcd::wait_ready(server, etcd::READY_BOUND)
    }

    /// One primary, the same in the store; a standby in sync, a new one where the old one is gone; nothing wrong in the guest.
    fn whole_again(&mut self, moves: Moves) -> Result<()> {
        let (was, spare) = (self.primary, self.standby);
        let owner = self.owner()?;
        let moved = owner != was;
        ensure(moves == Moves::Maybe || moved == (moves == Moves::Always), || {
            let (was, is) = (self.rig.server(was), self.rig.server(owner));
            let says = |server: &Server| self.vm.trouble(server, "the move", Duration::ZERO).to_string();
            format!(
                "the VM was on {}, and is on {} now; {}; {}",
                was.name(),
                is.name(),
                says(was),
                says(is)
            )
        })?;
        self.primary = owner;
        let other = if moved { was } else { spare };
        self.standby = other;
        // An instance that was only cut off, or frozen, comes back by itself; a primary that has lost its right ends.
        let standby = self.rig.server(other);
        let began = Instant::now();
        while moved && self.vm.is_alive(standby)? {
            let role = self.vm.status(standby)?.map(|s| s["protocol"]["role"].clone());
            if role.is_some_and(|r| r == "standby") {
                break;
            }
            ensure(began.elapsed() < STATUS_BOUND, || {
                format!(
                    "the former primary on {} neither ends nor follows",
                    standby.name()
                )
            })?;
            std::thread::sleep(Duration::from_millis(100));
        }
        if !self.vm.is_alive(standby)? {
            self.vm.protect(standby)?;
        }
        let (vm, primary) = (&self.vm, self.rig.server(owner));
        let term = vm
            .wait_status(primary, "protected", COPY_BOUND, |s| in_sync(s, standby.name()))
            .map_err(|e| {
                let why = vm.trouble(standby, "the copy", began.elapsed());
                RigError::Unknown(format!("{e}; {why}"))
            })?;
        ensure(
            if moved {
                term > self.term
            } else {
                term >= self.term
            },
            || format!("term {term} after term {}", self.term),
        )?;
        self.term = term;
        self.one_owner()?;
        self.load.alive()?;
        let status = Mini::new(self.rig.client()?, self.vm.plan().address).status(STATUS_BOUND)?;
        ensure(status.faults.is_empty() && status.clock_jumps == 0, || {
            format!(
                "the guest found {} clock jumps and: {}",
                status.clock_jumps,
                status.faults.join("; ")
            )
        })
    }

    /// Which server's instance says that it is the primary of the highest term.
    fn owner(&self) -> Result<usize> {
        let began = Instant::now();
        loop {
            let mut best = None;
            let servers = self.rig.servers().iter().enumerate();
            for (index, server) in servers.filter(|(_, s)| s.is_ready() && self.vm.was_started(s)) {
                let Some(status) = self.vm.status(server)? else {
                    continue;
                };
                let p = &status["protocol"];
                if p["role"] == "primary" {
                    best = best.max(Some((p["term"].as_u64().unwrap_or(0), index)));
                }
            }
            if let Some((_, index)) = best {
                return Ok(index);
            }
            ensure(began.elapsed() < STATUS_BOUND, || {
                format!(
                    "no server runs the VM; {}",
                    self.vm.trouble(self.standby(), "the VM", STATUS_BOUND)
                )
            })?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What the store says is what the instances say (I2), and nobody else believes to be the primary.
    fn one_owner(&self) -> Result<()> {
        let primary = self.primary();
        // A starved machine's store may take long to answer: that is no wrong answer.
        let record = primary.exec_within(
            "ETCDCTL_API=3 etcdctl --endpoints http://127.0.0.1:2379 --dial-timeout=30s --command-timeout=60s \
             get --prefix '' --print-value-only | grep '\"owner\"'",
            ASK_BOUND,
        )?;
        let record: Value = serde_json::from_str(record.lines().next().unwrap_or_default())
            .map_err(|e| RigError::malformed("the VM's record", format!("{e}: {record}")))?;
        ensure(
            record["owner"] == primary.name() && record["term"].as_u64() == Some(self.term),
            || {
                format!(
                    "{} runs the VM under term {}; the store says {record}",
                    primary.name(),
                    self.term
                )
            },
        )?;
        let others = self.rig.servers().iter().filter(|s| s.name() != primary.name());
        for server in others.filter(|s| s.is_ready() && self.vm.was_started(s)) {
            let role = self.vm.status(server)?.map(|s| s["protocol"]["role"].clone());
            ensure(role.as_ref().is_none_or(|r| r == "standby"), || {
                format!(
                    "{} is the primary; {} says {role:?}",
                    primary.name(),
                    server.name()
                )
            })?;
        }
        Ok(())
    }

    /// No process of a server died of a fault of its own, and none panicked.
    fn nothing_crashed(&self) -> Result<()> {
        let found = crashes(self.rig)?;
        ensure(found.is_empty(), || format!("processes crashed: {found}"))
    }

    /// Ends the clients, which must not have noticed anything, and lets new ones work.
    fn with_clients_audited(mut self) -> Result<Self> {
        let mut audited = None;
        self = self.with_new_clients(|load, _| {
            audited = Some(load.end()?);
            Ok(())
        })?;
        if let Some(audited) = audited {
            say(audited, self.tell);
        }
        Ok(self)
    }

    /// Ends the clients as `end` says, and lets new ones work.
    fn with_new_clients(self, end: impl FnOnce(Load, &Protected<'_>) -> Result<()>) -> Result<Self> {
        let Scene {
            rig,
            vm,
            load,
            tell,
            primary,
            standby,
            term,
        } = self;
        end(load, &vm)?;
        let load = clients(rig, &vm, rig.server(primary))?;
        Ok(Scene {
            rig,
            vm,
            load,
            tell,
            primary,
            standby,
            term,
        })
    }

    /// Ends the clients, reads every write back, compares the replicas, and stops the VM.
    fn audit(self) -> Result<()> {
        self.nothing_crashed()?;
        let (primary, standby) = (self.primary(), self.standby());
        let Scene { vm, load, tell, .. } = self;
        say(load.end()?, tell);
        equal_disks(&vm, primary, standby)?;
        tell.done("the disks are equal");
        for server in [standby, primary] {
            vm.stop(server)?;
        }
        Ok(())
    }
}

/// Clients of the VM, at work.
fn clients(rig: &Rig, vm: &Protected<'_>, on: &Server) -> Result<Load> {
    let began = Instant::now();
    let plan = vm.plan();
    let options = LoadOptions::default();
    Load::start(rig.client()?, plan.address, plan.mac, &options, BOOT_BOUND).map_err(|e| {
        let why = vm.trouble(on, "the service", began.elapsed());
        RigError::Unknown(format!("{e}; {why}"))
    })
}

/// What clients that noticed nothing have done.
fn say(audited: Audited, tell: &mut dyn Tell) {
    tell.done(&format!(
        "audit: {} redis writes, each there once and in order; {} pages; one TCP session of {} steps; 0 lost, 0 repeated, 0 reset",
        audited.writes, audited.pages, audited.steps
    ));
}

/// The term, when this standby is in sync and the VM says that it is protected.
fn in_sync(status: &Value, standby: &str) -> Option<u64> {
    let p = &status["protocol"];
    let member = p["members"].as_array()?.iter().find(|m| m["host"] == standby)?;
    (p["protected"] == true && member["in_sync"] == true).then(|| p["term"].as_u64())?
}

fn equal_disks(vm: &Protected<'_>, one: &Server, other: &Server) -> Result<()> {
    let hash = |server: &Server| server.exec_within(&format!("sync; sha256sum < {}", vm.disk()), EQUAL_BOUND);
    let began = Instant::now();
    loop {
        let (a, b) = (hash(one)?, hash(other)?);
        if a == b {
            return Ok(());
        }
        ensure(began.elapsed() < EQUAL_BOUND, || {
            format!(
                "the disks differ: {} has {a}, {} has {b}",
                one.name(),
                other.name()
            )
        })?;
        std::thread::sleep(Duration::from_millis(500));
    }
}
