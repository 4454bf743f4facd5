//! Starting processes that must not outlive the rig.
//!
//! Invariant: every process started here gets SIGKILL from the kernel when this process dies, however it dies
//! (`PR_SET_PDEATHSIG`). That signal is tied to the *thread* that forked, so one thread that never ends does all the forking.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel, sync_channel};

type Job = Box<dyn FnOnce() + Send>;

fn forker() -> io::Result<&'static Sender<Job>> {
    static FORKER: OnceLock<Sender<Job>> = OnceLock::new();
    if let Some(sender) = FORKER.get() {
        return Ok(sender);
    }
    let (sender, jobs) = channel::<Job>();
    std::thread::Builder::new()
        .name("rig-forker".to_string())
        .spawn(move || {
            // The static keeps a sender, so this ends with the process only.
            for job in jobs {
                job();
            }
        })?;
    Ok(FORKER.get_or_init(|| sender))
}

/// Starts a command that dies with this process. The descriptors of `inherit` stay open in it under the same numbers.
pub fn spawn_bound(mut command: Command, inherit: Vec<RawFd>) -> io::Result<Child> {
    let own_pid = std::process::id();
    let prepare = move || {
        // SAFETY: prctl, getppid and fcntl are async-signal-safe and touch no memory of ours.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above; then nobody would send the signal.
            if libc::getppid() as u32 != own_pid {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            for fd in &inherit {
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes the async-signal-safe calls above; it allocates nothing after the fork.
    unsafe { command.pre_exec(prepare) };
    // Its own process group: a Ctrl-C at the terminal is for the rig, which then ends its servers in order.
    command.process_group(0);
    let (answer, answered) = sync_channel(1);
    let job: Job = Box::new(move || {
        // The asker waits for exactly one answer.
        let _ = answer.send(command.spawn());
    });
    forker()?
        .send(job)
        .map_err(|_| io::Error::other("the rig's forking thread is gone"))?;
    answered
        .recv()
        .map_err(|_| io::Error::other("the rig's forking thread is gone"))?
}
