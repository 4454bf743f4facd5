//! A protected VM on simulated servers: the mini guest with its service disk, run by `steadfast vmm --protect` on each server.
//!
//! ```text
//!        s1 (starts it)                     s2, s3 (one command each: protect)
//!   steadfast vmm --protect  === repl0 ===>  steadfast vmm --protect
//!      |  /data/web.raw      === repl1 ===>     /data/web.raw, empty
//!      br0, TAP                                 br0, TAP, mute
//! ```
//! The arbiter's record is in the etcd of the servers. Every wait has a bound.

use crate::artifacts::service;
use crate::error::{Result, RigError};
use crate::etcd;
use crate::host::server::Server;
use crate::rig::Rig;
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// First port of the replication links; each pair of servers has one.
const LINK_PORT: usize = 7100;
/// A question to an instance, or a small command; on a starved machine even those take their time.
const SHORT: Duration = Duration::from_secs(60);
/// Copying the service disk.
const COPY: Duration = Duration::from_secs(240);

/// What the VM is and how it is protected.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Its address on the client switch.
    pub address: Ipv4Addr,
    /// Its NIC's address.
    pub mac: [u8; 6],
    /// Megabytes of RAM.
    pub memory_mib: u64,
    /// Words for the mini guest (see [`crate::inside::mini`]).
    pub words: String,
    /// Silence after which a standby suspects its primary.
    pub suspect: Duration,
}

/// A protected VM. Dropping it leaves its processes to the servers, which end with the rig.
pub struct Protected<'r> {
    rig: &'r Rig,
    plan: Plan,
    verbose: bool,
    pids: Vec<Option<u32>>,
}

impl<'r> Protected<'r> {
    /// Starts the VM on a server, from power-on, with nobody to mirror it yet; it does not wait for the guest. The servers
    /// must have the service disk, and an etcd that is ready. `verbose`: its log tells of every epoch.
    ///
    /// # Errors
    /// Those of the agents. A VM that cannot start is noticed by the first wait.
    pub fn start(rig: &'r Rig, at: &Server, plan: Plan, verbose: bool) -> Result<Protected<'r>> {
        let mut vm = Protected {
            rig,
            plan,
            verbose,
            pids: vec![None; rig.servers().len()],
        };
        let disk = vm.disk();
        at.exec_within(
            &format!("cp --sparse=always /dev/rig/{} {disk}", service::SERIAL),
            COPY,
        )?;
        vm.spawn(at, true)?;
        Ok(vm)
    }

    /// The one command: from now on the VM is mirrored to this server too. It does not wait for the first full copy.
    pub fn protect(&mut self, on: &Server) -> Result<()> {
        on.exec(&format!(
            "rm -rf {0} {0}.sfj && truncate -s {1} {0}",
            self.disk(),
            service::BYTES
        ))?;
        self.spawn(on, false)
    }

    /// Starts it again from the disk that this server has, after all its instances were lost.
    pub fn start_again(&mut self, on: &Server) -> Result<()> {
        self.spawn(on, true)
    }

    /// A standby with the disk that this server has: what it lacks is copied, not all.
    pub fn follow(&mut self, on: &Server) -> Result<()> {
        self.spawn(on, false)
    }

    /// Its newest process on a server.
    ///
    /// # Errors
    /// None was started there.
    pub fn pid(&self, on: &Server) -> Result<u32> {
        self.pids[self.index(on)?].ok_or_else(|| {
            RigError::Unknown(format!("{} has no process of VM {}", on.name(), self.plan.name))
        })
    }

    /// Whether an instance was started there, which may have ended since.
    pub fn was_started(&self, on: &Server) -> bool {
        self.pid(on).is_ok()
    }

    /// The server has lost its power, and with it the instance.
    pub fn lost(&mut self, on: &Server) -> Result<()> {
        let index = self.index(on)?;
        self.pids[index] = None;
        Ok(())
    }

    /// Sends a signal (`KILL`, `STOP`, ...) to that process.
    pub fn signal(&self, on: &Server, signal: &str) -> Result<()> {
        on.exec(&format!("kill -{signal} {}", self.pid(on)?)).map(|_| ())
    }

    /// Its disk's image in each server.
    pub fn disk(&self) -> String {
        format!("/data/{}.raw", self.plan.name)
    }

    /// What its newest process on a server has said, in the server.
    pub fn log(&self) -> String {
        format!("/run/{}.log", self.plan.name)
    }

    /// Its console, in each server.
    pub fn console(&self) -> String {
        format!("/run/{}.console", self.plan.name)
    }

    fn index(&self, server: &Server) -> Result<usize> {
        let found = self.rig.servers().iter().position(|s| s.name() == server.name());
        found.ok_or_else(|| RigError::Unknown(format!("server {} is of another rig", server.name())))
    }

    fn spawn(&mut self, on: &Server, start: bool) -> Result<()> {
        let index = self.index(on)?;
        let (spec, protect) = (self.spec(), self.protection(index, start)?);
        let file = |what: &str| format!("/run/{}.{what}.json", self.plan.name);
        on.put_bytes(spec.to_string().as_bytes(), &file("vm"), 0o644)?;
        on.put_bytes(protect.to_string().as_bytes(), &file("protect"), 0o644)?;
        let level = if self.verbose {
            "info,steadfast_protect=debug"
        } else {
            "info"
        };
        let command = format!(
            "env STEADFAST_LOG={level} NO_COLOR=1 steadfast vmm --spec {} --protect {} --console {}",
            file("vm"),
            file("protect"),
            self.console()
        );
        self.pids[index] = Some(on.spawn(&command, &self.log())?);
        Ok(())
    }

    fn spec(&self) -> Value {
        let plan = &self.plan;
        let [a, b, c, d, e, f] = plan.mac;
        // The mini guest's own command line; `mini.root`: the service on the replicated disk.
        let cmdline = format!(
            "console=ttyS0 quiet loglevel=4 panic=-1 net.ifnames=0 {} mini.ip={}/24 mini.root=vda {}",
            crate::inside::mini::WORD,
            plan.address,
            plan.words
        );
        json!({
            "name": plan.name,
            "vcpus": 1,
            "memory_bytes": plan.memory_mib << 20,
            // Software emulation has an XSAVE that no real CPU has.
            "cpu": "V2",
            "boot": {"kernel": {
                "kernel": "/guests/mini/bzImage", "initrd": "/guests/mini/initrd", "cmdline": cmdline,
            }},
            "disks": [{"path": self.disk(), "format": "raw"}],
            "nics": [{
                "to": {"bridge": "br0"},
                "mac": format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
            }],
        })
    }

    fn protection(&self, own: usize, start: bool) -> Result<Value> {
        let servers = self.rig.servers();
        let address = |server: &Server, nic: &str| {
            server
                .address(nic)
                .map(str::to_string)
                .ok_or_else(|| RigError::Unknown(format!("server {} has no NIC {nic}", server.name())))
        };
        let mut peers = Vec::new();
        for (index, server) in servers.iter().enumerate().filter(|(i, _)| *i != own) {
            // Of each pair the first listens, on both replication switches.
            let (first, second) = (own.min(index), own.max(index));
            let port = LINK_PORT + first * servers.len() + second;
            let paths = ["repl0", "repl1"]
                .iter()
                .map(|nic| Ok(format!("{}:{port}", address(&servers[first], nic)?)))
                .collect::<Result<Vec<String>>>()?;
            peers.push(json!({"host": server.name(), "paths": paths}));
        }
        // Its own member first: the others may be the ones that die.
        let own_first = [&servers[own..], &servers[..own]].concat();
        let endpoints: Vec<String> = etcd::endpoints(&own_first)?
            .split(',')
            .map(str::to_string)
            .collect();
        Ok(json!({
            "host": servers[own].name(),
            "store": {"etcd": {"endpoints": endpoints, "timeout_ms": 4000}},
            "start": start,
            "suspect_ms": self.plan.suspect.as_millis() as u64,
            "peers": peers,
        }))
    }

    /// The status of the instance on a server: none while it does not answer.
    pub fn status(&self, on: &Server) -> Result<Option<Value>> {
        let command = format!("steadfast vm status {} --json", self.plan.name);
        let output = on.shell(&command, SHORT)?;
        if !output.success() {
            return Ok(None);
        }
        serde_json::from_slice(&output.stdout)
            .map(Some)
            .map_err(|e| RigError::malformed(format!("answer of `{command}`"), e))
    }

    /// True while the process on this server is there.
    pub fn is_alive(&self, on: &Server) -> Result<bool> {
        match self.pids[self.index(on)?] {
            // After a power loss the number may be another's.
            Some(pid) => {
                let alive = format!("tr '\\0' ' ' < /proc/{pid}/cmdline | grep -q 'steadfast vmm'");
                Ok(on.shell(&alive, SHORT)?.success())
            }
            None => Ok(false),
        }
    }

    /// Waits until the instance on a server says what is wanted; gives back its status then. Ends early when its process ends.
    ///
    /// # Errors
    /// [`RigError::Timeout`] with the end of its log.
    pub fn wait_status<T>(
        &self,
        on: &Server,
        what: &str,
        bound: Duration,
        mut wanted: impl FnMut(&Value) -> Option<T>,
    ) -> Result<T> {
        let began = Instant::now();
        loop {
            let status = self.status(on)?;
            if let Some(found) = status.as_ref().and_then(&mut wanted) {
                return Ok(found);
            }
            if began.elapsed() > bound || (status.is_none() && !self.is_alive(on)?) {
                return Err(self.trouble(on, what, began.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The error of an instance that is gone or late, with what it said last.
    pub fn trouble(&self, on: &Server, what: &str, after: Duration) -> RigError {
        let tail = format!(
            "grep -v ' DEBUG ' {} | tail -n 30; tail -c 600 {}",
            self.log(),
            self.console()
        );
        let said = on
            .shell(&tail, SHORT)
            .map_or_else(|e| e.to_string(), |output| output.text());
        RigError::Timeout {
            what: format!("{what} of VM {} on {}", self.plan.name, on.name()),
            after_ms: after.as_millis() as u64,
            detail: format!("; its log and console end with:\n{said}"),
        }
    }

    /// The server whose instance runs the VM, among those that are on.
    pub fn primary(&self) -> Result<Option<&'r Server>> {
        for (server, pid) in self.rig.servers().iter().zip(&self.pids) {
            if pid.is_some() && server.is_ready() {
                let status = self.status(server)?;
                if status.is_some_and(|s| s["protocol"]["role"] == "primary") {
                    return Ok(Some(server));
                }
            }
        }
        Ok(None)
    }

    /// Ends the instance on a server, as if its process were killed in order; waits for its end.
    pub fn stop(&self, on: &Server) -> Result<()> {
        let Some(pid) = self.pids[self.index(on)?] else {
            return Ok(());
        };
        on.exec(&format!("steadfast vm stop {}", self.plan.name))?;
        on.wait_for(&format!("! kill -0 {pid} 2>/dev/null"), SHORT)
            .map(|_| ())
    }

    /// What it is.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}
