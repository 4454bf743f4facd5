//! The 16550 at 0x3f8 and the debug port at 0xe9. Used by vCPU 0 only (and by a panic).

use crate::cpu::{inb, outb};

const COM1: u16 = 0x3f8;
const LSR: u16 = COM1 + 5;
const THR_EMPTY: u8 = 0x20;

/// Sets 8 bits, no parity, FIFO on, interrupts off. The divisor stays: there is no line whose speed would matter, and the
/// simplest monitors take every byte at 0x3f8 for output.
pub fn init() {
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x03);
    outb(COM1 + 2, 0x07);
}

fn byte(b: u8) {
    // Bounded: a monitor that never empties the register costs a delay, not a hang.
    for _ in 0..10_000 {
        if inb(LSR) & THR_EMPTY != 0 {
            break;
        }
    }
    outb(COM1, b);
}

pub fn text(s: &str) {
    bytes(s.as_bytes());
}

pub fn bytes(s: &[u8]) {
    for b in s {
        byte(*b);
    }
}

pub fn number(v: u64) {
    let mut buf = [0u8; 20];
    bytes(decimal(v, &mut buf));
}

pub fn hex(v: u64) {
    text("0x");
    for i in (0..16).rev() {
        byte(b"0123456789abcdef"[(v >> (i * 4)) as usize & 15]);
    }
}

/// The decimal digits of `v`.
pub fn decimal(mut v: u64, buf: &mut [u8; 20]) -> &[u8] {
    let mut i = buf.len();
    loop {
        i -= 1;
        buf[i] = b'0' + (v % 10) as u8;
        v /= 10;
        if v == 0 || i == 0 {
            return &buf[i..];
        }
    }
}

/// One byte to the debug port.
pub fn debug_byte(b: u8) {
    outb(0xe9, b);
}
