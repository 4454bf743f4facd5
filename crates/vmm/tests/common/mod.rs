//! What the `pulse_*` tests share: the `steadfast` binary on this machine's KVM, with `pulse` as its guest and the test
//! as the guest's network peer.
//!
//! Every wait is bounded. Every process that a test starts is killed when its guard is dropped, and by the kernel when
//! the thread that started it dies; as root a VM's process becomes another user, and then only the guard kills it.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::panic)]

pub mod peer;

use pulse::shared::{COUNTER_LBA, PAGE, RING_LBA};
use pulse::{Config, Content, DiskMode, Summary, check};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use steadfast_machine::memory::{Ram, RamBacking};
use steadfast_machine::state::SaveReader;
use steadfast_vmm::control::{Request, Then, ask};
use steadfast_vmm::isolation::user::UserChoice;
use vm_memory::{Bytes, GuestAddress};

/// Bound of everything that takes milliseconds on an idle machine; this one may have many neighbours.
pub const LONG: Duration = Duration::from_secs(60);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const ME: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Blocks of the ring that the guest writes and reads back all the time.
pub const RING: u64 = 32;
pub const NAME: &str = "pulse";
const DISK_BYTES: u64 = 16 << 20;

/// False, with the reason on stdout, where there is no KVM.
pub fn can_run() -> bool {
    match steadfast_machine::kvm::Hypervisor::open() {
        Ok(_) => true,
        Err(e) => {
            println!("SKIPPED: no KVM here: {e}");
            false
        }
    }
}

/// The `steadfast` binary of the same build.
pub fn binary() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.parent().and_then(Path::parent).unwrap().join("steadfast");
    assert!(
        path.exists(),
        "{} is missing: these tests run the steadfast binary of the same profile; `cargo build --release -p steadfast` makes it",
        path.display()
    );
    path
}

/// A process that does not outlive the test.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub fn spawn(command: &mut Command, log: &Path) -> Self {
        let err = File::options().append(true).create(true).open(log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(err.try_clone().unwrap())
            .stderr(err);
        // SAFETY: prctl is safe between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?} does not start: {e}"));
        Self {
            child,
            log: log.to_owned(),
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the process ends of itself.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("a steadfast process to end", || {
            status = self.ended();
            status.is_some()
        });
        status.unwrap()
    }

    /// What it said on stdout and stderr, with whatever was in the log before it.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `kill -9`; returns when it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Changes a resource limit of the running process, which needs a [`World::of_one_user`].
    pub fn limit_file_size(&self, bytes: u64) {
        let limit = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: `limit` lives through the call; the old limit is not asked for.
        let done = unsafe {
            libc::prlimit(
                self.id() as i32,
                libc::RLIMIT_FSIZE,
                &raw const limit,
                std::ptr::null_mut(),
            )
        };
        assert_eq!(done, 0, "prlimit: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        self.kill();
        if std::thread::panicking() {
            eprintln!(
                "--- {} (before this end: {ended:?})\n{}",
                self.log.display(),
                self.said()
            );
        }
    }
}

/// Waits for a condition, with a bound.
pub fn wait_for(what: &str, done: impl FnMut() -> bool) {
    assert!(came(LONG, done), "timed out after {LONG:?}: {what}");
}

/// Whether a condition came true in time.
pub fn came(within: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A folder in memory with all that one VM needs.
pub struct World {
    dir: tempfile::TempDir,
    /// VMs stay the test's user, who may then change their limits.
    same_user: bool,
    /// RAM of a VM, as `--memory` takes it.
    pub ram: &'static str,
    /// More words for `vm run`.
    pub extra: Vec<String>,
}

impl World {
    pub fn new() -> Self {
        Self::of(false)
    }

    /// A world whose VMs stay the test's user.
    pub fn of_one_user() -> Self {
        Self::of(true)
    }

    fn of(same_user: bool) -> Self {
        let shm = Path::new("/dev/shm");
        let made = if shm.is_dir() {
            tempfile::Builder::new()
                .prefix("steadfast-pulse-")
                .tempdir_in(shm)
        } else {
            tempfile::tempdir()
        };
        let dir = made.unwrap();
        let world = Self {
            dir,
            same_user,
            ram: "64MiB",
            extra: Vec::new(),
        };
        // As root, a VM's process becomes the VM's own user, who saves files and hands sockets over in this folder.
        if !same_user && rustix::process::geteuid().is_root() {
            let (uid, gid) = UserChoice::default().ids(&NAME.parse().unwrap());
            std::os::unix::fs::chown(world.path(), Some(uid), Some(gid)).unwrap();
        }
        fs::write(world.at("pulse.elf"), pulse::elf()).unwrap();
        File::create(world.at("disk.raw"))
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        world
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Lets the VM's user use a socket that the test serves.
    pub fn share(&self, name: &str) {
        fs::set_permissions(self.at(name), fs::Permissions::from_mode(0o777)).unwrap();
    }

    /// The control socket in the run folder `run`.
    pub fn control(&self, run: &str) -> PathBuf {
        self.at(run).join(format!("{NAME}.sock"))
    }

    /// `steadfast ARGS` with `run` as its run folder.
    pub fn command(&self, run: &str, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).env("STEADFAST_RUN_DIR", self.at(run));
        command
    }

    /// Runs a verb to its end.
    pub fn verb(&self, run: &str, args: &[&str]) -> Output {
        self.command(run, args).output().unwrap()
    }

    /// A verb that must succeed; what it printed.
    pub fn must(&self, run: &str, args: &[&str]) -> String {
        let out = self.verb(run, args);
        assert!(
            out.status.success(),
            "steadfast {args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// Asks the VM's control socket.
    pub fn ask(&self, run: &str, request: &Request) -> std::io::Result<Value> {
        ask(&self.control(run), request, LONG)
    }

    pub fn save(&self, run: &str, file: &str, then: Then) -> std::io::Result<Value> {
        let path = self.at(file);
        self.ask(
            run,
            &Request::Save {
                path,
                then,
                memory: true,
            },
        )
    }

    fn log(&self, run: &str) -> PathBuf {
        self.at(&format!("{run}.log"))
    }

    /// Boots `pulse` with every device there is; returns when the control socket answers.
    pub fn boot(&self, run: &str, config: &Config, cpus: u32) -> Process {
        let text = |name: &str| self.at(name).to_str().unwrap().to_owned();
        let (cpus, cmdline) = (cpus.to_string(), config.to_string());
        let nic = format!("socket:{}:{}", text("guest.net"), text("peer.net"));
        let vsock = format!("3:{}", text("vsock"));
        let args = [
            "vm",
            "run",
            "--name",
            NAME,
            "--memory",
            self.ram,
            "--balloon",
            "--cpus",
            &cpus,
            "--flat",
            &text("pulse.elf"),
            "--cmdline",
            &cmdline,
            "--disk",
            &text("disk.raw"),
            "--nic",
            &nic,
            "--virtio-console",
            &text("console"),
            "--vsock",
            &vsock,
            "--console",
            &text("serial"),
        ];
        let mut command = self.command(run, &args);
        command.args(&self.extra);
        if self.same_user {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            command.args(["--user", &format!("{uid}:{gid}")]);
        }
        let mut process = Process::spawn(&mut command, &self.log(run));
        self.reachable(run, &mut process);
        process
    }

    /// Starts `vm restore` in a new process, without waiting for anything.
    pub fn begin_restore(&self, run: &str, file: &str, paused: bool) -> Process {
        let (file, serial) = (self.at(file), self.at("serial"));
        let mut args = vec![
            "vm",
            "restore",
            file.to_str().unwrap(),
            "--console",
            serial.to_str().unwrap(),
        ];
        if paused {
            args.push("--paused");
        }
        Process::spawn(&mut self.command(run, &args), &self.log(run))
    }

    /// Restores in a new process; returns when the control socket answers.
    pub fn restore(&self, run: &str, file: &str) -> Process {
        let mut process = self.begin_restore(run, file, false);
        self.reachable(run, &mut process);
        process
    }

    pub fn reachable(&self, run: &str, process: &mut Process) {
        let path = self.control(run);
        wait_for("the control socket to answer", || {
            if let Some(status) = process.ended() {
                panic!("steadfast ended ({status}): {}", process.said());
            }
            ask(&path, &Request::Status, LONG).is_ok()
        });
    }

    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_default()
    }

    /// The serial port has said nothing but the banner, once.
    pub fn serial_is_clean(&self) {
        let serial = self.text("serial");
        let lines: Vec<_> = serial.lines().collect();
        assert!(
            lines.len() == 1 && lines[0].starts_with("pulse 1 ready"),
            "the serial port said: {serial:?}"
        );
    }

    /// The console holds the lines 1, 2, 3, ..., none lost, none repeated; returns how many.
    pub fn console_lines(&self) -> u64 {
        let text = self.text("console");
        for (i, line) in text.lines().enumerate() {
            assert_eq!(line, format!("pulse console {}", i + 1), "console line {}", i + 1);
        }
        text.lines().count() as u64
    }

    /// What a saved VM's memory says, checked.
    pub fn memory(&self, file: &str) -> Summary {
        let reader = SaveReader::open(&self.at(file)).unwrap();
        let ram = Ram::new(reader.ram_bytes, &RamBacking::Memfd).unwrap();
        reader.load(&ram).unwrap();
        pulse::invariants_hold_with(|gpa, out| ram.memory().read_slice(out, GuestAddress(gpa)).is_ok())
            .unwrap_or_else(|e| panic!("the saved memory is wrong: {e}"))
    }

    /// Checks a saved VM whose disk has not been written since: memory with itself, memory with the disk, memory
    /// with the console.
    pub fn check_save(&self, file: &str) -> Saved {
        let summary = self.memory(file);
        let record = summary
            .agrees_with_disk(&self.disk(COUNTER_LBA, 512))
            .unwrap_or_else(|e| panic!("memory and disk disagree: {e}"));
        let top = check::ring_holds(&self.disk(RING_LBA, RING * PAGE)).unwrap_or_else(|e| panic!("{e}"));
        let verified = summary.shared.verify_seq;
        assert!(
            (verified..=verified + 1).contains(&top),
            "the ring on disk is at {top}, memory has {verified} written and read back"
        );
        let lines = self.console_lines();
        let told = summary.shared.console_lines;
        assert!(
            (told..=told + 1).contains(&lines),
            "the console has {lines} lines, memory says {told} were taken"
        );
        Saved {
            summary,
            disk_seq: record.seq,
        }
    }

    fn disk(&self, lba: u64, bytes: u64) -> Vec<u8> {
        let mut file = File::open(self.at("disk.raw")).unwrap();
        file.seek(SeekFrom::Start(lba * 512)).unwrap();
        let mut out = vec![0; bytes as usize];
        file.read_exact(&mut out).unwrap();
        out
    }
}

/// What a saved VM says.
pub struct Saved {
    pub summary: Summary,
    pub disk_seq: u64,
}

/// Both vCPUs dirty memory, the disk ring runs, every other device works every few milliseconds.
pub fn busy() -> Config {
    Config::new()
        .dirty(256)
        .chunk(32)
        .disk(DiskMode::Verify)
        .ring(RING)
        .ip(GUEST)
        .extras(5, 5, 5, 5)
}

/// As [`busy`], with whole pages; few of them, since an emulated instruction takes a microsecond.
pub fn busy_with_whole_pages() -> Config {
    busy().dirty(8).chunk(1).content(Content::Random)
}
