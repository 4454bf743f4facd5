//! A VM under full isolation boots, resets, saves and restores; what a taken-over monitor would try kills it.
//!
//! Each VM is this test binary again (`child`, ignored by itself), since a process is confined for good. Needs root and
//! /dev/kvm; without them the tests say `SKIPPED`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_machine::devices::legacy::{NullSink, OutputSink};
use steadfast_machine::machine::ThreadHooks;
use steadfast_types::VmId;
use steadfast_vmm::control::{Request, Then, ask, save};
use steadfast_vmm::isolation::Isolation;
use steadfast_vmm::isolation::cgroup::{Cgroup, CpuMax, Limits};
use steadfast_vmm::isolation::seccomp::SeccompMode;
use steadfast_vmm::process::{Options, Start, run};
use steadfast_vmm::spec::{Boot, DiskSpec, NicSpec, NicTarget, VmSpec, VsockSpec};

const BOUND: Duration = Duration::from_secs(30);
/// How a child ends whose forbidden call was let through.
const SURVIVED: i32 = 42;

fn skipped(test: &str) -> bool {
    let why = if !Path::new("/dev/kvm").exists() {
        "there is no /dev/kvm"
    } else if !rustix::process::geteuid().is_root() {
        "only root can become another user"
    } else {
        return false;
    };
    println!("SKIPPED: {test}: {why}");
    true
}

/// A VM with one of every device, its files in `dir`.
fn spec(dir: &Path, name: &str, elf: &Path, cmdline: &str) -> VmSpec {
    VmSpec {
        name: VmId::new(name).unwrap(),
        vcpus: 2,
        memory_bytes: 128 << 20,
        memory: Default::default(),
        cpu: Default::default(),
        boot: Boot::Flat {
            elf: elf.to_owned(),
            cmdline: cmdline.into(),
        },
        disks: vec![DiskSpec {
            path: dir.join("disk"),
            format: Some("raw".into()),
            read_only: false,
            direct: false,
            queues: 0,
            serial: String::new(),
        }],
        nics: vec![NicSpec {
            to: NicTarget::Socket {
                own: dir.join("nic"),
                peer: dir.join("peer"),
            },
            mac: None,
            mtu: None,
        }],
        rng: true,
        virtio_console: Some(dir.join("console")),
        balloon: true,
        vsock: Some(VsockSpec {
            cid: 5,
            path: dir.join("vsock"),
        }),
        cloud_init: None,
        watchdog: true,
        dirty: Default::default(),
    }
}

/// The VM's process; ended when dropped.
struct Vm {
    child: Child,
    control: PathBuf,
    log: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the VM's process said:\n{}", self.said());
        }
    }
}

impl Vm {
    fn start(dir: &Path, start: &str, more: &[(&str, &str)]) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
            .env("ISOLATION_DIR", dir)
            .env("ISOLATION_START", start)
            .envs(more.iter().copied())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        Self {
            child,
            control: dir.join("control"),
            log: dir.join("log"),
        }
    }

    /// What its process has said.
    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn ask(&self, request: &Request) -> Value {
        ask(&self.control, request, BOUND).unwrap()
    }

    /// Asks for the status until it is as wanted.
    fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        let mut last = String::new();
        while began.elapsed() < BOUND {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("waiting for {what}: the VM's process ended: {status}");
            }
            match ask(&self.control, &Request::Status, BOUND) {
                Ok(status) if wanted(&status) => return status,
                Ok(status) => last = status.to_string(),
                Err(e) => last = e.to_string(),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{what} did not come to pass: {last}");
    }

    fn end(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < BOUND, "the VM's process does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Fields of `/proc/PID/task/*/status`, one map per thread.
    fn threads(&self) -> Vec<std::collections::BTreeMap<String, String>> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks
            .filter_map(|t| std::fs::read_to_string(t.unwrap().path().join("status")).ok())
            // Kernel threads of KVM and io_uring are listed too, with the filters of the thread that caused them.
            .filter(|text| !text.starts_with("Name:\tkvm-") && !text.starts_with("Name:\tiou-"))
            .map(|text| {
                text.lines()
                    .filter_map(|l| l.split_once(':'))
                    .map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
                    .collect()
            })
            .collect()
    }

    fn is_confined(&self) {
        let filters = |t: &std::collections::BTreeMap<String, String>| {
            let own = t["Name"].starts_with("vcpu") || t["Name"].starts_with("io-");
            (t["Seccomp_filters"].parse().unwrap_or(0u32), 1 + u32::from(own))
        };
        // Two vCPUs, three I/O threads, main, control. After a reset the new ones may still be on their way to their
        // own filters, which they take before anything else.
        let began = Instant::now();
        let threads = loop {
            let threads = self.threads();
            let all = threads.len() >= 7 && threads.iter().map(filters).all(|(has, wants)| has >= wants);
            if all || began.elapsed() > BOUND {
                break threads;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(threads.len() >= 7, "{}", threads.len());
        for t in &threads {
            let name = &t["Name"];
            assert_eq!(t["Seccomp"], "2", "{name}");
            assert_eq!(t["NoNewPrivs"], "1", "{name}");
            for capabilities in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(t[capabilities], "0000000000000000", "{name}: {capabilities}");
            }
            for ids in ["Uid", "Gid"] {
                assert!(
                    t[ids].split_whitespace().all(|id| id != "0"),
                    "{name}: {}",
                    t[ids]
                );
            }
            assert_eq!(t["Groups"], "", "{name}");
            let (has, wants) = filters(t);
            assert_eq!(has, wants, "{name}");
        }
    }
}

fn writes(status: &Value) -> u64 {
    status["disks"][0]["writes"].as_u64().unwrap()
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pulse"), pulse::elf()).unwrap();
    std::fs::write(dir.path().join("resetter"), resetter()).unwrap();
    let disk = std::fs::File::create(dir.path().join("disk")).unwrap();
    disk.set_len(16 << 20).unwrap();
    dir
}

/// An ELF that writes `R` to port 0xe9 and then asks the keyboard controller for a reset.
fn resetter() -> Vec<u8> {
    let code: [u8; 11] = [0xb0, b'R', 0xe6, 0xe9, 0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    const AT: u64 = 0x10_0000;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    put(&2u16.to_le_bytes());
    put(&62u16.to_le_bytes());
    put(&1u32.to_le_bytes());
    put(&AT.to_le_bytes());
    put(&64u64.to_le_bytes());
    put(&[0; 12]);
    for half in [64u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    put(&1u32.to_le_bytes());
    put(&7u32.to_le_bytes());
    for word in [0x1000, AT, AT, code.len() as u64, code.len() as u64, 0x1000] {
        put(&word.to_le_bytes());
    }
    elf.resize(0x1000, 0);
    elf.extend_from_slice(&code);
    elf
}

#[test]
fn a_confined_vm_boots_saves_and_restores() {
    if skipped("a_confined_vm_boots_saves_and_restores") {
        return;
    }
    let dir = folder();
    let file = dir.path().join("saved");
    let mut first = Vm::start(dir.path(), "pulse", &[]);
    first.until("a disk write", |s| writes(s) > 20);
    first.is_confined();
    // A copy, then the VM itself: the folder is root's, and the VM's process is not.
    save(&first.control, &file, Then::Resume, BOUND).unwrap();
    let before = writes(&first.ask(&Request::Status));
    first.until("more disk writes after the copy", |s| writes(s) > before);
    save(&first.control, &file, Then::Stop, BOUND).unwrap();
    assert!(first.end().success());
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");

    let mut second = Vm::start(dir.path(), "restore", &[]);
    second.until("disk writes after the restore", |s| writes(s) > 20);
    second.is_confined();
    second.ask(&Request::Pause);
    second.ask(&Request::Resume);
    let before = writes(&second.ask(&Request::Status));
    second.until("disk writes after pause and resume", |s| writes(s) > before);
    second.ask(&Request::Stop);
    assert!(second.end().success());
    // The process could not remove these itself.
    let began = Instant::now();
    let leftovers = ["control", "nic", "vsock"].map(|n| dir.path().join(n));
    while leftovers.iter().any(|p| p.exists()) {
        assert!(began.elapsed() < BOUND, "the janitor left {leftovers:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_confined_vm_resets() {
    if skipped("a_confined_vm_resets") {
        return;
    }
    let dir = folder();
    let mut vm = Vm::start(dir.path(), "resetter", &[]);
    vm.until("five resets", |s| s["guest_resets"].as_u64() >= Some(5));
    vm.ask(&Request::Pause);
    // Answered after a reset that the guest asked for before it was paused.
    vm.ask(&Request::Status);
    vm.is_confined();
    vm.ask(&Request::Stop);
    assert!(vm.end().success());
    let output = std::fs::read(dir.path().join("debugcon")).unwrap();
    assert!(
        output.len() >= 5 && output.iter().all(|&b| b == b'R'),
        "{output:?}"
    );
}

#[test]
fn limits_change_while_the_vm_runs_and_its_group_goes_with_it() {
    if skipped("limits_change_while_the_vm_runs_and_its_group_goes_with_it") {
        return;
    }
    let dir = folder();
    let mut vm = Vm::start(dir.path(), "pulse", &[("ISOLATION_CGROUP", "1")]);
    vm.until("a disk write", |s| writes(s) > 0);
    let name = VmId::new(format!("cgroup-test-{}", std::process::id())).unwrap();
    let group = match Cgroup::of_process(vm.child.id(), &name) {
        Ok(group) => group,
        Err(error) => {
            println!("SKIPPED: limits: this host's cgroups cannot be used: {error}");
            return;
        }
    };
    let limits = |percent| Limits {
        cpu_max: Some(CpuMax::Percent(percent)),
        cpu_weight: Some(50),
        ..Limits::default()
    };
    let of = |file: &[&str]| {
        let shown = group.show();
        shown
            .into_iter()
            .find(|(name, _)| file.contains(&name.as_str()))
            .map(|(_, text)| text)
            .unwrap()
    };
    for percent in [150, 30] {
        group.set(&limits(percent), &[]).unwrap();
        let quota = format!("{}000", percent);
        assert_eq!(
            of(&["cpu.max", "cpu.cfs_quota_us"]).split(' ').next(),
            Some(quota.as_str())
        );
    }
    let memory: u64 = of(&["memory.max", "memory.limit_in_bytes"]).parse().unwrap();
    assert!(((128 << 20)..(1 << 30)).contains(&memory), "{memory}");
    let before = writes(&vm.ask(&Request::Status));
    vm.until("disk writes under a limit", |s| writes(s) > before);
    // As if it crashed.
    vm.child.kill().unwrap();
    vm.end();
    let began = Instant::now();
    while group.folders().any(Path::exists) {
        assert!(began.elapsed() < BOUND, "the VM's cgroup stayed");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Row 54: a taken-over thread of each kind makes a forbidden call.
#[test]
fn forbidden_calls_kill_the_process() {
    if skipped("forbidden_calls_kill_the_process") {
        return;
    }
    let calls = [
        ("vcpu", libc::SYS_openat),
        ("io", libc::SYS_socket),
        ("main", libc::SYS_execve),
    ];
    for (thread, call) in calls {
        let dir = folder();
        let mut killed = Vm::start(dir.path(), "pulse", &[("ISOLATION_ATTACK", thread)]);
        let status = killed.end();
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread}: {status}");
        // It said so, and the janitor has nothing to add.
        let said = killed.said();
        let word =
            format!("SIGSYS: the VM's process ends; its filter forbids system call {call}, in thread ");
        assert!(said.contains(&word) && !said.contains("was killed"), "{said:?}");
        // The same without filters: it is the filter that kills.
        let more = [("ISOLATION_ATTACK", thread), ("ISOLATION_SECCOMP", "off")];
        let mut spared = Vm::start(dir.path(), "pulse", &more);
        let status = spared.end();
        assert_eq!(status.code(), Some(SURVIVED), "{thread}: {status}");
    }
}

/// What the filter of each kind of thread forbids, though another kind may do it.
fn attack(thread: &str) {
    // SAFETY: the calls have no effect on memory of this process; they are meant to fail or to kill.
    unsafe {
        match thread {
            "vcpu" => libc::syscall(
                libc::SYS_openat,
                libc::AT_FDCWD,
                c"/etc/passwd".as_ptr(),
                libc::O_RDONLY,
            ),
            "io" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM, 0),
            _ => libc::syscall(libc::SYS_execve, c"/none".as_ptr(), 0, 0),
        };
    }
    std::process::exit(SURVIVED);
}

/// The VM's process of the tests above.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    let Some(dir) = std::env::var_os("ISOLATION_DIR").map(PathBuf::from) else {
        println!("SKIPPED: child: it is started by the other tests");
        return;
    };
    let set = |name: &str| std::env::var(name).ok();
    let under_attack = set("ISOLATION_ATTACK").unwrap_or_default();
    let start = match set("ISOLATION_START").unwrap().as_str() {
        "restore" => Start::Restore(dir.join("saved")),
        guest => {
            let name = if set("ISOLATION_CGROUP").is_some() {
                format!("cgroup-test-{}", std::os::unix::process::parent_id())
            } else {
                "confined".to_owned()
            };
            Start::Boot(Box::new(spec(
                &dir,
                &name,
                &dir.join(guest),
                "loop=flush disk=1 net=1",
            )))
        }
    };
    let debugcon = std::fs::File::options()
        .append(true)
        .create(true)
        .open(dir.join("debugcon"))
        .unwrap();
    let (on_vcpu, on_io) = (under_attack == "vcpu", under_attack == "io");
    let options = Options {
        control: Some(dir.join("control")),
        serial: Box::new(|| Box::new(NullSink)),
        debugcon: Box::new(move || {
            let fd = debugcon.try_clone().unwrap().into();
            Some(Box::new(steadfast_machine::devices::legacy::FdSink::new(fd)) as Box<dyn OutputSink>)
        }),
        on_serial: Box::new(move |_| {
            if under_attack == "main" {
                attack("main");
            }
        }),
        paused: false,
        reset_panicked: false,
        hooks: ThreadHooks {
            vcpu: Arc::new(move |_| {
                if on_vcpu {
                    attack("vcpu");
                }
            }),
            io: Arc::new(move |_| {
                if on_io {
                    attack("io");
                }
            }),
        },
        isolation: Some(Isolation {
            seccomp: match set("ISOLATION_SECCOMP").as_deref() {
                Some("off") => SeccompMode::Off,
                _ => SeccompMode::Enforce,
            },
            cgroup: set("ISOLATION_CGROUP").map(|_| "steadfast-tests".into()),
            ..Isolation::default()
        }),
    };
    run(start, options).unwrap();
}
