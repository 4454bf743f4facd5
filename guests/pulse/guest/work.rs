//! The dirty loop of one vCPU.
//!
//! In loop L (0, 1, 2, ...) the first word of each page of the range goes from L to L+1, in order. So at any instant the
//! words are L+1 up to some page and L from there on, and `progress` (`L << 24 | pages done`) is never ahead of them.
//! With `content=random|text` the other 511 words are a function of (vCPU, page, L+1); the first word is written last.

use core::arch::asm;

use crate::config::Config;
use crate::cpu::rdtsc;
use crate::shared::{Shared, content, error, page_gpa, page_next, page_seed, page_text};
use crate::state::{lane, shared, ticks};
use crate::{get, set};

pub struct Worker {
    cpu: u64,
    layout: Shared,
    chunk: u64,
    loops: u64,
    pos: u64,
    /// TSC ticks per loop; 0: as fast as it goes.
    period: u64,
    next: u64,
}

impl Worker {
    pub fn new(cpu: u64, config: &Config) -> Self {
        // SAFETY: the layout words do not change after GO.
        let layout = unsafe { shared().read_volatile() };
        // Whole pages take long; poll the devices after each.
        let whole = matches!(config.content, content::RANDOM | content::TEXT);
        let chunk = if whole { config.chunk.min(4) } else { config.chunk };
        set!(lane(cpu as usize), chunk, chunk);
        let period = if config.rate == 0 {
            0
        } else {
            ticks(1000) / config.rate
        };
        Self {
            cpu,
            layout,
            chunk,
            loops: 0,
            pos: 0,
            period,
            next: rdtsc(),
        }
    }

    pub fn loops(&self) -> u64 {
        self.loops
    }

    /// Dirties the next chunk. False if the rate allows nothing yet.
    pub fn step(&mut self) -> bool {
        if self.pos == 0 && self.period != 0 {
            let now = rdtsc();
            if now < self.next {
                return false;
            }
            // A guest that was stopped does not catch up on more than one loop.
            self.next = if now - self.next > self.period {
                now + self.period
            } else {
                self.next + self.period
            };
        }
        let pages = self.layout.pages;
        let n = self.chunk.min(pages - self.pos);
        self.run(n);
        self.pos += n;
        if self.pos == pages {
            self.pos = 0;
            self.loops += 1;
        }
        set!(lane(self.cpu as usize), progress, self.loops << 24 | self.pos);
        true
    }

    fn run(&mut self, n: u64) {
        let l = &self.layout;
        let first = page_gpa(l, self.cpu, self.pos);
        // One straight run of addresses, unless the hole for devices lies in it.
        let straight =
            page_gpa(l, self.cpu, self.pos + n - 1) == first.wrapping_add((n - 1).wrapping_mul(l.stride));
        match l.content {
            content::WORD if straight => self.words(first, n),
            content::UNCHECKED if straight => unchecked(first, l.stride, n),
            _ => {
                for page in self.pos..self.pos + n {
                    let gpa = page_gpa(&self.layout, self.cpu, page);
                    if matches!(self.layout.content, content::RANDOM | content::TEXT) {
                        self.fill(gpa, page);
                    }
                    self.words(gpa, 1);
                }
            }
        }
    }

    /// Takes the first words of `n` pages from `loops` to `loops + 1`.
    fn words(&mut self, mut gpa: u64, n: u64) {
        let (old, new) = (self.loops, self.loops + 1);
        let done = turn_fours(gpa, self.layout.stride, n / 4, old, new);
        let mut left = n - done;
        gpa = gpa.wrapping_add(done.wrapping_mul(self.layout.stride));
        while left > 0 {
            let mut found = old;
            // SAFETY: the pages were placed in mapped RAM that nothing else uses. cmpxchg compares and stores in one
            // instruction, which is cheap where instructions are emulated.
            unsafe {
                asm!(
                    "2:",
                    "cmpxchg [{p}], {new}",
                    "jne 3f",
                    "add {p}, {stride}",
                    "dec {n}",
                    "jnz 2b",
                    "3:",
                    p = inout(reg) gpa, new = in(reg) new, stride = in(reg) self.layout.stride,
                    n = inout(reg) left, inout("rax") found, options(nostack)
                )
            }
            if left > 0 {
                self.corrupt(gpa, old, found);
                // SAFETY: as above; the loop goes on from a known value.
                unsafe { (gpa as *mut u64).write_volatile(new) };
                gpa += self.layout.stride;
                left -= 1;
            }
        }
    }

    /// Checks the whole page against the last loop and writes the next content, but for word 0.
    fn fill(&mut self, gpa: u64, page: u64) {
        let text = self.layout.content == content::TEXT;
        let word = |x: u64| if text { page_text(x) } else { x };
        let mut old = page_seed(self.cpu, page, self.loops);
        let mut new = page_seed(self.cpu, page, self.loops + 1);
        let p = gpa as *mut u64;
        for i in 1..512 {
            old = page_next(old);
            new = page_next(new);
            // SAFETY: within the page; see `words`.
            unsafe {
                let found = p.add(i).read_volatile();
                if self.loops > 0 && found != word(old) {
                    self.corrupt(gpa + i as u64 * 8, word(old), found);
                }
                p.add(i).write_volatile(word(new));
            }
        }
    }

    #[cold]
    fn corrupt(&self, at: u64, want: u64, found: u64) {
        let l = lane(self.cpu as usize);
        if get!(l, errors) == 0 {
            set!(l, error_at, at);
            set!(l, error_want, want);
            set!(l, error_found, found);
            set!(l, errors, error::MEMORY);
        }
    }
}

/// Takes the first words of up to `groups` times four pages from `old` to `new`; stops before the first that is not
/// `old`. Returns the pages done. Four at a time, since where instructions are emulated each one costs the same.
fn turn_fours(gpa: u64, stride: u64, groups: u64, old: u64, new: u64) -> u64 {
    if groups == 0 {
        return 0;
    }
    let (mut left, mut odd) = (groups, 0u64);
    // SAFETY: see `Worker::words`.
    unsafe {
        asm!(
            "2:",
            "cmpxchg [{p}], {new}",
            "jne 3f",
            "cmpxchg [{p} + {s}], {new}",
            "jne 4f",
            "cmpxchg [{p} + {s} * 2], {new}",
            "jne 5f",
            "cmpxchg [{p} + {t}], {new}",
            "jne 6f",
            "lea {p}, [{p} + {s} * 4]",
            "dec {n}",
            "jnz 2b",
            "jmp 3f",
            "6: inc {odd}",
            "5: inc {odd}",
            "4: inc {odd}",
            "3:",
            p = inout(reg) gpa => _, s = in(reg) stride, t = in(reg) stride * 3, new = in(reg) new,
            n = inout(reg) left, odd = inout(reg) odd, inout("rax") old => _, options(nostack)
        )
    }
    (groups - left) * 4 + odd
}

/// Adds one to the first words of `n` pages, whatever they are.
fn unchecked(gpa: u64, stride: u64, n: u64) {
    let (fours, rest) = (n / 4, n % 4);
    if fours > 0 {
        // SAFETY: see `Worker::words`.
        unsafe {
            asm!("2:", "inc qword ptr [{p}]", "inc qword ptr [{p} + {s}]", "inc qword ptr [{p} + {s} * 2]",
                "inc qword ptr [{p} + {t}]", "lea {p}, [{p} + {s} * 4]", "dec {n}", "jnz 2b",
                p = inout(reg) gpa => _, s = in(reg) stride, t = in(reg) stride * 3, n = inout(reg) fours => _,
                options(nostack))
        }
    }
    for i in n - rest..n {
        // SAFETY: see `Worker::words`.
        unsafe {
            let p = gpa.wrapping_add(i.wrapping_mul(stride)) as *mut u64;
            p.write_volatile(p.read_volatile().wrapping_add(1));
        }
    }
}
