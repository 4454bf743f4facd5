//! Faults of a pool's hosts, one after another, while a client holds a session to an `ft` VM. The numbers are those of the
//! catalogue (`docs/testing.md`).
//!
//! ```text
//! well ──fault──> the session goes on ──taken back──> well again by itself ──> the next
//! ```
//! Where a row says so, the VM must not have moved: anything else is a false failover (I7).

use super::PoolHost;
use super::steps::{ANSWER, BOOT_BOUND, CLASSES, IMAGE, Stage, none};
use crate::error::{Result, RigError};
use crate::failover::{ensure, ms};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long most faults last: shorter than a lease, longer than anything that suspects.
const HOLD: Duration = Duration::from_secs(8);
/// Within this the pool says that something is wrong.
const NOTICED: Duration = Duration::from_secs(60);
/// Of the host where it is started.
const DAEMON: &str = "steadfast node";

/// Who has which part.
pub(super) struct Cast<'r> {
    /// The `ft` VM.
    vm: String,
    /// It runs there.
    primary: PoolHost<'r>,
    /// It is mirrored there.
    standby: PoolHost<'r>,
    /// Neither.
    third: PoolHost<'r>,
}

struct Row {
    number: u32,
    what: &'static str,
    play: for<'r> fn(&Stage<'_, 'r>, &Cast<'r>) -> Result<()>,
    /// Whether the VM may be elsewhere afterwards.
    may_move: bool,
}

const ROWS: &[Row] = &[
    Row {
        number: 8,
        what: "the daemon of the VM's host is killed",
        play: daemon_killed,
        may_move: false,
    },
    Row {
        number: 20,
        what: "the VM's host loses its cable to the other hosts that is its management's too",
        play: |s, c| unplugged(s, &c.primary, "repl0"),
        may_move: false,
    },
    Row {
        number: 20,
        what: "the VM's host loses its other cable to the other hosts",
        play: |s, c| unplugged(s, &c.primary, "repl1"),
        may_move: false,
    },
    Row {
        number: 20,
        what: "the VM's host loses its cable to the clients",
        play: clients_unplugged,
        may_move: true,
    },
    Row {
        number: 29,
        what: "a program takes all memory of the VM's host",
        play: |s, c| memory_taken(s, &c.primary),
        may_move: false,
    },
    Row {
        number: 31,
        what: "no thread, process or file descriptor is to be had on the VM's host",
        play: exhausted,
        may_move: false,
    },
    Row {
        number: 32,
        what: "no member of the store answers; then all are killed",
        play: store_lost,
        may_move: false,
    },
    Row {
        number: 14,
        what: "the disk of the standby's host is full",
        play: disk_full,
        may_move: false,
    },
    Row {
        number: 18,
        what: "the standby and its replica of the disk are gone for good",
        play: replica_lost,
        may_move: false,
    },
    Row {
        number: 5,
        what: "a host loses its power, and again in the middle of its start",
        play: power_lost_at_the_start,
        may_move: false,
    },
    Row {
        number: 4,
        what: "the host of a `restart` VM freezes beyond its lease, and its watchdog resets it when it goes on",
        play: frozen_beyond_its_lease,
        may_move: true,
    },
    Row {
        number: 36,
        what: "a host and its member of the store are replaced; a wrong token is refused (49)",
        play: member_replaced,
        may_move: false,
    },
];

impl<'r> Stage<'_, 'r> {
    /// All of them.
    pub(super) fn faults(&mut self) -> Result<()> {
        for row in ROWS {
            let what = format!("fault {:2}, {}", row.number, row.what);
            self.tell.doing(&what);
            let cast = self.cast()?;
            self.look_away();
            let told = |e: RigError| RigError::Unknown(format!("{what}: {e}"));
            (row.play)(self, &cast).map_err(told)?;
            let began = Instant::now();
            self.steps_on(&cast.vm).map_err(told)?;
            self.well("the pool to be well again").map_err(told)?;
            let well = began.elapsed();
            let (owner, longest) = (self.cast()?.primary, self.longest());
            ensure(row.may_move || owner.name() == cast.primary.name(), || {
                format!("{what}: {} moved to {}", cast.vm, owner.name())
            })?;
            self.tell.done(&format!(
                "{what}: {} to {}, longest wait of its session {}, well {:.0} s after",
                cast.primary.name(),
                owner.name(),
                ms(longest),
                well.as_secs_f64()
            ));
        }
        Ok(())
    }

    fn cast(&self) -> Result<Cast<'r>> {
        let status = self.status()?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        let vm = vms.iter().find(|v| v["class"] == "ft").ok_or_else(none)?;
        let named = |name: &Value| self.hosts.iter().find(|h| *name == h.name()).cloned();
        let (primary, standby) = (named(&vm["host"]), named(&vm["in_sync"][0]));
        let (Some(primary), Some(standby)) = (primary, standby) else {
            return Err(RigError::Unknown(format!("it is not protected: {status}")));
        };
        let third = self.hosts[..self.workers]
            .iter()
            .find(|h| h.name() != primary.name() && h.name() != standby.name());
        Ok(Cast {
            vm: vm["vm"].as_str().unwrap_or_default().to_string(),
            primary,
            standby,
            third: third.cloned().ok_or_else(none)?,
        })
    }

    /// The session is answered, from now on.
    fn steps_on(&self, vm: &str) -> Result<()> {
        let guest = self.guests.iter().find(|g| g.name == vm).ok_or_else(none)?;
        let session = guest.session.as_ref().ok_or_else(none)?;
        session
            .wait_steps(session.steps() + 5, ANSWER)
            .map_err(|e| RigError::Unknown(format!("session of {vm}: {e}")))
    }

    /// The session is answered all the time.
    fn goes_on_for(&self, vm: &str, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.steps_on(vm)?;
        }
        Ok(())
    }
}

fn daemon_killed<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let host = &cast.primary;
    let before = instance(host)?;
    host.server.exec(&format!("pkill -KILL -xf '{DAEMON}'"))?;
    stage.goes_on_for(&cast.vm, HOLD)?;
    host.start_daemon()?;
    let after = instance(host)?;
    ensure(before == after, || {
        format!("the VM's process was {before}, it is {after}")
    })
}

/// Process numbers of the instances on a host.
fn instance(host: &PoolHost<'_>) -> Result<String> {
    let found = host.server.exec("pgrep -f '[v]mm --spec' | sort -n")?;
    Ok(found.trim().replace('\n', " "))
}

fn unplugged<'r>(stage: &Stage<'_, 'r>, host: &PoolHost<'r>, nic: &str) -> Result<()> {
    stage.rig.unplug(host.name(), nic)?;
    let went_on = stage
        .guests
        .iter()
        .filter(|g| g.session.is_some())
        .try_for_each(|g| stage.goes_on_for(&g.name, HOLD));
    // The management's goes with the first: then this host cannot say so, and is not asked.
    let told = match nic {
        "repl1" => stage.wait("the pool to tell which path is lost", |status| {
            let problems = status["problems"].as_array()?;
            let told = |p: &Value| {
                let text = p.as_str().unwrap_or_default();
                text.contains("replication path 2 is down") && text.contains(host.name())
            };
            problems.iter().any(told).then_some(())
        }),
        _ => Ok(()),
    };
    stage.rig.plug(host.name(), nic)?;
    went_on.and(told)
}

/// Nobody can reach the VM there; who sends again is answered when the cable is back.
fn clients_unplugged<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    stage.rig.unplug(cast.primary.name(), "client0")?;
    std::thread::sleep(HOLD);
    stage.rig.plug(cast.primary.name(), "client0")
}

fn memory_taken<'r>(stage: &Stage<'_, 'r>, host: &PoolHost<'r>) -> Result<()> {
    host.server.spawn("tail /dev/zero", "/run/hog.log")?;
    let began = Instant::now();
    while host.server.shell("pgrep -xf 'tail /dev/zero'", ANSWER)?.success() {
        ensure(began.elapsed() < NOTICED, || {
            "the kernel did not end who took all memory".to_string()
        })?;
        std::thread::sleep(Duration::from_millis(500));
    }
    let guests = stage.guests.iter().filter(|g| g.session.is_some());
    guests.map(|g| &g.name).try_for_each(|vm| stage.steps_on(vm))
}

/// What starts it must end it without a new process.
fn exhausted<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let script = format!(
        "pid=$(pgrep -xf '{DAEMON}'); open=$(ls /proc/$pid/fd | wc -l); prlimit --pid $pid --nofile=$open:1024\n\
         mkfifo /run/never; exec 3<>/run/never; most=$(cat /proc/sys/kernel/threads-max)\n\
         echo 20 > /proc/sys/kernel/threads-max; read -t {} -u 3; echo $most > /proc/sys/kernel/threads-max\n\
         prlimit --pid $pid --nofile=1024:1024; rm /run/never",
        HOLD.as_secs()
    );
    let host = &cast.primary;
    host.server.put_bytes(script.as_bytes(), "/run/exhaust", 0o755)?;
    host.server.spawn("bash /run/exhaust", "/run/exhaust.log")?;
    stage.goes_on_for(&cast.vm, HOLD)?;
    let ended = host
        .server
        .wait_for("test ! -e /run/never && pgrep -xf 'steadfast node'", ANSWER);
    ended.map(|_| ())
}

fn store_lost<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let all = |signal: &str| -> Result<()> {
        stage
            .hosts
            .iter()
            .try_for_each(|h| h.server.exec(&format!("pkill -{signal} -x etcd")).map(|_| ()))
    };
    all("STOP")?;
    let went_on = stage.goes_on_for(&cast.vm, HOLD);
    all("CONT")?;
    went_on?;
    all("KILL")?;
    stage.goes_on_for(&cast.vm, HOLD)
}

fn disk_full<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let server = cast.standby.server;
    // Not `dd` alone: what is reserved for root goes as well, and in little time.
    server.exec("fallocate -l $(df --output=avail -B1 /data | tail -n 1) /data/filler; dd if=/dev/zero of=/data/filler2 bs=64k 2>/dev/null; true")?;
    let went_on = stage.goes_on_for(&cast.vm, HOLD);
    server.exec("rm -f /data/filler /data/filler2")?;
    went_on
}

fn replica_lost<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let server = cast.standby.server;
    server.exec(&format!("pkill -KILL -f '[v]mm --spec'; rm -rf {IMAGE}*"))?;
    stage.goes_on_for(&cast.vm, HOLD)
}

fn power_lost_at_the_start<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let host = &cast.third;
    for _ in 0..2 {
        host.server.kill()?;
        stage.steps_on(&cast.vm)?;
        host.server.power_on()?;
        host.server.wait_ready(BOOT_BOUND)?;
        host.spawn_daemon()?;
        // Its etcd is read from its disk now, or begins to catch up.
        stage.steps_on(&cast.vm)?;
    }
    host.start_daemon()
}

/// Where it ran before, the VM must not run for a moment once it was booted elsewhere.
fn frozen_beyond_its_lease<'r>(stage: &Stage<'_, 'r>, _: &Cast<'r>) -> Result<()> {
    let guest = stage
        .guests
        .iter()
        .find(|g| CLASSES[g.class] == "restart")
        .ok_or_else(none)?;
    let runs_on = |status: &Value| -> Option<String> {
        let vm = status["vms"]
            .as_array()?
            .iter()
            .find(|v| v["vm"] == guest.name.as_str())?;
        (vm["state"] == "running").then(|| vm["host"].as_str().map(str::to_string))?
    };
    let before = stage.wait("it to be armed", |s| {
        let on = runs_on(s)?;
        let host = s["hosts"].as_array()?.iter().find(|h| h["host"] == on.as_str())?;
        host["watchdog"]
            .as_str()?
            .contains("resets this host")
            .then_some(on)
    })?;
    let host = stage.host(&before)?;
    let starts = host.server.starts();
    host.server.freeze()?;
    stage.wait("it to run elsewhere", |s| runs_on(s).filter(|on| *on != before))?;
    guest.mini.status(BOOT_BOUND)?;
    host.server.thaw()?;
    let began = Instant::now();
    while host.server.starts() == starts {
        ensure(began.elapsed() < NOTICED, || {
            format!("{before} goes on after its lease: its watchdog did not reset it")
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
    host.server.wait_ready(BOOT_BOUND)?;
    host.start_daemon()
}

fn member_replaced<'r>(stage: &Stage<'_, 'r>, cast: &Cast<'r>) -> Result<()> {
    let (host, by) = (&cast.third, &cast.primary);
    by.run(&format!("host drain {}", host.name()))?;
    stage.wait("it to be empty", |s| {
        let hosts = s["hosts"].as_array()?;
        let found = hosts.iter().find(|h| h["host"] == host.name())?;
        (found["admin"] == "maintenance").then_some(())
    })?;
    // Its power and its disk are gone.
    host.server.exec(&format!(
        "pkill -KILL -xf '{DAEMON}'; pkill -KILL -x etcd; pkill -KILL -f '[s]teadfast guard'; true"
    ))?;
    host.server.exec("rm -rf /data/steadfast /run/steadfast")?;
    stage.steps_on(&cast.vm)?;
    by.run(&format!("host remove {}", host.name()))?;
    let let_in = host.is_let_in(by, "wrong")?;
    ensure(!let_in, || "a wrong token let a host in".to_string())?;
    host.join(by, false)
}
