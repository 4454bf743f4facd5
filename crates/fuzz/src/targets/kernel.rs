//! Kernels: bzImage, ELF with and without a PVH note.

use super::{Target, runs_anywhere};
use steadfast_machine::boot;

pub(super) fn target() -> Target {
    Target {
        name: "kernel",
        what: "bzImage, ELF, PVH and flat kernels",
        run: boot::fuzz_kernel,
        seeds: || vec![bzimage(), elf()],
        dictionary: &[
            b"HdrS",
            b"\x7fELF",
            b"Xen\0",
            &[0x55, 0xaa],
            &[0x0f, 2],
            &[18, 0, 0, 0],
            &[4, 0, 0, 0],
        ],
        cannot_run: runs_anywhere,
    }
}

/// Setup header of the boot protocol 2.15 in front of a page of code.
fn bzimage() -> Vec<u8> {
    let mut k = vec![0u8; 8192];
    let mut put = |at: usize, value: &[u8]| k[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x1f4, &0x1c0u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x100_0000u32.to_le_bytes());
    k
}

/// A static x86-64 ELF with one loaded segment and a PVH note.
fn elf() -> Vec<u8> {
    let mut k = vec![0u8; 4096];
    let mut put = |at: usize, value: &[u8]| k[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let mut segment = |at: usize, kind: u32, offset: u64, address: u64, size: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 4, &5u32.to_le_bytes());
        for (i, v) in [offset, address, address, size, size, 4096].iter().enumerate() {
            put(at + 8 + i * 8, &v.to_le_bytes());
        }
    };
    segment(64, 1, 2048, 0x10_0000, 1024);
    segment(120, 4, 1024, 0, 20);
    put(1024, &4u32.to_le_bytes());
    put(1028, &4u32.to_le_bytes());
    put(1032, &18u32.to_le_bytes());
    put(1036, b"Xen\0");
    put(1040, &0x10_0000u32.to_le_bytes());
    k
}
