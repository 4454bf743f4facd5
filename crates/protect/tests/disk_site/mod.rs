//! Two hosts of one protected `pulse` guest with a writable disk, as processes of this machine, and a client that counts.
//!
//! An instance is this very test program again, called with the name of the ignored test `disk_instance`; it ends with the
//! test that started it. Faults of its disks come and go with a file of rules (`steadfast_disk::testing::LiveFaults`).

#![allow(dead_code)]

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
use steadfast_disk::image::{self, ImageOptions, create};
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

/// The longest wait for anything.
pub const LONG: Duration = Duration::from_secs(40);
const HEADER: usize = 12;
/// The ignored test that is an instance.
pub const INSTANCE_TEST: &str = "disk_instance";

/// Whether KVM can be used; says so loudly when not.
pub fn kvm() -> bool {
    let there = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, no guest can run here");
    }
    there
}

/// The body of [`INSTANCE_TEST`].
pub fn instance_process() {
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
        reset_panicked: true,
        isolation: None,
        hooks: ThreadHooks::default(),
    };
    let ended = steadfast_protect::run(spec, protect, options);
    tracing::info!(?ended, "the instance ended");
    std::process::exit(i32::from(ended.is_err()));
}

/// One instance's process.
pub struct Instance {
    /// 0 or 1.
    pub host: usize,
    dir: PathBuf,
    /// Its process.
    pub child: Child,
}

impl Instance {
    /// Asks its control socket; null if it does not answer.
    pub fn ask(&self, request: &Request) -> Value {
        ask(&self.dir.join("control"), request, Duration::from_secs(5)).unwrap_or_default()
    }

    /// Its part of the protocol.
    pub fn protocol(&self) -> Value {
        self.ask(&Request::Status)["protocol"].take()
    }

    /// Its disks.
    pub fn disks(&self) -> Value {
        self.ask(&Request::Status)["disks"].take()
    }

    /// The alarm about its disks, if there is one.
    pub fn alarm(&self) -> Option<String> {
        self.disks()["alarm"].as_str().map(str::to_owned)
    }

    /// A number of its first disk.
    pub fn disk(&self, what: &str) -> u64 {
        self.disks()["list"][0][what].as_u64().unwrap_or(0)
    }

    /// The copy to the other host.
    pub fn copy(&self, to: &str) -> Value {
        self.disks()["copies"][to].take()
    }

    /// It is the primary, and the VM is protected.
    pub fn protects(&self) -> bool {
        let p = self.protocol();
        p["role"] == "primary" && p["protected"] == true
    }

    /// It is the primary.
    pub fn leads(&self) -> bool {
        self.protocol()["role"] == "primary"
    }

    /// kill -9, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether the process has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Ends it in order.
    pub fn stop(&mut self) {
        self.ask(&Request::Stop);
        wait("clean stop", || self.ended());
    }

    /// Whether its log holds this text.
    pub fn logged(&self, text: &str) -> bool {
        std::fs::read_to_string(self.dir.join("log")).is_ok_and(|log| log.contains(text))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("--- {}\n{tail}", self.dir.display());
        }
        self.kill();
    }
}

/// Waits for a condition, and fails when it does not come.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A switch that learns at which NIC the guest is: a standby's NIC must not collect frames that the guest had long since.
pub struct Switch {
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

/// Where the hosts `a` and `b` meet, and what they run.
pub struct Site {
    dir: tempfile::TempDir,
    port: SocketAddr,
    /// Format of the hosts' images.
    format: &'static str,
    /// Size of the guest's disk.
    pub disk_bytes: u64,
    /// The guest's command line, without its address.
    pub cmdline: String,
    /// More fields of the protection's specification.
    pub extra: Value,
    count: u32,
}

impl Site {
    /// A new one, with a disk of so many bytes: zeroes on host `a`, something else on host `b`.
    pub fn new(disk_bytes: u64) -> Self {
        Self::with_format("raw", disk_bytes)
    }

    /// The same with images of this format.
    pub fn with_format(format: &'static str, disk_bytes: u64) -> Self {
        // In memory where it can be: a shared machine's disk may stand still for seconds, which is another test's matter.
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        std::fs::write(dir.path().join("pulse.elf"), pulse::elf()).unwrap();
        for host in ["a", "b"] {
            let path = dir.path().join(format!("{host}.{format}"));
            match format {
                "qcow2" => create::create_qcow2(&path, disk_bytes).unwrap(),
                _ => create::create_raw(&path, disk_bytes).unwrap(),
            }
            // What the standby's image holds before must not matter.
            if host == "b" {
                let image = image::open(&path, &ImageOptions::default()).unwrap();
                image.write_at(0, &vec![0x5a; disk_bytes as usize]).unwrap();
                image.flush().unwrap();
            }
        }
        let port = loop {
            let port = 10_000 + (random_u64().unwrap() % 20_000) as u16;
            let at: SocketAddr = ([127, 0, 0, 1], port).into();
            if TcpListener::bind(at).is_ok() {
                break at;
            }
        };
        Self {
            dir,
            port,
            format,
            disk_bytes,
            cmdline: "loop=dirty pages=50 rate=300 disk=verify ring=48".into(),
            // A killed process is known to be gone at once; a starved one, on a busy machine, is not to be taken for dead.
            extra: json!({"disk_hang_ms": 1500, "suspect_ms": 3000}),
            count: 0,
        }
    }

    /// A file of it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The image of a host.
    pub fn image(&self, host: usize) -> PathBuf {
        self.path(&format!("{}.{}", ["a", "b"][host], self.format))
    }

    /// From now on the disks of this host fail by these rules; none: they work.
    pub fn faults(&self, host: usize, rules: &str) {
        let (path, new) = (self.path(["faults-a", "faults-b"][host]), self.path("faults-new"));
        if rules.is_empty() {
            let _ = std::fs::remove_file(path);
        } else {
            std::fs::write(&new, rules).unwrap();
            std::fs::rename(new, path).unwrap();
        }
    }

    /// Starts a process on a host; `start`: it powers the VM on.
    pub fn spawn(&mut self, host: usize, start: bool) -> Instance {
        self.count += 1;
        let (me, peer) = [("a", "b"), ("b", "a")][host];
        let dir = self.path(&format!("{me}{}", self.count));
        std::fs::create_dir(&dir).unwrap();
        let spec = json!({
            "name": "p", "vcpus": 1, "memory_bytes": 64 << 20,
            "boot": {"flat": {"elf": self.path("pulse.elf"), "cmdline": format!("{} ip=10.0.0.2", self.cmdline)}},
            "disks": [{"path": self.image(host), "format": self.format}],
            "nics": [{"to": {"socket": {"own": self.path(&format!("nic-{me}")), "peer": self.path("client")}}}],
        });
        let mut protect = json!({
            "host": me, "store": self.path("store"), "start": start,
            "peers": [{"host": peer, "paths": [self.port]}],
            "disk_faults": self.path(&format!("faults-{me}")),
        });
        for (key, value) in self.extra.as_object().unwrap() {
            protect[key] = value.clone();
        }
        std::fs::write(dir.join("spec.json"), spec.to_string()).unwrap();
        std::fs::write(dir.join("protect.json"), protect.to_string()).unwrap();
        let log = File::create(dir.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", INSTANCE_TEST, "--nocapture"])
            .env("PULSE_DISK_INSTANCE", &dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Instance { host, dir, child }
    }

    /// A client of the guest.
    pub fn count(&self) -> Count {
        let socket = UnixDatagram::bind(self.path("client")).unwrap();
        let nics = [self.path("nic-a"), self.path("nic-b")];
        let mut client = Client::new(
            Switch { socket, nics, at: 0 },
            Ipv4Addr::new(10, 0, 0, 9),
            Ipv4Addr::new(10, 0, 0, 2),
        );
        client.nonces_from(random_u64().unwrap() >> 8);
        Count {
            client,
            last: None,
            longest: Duration::ZERO,
            boot: None,
        }
    }

    /// Both hosts up, the VM protected, the client at work.
    pub fn pair(&mut self) -> (Instance, Instance, Count) {
        let count = self.count();
        let primary = self.spawn(0, true);
        let standby = self.spawn(1, false);
        wait("protected", || primary.protects());
        (primary, standby, count)
    }

    /// The guest writes no more; both hosts come to hold the same image, and the last count is in it.
    pub fn compare(&self, mut primary: Instance, mut standby: Instance, mut count: Count) {
        count.client.tell(kind::HANG).unwrap();
        let sealed = || primary.protocol()["sealed"].as_u64().unwrap();
        // What the guest had under way comes to its end. Time alone proves nothing: a machine that stands still writes nothing either.
        let (mut used, mut looks, mut since) = (0, 0, Instant::now());
        wait("the guest's disk is still", || {
            let now = primary.disk("journal_used_bytes");
            (looks, since) = if now > used {
                (0, Instant::now())
            } else {
                (looks + 1, since)
            };
            used = now;
            looks >= 30 && since.elapsed() > Duration::from_millis(400)
        });
        // The last write may be in the epoch that is still open, and an epoch of a guest that rests may be a long one.
        let open = sealed() + 1;
        wait("the standby has applied all", || {
            standby.protocol()["applied"].as_u64().is_some_and(|a| a >= open)
        });
        standby.stop();
        primary.stop();
        let images = [0, 1].map(|host| settled(&self.image(host)));
        let differs = (0..self.disk_bytes as usize).find(|&i| images[0][i] != images[1][i]);
        if let Some(at) = differs {
            let sector = at / 512 * 512;
            let word = |image: &[u8], i: usize| {
                let at = sector + 8 * i;
                u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
            };
            let words = |image: &[u8]| [0, 1, 2, 3].map(|i| word(image, i));
            let (a, b) = (words(&images[0]), words(&images[1]));
            panic!(
                "the hosts' images differ at byte {at}; its sector begins with {a:x?} and {b:x?}; applied up to epoch {open}"
            );
        }
        let at = COUNTER_LBA as usize * 512;
        let record = pulse::check::disk_counter(&images[1][at..at + 512])
            .unwrap()
            .unwrap();
        assert_eq!(record.counter, count.last.unwrap().counter, "the counter on disk");
    }
}

/// Counts, and compares each reply with the one before.
pub struct Count {
    /// The client.
    pub client: Client<Switch>,
    /// The last reply.
    pub last: Option<Reply>,
    /// The longest wait for a reply.
    pub longest: Duration,
    boot: Option<u64>,
}

impl Count {
    /// Adds one to the counter in memory and on disk; how long that took.
    pub fn one(&mut self) -> Duration {
        let began = Instant::now();
        let r = self
            .client
            .ask(kind::FLUSH_INC, LONG)
            .unwrap_or_else(|e| panic!("{e}"));
        let took = began.elapsed();
        self.longest = self.longest.max(took);
        assert_eq!((r.errors, r.status), (0, 0), "the guest found errors: {r:?}");
        assert_eq!(r.disk_counter, r.counter, "disk and memory: {r:?}");
        let (counter, verified) = self.last.map_or((0, 0), |l| (l.counter, l.verify_seq));
        assert_eq!(r.counter, counter + 1, "nothing lost, nothing done twice: {r:?}");
        let boot = *self.boot.get_or_insert(r.boot_counter);
        assert_eq!(r.boot_counter, boot, "the guest was powered on again: {r:?}");
        assert!(r.verify_seq >= verified, "the ring went back: {r:?}");
        self.last = Some(r);
        took
    }

    /// Counts for so long.
    pub fn during(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.one();
        }
    }

    /// Counts until something is so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut() -> bool) {
        let until = Instant::now() + LONG;
        while !done() {
            assert!(Instant::now() < until, "{what}: not within {LONG:?}");
            self.one();
        }
    }

    /// The VM was powered on again from its disk: it goes on from what was flushed.
    pub fn rebooted(&mut self) {
        self.boot = None;
        if let Some(last) = &mut self.last {
            self.boot = Some(last.counter);
            last.verify_seq = 0;
        }
    }
}

/// Opens the replica of an ended process: its image as of the last complete epoch.
pub fn settled(path: &Path) -> Vec<u8> {
    let volume = steadfast_wire::vm_hash(&VmId::new("p").unwrap()) ^ 1;
    let image = image::open(path, &ImageOptions::default()).unwrap();
    let journal = format!("{}.sfj", path.display());
    let storage = DirStorage::new(journal).unwrap();
    let options = VolumeOptions::new(volume);
    let file = Arc::new(BlockFile(Arc::clone(&image)));
    let (replica, found) = Replica::open(&storage, file, &options, None).unwrap();
    replica.commit(found.last_staged).unwrap();
    let volume = replica.common();
    volume.wait_applied(found.last_staged, LONG).unwrap();
    drop((volume, replica));
    let mut content = vec![0; image.info().capacity_bytes as usize];
    image.read_at(0, &mut content).unwrap();
    content
}
