//! Instructions that Rust has no word for, and the memory routines that the compiler calls.

use core::arch::asm;

pub fn outb(port: u16, v: u8) {
    // SAFETY: port output touches no memory of ours.
    unsafe { asm!("out dx, al", in("dx") port, in("al") v, options(nomem, nostack, preserves_flags)) }
}

pub fn inb(port: u16) -> u8 {
    let v: u8;
    // SAFETY: port input touches no memory of ours.
    unsafe { asm!("in al, dx", in("dx") port, out("al") v, options(nomem, nostack, preserves_flags)) }
    v
}

pub fn outl(port: u16, v: u32) {
    // SAFETY: port output touches no memory of ours.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") v, options(nomem, nostack, preserves_flags)) }
}

pub fn inl(port: u16) -> u32 {
    let v: u32;
    // SAFETY: port input touches no memory of ours.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") v, options(nomem, nostack, preserves_flags)) }
    v
}

pub fn rdtsc() -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("rdtsc", out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags)) }
    u64::from(hi) << 32 | u64::from(lo)
}

pub fn cpuid(leaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid(leaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

pub fn pause() {
    core::hint::spin_loop();
}

/// A full barrier. `mfence` is an SSE2 instruction, so a locked one on the stack takes its place.
pub fn barrier() {
    // SAFETY: or with 0 changes no byte; it is below no red zone, since there is none.
    unsafe { asm!("lock or dword ptr [rsp], 0", options(nostack)) }
}

pub fn halt() -> ! {
    loop {
        // SAFETY: interrupts stay off, so this vCPU stops for good.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

pub fn triple_fault() -> ! {
    let idt = [0u16; 5];
    // SAFETY: with an empty IDT the exception cannot be delivered: the machine shuts down, as asked.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) idt.as_ptr(), options(noreturn)) }
}

/// Root of the page tables.
pub fn cr3() -> u64 {
    let v: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) v, options(nomem, nostack, preserves_flags)) }
    v
}

/// Adds the bytes to a ones' complement sum, 32 at a time. The result is a 64-bit sum to be folded.
pub fn sum_bytes(data: &[u8], start: u64) -> u64 {
    let mut sum = start;
    let blocks = data.len() / 32;
    let p = data.as_ptr();
    if blocks > 0 {
        // SAFETY: reads `blocks * 32` bytes of `data`; lea and dec leave the carry alone.
        unsafe {
            asm!(
                "clc",
                "2:",
                "adc {s}, [{p}]",
                "adc {s}, [{p} + 8]",
                "adc {s}, [{p} + 16]",
                "adc {s}, [{p} + 24]",
                "lea {p}, [{p} + 32]",
                "dec {n}",
                "jnz 2b",
                "adc {s}, 0",
                s = inout(reg) sum, p = inout(reg) p => _, n = inout(reg) blocks => _,
                options(readonly, nostack)
            )
        }
    }
    let mut rest = &data[blocks * 32..];
    while rest.len() >= 2 {
        sum = add_carry(sum, u64::from(u16::from_le_bytes([rest[0], rest[1]])));
        rest = &rest[2..];
    }
    if let [last] = rest {
        sum = add_carry(sum, u64::from(*last));
    }
    sum
}

fn add_carry(a: u64, b: u64) -> u64 {
    let (s, c) = a.overflowing_add(b);
    s + u64::from(c)
}

/// Folds a sum of little-endian words to 16 bits and complements it; store it little-endian.
pub fn sum_fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// # Safety
/// As C's memcpy.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(d: *mut u8, s: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller's promise; words first, for an emulated CPU pays by the step.
    unsafe {
        asm!("rep movsq", "mov ecx, {r:e}", "rep movsb", r = in(reg) n & 7,
            inout("rdi") d => _, inout("rsi") s => _, inout("rcx") n >> 3 => _, options(nostack, preserves_flags))
    }
    d
}

/// # Safety
/// As C's memmove.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(d: *mut u8, s: *const u8, n: usize) -> *mut u8 {
    if (d as usize).wrapping_sub(s as usize) >= n {
        // SAFETY: a forward copy is right if the destination does not start inside the source.
        return unsafe { memcpy(d, s, n) };
    }
    // SAFETY: copies backwards within the caller's ranges, then restores the direction flag.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") d.wrapping_add(n).wrapping_sub(1) => _,
            inout("rsi") s.wrapping_add(n).wrapping_sub(1) => _, inout("rcx") n => _, options(nostack))
    }
    d
}

/// # Safety
/// As C's memset.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(d: *mut u8, c: i32, n: usize) -> *mut u8 {
    let word = u64::from(c as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosq", "mov ecx, {r:e}", "rep stosb", r = in(reg) n & 7,
            inout("rdi") d => _, in("rax") word, inout("rcx") n >> 3 => _, options(nostack, preserves_flags))
    }
    d
}

/// # Safety
/// As C's memcmp.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let mut i = 0;
    while i < n {
        // SAFETY: the caller's promise.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        i += 1;
    }
    0
}

/// # Safety
/// As C's bcmp.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, n) }
}
