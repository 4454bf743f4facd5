//! Identity page tables for the first instructions of a 64-bit guest (Intel SDM volume 3, section 4.5).
//!
//! Pages of 2 MiB; above [`HUGE_FROM`] pages of 1 GiB, so that the tables stay below 1 MiB however much RAM there is.

use super::{BootError, put, words};
use crate::memory::GuestMemory;
use std::ops::Range;

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;
const PAGE: u64 = 0x1000;
const GIB: u64 = 1 << 30;
/// From here on the tables use 1 GiB pages (CPUID 8000_0001h EDX bit 26, in every server CPU since 2010).
const HUGE_FROM: u64 = 64 * GIB;
/// 4-level paging with one top-level entry.
const MAPPED_MAX: u64 = 512 * GIB;

/// Maps `0..end` onto itself, rounded up to whole GiB, with tables in `room`. Returns CR3.
pub(crate) fn identity(memory: &GuestMemory, end: u64, room: Range<u64>) -> Result<u64, BootError> {
    let no_room = |what: String| BootError::Flat { what };
    if end > MAPPED_MAX {
        return Err(no_room(format!(
            "memory up to {end:#x}: its page tables reach 512 GiB; give it less memory"
        )));
    }
    let gibs = end.div_ceil(GIB);
    let small = gibs.min(HUGE_FROM / GIB);
    let pml4 = room.start;
    let pdpt = pml4 + PAGE;
    let first_pd = pdpt + PAGE;
    if first_pd + small * PAGE > room.end {
        return Err(no_room(format!(
            "page tables for {gibs} GiB in {:#x} bytes",
            room.end - room.start
        )));
    }
    let mut top = vec![0u64; 512];
    top[0] = pdpt | PRESENT_WRITABLE;
    put(memory, "page tables", pml4, &words(&top))?;
    let mut pointers = vec![0u64; 512];
    for (gib, pointer) in (0..gibs).zip(pointers.iter_mut()) {
        *pointer = if gib < small {
            (first_pd + gib * PAGE) | PRESENT_WRITABLE
        } else {
            (gib * GIB) | PRESENT_WRITABLE | LARGE
        };
    }
    put(memory, "page tables", pdpt, &words(&pointers))?;
    for gib in 0..small {
        let directory: Vec<u64> = (0..512u64)
            .map(|i| (gib * GIB + (i << 21)) | PRESENT_WRITABLE | LARGE)
            .collect();
        put(memory, "page tables", first_pd + gib * PAGE, &words(&directory))?;
    }
    Ok(pml4)
}
