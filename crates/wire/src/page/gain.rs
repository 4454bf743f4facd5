//! Whether LZ4 pays, decided per neighbourhood of pages from what it gained there before.
//!
//! A neighbourhood is 64 pages (256 KiB): allocators keep like with like. After a try that did not pay, the next 1, 3,
//! 7 ... 63 pages of the neighbourhood are not tried; one that pays ends the wait. So incompressible memory costs one
//! try in 64 pages, and memory that changes its nature is found out within 64. Where the tries did not pay because the
//! content was noise, a page that from 64 of its bytes looks different is tried nevertheless: text may lie among noise.

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
    noise: bool,
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

    /// Whether to try this page, of which `input` is what would be packed.
    pub fn wants(&mut self, gfn: u64, input: &[u8]) -> bool {
        let group = self.group(gfn);
        if group.wait == 0 || (group.noise && looks_packable(input)) {
            return true;
        }
        group.wait -= 1;
        false
    }

    /// A start time, for the tries that are timed.
    pub fn start(&mut self) -> Option<Instant> {
        self.tries = self.tries.wrapping_add(1);
        self.tries.is_multiple_of(TIME_EVERY).then(Instant::now)
    }

    /// Takes the result of a try and says whether it paid.
    pub fn result(&mut self, gfn: u64, started: Option<Instant>, input: usize, output: usize) -> bool {
        if let Some(t) = started {
            // Down fast, up slowly: a sample that contains a time slice of somebody else says nothing of LZ4.
            let ns = t.elapsed().as_nanos() as f64 / input.max(1) as f64;
            let step = if ns < self.cpu_ns_per_byte {
                (ns - self.cpu_ns_per_byte) / 8.0
            } else {
                ((ns - self.cpu_ns_per_byte) / 8.0).min(self.cpu_ns_per_byte / 64.0)
            };
            self.cpu_ns_per_byte += step;
        }
        let saved = input.saturating_sub(output) as f64;
        let pays = saved * self.wire_ns_per_byte > input as f64 * self.cpu_ns_per_byte && output < input;
        let group = self.group(gfn);
        if group.wait > 0 {
            // Tried for its looks: it says nothing of its neighbours.
            group.wait -= 1;
        } else if pays {
            *group = Group::default();
        } else {
            group.backoff = (group.backoff + 1).min(BACKOFF_MAX);
            group.wait = (1u8 << group.backoff) - 1;
            group.noise = output > input - input / 8;
        }
        pays
    }
}

/// Whether 64 bytes, spread over the input, repeat more than those of noise do (which has about 57 different ones).
fn looks_packable(input: &[u8]) -> bool {
    if input.len() < 64 {
        return false;
    }
    let mut seen = [0u64; 4];
    // Not a multiple of the word size: in numbers, every eighth byte would always be the same.
    let step = (input.len() / 64) | 1;
    for b in input.iter().step_by(step).take(64) {
        seen[usize::from(b >> 6)] |= 1 << (b & 63);
    }
    seen.iter().map(|w| w.count_ones()).sum::<u32>() <= 40
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_among_noise_is_found() {
        let mut g = Gain::new(8.0);
        let text: Vec<u8> = b"set key:000123 value:abcdef\r\n"
            .iter()
            .copied()
            .cycle()
            .take(4096)
            .collect();
        let mut x = 1u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                x = x
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (x >> 56) as u8
            })
            .collect();
        let mut tried = [0, 0];
        for i in 0..1000u64 {
            let (input, kind) = if i % 10 == 0 { (&text, 0) } else { (&noise, 1) };
            if g.wants(i % 64, input) {
                tried[kind] += 1;
                g.result(i % 64, None, 4096, if kind == 0 { 400 } else { 4100 });
            }
        }
        assert_eq!(tried[0], 100, "all text is tried");
        assert!(tried[1] < 100, "noise is mostly not: {tried:?}");
    }

    fn tries(g: &mut Gain, pages: u64, output: usize) -> u64 {
        let mut tried = 0;
        for i in 0..pages {
            if g.wants(i % 64, &[]) {
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
