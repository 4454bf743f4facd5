//! Precedence of the daemon, its guard and its member of the store over guests: a guest that takes all it can get, as one that boots, must
//! not keep its own host from renewing its lease, or the store from answering.
//!
//! The daemon's nice value is inherited by what it starts; VMs are started from a thread without it (the engine of a protected VM takes
//! its own). Where the kernel groups tasks by session (`CONFIG_SCHED_AUTOGROUP`) the value of the group counts instead, and
//! under systemd the weight of the unit: `CPUWeight=` (docs/guide/pool.md).

use crate::error::{IoContext, Result};

const NICE: i32 = -10;

/// Takes it for the calling thread and all that it starts from now on. Call it before there are others.
pub fn take() {
    let own = rustix::process::getpriority_process(None).unwrap_or_default();
    if own != 0 {
        // Somebody has decided.
        return;
    }
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::warn!(%error, "no precedence over guests; allow CAP_SYS_NICE for this process");
        return;
    }
    let (session, own) = (rustix::process::getsid(None), rustix::process::getpid());
    // Not a session that is somebody's shell.
    if session.is_ok_and(|s| s == own)
        && let Err(error) = std::fs::write("/proc/self/autogroup", NICE.to_string())
    {
        tracing::debug!(%error, "tasks are not grouped by session");
    }
}

/// Runs this on a thread without it: a process that is started there has none.
///
/// # Errors
/// There is no thread to be had.
pub fn without<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let plain = std::thread::Builder::new().name("plain".into());
        let run = move || {
            // Giving up precedence is always allowed.
            let _ = rustix::process::setpriority_process(None, 0);
            f()
        };
        let done = plain.spawn_scoped(scope, run).what(|| "start a thread".into())?;
        match done.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Of what runs beside VMs that matter more.
const NICE_BACKGROUND: i32 = 5;

/// Makes a process that has just been started, and has one thread, give way to the VMs of this host.
pub fn give_way(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(Err(error)) = pid.map(|pid| rustix::process::setpriority_process(Some(pid), NICE_BACKGROUND))
    {
        tracing::debug!(%error, "a process that was started has ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn nice_of_child() -> String {
        let out = Command::new("nice").output().unwrap();
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    #[test]
    fn what_is_started_has_it_and_vms_do_not() {
        take();
        if rustix::process::getpriority_process(None).unwrap() != NICE {
            println!("SKIPPED: no right to take precedence here");
            return;
        }
        assert_eq!(nice_of_child(), NICE.to_string());
        assert_eq!(without(nice_of_child).unwrap(), "0");
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let (pid, nice) = (child.id(), rustix::process::getpriority_process);
        give_way(pid);
        let left = nice(rustix::process::Pid::from_raw(pid as i32));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((left.unwrap(), nice(None).unwrap()), (NICE_BACKGROUND, NICE));
    }
}
