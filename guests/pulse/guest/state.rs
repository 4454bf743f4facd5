//! Access to the shared pages, one volatile word at a time.

use crate::cpu::rdtsc;
use crate::serial;
use crate::shared::{LANE_BYTES, LANES_OFFSET, Lane, MAX_VCPUS, SHARED_GPA, Shared, error};

/// The first shared page.
pub fn shared() -> *mut Shared {
    SHARED_GPA as *mut Shared
}

/// The lane of a vCPU.
pub fn lane(cpu: usize) -> *mut Lane {
    debug_assert!(cpu < MAX_VCPUS);
    (SHARED_GPA + LANES_OFFSET + (cpu % MAX_VCPUS) as u64 * LANE_BYTES) as *mut Lane
}

/// Reads a word of a shared structure.
#[macro_export]
macro_rules! get {
    ($p:expr, $f:ident) => {{
        let p = $p;
        // SAFETY: the shared pages are mapped at a fixed address for the whole run; a word is always a valid u64.
        unsafe { core::ptr::addr_of!((*p).$f).read_volatile() }
    }};
}

/// Writes a word of a shared structure.
#[macro_export]
macro_rules! set {
    ($p:expr, $f:ident, $v:expr) => {{
        let (p, v) = ($p, $v);
        // SAFETY: as for get!; each word has one writer (vCPU 0, or the lane's vCPU).
        unsafe { core::ptr::addr_of_mut!((*p).$f).write_volatile(v) }
    }};
}

/// Adds to a word of the first shared page (vCPU 0 only).
#[macro_export]
macro_rules! count {
    ($f:ident, $n:expr) => {{
        let v = $crate::get!($crate::state::shared(), $f);
        $crate::set!($crate::state::shared(), $f, v.wrapping_add($n));
    }};
}

/// Records an error: sticky, counted in every reply, printed the first time each kind is seen. vCPU 0 only.
pub fn fail(bit: u64, at: u64, want: u64, found: u64) {
    let s = shared();
    let errors = get!(s, errors);
    if errors & bit != 0 {
        return;
    }
    if errors == 0 {
        set!(s, error_bit, bit);
        set!(s, error_at, at);
        set!(s, error_want, want);
        set!(s, error_found, found);
    }
    set!(s, errors, errors | bit);
    serial::text(match bit {
        error::MEMORY => "PULSE CORRUPTION memory at ",
        error::DISK_CONTENT => "PULSE CORRUPTION disk sector ",
        error::COUNTER => "PULSE CORRUPTION counter ",
        error::RNG => "PULSE CORRUPTION rng repeats ",
        error::DISK_IO => "PULSE ERROR disk I/O ",
        error::CPU => "PULSE CORRUPTION cpu changed, leaf ",
        error::DISK_TIMEOUT => "PULSE ERROR disk timeout ",
        _ => "PULSE ERROR device ",
    });
    serial::hex(at);
    serial::text(" expected ");
    serial::hex(want);
    serial::text(" found ");
    serial::hex(found);
    serial::text("\n");
}

/// Sticky bits of all vCPUs; reports those of the other vCPUs on their first sight.
pub fn errors() -> u64 {
    let ncpus = get!(shared(), ncpus) as usize;
    for cpu in 0..ncpus.min(MAX_VCPUS) {
        let l = lane(cpu);
        let e = get!(l, errors);
        if e != 0 {
            fail(e, get!(l, error_at), get!(l, error_want), get!(l, error_found));
        }
    }
    get!(shared(), errors)
}

/// TSC ticks in `ms` milliseconds.
pub fn ticks(ms: u64) -> u64 {
    get!(shared(), tsc_khz).wrapping_mul(ms)
}

/// A deadline that comes back every so often.
pub struct Every {
    next: u64,
    ms: u64,
}

impl Every {
    /// Due for the first time `ms` from now; never if 0.
    pub fn new(ms: u64) -> Self {
        Self {
            next: rdtsc().wrapping_add(ticks(ms)),
            ms,
        }
    }

    /// Whether it is due; then starts again.
    pub fn due(&mut self, now: u64) -> bool {
        if self.ms == 0 || now < self.next {
            return false;
        }
        self.next = now.wrapping_add(ticks(self.ms));
        true
    }
}
