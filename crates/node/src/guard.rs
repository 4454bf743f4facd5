//! `steadfast guard`: ends the VMs of class `restart` when their host has lost its lease.
//!
//! The pool boots such a VM elsewhere once its host's lease has run out; so it must not run here any longer then, even if the
//! daemon is dead or hangs. The guard is a process of its own that does nothing but this: it reads `RUN/lease`, a point of
//! time on the clock that also runs while the host sleeps (`CLOCK_BOOTTIME`), and when that has passed it kills every instance
//! whose `RUN/NAME.meta` says `leased`. The daemon writes the lease anew whenever the store has taken its report, counted from
//! *before* the report was sent, and starts the guard again if it is gone.
//!
//! Not covered: a host that freezes and thaws after its lease runs the guest for the moment until the guard is scheduled. Shared
//! disks that cannot bear that need a watchdog device or a fence agent.

use crate::config::Folders;
use crate::error::{IoContext, Result};
use crate::instances::Meta;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use steadfast_types::VmId;
use steadfast_vmm::control::served_by;

/// The guard looks at the lease at least so often.
const EVERY: Duration = Duration::from_millis(200);
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

/// Starts the guard unless one runs.
///
/// # Errors
/// It cannot be started.
pub fn ensure(folders: &Folders, program: &std::path::Path) -> Result<()> {
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
    let mut child = Command::new(program)
        .args(["guard", "--run"])
        .arg(&folders.run)
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
pub fn run(folders: &Folders) -> Result<()> {
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
    loop {
        let (until, now) = (lease_until(folders), boot_ms());
        if now >= until {
            let guarded = fence(folders);
            if guarded == 0 && now > until + IDLE_MS {
                return Ok(());
            }
        }
        let left = Duration::from_millis(until.saturating_sub(now));
        std::thread::sleep(if left.is_zero() { EVERY } else { left.min(EVERY) });
    }
}

/// Kills every leased instance; says how many there are.
fn fence(folders: &Folders) -> usize {
    let Ok(dir) = fs::read_dir(&folders.run) else {
        return 0;
    };
    let mut count = 0;
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
            continue;
        }
        count += 1;
        let served = served_by(&folders.run.join(format!("{vm}.sock"))).ok();
        for pid in served.into_iter().chain(meta.pid).filter(|pid| is_vmm(*pid, &vm)) {
            if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
    count
}
