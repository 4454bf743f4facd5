//! Our side: a pool of three, two VMs of class `restart`, one of them with a disk of each host's own that is mirrored, and one of class `ft`;
//! the host that runs the one is killed, then the host that runs the next.

use super::{BOUND, MEMORY_MIB, kill, servers, until_answer};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use steadfast_rig::Rig;
use steadfast_rig::pool::PoolHost;
use steadfast_rig::vm::CPU;

pub const LEASE: Duration = Duration::from_secs(3);
pub const SUSPECT: Duration = Duration::from_millis(1500);
/// Of the store; an election takes ten to twenty.
const HEARTBEAT: Duration = Duration::from_millis(300);
/// The disk of a VM, on every host.
const IMAGE: &str = "/data/bench.raw";

/// A VM: name, class, address, whether it has a disk.
struct Vm(&'static str, &'static str, Ipv4Addr, bool);

const VMS: [Vm; 3] = [
    Vm("restart", "restart", Ipv4Addr::new(10, 90, 0, 121), false),
    Vm("restart-disk", "restart", Ipv4Addr::new(10, 90, 0, 123), true),
    Vm("ft", "ft", Ipv4Addr::new(10, 90, 0, 122), false),
];

/// Seconds from kill to answer: class `restart`, the same with a disk, class `ft`.
pub fn measure(rounds: usize) -> Result<[Vec<f64>; 3]> {
    let rig = servers(Rig::builder())?;
    let host = |server| PoolHost::new(server).heartbeat(HEARTBEAT);
    let hosts: Vec<PoolHost<'_>> = rig.servers().iter().map(host).collect();
    let pool = Pool { rig: &rig, hosts };
    let measured = pool.measure(rounds);
    if measured.is_err() {
        eprintln!("{}", pool.story(60));
    }
    drop(pool);
    rig.end();
    measured
}

struct Pool<'r> {
    rig: &'r Rig,
    hosts: Vec<PoolHost<'r>>,
}

impl Pool<'_> {
    fn measure(&self, rounds: usize) -> Result<[Vec<f64>; 3]> {
        let (first, others) = self.hosts.split_first().context("no servers")?;
        eprintln!("three servers are up; they become a pool");
        first.init(LEASE, SUSPECT)?;
        for host in others {
            host.join(first, false)?;
        }
        self.wait("three hosts that are up", |s| {
            let hosts = s["hosts"].as_array();
            hosts.is_some_and(|h| h.len() == 3 && h.iter().all(|h| h["health"] == "up"))
                && s["leader"].is_string()
        })?;
        for Vm(name, class, address, disk) in VMS {
            let disk = match disk {
                true => format!("--disk {IMAGE},format=raw"),
                false => String::new(),
            };
            for host in self.hosts.iter().filter(|_| !disk.is_empty()) {
                host.server.exec(&format!("truncate -s 16M {IMAGE}"))?;
            }
            first.run(&format!(
                "vm create --name {name} --class {class} {disk} --memory {MEMORY_MIB}MiB --cpu {CPU} --rng false --nic br0 \
                 --kernel /guests/mini/bzImage --initrd /guests/mini/initrd \
                 --cmdline \"$(cat /guests/mini/cmdline) mini.ip={address}/24 mini.tick_ms=0 mini.clock_ms=200\""
            ))?;
            let began = Instant::now();
            self.wait("the VM to run", |s| {
                vm(s, name).is_some_and(|v| v["state"] == "running")
            })?;
            until_answer(self.rig.client()?, address, began)?;
            eprintln!("{name}: booted in {:.2} s", began.elapsed().as_secs_f64());
        }
        let mut found = [const { Vec::new() }; 3];
        for round in 0..rounds {
            for (Vm(name, _, address, _), found) in VMS.into_iter().zip(&mut found) {
                self.wait("the pool to be well", |s| s["healthy"] == true)?;
                let status = self.status()?;
                let on = vm(&status, name)
                    .and_then(|v| v["host"].as_str())
                    .unwrap_or_default()
                    .to_string();
                let Some(host) = self.hosts.iter().find(|h| h.name() == on) else {
                    bail!("{name} runs nowhere: {status}");
                };
                let took = kill(self.rig, host.server, address).with_context(|| format!("{name} on {on}"))?;
                eprintln!(
                    "round {} of {rounds}: {on} was killed, {name}: {took:.2} s",
                    round + 1
                );
                eprintln!("{}", self.story(12));
                found.push(took);
                host.server.start()?;
                host.start_daemon()?;
            }
        }
        Ok(found)
    }

    fn status(&self) -> Result<Value> {
        let on = self
            .hosts
            .iter()
            .find(|h| h.server.is_ready())
            .context("no server is on")?;
        Ok(on.json("pool status")?.unwrap_or_default())
    }

    fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        let began = Instant::now();
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(());
            }
            if began.elapsed() > BOUND {
                bail!("waited for {what} in vain; the pool says {status}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What the pool says that it did last.
    fn story(&self, events: u32) -> String {
        let on = self.hosts.iter().find(|h| h.server.is_ready());
        let said = on.map(|h| h.run(&format!("events --limit {events}")));
        match said {
            Some(Ok(text)) => text,
            other => format!("{other:?}"),
        }
    }
}

fn vm<'s>(status: &'s Value, name: &str) -> Option<&'s Value> {
    status["vms"].as_array()?.iter().find(|v| v["vm"] == name)
}
