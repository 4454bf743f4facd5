//! Real-time priority for a vCPU's thread while it is being stopped.
//!
//! A thread that waits for its turn on a busy host cannot park, and a cut waits for the last thread to park. With
//! real-time priority from the kick until it has parked it gets its turn at once. The guest itself never runs with it: a
//! guest must not starve its host.

use rustix::thread::Pid;
use std::io;

/// How long a vCPU of a machine that is cut often runs at a time while others wait, in nanoseconds.
const SLICE_NS: u64 = 200_000;

/// `struct sched_attr` of `sched_setattr(2)`, in its first version.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn number(thread: Pid) -> libc::pid_t {
    thread.as_raw_nonzero().get()
}

fn set(thread: Pid, policy: libc::c_int, sched_priority: libc::c_int) -> io::Result<()> {
    let param = libc::sched_param { sched_priority };
    // SAFETY: `param` lives across the call and is only read. A thread number that is out of date is an error or means
    // another thread's priority, never memory; the caller keeps the thread alive by its join handle.
    match unsafe { libc::sched_setscheduler(number(thread), policy, &raw const param) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Raises a thread above all that is not real-time.
///
/// # Errors
/// The host does not allow it (CAP_SYS_NICE, RLIMIT_RTPRIO).
pub fn raise(thread: Pid) -> io::Result<()> {
    set(thread, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1)
}

/// Makes it an ordinary thread again, with the nice value and the slice it had. This is always allowed.
pub fn lower(thread: Pid) {
    if let Err(error) = set(thread, libc::SCHED_OTHER, 0) {
        tracing::error!(%error, "a vCPU's thread keeps its real-time priority");
    }
}

/// Gives an ordinary thread short turns, and many: its share of the CPU stays what it is, but it waits less for each turn
/// (EEVDF, Linux 6.12; without effect before). With the usual slices of milliseconds a vCPU that is cut every
/// millisecond on a busy host runs for one and waits for ten.
///
/// # Errors
/// The host does not allow it.
pub fn short_turns(thread: Pid) -> io::Result<()> {
    let nice = rustix::process::getpriority_process(Some(thread))?;
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        nice,
        runtime: SLICE_NS,
        ..Attributes::default()
    };
    // SAFETY: the structure is as the kernel wants it, of the size that it names, and only read.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, number(thread), &raw const attributes, 0) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_thread_comes_back() {
        let policy = || {
            // SAFETY: reads the calling thread's policy.
            unsafe { libc::sched_getscheduler(0) }
        };
        std::thread::spawn(move || {
            let me = rustix::thread::gettid();
            short_turns(me).unwrap();
            if let Err(error) = raise(me) {
                eprintln!("SKIPPED: real-time priority is not allowed here: {error}");
                return;
            }
            assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, libc::SCHED_RR);
            lower(me);
            assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, libc::SCHED_OTHER);
        })
        .join()
        .unwrap();
    }
}
