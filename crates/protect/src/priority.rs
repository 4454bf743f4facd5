//! Precedence of the threads that protect a VM over the vCPUs of this and other VMs: a busy guest must not delay its own
//! protection, and a starved one must not look dead (I7).
//!
//! A standby that is being filled protects nothing yet: it gives way at first, and then has as much of its host as a guest has. A VM that is
//! booted there meanwhile, because the same host died, is down until it has booted.

use rustix::process::Pid;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const NICE: i32 = -15;
/// On a host with one CPU everything must live: its store, its daemon, and the guests.
const NICE_ALONE: i32 = -7;
const NICE_BACKGROUND: i32 = 10;
/// A standby that is being filled gives way to guests for so long, in which one that is booted has booted; no longer: until it is filled its
/// VM is not protected.
const GIVES_WAY: Duration = Duration::from_secs(30);

/// Gives the calling thread precedence: real-time where the host allows it and has a CPU to spare, else a better nice value.
/// Where it allows neither, that is said once and the VM is protected all the same, at the mercy of the scheduler.
///
/// On a host with one CPU a busy engine at real-time priority is all that runs: neither the guest that it protects nor
/// whatever else the host needs to stay alive (the store's member, a shell) would get a turn.
///
/// Threads that the calling thread starts later do not inherit what is real-time; a nice value they do.
pub fn raise(who: &str) {
    set(None, Rank::High, who);
}

/// Before what a thread comes on its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Before guests.
    High,
    /// As a guest.
    Even,
    /// After guests.
    Low,
}

impl Rank {
    /// Of a standby that has been filled for so long, and is not done.
    pub fn of_a_copy(lasts: Duration) -> Self {
        match lasts < GIVES_WAY {
            true => Self::Low,
            false => Self::Even,
        }
    }
}

/// Ranks a thread of this process, the calling one if none is named.
fn set(thread: Option<Pid>, rank: Rank, who: &str) {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let nice = match rank {
        Rank::High if cpus > 1 => NICE,
        Rank::High => NICE_ALONE,
        Rank::Even => 0,
        Rank::Low => NICE_BACKGROUND,
    };
    let done = match rank {
        // A thread that it starts later has the nice value, and not this.
        Rank::High if cpus > 1 && schedule(thread, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1).is_ok() => {
            rustix::process::setpriority_process(thread, 0)
        }
        Rank::High => rustix::process::setpriority_process(thread, nice),
        Rank::Even | Rank::Low => match schedule(thread, libc::SCHED_OTHER, 0) {
            Ok(()) => rustix::process::setpriority_process(thread, nice),
            Err(error) => {
                tracing::debug!(%error, "{who} keeps its precedence");
                return;
            }
        },
    };
    if let Err(error) = done {
        tracing::warn!(%error, "{who} cannot be given precedence over vCPUs; allow CAP_SYS_NICE for this process");
    }
}

/// The threads that move an instance's epochs: its engine and its links.
#[derive(Clone)]
pub struct Movers(Arc<Mutex<Moving>>);

struct Moving {
    threads: Vec<(Pid, &'static str)>,
    rank: Rank,
}

impl Default for Movers {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Moving {
            threads: Vec::new(),
            rank: Rank::High,
        })))
    }
}

impl Movers {
    fn moving(&self) -> MutexGuard<'_, Moving> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread is one of them from now on.
    pub fn join(&self, who: &'static str) {
        let mut moving = self.moving();
        moving.threads.push((rustix::thread::gettid(), who));
        set(None, moving.rank, who);
    }

    /// Ranks all of them.
    pub fn set(&self, rank: Rank) {
        let mut moving = self.moving();
        if std::mem::replace(&mut moving.rank, rank) == rank {
            return;
        }
        // The number of one that has ended may be that of another process's by now.
        let ours = |t: &Pid| {
            Path::new("/proc/self/task")
                .join(t.as_raw_nonzero().to_string())
                .exists()
        };
        moving.threads.retain(|(thread, _)| ours(thread));
        for (thread, who) in &moving.threads {
            set(Some(*thread), rank, who);
        }
    }
}

/// The calling thread, whatever the one that started it has, gives way to guests: nobody waits for its work.
pub fn give_way() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE_BACKGROUND) {
        tracing::debug!(%error, "a thread in the background keeps its priority");
    }
}

/// Real time at the lowest priority, in turns with others of it, is above all vCPUs and below what the host's own kernel needs.
fn schedule(thread: Option<Pid>, policy: i32, priority: i32) -> std::io::Result<()> {
    let param = libc::sched_param {
        sched_priority: priority,
    };
    let thread = thread.map_or(0, |t| t.as_raw_nonzero().get());
    // SAFETY: `param` lives across the call and is only read; thread 0 is the calling one, others are of this process.
    let done = unsafe { libc::sched_setscheduler(thread, policy, &param) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    /// Scheduling policy and nice value of a thread of this process.
    fn of(thread: Pid) -> (i32, i32) {
        // SAFETY: asks for a number.
        let policy = unsafe { libc::sched_getscheduler(thread.as_raw_nonzero().get()) };
        let nice = rustix::process::getpriority_process(Some(thread)).unwrap();
        (policy & !libc::SCHED_RESET_ON_FORK, nice)
    }

    #[test]
    fn movers_lose_their_precedence_and_get_it_back() {
        let movers = Movers::default();
        let ((tell, told), (end, ended)) = (channel(), channel::<()>());
        let theirs = movers.clone();
        let thread = std::thread::spawn(move || {
            theirs.join("a mover");
            tell.send(rustix::thread::gettid()).unwrap();
            let _ = ended.recv();
        });
        let thread_id = told.recv().unwrap();
        let high = of(thread_id);
        if high == (libc::SCHED_OTHER, 0) {
            println!("SKIPPED: no right to take precedence here");
        } else {
            for (rank, nice) in [(Rank::Even, 0), (Rank::Low, NICE_BACKGROUND)] {
                movers.set(rank);
                assert_eq!(of(thread_id), (libc::SCHED_OTHER, nice));
            }
            movers.set(Rank::High);
            assert_eq!(of(thread_id), high);
        }
        drop(end);
        thread.join().unwrap();
        movers.set(Rank::Low);
        assert!(
            movers.moving().threads.is_empty(),
            "one that has ended is left alone"
        );
    }
}
