//! The clock checker: a saved and restored guest must not see time go back, nor its clocks move apart.

use super::Guest;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How far the wall clock and the monotonic clock may drift apart between two looks.
const APART_NS_MAX: i128 = 5_000_000;

/// A clock of the kernel in nanoseconds.
pub fn read(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec to write to; the clocks used here exist on every Linux.
    unsafe { libc::clock_gettime(clock, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Looks at the clocks every so often, for ever.
pub fn watch(guest: &Guest, every: Duration) {
    let apart = || {
        // Read between two reads of the other, so that being descheduled in between does not count as a jump.
        loop {
            let before = read(libc::CLOCK_MONOTONIC);
            let wall = read(libc::CLOCK_REALTIME);
            let after = read(libc::CLOCK_MONOTONIC);
            if after < before {
                guest.fault(format!("JUMP monotonic clock from {before} back to {after}"));
                guest.clock_jumps.fetch_add(1, Ordering::Relaxed);
            } else if after - before < 1_000_000 {
                return (after, i128::from(wall) - i128::from(before));
            }
        }
    };
    let (mut last, mut offset) = apart();
    loop {
        std::thread::sleep(every);
        let (now, new_offset) = apart();
        if now < last {
            guest.fault(format!("JUMP monotonic clock from {last} back to {now}"));
            guest.clock_jumps.fetch_add(1, Ordering::Relaxed);
        }
        if (new_offset - offset).abs() > APART_NS_MAX {
            guest.fault(format!(
                "JUMP wall clock by {} us against the monotonic clock",
                (new_offset - offset) / 1000
            ));
            guest.clock_jumps.fetch_add(1, Ordering::Relaxed);
        }
        guest
            .gap_max_us
            .fetch_max(now.saturating_sub(last) / 1000, Ordering::Relaxed);
        (last, offset) = (now, new_offset);
    }
}
