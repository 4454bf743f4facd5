//! The place of a benchmark: a folder, and VMs as processes of this machine, each started from a [`Setup`].
//!
//! ```text
//! client socket <--> nic-a  primary  --link, loopback TCP--> standby  nic-b <--> client socket
//! ```
//! The processes are the real binary. Each ends with its [`Vm`], and when this program dies (`setpriv --pdeathsig`).

use super::loop_guest;
use super::proc::{self, Cpu};
use super::switch::Switch;
use anyhow::{Context, Result, bail};
use pulse::client::Client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// Whatever should happen, happens within this time on any machine, or not at all.
pub const BOUND: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// Of everything that is measured, and of the client.
const NICE: i32 = -10;
/// The guest's address.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);

/// Where benchmarks have their files, and the binary they start.
pub struct Lab {
    steadfast: PathBuf,
    dir: tempfile::TempDir,
    count: Cell<u32>,
    /// Fewer cases and rounds.
    pub quick: bool,
    _group: Group,
}

/// Linux shares the CPU out by sessions first (`sched_autogroup`): nice values count only inside of one. So the session
/// that measures comes first too, until this is dropped.
struct Group {
    before: Option<String>,
}

impl Group {
    const FILE: &'static str = "/proc/self/autogroup";

    fn raise() -> Self {
        // `/autogroup-9 nice 0`; nothing where the kernel has no such groups, or does not allow it.
        let text = std::fs::read_to_string(Self::FILE).unwrap_or_default();
        let nice = text.split_ascii_whitespace().last().map(String::from);
        let raised = std::fs::write(Self::FILE, (NICE + 2).to_string()).is_ok();
        Self {
            before: nice.filter(|_| raised),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(nice) = &self.before {
            let _ = std::fs::write(Self::FILE, nice);
        }
    }
}

impl Lab {
    /// Builds the binary, so that no old one is measured, and makes the folder.
    pub fn new(quick: bool) -> Result<Self> {
        let built = Command::new("cargo")
            .args(["build", "--release", "--quiet", "--workspace", "--bins"])
            .status()
            .context("run cargo")?;
        if !built.success() {
            bail!("the binary cannot be built");
        }
        // Not allowed: then the client is at the mercy of other work.
        let _ = rustix::process::setpriority_process(None, NICE);
        let me = std::env::current_exe().context("where this program is")?;
        let steadfast = me.with_file_name("steadfast");
        if !steadfast.is_file() {
            bail!("{} does not exist after building it", steadfast.display());
        }
        let dir = tempfile::Builder::new().prefix("ft").tempdir()?;
        std::fs::write(dir.path().join("pulse.elf"), pulse::elf())?;
        Ok(Self {
            steadfast,
            dir,
            count: Cell::new(0),
            quick,
            _group: Group::raise(),
        })
    }

    /// A new folder for one measurement.
    pub fn folder(&self) -> Result<PathBuf> {
        self.count.set(self.count.get() + 1);
        let dir = self.dir.path().join(self.count.get().to_string());
        std::fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// The flat guest's file.
    pub fn pulse(&self) -> PathBuf {
        self.dir.path().join("pulse.elf")
    }

    /// How long a rate is watched.
    pub fn watch(&self) -> Duration {
        Duration::from_secs(if self.quick { 2 } else { 4 })
    }
}

/// What runs in a VM.
#[derive(Clone)]
pub enum Guest {
    /// `pulse` with this command line.
    Pulse(String),
    /// The loop of [`loop_guest`] over so many pages.
    Loop(u32),
}

/// A VM to be measured.
#[derive(Clone)]
pub struct Setup {
    /// What runs.
    pub guest: Guest,
    /// RAM in MiB.
    pub ram_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// A disk of so many MiB.
    pub disk_mib: Option<u64>,
    /// A set interval of cuts instead of the policy's.
    pub interval_us: Option<u64>,
}

impl Setup {
    /// 128 MiB, one vCPU, no disk, cuts as the policy says.
    pub fn new(guest: Guest) -> Self {
        Self {
            guest,
            ram_mib: 128,
            vcpus: 1,
            disk_mib: None,
            interval_us: None,
        }
    }

    /// `pulse` with this command line.
    pub fn pulse(cmdline: impl Into<String>) -> Self {
        Self::new(Guest::Pulse(cmdline.into()))
    }

    /// With this interval between cuts.
    pub fn every(self, interval_us: u64) -> Self {
        Self {
            interval_us: Some(interval_us),
            ..self
        }
    }
}

/// The process of one instance of a VM.
pub struct Vm {
    child: RefCell<Child>,
    dir: PathBuf,
    /// `a`, `b`, or `u` for an unprotected one.
    pub host: &'static str,
}

impl Vm {
    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.borrow().id()
    }

    /// Its status.
    pub fn status(&self) -> Result<Value> {
        self.ask_status().with_context(|| self.logged())
    }

    fn logged(&self) -> String {
        let read = |name| std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        let ended = self.child.borrow_mut().try_wait().ok().flatten();
        format!("{} ({ended:?}): {} {}", self.host, read("log"), read("console"))
    }

    fn ask_status(&self) -> Result<Value> {
        let path = self.dir.join("p.sock");
        let mut s = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
        s.set_read_timeout(Some(Duration::from_secs(20)))?;
        s.write_all(b"{\"verb\":\"status\"}\n")?;
        let mut line = String::new();
        BufReader::new(s).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// A number of its status.
    pub fn number(status: &Value, name: &str) -> f64 {
        let protocol = &status["protocol"];
        let found = if status[name].is_null() {
            &protocol[name]
        } else {
            &status[name]
        };
        found.as_f64().unwrap_or(f64::NAN)
    }

    /// Whether it runs the VM, and a standby could go on with it now.
    pub fn protects(&self) -> bool {
        let status = self.ask_status().unwrap_or_default();
        let p = &status["protocol"];
        p["role"] == "primary" && p["protected"] == true
    }

    /// Bytes that the guest wrote to port 0xe9.
    pub fn progress(&self) -> u64 {
        std::fs::metadata(self.dir.join("e9")).map_or(0, |m| m.len())
    }

    /// Sends a signal; says when.
    pub fn signal(&self, signal: Signal) -> Instant {
        let at = Instant::now();
        // A process that is gone already is waited for all the same.
        let _ = kill_process(Pid::from_child(&self.child.borrow()), signal);
        at
    }

    /// CPU time until now.
    pub fn cpu(&self) -> Cpu {
        proc::cpu(self.pid())
    }

    /// What it said last.
    pub fn said(&self) -> String {
        let status = self.ask_status().unwrap_or_default();
        let lines = status["log"].as_array().cloned().unwrap_or_default();
        let tail: Vec<String> = lines.iter().rev().take(12).rev().map(Value::to_string).collect();
        format!("{} {}\n{}", self.logged(), status["protocol"], tail.join("\n"))
    }
}

impl Vm {
    /// Kills it and waits for its end.
    pub fn end(&mut self) {
        let child = self.child.get_mut();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end();
    }
}

/// A VM's home: its folder, its two hosts' addresses, its client's socket.
pub struct Home<'l> {
    lab: &'l Lab,
    setup: Setup,
    dir: PathBuf,
    link: SocketAddr,
    count: Cell<u32>,
}

fn free_port() -> Result<SocketAddr> {
    // Outside of the range of outgoing connections, which come and go.
    let mut seed = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(1, |d| d.as_nanos() as u64);
    for _ in 0..1000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at: SocketAddr = ([127, 0, 0, 1], 10_000 + (seed >> 40) as u16 % 20_000).into();
        if TcpListener::bind(at).is_ok() {
            return Ok(at);
        }
    }
    bail!("no port of the loopback interface is free")
}

impl<'l> Home<'l> {
    /// A home for one VM.
    pub fn new(lab: &'l Lab, setup: Setup) -> Result<Self> {
        let dir = lab.folder()?;
        if let Guest::Loop(pages) = setup.guest {
            std::fs::write(dir.join("loop.elf"), loop_guest::elf(pages))?;
        }
        Ok(Self {
            lab,
            setup,
            dir,
            link: free_port()?,
            count: Cell::new(0),
        })
    }

    /// Its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The socket of a host's card.
    pub fn nic(&self, host: &str) -> PathBuf {
        self.path(&format!("nic-{host}"))
    }

    /// A client that talks to the VM on whichever of these hosts it is.
    pub fn client(&self, hosts: &[&str]) -> Result<Client<Switch>> {
        let own = self.path("client");
        let _ = std::fs::remove_file(&own);
        let nics = hosts.iter().map(|h| self.nic(h)).collect();
        let wire = Switch::new(UnixDatagram::bind(own)?, nics, pulse_header::VNET);
        let mut client = Client::new(wire, CLIENT_IP, GUEST_IP);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        client.nonces_from(now.as_nanos() as u64 >> 8);
        Ok(client)
    }

    /// Starts a process: unprotected on `u`; on `a` and `b` the first powers the VM on (`start`), the other mirrors it.
    pub fn start(&self, host: &'static str, start: bool) -> Result<Vm> {
        self.count.set(self.count.get() + 1);
        let dir = self.path(&format!("{host}{}", self.count.get()));
        std::fs::create_dir(&dir)?;
        let s = &self.setup;
        let boot = match &s.guest {
            Guest::Pulse(cmdline) => json!({"elf": self.lab.pulse(), "cmdline": cmdline}),
            Guest::Loop(_) => json!({"elf": self.path("loop.elf"), "cmdline": ""}),
        };
        let nics = match &s.guest {
            Guest::Pulse(_) => json!([{
                "to": {"socket": {"own": self.nic(host), "peer": self.path("client")}}, "mac": "52:54:00:00:00:01",
            }]),
            Guest::Loop(_) => json!([]),
        };
        let disks = match s.disk_mib {
            Some(mib) => {
                let path = self.path(&format!("{host}.raw"));
                if !path.exists() {
                    new_disk(&path, mib)?;
                }
                json!([{"path": path, "format": "raw"}])
            }
            None => json!([]),
        };
        let spec = json!({
            "name": "p", "vcpus": s.vcpus, "memory_bytes": s.ram_mib * MIB, "boot": {"flat": boot},
            "nics": nics, "disks": disks,
        });
        std::fs::write(dir.join("spec"), spec.to_string())?;
        let log = File::create(dir.join("log"))?;
        let mut command = measured();
        command
            .arg(&self.lab.steadfast)
            .arg("vmm")
            .arg("--spec")
            .arg(dir.join("spec"))
            .args(["--user", "0:0", "--cgroup", "off", "--console"])
            .arg(dir.join("console"))
            .arg("--debugcon")
            .arg(dir.join("e9"))
            .env("STEADFAST_RUN_DIR", &dir)
            .env("STEADFAST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if host != "u" {
            let peer = if host == "a" { "b" } else { "a" };
            let mut protect = json!({
                "host": host, "store": self.path("store"), "start": start,
                "peers": [{"host": peer, "paths": [self.link]}],
            });
            if let Some(us) = s.interval_us {
                protect["max_interval_us"] = us.into();
            }
            std::fs::write(dir.join("protect"), protect.to_string())?;
            command.arg("--protect").arg(dir.join("protect"));
        }
        let child = command.spawn().context("start a VM's process (setpriv)")?;
        Ok(Vm {
            child: RefCell::new(child),
            dir,
            host,
        })
    }

    /// Starts both hosts and waits until the VM is protected.
    pub fn pair(&self) -> Result<(Vm, Vm)> {
        let primary = self.start("a", true)?;
        let standby = self.start("b", false)?;
        wait("the VM is protected", || primary.protects())
            .with_context(|| format!("{}\n{}", primary.said(), standby.said()))?;
        Ok((primary, standby))
    }
}

/// Headers in front of frames.
pub mod pulse_header {
    /// Bytes of the virtio header in front of a frame on our sockets.
    pub const VNET: usize = 12;
    /// QEMU's `dgram` has none.
    pub const NONE: usize = 0;
}

/// Runs what is added to it: it ends with this program, and inherits its nice value.
pub fn measured() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    command
}

/// A disk image whose blocks exist, so that no measurement pays for their allocation.
pub fn new_disk(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let block = vec![0; MIB as usize];
    for _ in 0..mib {
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

/// Waits for a condition.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + BOUND;
    while !done() {
        if Instant::now() > until {
            bail!("{what}: not within {BOUND:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// How fast a number grows, per second, watched for `time`.
pub fn rate(time: Duration, mut read: impl FnMut() -> Result<f64>) -> Result<f64> {
    let (first, began) = (read()?, Instant::now());
    std::thread::sleep(time);
    let last = read()?;
    Ok((last - first) / began.elapsed().as_secs_f64())
}
