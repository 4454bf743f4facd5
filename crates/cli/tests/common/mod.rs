//! A pool on this machine: each host is a daemon on a loopback address of its own, with folders of its own.
//!
//! The death of a host is the death of all processes that were started for it: daemon, etcd, guard and VMs. They are found by
//! the run folder in their environment, which nobody else has.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

pub mod client;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Bound for what takes seconds on a quiet machine.
pub const LONG: Duration = Duration::from_secs(120);

/// The etcd program: installed, or unpacked by scripts/setup.sh.
pub fn etcd() -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let cache = std::env::var_os("STEADFAST_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|c| PathBuf::from(c).join("steadfast")))
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache/steadfast")));
    std::env::split_paths(&paths)
        .chain(cache.map(|c| c.join("etcd/usr/bin")))
        .map(|folder| folder.join("etcd"))
        .find(|p| p.is_file())
}

/// Whether a pool can run here; says loudly when not.
pub fn possible() -> bool {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, no guest can run here");
        return false;
    }
    if etcd().is_none() {
        eprintln!(
            "SKIPPED: no etcd here; scripts/setup.sh unpacks the Debian package etcd-server into the cache"
        );
        return false;
    }
    true
}

pub struct Host {
    pub name: String,
    pub address: Ipv4Addr,
    pub folder: PathBuf,
    pub daemon: Option<Child>,
    /// Its `steadfast`, if it is to have one of its own.
    pub program: Option<PathBuf>,
}

impl Host {
    pub fn run_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Its `/sys` is below this, as far as it is about failures to come.
    pub fn sys_root(&self) -> PathBuf {
        self.folder.join("sys-root")
    }

    fn command(&self) -> Command {
        let program = self.program.as_deref();
        let mut command = Command::new(program.unwrap_or(Path::new(env!("CARGO_BIN_EXE_steadfast"))));
        command
            .env("STEADFAST_DATA_DIR", self.folder.join("data"))
            .env("STEADFAST_RUN_DIR", self.run_folder())
            // What this machine's sensors say is no part of a test.
            .env("STEADFAST_SYS_ROOT", self.sys_root())
            .stdin(Stdio::null());
        command
    }

    /// Runs `steadfast ARGS` on this host.
    pub fn try_run(&self, args: &[&str]) -> Output {
        self.command().args(args).output().unwrap()
    }

    /// As [`Self::try_run`]; it must succeed.
    pub fn run(&self, args: &[&str]) -> String {
        let out = self.try_run(args);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success(),
            "{}: steadfast {args:?}: {text}{said}",
            self.name
        );
        text
    }

    /// What it prints, however it ends.
    pub fn run_anyway(&self, args: &[&str]) -> String {
        String::from_utf8_lossy(&self.try_run(args).stdout).into_owned()
    }

    /// What a verb answers with --json, whatever its exit code; nothing if it cannot be asked.
    pub fn json(&self, args: &[&str]) -> Value {
        let out = self.command().arg("--json").args(args).output().unwrap();
        serde_json::from_slice(&out.stdout).unwrap_or(Value::Null)
    }

    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// A VM as this host's daemon sees it.
    pub fn vm(&self, vm: &str) -> Value {
        let status = self.status();
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        vms.into_iter().find(|v| v["vm"] == vm).unwrap_or(Value::Null)
    }

    pub fn start_daemon(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("daemon.log"))
            .unwrap();
        let child = self
            .command()
            .arg("node")
            .env("STEADFAST_LOG", "info")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(child);
    }

    /// Ends the daemon in order; what outlives it lives on.
    pub fn stop_daemon(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            let until = Instant::now() + Duration::from_secs(20);
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > until {
                    child.kill().unwrap();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Processes of drills on this host: they have a run folder of their own, and are found by the file that they go on from.
    pub fn copies(&self) -> usize {
        let file = self.folder.join("data/drill").display().to_string();
        let lines = std::fs::read_dir("/proc").unwrap().flatten();
        let of = |e: std::fs::DirEntry| std::fs::read(e.path().join("cmdline")).unwrap_or_default();
        lines
            .map(of)
            .filter(|line| String::from_utf8_lossy(line).contains(&file))
            .count()
    }

    /// Kills the daemon alone; whoever waits for it is the caller.
    pub fn kill_daemon(&self) {
        if let Some(child) = &self.daemon {
            let _ = kill_process(Pid::from_child(child), Signal::KILL);
        }
    }

    /// Kills the daemon and starts it again, as whoever supervises it does: once the old one has ended.
    pub fn crash_daemon(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.start_daemon();
    }

    /// Processes of this host, by the run folder in their environment.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = format!("STEADFAST_RUN_DIR={}", self.run_folder().display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if environ.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                found.push((pid, String::from_utf8_lossy(&line).replace('\0', " ")));
            }
        }
        found
    }

    /// All its processes at once, as if its power failed. Its run folder is gone too, as after a restart.
    pub fn power_off(&mut self) -> Instant {
        // Until nothing is left: a process may be starting another one.
        let at = Instant::now();
        loop {
            let all = self.processes();
            for (pid, _) in &all {
                if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            if let Some(mut child) = self.daemon.take() {
                let _ = child.wait();
            }
            if all.is_empty() {
                break;
            }
        }
        let _ = std::fs::remove_dir_all(self.run_folder());
        at
    }
}

pub struct Pool {
    pub hosts: Vec<Host>,
    folder: tempfile::TempDir,
}

impl Pool {
    /// A pool of these hosts; names that begin with `w` are witnesses.
    pub fn new(names: &[&str], lease_ms: u64) -> Self {
        Self::made(names, lease_ms, &["--vmm-arg=--cgroup=off"])
    }

    /// As [`Self::new`], with more settings of each host.
    pub fn made(names: &[&str], lease_ms: u64, settings: &[&str]) -> Self {
        Self::with(names, lease_ms, settings, None)
    }

    /// As [`Self::made`]; each host has a copy of `program` of its own.
    pub fn with(names: &[&str], lease_ms: u64, settings: &[&str], program: Option<&Path>) -> Self {
        Self::begun(names, &["--lease-ms", &lease_ms.to_string()], settings, program)
    }

    /// As [`Self::with`], with settings of the pool.
    pub fn begun(names: &[&str], of_pool: &[&str], settings: &[&str], program: Option<&Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let random = std::collections::hash_map::RandomState::new();
        let random = std::hash::BuildHasher::hash_one(&random, folder.path());
        let [x, y, ..] = random.to_le_bytes();
        let hosts = names.iter().enumerate().map(|(i, name)| Host {
            name: (*name).into(),
            address: Ipv4Addr::new(127, x.max(1), y, i as u8 + 1),
            folder: folder.path().join(name),
            daemon: None,
            program: None,
        });
        let mut pool = Self {
            hosts: hosts.collect(),
            folder,
        };
        if let Some(program) = program {
            for host in &mut pool.hosts {
                std::fs::create_dir_all(&host.folder).unwrap();
                let own = host.folder.join("steadfast");
                std::fs::copy(program, &own).unwrap();
                host.program = Some(own);
            }
        }
        for i in 0..names.len() {
            pool.enter(i, of_pool, settings);
        }
        pool.all_up();
        pool
    }

    /// Lets one more host in.
    pub fn admit(&mut self, name: &str, settings: &[&str]) {
        let i = self.hosts.len();
        let mut address = self.hosts[0].address.octets();
        address[3] = i as u8 + 1;
        self.hosts.push(Host {
            name: name.into(),
            address: address.into(),
            folder: self.folder.path().join(name),
            daemon: None,
            program: None,
        });
        self.enter(i, &[], settings);
    }

    /// The host with this number founds the pool, or joins it.
    fn enter(&mut self, i: usize, of_pool: &[&str], settings: &[&str]) {
        let etcd = etcd().unwrap().display().to_string();
        let (name, address) = (self.hosts[i].name.clone(), self.hosts[i].address.to_string());
        let mut common = vec![
            "--name",
            &name,
            "--address",
            &address,
            "--etcd-program",
            &etcd,
            "--vmm-arg=--user=0",
        ];
        common.extend(settings);
        if i == 0 {
            let init = [&["pool", "init", "test"][..], of_pool, &common].concat();
            self.hosts[0].run(&init);
        } else {
            let token = self.hosts[0].json(&["pool", "token"]);
            let (at, token) = (
                token["address"].as_str().unwrap(),
                token["token"].as_str().unwrap(),
            );
            let mut join = [&["pool", "join", at, "--token", token][..], &common].concat();
            if name.starts_with('w') {
                join.push("--witness");
            }
            // One member of etcd after the other has to catch up.
            let out = wait_for("a host to be let in", || {
                let out = self.hosts[i].try_run(&join);
                if !out.status.success() {
                    eprintln!("{}", String::from_utf8_lossy(&out.stderr));
                }
                out.status.success().then_some(out)
            });
            println!("{}", String::from_utf8_lossy(&out.stdout).trim());
        }
        self.hosts[i].start_daemon();
        wait(&format!("the daemon of {name} to answer"), || {
            self.hosts[i].status().is_object()
        });
    }

    /// Waits until all hosts are well, have a vote in the store if the pool keeps its own, and somebody leads. Without its vote the pool
    /// cannot do without another host yet.
    pub fn all_up(&self) {
        wait("all hosts to be up", || {
            let status = self.hosts[0].status();
            let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
            hosts.len() == self.hosts.len()
                && hosts.iter().all(|h| h["health"] == "up")
                && (hosts.len() == 1
                    || status["store"] != "etcd"
                    || hosts.iter().all(|h| h["store_vote"] == true))
                && status["leader"].is_string()
        });
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn host(&mut self, name: &str) -> &mut Host {
        self.hosts.iter_mut().find(|h| h.name == name).unwrap()
    }

    /// A host that runs, other than this one.
    pub fn other(&self, name: &str) -> &Host {
        let fits = |h: &&Host| h.name != name && h.daemon.is_some() && !h.name.starts_with('w');
        self.hosts.iter().find(fits).unwrap()
    }

    /// Creates a VM with the pulse guest, its NIC a socket on each host, its clients at `client-VM`.
    pub fn create(&self, vm: &str, class: &str) {
        self.create_with(vm, class, "", &[]);
    }

    /// As [`Pool::create`], with more words for the guest and more settings.
    pub fn create_with(&self, vm: &str, class: &str, words: &str, settings: &[&str]) {
        let elf = self.path("pulse.elf");
        std::fs::write(&elf, pulse::elf()).unwrap();
        let nic = format!(
            "socket:{}-{{host}}:{}",
            self.path(&format!("nic-{vm}")).display(),
            self.path(&format!("client-{vm}")).display()
        );
        let host = self.other("");
        let cmdline = format!("loop=dirty pages=50 rate=300 ip=10.0.0.2 {words}");
        let create = [
            "vm",
            "create",
            "--name",
            vm,
            "--memory",
            "64MiB",
            "--flat",
            elf.to_str().unwrap(),
            "--cmdline",
            cmdline.trim_end(),
            "--rng",
            "false",
            "--nic",
            &nic,
            "--class",
            class,
        ];
        host.run(&[&create[..], settings].concat());
    }

    /// NICs of a VM, one for each host.
    pub fn nics(&self, vm: &str) -> Vec<(String, PathBuf)> {
        let of = |h: &Host| (h.name.clone(), self.path(&format!("nic-{vm}-{}", h.name)));
        self.hosts.iter().map(of).collect()
    }

    pub fn client(&self, vm: &str) -> client::Client {
        client::Client::start(&self.path(&format!("client-{vm}")), self.nics(vm))
    }

    /// As [`Pool::client`], of a guest that keeps its counter on a disk.
    pub fn disk_client(&self, vm: &str) -> client::Client {
        client::Client::of_disk(&self.path(&format!("client-{vm}")), self.nics(vm))
    }

    fn tell(&self) {
        for host in &self.hosts {
            for file in ["daemon.log", "data/etcd.log"] {
                tail(&host.folder.join(file), 40);
            }
            for vm in std::fs::read_dir(host.folder.join("data/vm"))
                .into_iter()
                .flatten()
                .flatten()
            {
                tail(&vm.path().join("log"), 15);
            }
        }
        if let Some(host) = self.hosts.iter().find(|h| h.daemon.is_some()) {
            let events = host.try_run(&["events", "--limit", "80"]);
            eprintln!("--- events\n{}", String::from_utf8_lossy(&events.stdout));
            let status = host.try_run(&["status"]);
            eprintln!("--- status\n{}", String::from_utf8_lossy(&status.stdout));
        }
    }
}

fn tail(path: &Path, lines: usize) {
    let Ok(text) = std::fs::read_to_string(path) else {
        return;
    };
    let all: Vec<_> = text.lines().collect();
    eprintln!(
        "--- {}\n{}",
        path.display(),
        all[all.len().saturating_sub(lines)..].join("\n")
    );
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
        for host in &mut self.hosts {
            host.power_off();
        }
    }
}

/// Waits until something is there.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + LONG;
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(Instant::now() < until, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until something holds.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    wait_for(what, || done().then_some(()));
}
