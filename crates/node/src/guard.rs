//! `steadfast guard`: ends the VMs of class `restart` when their host has lost its lease.
//!
//! The pool boots such a VM elsewhere once its host's lease has run out; so it must not run here any longer then, even if the
//! daemon is dead or hangs. The guard is a process of its own that does nothing but this: it reads `RUN/lease`, a point of
//! time on the clock that also runs while the host sleeps (`CLOCK_BOOTTIME`), and when that has passed it kills every instance
//! whose `RUN/NAME.meta` says `leased`. The daemon writes the lease anew whenever the store has taken its report, counted from
//! *before* the report was sent, and starts the guard again if it is gone.
//!
//! A host that freezes and thaws after its lease runs the guest for the moment until the guard is scheduled, and a process that hangs in
//! the kernel does not end. Against both there is the host's watchdog device (`watchdog/`), where one is named: `pool init --watchdog`.

use crate::config::Folders;
use crate::error::{IoContext, Result};
use crate::instances::Meta;
use crate::procs;
use crate::watchdog::{Choice, Watchdog};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_types::VmId;
use steadfast_vmm::control::served_by;

/// The guard looks at the lease at least so often.
const EVERY: Duration = Duration::from_millis(200);
/// While the lease holds it looks for what to guard no more often than this.
const LOOK: Duration = Duration::from_secs(1);
/// With nothing to guard and no lease for so long, the guard ends.
const IDLE_MS: u64 = 60_000;

/// The clock of leases, ms.
#[must_use]
pub fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.cast_unsigned() * 1000 + now.tv_nsec.cast_unsigned() / 1_000_000
}

fn lease_path(folders: &Folders) -> PathBuf {
    folders.run.join("lease")
}

/// When this host's lease ends, on [`boot_ms`]'s clock; 0: it has none.
#[must_use]
pub fn lease_until(folders: &Folders) -> u64 {
    let text = fs::read_to_string(lease_path(folders)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Writes when the lease ends. Not fsynced: it means nothing after a restart of the host.
///
/// # Errors
/// The run folder cannot be written.
pub fn write_lease(folders: &Folders, until_ms: u64) -> Result<()> {
    let path = lease_path(folders);
    let temp = path.with_extension("new");
    fs::write(&temp, until_ms.to_string())
        .and_then(|()| fs::rename(&temp, &path))
        .what(|| format!("write {}", path.display()))
}

/// Whether this process is the monitor of this VM, and not another that got its number.
#[must_use]
pub fn is_vmm(pid: u32, vm: &VmId) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let mut words = line.split(|b| *b == 0);
    let path = format!("/vm/{vm}/");
    words.any(|w| w == b"vmm") && words.any(|w| String::from_utf8_lossy(w).contains(&path))
}

/// Whether this process is a monitor whose files are in this folder.
#[must_use]
pub fn is_vmm_in(pid: u32, folder: &std::path::Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line
        .split(|b| *b == 0)
        .map(|w| std::path::Path::new(std::ffi::OsStr::from_bytes(w)));
    words.any(|w| w == "vmm") && words.any(|w| w.starts_with(folder))
}

/// Whether a process has no command line (yet).
#[must_use]
pub fn has_no_words(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty())
}

fn words_path(folders: &Folders) -> PathBuf {
    folders.run.join("watchdog")
}

/// What the guard says about the host's watchdog; empty: nothing.
#[must_use]
pub fn watchdog_words(folders: &Folders) -> String {
    fs::read_to_string(words_path(folders)).unwrap_or_default()
}

/// Starts the guard unless one runs.
///
/// # Errors
/// It cannot be started.
pub fn ensure(folders: &Folders, program: &std::path::Path, watchdog: Option<&Choice>) -> Result<()> {
    let path = folders.run.join("guard.lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let lock = lock.what(|| format!("open {}", path.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    drop(lock);
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    command.args(["guard", "--run"]).arg(&folders.run);
    if let Some(choice) = watchdog {
        command.arg("--watchdog").arg(&choice.device);
        command.arg(format!("--watchdog-seconds={}", choice.seconds));
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .what(|| format!("start {} guard", program.display()))?;
    let waiter = std::thread::Builder::new().name("guard-wait".into());
    waiter
        .spawn(move || _ = child.wait())
        .map(|_| ())
        .what(|| "a thread that waits for the guard".into())
}

/// The guard's process. Ends when there is nothing to guard any more, or another guard runs.
///
/// # Errors
/// The run folder cannot be used.
pub fn run(folders: &Folders, watchdog: Option<Choice>) -> Result<()> {
    let path = folders.run.join("guard.lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let lock = lock.what(|| format!("open {}", path.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    // What a guard that was killed said.
    let _ = fs::remove_file(words_path(folders));
    let mut watchdog = watchdog.map(Watchdog::new);
    let (mut guarded, mut looked, mut said) = (Guarded::default(), None::<Instant>, String::new());
    loop {
        let (until, now) = (lease_until(folders), boot_ms());
        let holds = now < until;
        if !holds {
            // What is known first.
            guarded.kill();
        }
        if !holds || looked.is_none_or(|at| at.elapsed() >= LOOK) {
            guarded.look(folders);
            looked = Some(Instant::now());
        }
        if !holds {
            guarded.kill();
            if guarded.named == 0 && now > until + IDLE_MS {
                let _ = fs::remove_file(words_path(folders));
                return Ok(());
            }
        }
        if let Some(watchdog) = &mut watchdog {
            guarded
                .processes
                .retain(|pid, (_, since)| procs::runs(*pid, *since));
            watchdog.turn(!guarded.processes.is_empty(), holds, Instant::now());
            let words = watchdog.words();
            if words != said && fs::write(words_path(folders), &words).is_ok() {
                said = words;
            }
        }
        let left = Duration::from_millis(until.saturating_sub(now));
        std::thread::sleep(if left.is_zero() { EVERY } else { left.min(EVERY) });
    }
}

/// What must not outlive the lease.
#[derive(Default)]
struct Guarded {
    /// Instances that are named as such.
    named: usize,
    /// Their processes, with the time of their start.
    processes: BTreeMap<u32, (VmId, u64)>,
}

impl Guarded {
    /// A process that is known and runs is not asked again: nothing here may wait for it longer than once. A VM may have two: one that was
    /// killed and waits in the kernel, and its successor.
    fn look(&mut self, folders: &Folders) {
        self.processes.retain(|pid, (_, since)| procs::runs(*pid, *since));
        let Ok(dir) = fs::read_dir(&folders.run) else {
            return;
        };
        self.named = 0;
        for entry in dir.flatten() {
            let name = entry.file_name();
            let vm = name.to_str().and_then(|n| n.strip_suffix(".meta")).map(VmId::new);
            let (Some(Ok(vm)), Ok(text)) = (vm, fs::read(entry.path())) else {
                continue;
            };
            let Ok(meta) = serde_json::from_slice::<Meta>(&text) else {
                continue;
            };
            if !meta.leased {
                // Another class since.
                self.processes.retain(|_, (of, _)| *of != vm);
                continue;
            }
            self.named += 1;
            let noted = meta.pid.into_iter().chain(meta.next);
            if meta.pid.is_some() && noted.clone().all(|pid| self.processes.contains_key(&pid)) {
                continue;
            }
            let served = served_by(&folders.run.join(format!("{vm}.sock"))).ok();
            for pid in served.into_iter().chain(noted).filter(|pid| is_vmm(*pid, &vm)) {
                if let Some(since) = procs::started(pid) {
                    self.processes.insert(pid, (vm.clone(), since));
                }
            }
        }
    }

    fn kill(&self) {
        for (pid, (_, since)) in &self.processes {
            let same = procs::started(*pid) == Some(*since);
            if let Some(process) = Pid::from_raw(pid.cast_signed()).filter(|_| same) {
                let _ = kill_process(process, Signal::KILL);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::VmLimits;
    use std::process::Child;
    use steadfast_types::Term;

    #[test]
    fn what_is_guarded_is_killed_and_what_left_the_class_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders {
            data: folder.path().join("data"),
            run: folder.path().join("run"),
        };
        fs::create_dir_all(&folders.run).unwrap();
        // Its words make it the process of that VM.
        let start = |vm: &str| {
            let spec = folder.path().join(format!("vm/{vm}/spec"));
            let mut command = Command::new("sh");
            command.args(["-c", "read x", "vmm"]).arg(spec);
            command.stdin(Stdio::piped()).spawn().unwrap()
        };
        let tell = |vm: &str, process: &Child, leased: bool| {
            let meta = Meta {
                term: Term(1),
                hot: false,
                leased,
                start: true,
                started_ms: 0,
                stopping: None,
                pid: Some(process.id()),
                limits: VmLimits::default(),
                net_max: None,
                next: None,
            };
            let path = folders.run.join(format!("{vm}.meta"));
            fs::write(path, serde_json::to_vec(&meta).unwrap()).unwrap();
        };
        let (mut a, mut b) = (start("a"), start("b"));
        tell("a", &a, true);
        tell("b", &b, true);
        let mut guarded = Guarded::default();
        // A process that was just started has no words for a moment.
        let until = Instant::now() + Duration::from_secs(10);
        while guarded.processes.len() < 2 {
            assert!(Instant::now() < until, "{:?}", guarded.processes);
            guarded.look(&folders);
        }
        tell("b", &b, false);
        // It was started again while something of it is still there.
        let mut again = start("a");
        tell("a", &again, true);
        while guarded.processes.len() != 2 || !guarded.processes.contains_key(&again.id()) {
            assert!(Instant::now() < until, "{:?}", guarded.processes);
            guarded.look(&folders);
        }
        assert_eq!(guarded.named, 1);
        guarded.kill();
        assert!(!a.wait().unwrap().success());
        assert!(!again.wait().unwrap().success());
        assert_eq!(b.try_wait().unwrap(), None, "it may outlive the lease");
        guarded.look(&folders);
        assert!(guarded.processes.is_empty());
        b.kill().unwrap();
        b.wait().unwrap();
    }
}
