//! Precedence of the threads that protect a VM over the vCPUs of this and other VMs: a busy guest must not delay its own
//! protection, and a starved one must not look dead (I7).

const NICE: i32 = -15;
/// On a host with one CPU everything must live: its store, its daemon, and the guests.
const NICE_ALONE: i32 = -7;
const NICE_BACKGROUND: i32 = 10;

/// Gives the calling thread precedence: real-time where the host allows it and has a CPU to spare, else a better nice value.
/// Where it allows neither, that is said once and the VM is protected all the same, at the mercy of the scheduler.
///
/// On a host with one CPU a busy engine at real-time priority is all that runs: neither the guest that it protects nor
/// whatever else the host needs to stay alive (the store's member, a shell) would get a turn.
///
/// Threads that the calling thread starts later do not inherit what is real-time; a nice value they do.
pub fn raise(who: &str) {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if cpus > 1 && realtime().is_ok() {
        return;
    }
    let nice = if cpus > 1 { NICE } else { NICE_ALONE };
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::warn!(%error, "{who} cannot be given precedence over vCPUs; allow CAP_SYS_NICE for this process");
    }
}

/// The calling thread, whatever the one that started it has, gives way to guests: nobody waits for its work.
pub fn give_way() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE_BACKGROUND) {
        tracing::debug!(%error, "a thread in the background keeps its priority");
    }
}

/// The lowest real-time priority, in turns with others of it: above all vCPUs and below what the host's own kernel needs.
fn realtime() -> std::io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: `param` lives across the call and is only read; thread 0 is the calling one, so nobody else's is changed.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &param) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
