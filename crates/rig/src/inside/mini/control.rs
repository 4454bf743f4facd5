//! Commands to the mini guest over TCP port 10, a line each.
//!
//! | line | does |
//! |---|---|
//! | `mem_rate N`, `disk_rate N`, `tick_ms N` | sets what the kernel's command line set |
//! | `reset_gap` | the longest gap of the clock starts from 0 |
//! | `say TEXT` | a line on the console |
//! | `flood N` | N lines of 80 bytes on the console, as fast as it takes them |
//! | `service_ill` | the agent's service fails until it is restarted |
//! | `drop_caches` | frees the page cache |
//! | `cpus` | the number of CPUs that run, behind `ok` |
//! | `disk_bench ...` | measures a disk: see [`super::bench`] |
//! | `poweroff`, `reboot` | ends the guest at once (no answer) |
//! | `panic` | a kernel panic (no answer) |
//! | `hang` | every CPU spins with real-time priority, for ever |

use super::Guest;
use std::sync::atomic::Ordering;

/// Does what a line says; the answer is `ok` or `error ...`.
pub fn act(guest: &Guest, line: &str) -> String {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let number = rest.trim().parse::<u64>();
    match (word, number) {
        ("mem_rate", Ok(n)) => guest.memory_rate.store(n, Ordering::Relaxed),
        ("disk_rate", Ok(n)) => guest.disk_rate.store(n, Ordering::Relaxed),
        ("tick_ms", Ok(n)) => guest.tick_ms.store(n, Ordering::Relaxed),
        ("reset_gap", _) => guest.gap_max_us.store(0, Ordering::Relaxed),
        ("say", _) => guest.say(rest),
        ("flood", Ok(n)) => {
            for line in 0..n.min(1_000_000) {
                guest.say(&format!("FLOOD {line:073}"));
            }
        }
        ("service_ill", _) => guest.service_ill.store(true, Ordering::Release),
        ("cpus", _) => {
            let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
            return format!("ok {cpus}");
        }
        ("disk_bench", _) => return super::bench::disk(rest),
        ("drop_caches", _) => return written("/proc/sys/vm/drop_caches", "3"),
        ("poweroff", _) => guest.power_off(),
        ("reboot", _) => guest.restart(),
        ("panic", _) => return written("/proc/sysrq-trigger", "c"),
        ("hang", _) => return hang(),
        _ => return format!("error: what is `{line}`?"),
    }
    "ok".to_string()
}

fn written(path: &str, text: &str) -> String {
    match std::fs::write(path, text) {
        Ok(()) => "ok".to_string(),
        Err(e) => format!("error: {path}: {e}"),
    }
}

fn hang() -> String {
    // Without this the kernel keeps 5 % of each CPU for others.
    let _ = std::fs::write("/proc/sys/kernel/sched_rt_runtime_us", "-1");
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for _ in 0..cpus {
        std::thread::spawn(|| {
            let priority = libc::sched_param { sched_priority: 99 };
            // SAFETY: `priority` is valid to read; 0 is this thread.
            unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) };
            loop {
                std::hint::spin_loop();
            }
        });
    }
    "ok".to_string()
}
