//! Processes by number and time of start: a number may be given again.

use std::fs;
use std::io::{self, ErrorKind};

/// When a process started, in ticks since the host did.
#[must_use]
pub fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    fields(&stat).nth(19)?.parse().ok()
}

/// All processes but the janitors of VMs, which have the words of the VM's process and outlive it.
#[must_use]
pub fn all() -> Vec<u32> {
    let named = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim_end() != "vm-janitor"
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(named).collect()
}

/// Whether a thread of it may still run, also one that waits in the kernel for a disk after the process was killed: that may still be
/// written to. What cannot be read counts as running.
#[must_use]
pub fn runs(pid: u32, since: u64) -> bool {
    may_run(pid, since).unwrap_or_else(|error| !gone(&error))
}

fn may_run(pid: u32, since: u64) -> io::Result<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    if fields(&stat).nth(19).is_some_and(|t| t != since.to_string()) {
        return Ok(false);
    }
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        match fs::read_to_string(thread?.path().join("stat")) {
            Ok(stat) if matches!(fields(&stat).next(), Some("Z" | "X")) => {}
            Ok(_) => return Ok(true),
            Err(error) if gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

fn gone(error: &io::Error) -> bool {
    let no_process = rustix::io::Errno::SRCH.raw_os_error();
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(no_process)
}

/// CPU time of a process so far, in ticks.
#[must_use]
pub fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // State is field 3, utime 14, stime 15.
    let of = |n: usize| fields(&stat).nth(n - 3).and_then(|f| f.parse::<u64>().ok());
    of(14).unwrap_or_default() + of(15).unwrap_or_default()
}

/// The fields of a `stat` behind the name, which may hold anything.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_runs_until_its_last_thread_has_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let (pid, since) = (child.id(), started(child.id()).unwrap());
        assert!(runs(pid, since));
        assert!(!runs(pid, since + 1), "another process got its number");
        child.kill().unwrap();
        // Dead, and nobody took note of it yet: nothing of it runs.
        let until = Instant::now() + Duration::from_secs(10);
        while runs(pid, since) {
            assert!(Instant::now() < until, "it is still there");
        }
        child.wait().unwrap();
        assert!(!runs(pid, since));
    }
}
