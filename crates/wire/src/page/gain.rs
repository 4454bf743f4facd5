//! Whether LZ4 pays, decided per neighbourhood of pages from what it gained there before.
//!
//! A neighbourhood is 64 pages (256 KiB): allocators keep like with like. After a try that did not pay, the next 1, 3,
//! 7 ... 63 pages of the neighbourhood are not tried; one that pays ends the wait. So incompressible memory costs one
//! try in 64 pages, and memory that changes its nature is found out within 64.

use std::time::Instant;

const PAGES_PER_GROUP_LOG2: u32 = 6;
/// Groups that are remembered; others share their entry. 16,384 groups are 4 GiB of guest memory in 32 KiB.
const GROUPS: usize = 1 << 14;
const BACKOFF_MAX: u8 = 6;
/// Every n-th try is timed.
const TIME_EVERY: u32 = 16;

#[derive(Clone, Copy, Default)]
struct Group {
    wait: u8,
    backoff: u8,
}

/// Decides where LZ4 is tried.
pub struct Gain {
    groups: Box<[Group]>,
    wire_ns_per_byte: f64,
    cpu_ns_per_byte: f64,
    tries: u32,
}

impl Gain {
    /// `wire_ns_per_byte`: see [`super::EncodeConfig`].
    #[must_use]
    pub fn new(wire_ns_per_byte: f64) -> Self {
        Self {
            groups: vec![Group::default(); GROUPS].into_boxed_slice(),
            wire_ns_per_byte,
            cpu_ns_per_byte: 1.5,
            tries: 0,
        }
    }

    /// Changes the price of a byte on the wire, e.g. from a link's measured rate.
    pub fn set_wire_ns_per_byte(&mut self, ns: f64) {
        self.wire_ns_per_byte = ns;
    }

    /// Nanoseconds that LZ4 takes per byte of input here, measured.
    #[must_use]
    pub const fn cpu_ns_per_byte(&self) -> f64 {
        self.cpu_ns_per_byte
    }

    fn group(&mut self, gfn: u64) -> &mut Group {
        let key = (gfn >> PAGES_PER_GROUP_LOG2) as usize;
        &mut self.groups[key % GROUPS]
    }

    /// Whether to try this page.
    pub fn wants(&mut self, gfn: u64) -> bool {
        let group = self.group(gfn);
        if group.wait > 0 {
            group.wait -= 1;
            return false;
        }
        true
    }

    /// A start time, for the tries that are timed.
    pub fn start(&mut self) -> Option<Instant> {
        self.tries = self.tries.wrapping_add(1);
        self.tries.is_multiple_of(TIME_EVERY).then(Instant::now)
    }

    /// Takes the result of a try and says whether it paid.
    pub fn result(&mut self, gfn: u64, started: Option<Instant>, input: usize, output: usize) -> bool {
        if let Some(t) = started {
            // One page takes far less than a second; a sample that was interrupted is cut down to that it cannot
            // switch LZ4 off for long.
            let ns = (t.elapsed().as_nanos() as f64 / input.max(1) as f64).min(20.0);
            self.cpu_ns_per_byte += (ns - self.cpu_ns_per_byte) / 16.0;
        }
        let saved = input.saturating_sub(output) as f64;
        let pays = saved * self.wire_ns_per_byte > input as f64 * self.cpu_ns_per_byte && output < input;
        let group = self.group(gfn);
        if pays {
            *group = Group::default();
        } else {
            group.backoff = (group.backoff + 1).min(BACKOFF_MAX);
            group.wait = (1u8 << group.backoff) - 1;
        }
        pays
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tries(g: &mut Gain, pages: u64, output: usize) -> u64 {
        let mut tried = 0;
        for i in 0..pages {
            if g.wants(i % 64) {
                tried += 1;
                g.result(i % 64, None, 4096, output);
            }
        }
        tried
    }

    #[test]
    fn incompressible_memory_is_tried_rarely_and_recovers() {
        let mut g = Gain::new(8.0);
        assert!(tries(&mut g, 6400, 4096) < 120);
        assert!(tries(&mut g, 64, 1000) >= 1, "found out within 64 pages");
        assert_eq!(tries(&mut g, 64, 1000), 64);
    }

    #[test]
    fn a_fast_wire_makes_small_gains_worthless() {
        let mut slow = Gain::new(8.0);
        let mut fast = Gain::new(0.8);
        assert!(slow.result(0, None, 4096, 3000));
        assert!(!fast.result(0, None, 4096, 3000));
        assert!(fast.result(0, None, 4096, 100) || fast.cpu_ns_per_byte() > 0.78);
    }
}
