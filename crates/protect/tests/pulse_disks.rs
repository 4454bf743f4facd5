//! A protected guest with a writable disk on this machine's KVM: its primary is killed at random instants, and memory, disk
//! and replies must agree ever after. At the end the images of both hosts are compared, byte by byte.
//!
//! An instance is this test program again, called with the name of the ignored test `disk_instance`; it ends with the test.

#![allow(clippy::unwrap_used, clippy::panic)]

use pulse::client::{Client, Wire};
use pulse::shared::COUNTER_LBA;
use pulse::{Reply, kind};
use serde_json::{Value, json};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_disk::image::{self, ImageOptions};
use steadfast_disk::storage::{BlockFile, DirStorage};
use steadfast_disk::volume::{Options as VolumeOptions, Replica};
use steadfast_machine::devices::legacy::NullSink;
use steadfast_machine::machine::ThreadHooks;
use steadfast_protect::ProtectSpec;
use steadfast_protect::store::random_u64;
use steadfast_types::VmId;
use steadfast_vmm::control::{Request, ask};
use steadfast_vmm::process::Options;
use steadfast_vmm::spec::VmSpec;

const LONG: Duration = Duration::from_secs(25);
const ROUNDS: usize = 8;
const DISK_BYTES: u64 = 12 << 20;
const HEADER: usize = 12;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn disk_instance() {
    let Some(dir) = std::env::var_os("PULSE_DISK_INSTANCE").map(PathBuf::from) else {
        return;
    };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
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
        isolation: None,
        hooks: ThreadHooks::default(),
    };
    let ended = steadfast_protect::run(spec, protect, options);
    tracing::info!(?ended, "the instance ended");
    std::process::exit(i32::from(ended.is_err()));
}

struct Instance {
    host: usize,
    dir: PathBuf,
    child: Child,
}

impl Instance {
    fn ask(&self, request: &Request) -> Value {
        ask(&self.dir.join("control"), request, Duration::from_secs(5)).unwrap_or_default()
    }

    fn protocol(&self) -> Value {
        self.ask(&Request::Status)["protocol"].take()
    }

    fn protects(&self) -> bool {
        let p = self.protocol();
        p["role"] == "primary" && p["protected"] == true
    }

    fn stop(&mut self) {
        self.ask(&Request::Stop);
        wait("clean stop", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("--- {}\n{tail}", self.dir.display());
        }
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A switch that learns at which NIC the guest is: a standby's NIC must not collect frames that the guest had long since.
struct Switch {
    socket: UnixDatagram,
    nics: [PathBuf; 2],
    at: usize,
}

impl Wire for Switch {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        if self.socket.send_to(&bytes, &self.nics[self.at]).is_err() {
            // A host that is down has no NIC.
            self.at = 1 - self.at;
            let _ = self.socket.send_to(&bytes, &self.nics[self.at]);
        }
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        self.socket.set_nonblocking(timeout.is_zero())?;
        if !timeout.is_zero() {
            self.socket.set_read_timeout(Some(timeout))?;
        }
        let mut bytes = vec![0; 66_000];
        match self.socket.recv_from(&mut bytes) {
            Ok((n, from)) => {
                let nic = self.nics.iter().position(|p| from.as_pathname() == Some(p));
                self.at = nic.unwrap_or(self.at);
                Ok(bytes.get(HEADER..n).map(<[u8]>::to_vec))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

struct Site {
    dir: tempfile::TempDir,
    port: SocketAddr,
    count: u32,
}

impl Site {
    fn new() -> Self {
        // In memory where it can be: a shared machine's disk may stand still for seconds, which is another test's matter.
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        std::fs::write(dir.path().join("pulse.elf"), pulse::elf()).unwrap();
        std::fs::write(dir.path().join("a.raw"), vec![0; DISK_BYTES as usize]).unwrap();
        // What the standby's image holds before must not matter.
        std::fs::write(dir.path().join("b.raw"), vec![0x5a; DISK_BYTES as usize]).unwrap();
        let port = loop {
            let port = 10_000 + (random_u64().unwrap() % 20_000) as u16;
            let at: SocketAddr = ([127, 0, 0, 1], port).into();
            if TcpListener::bind(at).is_ok() {
                break at;
            }
        };
        Self { dir, port, count: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spawn(&mut self, host: usize, start: bool) -> Instance {
        self.count += 1;
        let (me, peer) = [("a", "b"), ("b", "a")][host];
        let dir = self.path(&format!("{me}{}", self.count));
        std::fs::create_dir(&dir).unwrap();
        let spec = json!({
            "name": "p", "vcpus": 1, "memory_bytes": 64 << 20,
            "boot": {"flat": {"elf": self.path("pulse.elf"),
                "cmdline": "loop=dirty pages=50 rate=300 disk=verify ring=48 ip=10.0.0.2"}},
            "disks": [{"path": self.path(&format!("{me}.raw")), "format": "raw"}],
            "nics": [{"to": {"socket": {"own": self.path(&format!("nic-{me}")), "peer": self.path("client")}}}],
        });
        let protect = json!({
            "host": me, "store": self.path("store"), "start": start,
            "peers": [{"host": peer, "paths": [self.port]}],
        });
        std::fs::write(dir.join("spec.json"), spec.to_string()).unwrap();
        std::fs::write(dir.join("protect.json"), protect.to_string()).unwrap();
        let log = File::create(dir.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "disk_instance", "--nocapture"])
            .env("PULSE_DISK_INSTANCE", &dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Instance { host, dir, child }
    }

    fn client(&self) -> Client<Switch> {
        let socket = UnixDatagram::bind(self.path("client")).unwrap();
        let nics = [self.path("nic-a"), self.path("nic-b")];
        let mut client = Client::new(
            Switch { socket, nics, at: 0 },
            Ipv4Addr::new(10, 0, 0, 9),
            Ipv4Addr::new(10, 0, 0, 2),
        );
        client.nonces_from(random_u64().unwrap() >> 8);
        client
    }
}

/// Counts, and compares each reply with the one before.
struct Count {
    client: Client<Switch>,
    last: Option<Reply>,
    longest: Duration,
}

impl Count {
    /// Adds one to the counter in memory and on disk.
    fn one(&mut self) {
        let began = Instant::now();
        let r = self
            .client
            .ask(kind::FLUSH_INC, LONG)
            .unwrap_or_else(|e| panic!("{e}"));
        self.longest = self.longest.max(began.elapsed());
        assert_eq!((r.errors, r.status), (0, 0), "the guest found errors: {r:?}");
        assert_eq!(r.disk_counter, r.counter, "disk and memory: {r:?}");
        let (counter, verified) = self.last.map_or((0, 0), |l| (l.counter, l.verify_seq));
        assert_eq!(r.counter, counter + 1, "nothing lost, nothing done twice: {r:?}");
        assert_eq!(r.boot_counter, 0, "the guest was never powered on again: {r:?}");
        assert!(r.verify_seq >= verified, "the ring went back: {r:?}");
        self.last = Some(r);
    }
}

/// Opens the replica of an ended process: its image as of the last complete epoch.
fn settled(path: &Path, volume: u64) -> Vec<u8> {
    let file = image::open(path, &ImageOptions::default()).unwrap();
    let storage = DirStorage::new(path.with_extension("raw.sfj")).unwrap();
    let options = VolumeOptions::new(volume);
    let file = Arc::new(BlockFile(file));
    let (replica, found) = Replica::open(&storage, file, &options, None).unwrap();
    replica.commit(found.last_staged).unwrap();
    let volume = replica.common();
    volume.wait_applied(found.last_staged, LONG).unwrap();
    drop((volume, replica));
    std::fs::read(path).unwrap()
}

#[test]

fn pulse_disks() {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, no guest can run here");
        return;
    }
    let mut site = Site::new();
    let client = site.client();
    let mut primary = site.spawn(0, true);
    let mut standby = site.spawn(1, false);
    wait("protected", || primary.protects());
    let mut count = Count {
        client,
        last: None,
        longest: Duration::ZERO,
    };
    let began = Instant::now();
    for round in 0..ROUNDS {
        for _ in 0..3 {
            count.one();
        }
        let pid = rustix::process::Pid::from_child(&primary.child);
        let delay = Duration::from_micros(random_u64().unwrap() % 60_000);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(delay);
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        while !killer.is_finished() {
            count.one();
        }
        killer.join().unwrap();
        for _ in 0..5 {
            count.one();
        }
        std::mem::swap(&mut primary, &mut standby);
        let host = standby.host;
        // Dead and waited for before the next one takes its image.
        let _ = standby.child.wait();
        standby = site.spawn(host, false);
        wait("protected again", || primary.protects());
        println!(
            "round {round}: killed after {delay:?}, counter {:?}, {:?} since the start",
            count.last.map(|r| r.counter),
            began.elapsed()
        );
    }
    count.one();
    let last = count.last.unwrap();
    assert!(
        last.verify_seq > 100 && last.disk_writes > 100,
        "the ring was at work: {last:?}"
    );
    println!(
        "longest wait {:?}, {} ring writes in {:?}",
        count.longest,
        last.verify_seq,
        began.elapsed()
    );
    // The guest writes no more; both hosts come to hold the same.
    count.client.tell(kind::HANG).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let sealed = primary.protocol()["sealed"].as_u64().unwrap();
    wait("the standby has applied all", || {
        standby.protocol()["applied"]
            .as_u64()
            .is_some_and(|a| a >= sealed)
    });
    standby.stop();
    primary.stop();
    let volume = steadfast_wire::vm_hash(&VmId::new("p").unwrap()) ^ 1;
    let images = ["a.raw", "b.raw"].map(|n| settled(&site.path(n), volume));
    let differs = (0..DISK_BYTES as usize).find(|&i| images[0][i] != images[1][i]);
    assert_eq!(differs, None, "the hosts' images differ at this byte");
    let at = COUNTER_LBA as usize * 512;
    let record = pulse::check::disk_counter(&images[1][at..at + 512])
        .unwrap()
        .unwrap();
    assert_eq!(record.counter, last.counter, "the counter on disk");
}
