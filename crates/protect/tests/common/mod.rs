//! Two hosts of one protected `pulse` guest, as processes of this machine, and a client of the guest.
//!
//! An instance is this very test program again, called with the name of the ignored test [`INSTANCE_TEST`], so that a test
//! needs no other binary. It ends with the test that started it (`PDEATHSIG`), and by [`Instance`]'s drop.
//!
//! The client hears both NICs, as behind a switch that floods, and knows from which of them each frame came.

#![allow(dead_code)]

pub mod client;
pub mod duo;
pub mod proxy;
pub mod switch;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_disk::image::create;
use steadfast_machine::devices::legacy::NullSink;
use steadfast_machine::machine::ThreadHooks;
use steadfast_protect::ProtectSpec;
use steadfast_vmm::control::{Request, ask};
use steadfast_vmm::process::{Options, ProcessError};
use steadfast_vmm::spec::VmSpec;

/// The ignored test that is an instance.
pub const INSTANCE_TEST: &str = "instance_process";
/// Exit status of an instance that was fenced.
pub const FENCED: i32 = 43;
/// Exit status of an instance whose disk failed.
pub const DISK_FAULT: i32 = 45;
/// Exit status of an instance that ended with another error.
pub const FAILED: i32 = 44;

/// Size of the guest's disk.
const DISK_BYTES: usize = 12 << 20;

/// Whether KVM can be used; says so loudly when not.
pub fn kvm() -> bool {
    let there = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, no guest can run here");
    }
    there
}

/// The body of [`INSTANCE_TEST`]: one host's instance, with its files in the folder that the environment names.
pub fn instance_process() {
    let Some(dir) = std::env::var_os("PULSE_INSTANCE").map(PathBuf::from) else {
        return;
    };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::INFO)
        .init();
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let spec: VmSpec = serde_json::from_slice(&read("spec.json")).unwrap();
    let protect: ProtectSpec = serde_json::from_slice(&read("protect.json")).unwrap();
    let options = Options {
        control: Some(dir.join("control")),
        serial: Box::new(|| Box::new(NullSink)),
        debugcon: Box::new(|| None),
        on_serial: Box::new(|_| {}),
        paused: false,
        reset_panicked: true,
        isolation: None,
        hooks: ThreadHooks::default(),
    };
    match steadfast_protect::run(spec, protect, options) {
        Ok(ended) => tracing::info!(?ended, "the instance ended"),
        Err(error) => {
            tracing::error!(%error, "the instance failed");
            std::process::exit(match error {
                ProcessError::Fenced => FENCED,
                ProcessError::DiskFault(_) => DISK_FAULT,
                _ => FAILED,
            });
        }
    }
    std::process::exit(0);
}

/// One instance's process.
pub struct Instance {
    /// Its host.
    pub host: &'static str,
    dir: PathBuf,
    child: Child,
}

impl Instance {
    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// kill -9; returns when, and does not wait for the end of the process.
    pub fn kill(&self) -> Instant {
        let at = Instant::now();
        self.signal(rustix::process::Signal::KILL);
        at
    }

    /// Waits for the end: the exit status, none if a signal ended it.
    pub fn ended(&mut self, within: Duration) -> Option<i32> {
        let until = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(
                Instant::now() < until,
                "{} has not ended within {within:?}",
                self.host
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Memory that its process holds, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    /// Whether the process still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Asks it something; null if it does not answer.
    pub fn ask(&self, request: &Request) -> Value {
        ask(&self.dir.join("control"), request, Duration::from_secs(5)).unwrap_or_default()
    }

    /// Its status, if it answers.
    pub fn status(&self) -> Option<Value> {
        Some(self.ask(&Request::Status)).filter(|v| !v.is_null())
    }

    /// Whether it is the primary, and whether the VM is protected.
    pub fn role(&self) -> (bool, bool) {
        let status = self.status().unwrap_or_default();
        let p = &status["protocol"];
        (p["role"] == "primary", p["protected"] == true)
    }

    /// Whether it is the primary, and another host could be handed the VM.
    pub fn could_move(&self) -> bool {
        let status = self.status().unwrap_or_default();
        let members = status["protocol"]["members"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        members.iter().any(|m| m["in_sync"] == true)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Only here: a killed process must be waited for, too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where two hosts meet, and what they run.
pub struct Site {
    dir: tempfile::TempDir,
    /// Where host `a` listens, and where host `b` connects (a proxy may be between).
    pub paths: [[SocketAddr; 2]; 2],
    /// The guest's command line.
    pub cmdline: String,
    /// Every epoch is compared with what the primary had (it lengthens the pause).
    pub audit: bool,
    /// The guest has a disk that is replicated.
    pub disk: bool,
    /// That disk is one image for all hosts, in this format; here, if a host is listed, is another file.
    pub shared: Option<&'static str>,
    /// See [`Site::shared`].
    pub elsewhere: BTreeMap<&'static str, PathBuf>,
    /// It has a watchdog.
    pub watchdog: bool,
    /// Silence after which a primary is suspected, in milliseconds.
    pub suspect_ms: u64,
    /// All of it is mirrored, not only its disk.
    pub memory: bool,
    /// The same silence where only its disk is mirrored.
    pub boot_after_ms: u64,
    /// Where the instance that is started next kills itself.
    pub die_at: Option<String>,
    /// The CPU template of each host's own specification.
    pub cpu: BTreeMap<&'static str, Value>,
    /// Features of the guest's CPU that host `b` lacks.
    pub cpu_without: Vec<&'static str>,
    /// Certificates for each host, in its folder: `ca.pem`, `HOST.pem`, `HOST.key`.
    pub tls: bool,
    /// Where hosts `a` and `b` meet a third one, `c`, if there is one.
    pub third: Option<[[SocketAddr; 2]; 2]>,
    count: u32,
}

/// A port of the loopback interface where nobody listens, outside the range of outgoing connections.
pub fn free_port(random: &mut Random) -> SocketAddr {
    loop {
        let at: SocketAddr = ([127, 0, 0, 1], 10_000 + random.below(20_000) as u16).into();
        if TcpListener::bind(at).is_ok() {
            return at;
        }
    }
}

impl Site {
    /// A new one, its files in a temporary folder.
    pub fn new(random: &mut Random) -> Self {
        // In memory where it can be: a shared machine's disk may stand still for seconds, which is another test's matter.
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        std::fs::write(dir.path().join("pulse.elf"), pulse::elf()).unwrap();
        let ports = [free_port(random), free_port(random)];
        Self {
            dir,
            paths: [ports, ports],
            cmdline: "pages=100 loop=dirty rate=200 udp=1 tcp=1 ip=10.0.0.2".into(),
            audit: std::env::var_os("STEADFAST_AUDIT").is_some(),
            disk: false,
            shared: None,
            elsewhere: BTreeMap::new(),
            watchdog: false,
            suspect_ms: 160,
            memory: true,
            boot_after_ms: 0,
            die_at: None,
            cpu: BTreeMap::new(),
            cpu_without: Vec::new(),
            tls: false,
            third: None,
            count: 0,
        }
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The other hosts, and where this one meets them.
    pub fn links(&self, host: &str) -> Vec<(&'static str, [SocketAddr; 2])> {
        let [a, b] = self.paths;
        let mut all = match host {
            "a" => vec![("b", a)],
            "b" => vec![("a", b)],
            _ => Vec::new(),
        };
        if let Some([ac, bc]) = self.third {
            match host {
                "a" => all.push(("c", ac)),
                "b" => all.push(("c", bc)),
                _ => all = vec![("a", ac), ("b", bc)],
            }
        }
        all
    }

    /// Starts a new process on `host` (`a`, `b`, or `c` if there is a third); `start`: it powers the VM on.
    pub fn spawn(&mut self, host: &'static str, start: bool) -> Instance {
        self.count += 1;
        let dir = self.path().join(format!("{host}{}", self.count));
        std::fs::create_dir(&dir).unwrap();
        let links = self.links(host);
        let peers: Vec<_> = links
            .iter()
            .map(|(peer, paths)| json!({"host": peer, "paths": paths}))
            .collect();
        let image = match (self.shared, self.elsewhere.get(host)) {
            (None, _) => self.path().join(format!("{host}.raw")),
            (Some(_), Some(other)) => other.clone(),
            (Some(format), None) => self.path().join(format!("shared.{format}")),
        };
        if self.disk && !image.exists() {
            match self.shared {
                Some("qcow2") => create::create_qcow2(&image, DISK_BYTES as u64).unwrap(),
                _ => std::fs::write(&image, vec![0; DISK_BYTES]).unwrap(),
            }
        }
        let disks = json!([{"path": image, "format": self.shared.unwrap_or("raw")}]);
        let file = |name: String| self.path().join(name);
        let tls = json!({
            "ca": file("ca.pem".into()),
            "certificate": file(format!("{host}.pem")),
            "key": file(format!("{host}.key")),
        });
        let spec = json!({
            "disks": if self.disk { disks } else { json!([]) },
            "name": "p", "vcpus": 1, "memory_bytes": 128 << 20, "watchdog": self.watchdog,
            "cpu": self.cpu.get(host).unwrap_or(&json!("Host")),
            "boot": {"flat": {"elf": self.path().join("pulse.elf"), "cmdline": self.cmdline}},
            "nics": [{
                "to": {"socket": {"own": self.nic(host), "peer": self.path().join("client")}},
                "mac": "52:54:00:00:00:01",
            }],
        });
        let protect = json!({
            "host": host, "store": self.path().join("store"), "start": start,
            "peers": peers,
            "suspect_ms": self.suspect_ms,
            "memory": self.memory,
            "boot_after_ms": self.boot_after_ms,
            "shared_disks": if self.shared.is_some() { &[0][..] } else { &[] },
            "die_at": self.die_at.take(),
            "tls": if self.tls { tls } else { Value::Null },
            "disk_faults": self.path().join(format!("faults-{host}")),
            "cpu_without": if host == "b" { &self.cpu_without[..] } else { &[] },
            "audit": self.audit.then(|| self.path().join("audit")),
        });
        std::fs::write(dir.join("spec.json"), spec.to_string()).unwrap();
        std::fs::write(dir.join("protect.json"), protect.to_string()).unwrap();
        let log = File::create(dir.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", INSTANCE_TEST, "--nocapture"])
            .env("PULSE_INSTANCE", &dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Instance { host, dir, child }
    }

    /// The last lines of the logs of the instances started last.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for n in self.count.saturating_sub(2)..=self.count {
            for host in ["a", "b", "c"] {
                if let Ok(text) = std::fs::read_to_string(self.path().join(format!("{host}{n}/log"))) {
                    let lines: Vec<_> = text.lines().collect();
                    let tail = lines[lines.len().saturating_sub(40)..].join("\n");
                    all.push_str(&format!("--- {host}{n}\n{tail}\n"));
                }
            }
        }
        all
    }

    /// How a host's disk fails from now on (`steadfast_disk::testing::LiveFaults`).
    pub fn faults(&self, host: &str, rules: &str) {
        let path = self.path().join(format!("faults-{host}"));
        let draft = path.with_extension("new");
        std::fs::write(&draft, rules).unwrap();
        std::fs::rename(draft, path).unwrap();
    }

    /// The socket of a host's NIC.
    pub fn nic(&self, host: &str) -> PathBuf {
        self.path().join(format!("nic-{host}"))
    }
}

/// Waits for a condition, and fails when it does not come.
pub fn wait(what: &str, within: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + within;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {within:?}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Numbers from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    /// From `STEADFAST_SEED`, or a new seed; printed.
    pub fn seeded(test: &str) -> Self {
        let seed = std::env::var("STEADFAST_SEED")
            .ok()
            .and_then(|s| s.parse().ok())
            .unwrap_or_else(|| steadfast_protect::store::random_u64().unwrap());
        println!("{test}: seed {seed} (again with STEADFAST_SEED={seed})");
        Self(seed)
    }

    /// The next number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

/// Median and 99th percentile, printed with what they are of.
pub fn print_percentiles(what: &str, mut all: Vec<Duration>) {
    all.sort_unstable();
    let at = |p: usize| all.get((all.len() * p / 100).min(all.len().saturating_sub(1)));
    println!(
        "{what}: n {} p50 {:.1?} p99 {:.1?} max {:.1?}",
        all.len(),
        at(50).copied().unwrap_or_default(),
        at(99).copied().unwrap_or_default(),
        all.last().copied().unwrap_or_default()
    );
}
