//! A small, strict ELF-64 loader: program headers and the PVH note of a hostile file, nothing else.

use super::{BootError, field, put, slice};
use crate::memory::GuestMemory;

/// Kernels have 5 to 8 program headers.
const SEGMENTS_MAX: u16 = 64;
/// Notes that are looked at in one note segment.
const NOTES_MAX: usize = 256;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note "Xen" of this type holds the PVH entry point.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
static ZEROS: [u8; 65536] = [0; 65536];

/// What loading an ELF file gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// `e_entry`, a physical address in all files that we take.
    pub entry: u64,
    /// Entry point of the PVH note, if there is one.
    pub pvh: Option<u32>,
    /// One past the highest byte of any segment.
    pub end: u64,
}

fn bad(why: impl Into<String>) -> BootError {
    BootError::Elf { why: why.into() }
}

fn u16_at(file: &[u8], at: u64) -> Result<u16, BootError> {
    field(file, "the ELF header", at).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], at: u64) -> Result<u32, BootError> {
    field(file, "an ELF header", at).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], at: u64) -> Result<u64, BootError> {
    field(file, "an ELF header", at).map(u64::from_le_bytes)
}

/// Loads all `PT_LOAD` segments at their physical addresses, which must lie in `from..low_end`, and clears the part
/// that the file does not hold.
///
/// # Errors
/// [`BootError::Elf`], [`BootError::Truncated`], [`BootError::NoRoom`].
pub(crate) fn load(memory: &GuestMemory, file: &[u8], from: u64, low_end: u64) -> Result<Loaded, BootError> {
    let ident: [u8; 16] = field(file, "the ELF header", 0)?;
    if ident[..4] != *b"\x7fELF" || ident[4] != 2 || ident[5] != 1 {
        return Err(bad("it is not a little-endian ELF-64 file; use an x86-64 kernel"));
    }
    let machine = u16_at(file, 18)?;
    if machine != 62 {
        return Err(bad(format!(
            "it is built for ELF machine {machine}, not for x86-64 (62)"
        )));
    }
    let (entry, offset) = (u64_at(file, 24)?, u64_at(file, 32)?);
    let (size, count) = (u16_at(file, 54)?, u16_at(file, 56)?);
    if size != 56 || count == 0 || count > SEGMENTS_MAX {
        return Err(bad(format!(
            "it has {count} program headers of {size} bytes; expected 1 to {SEGMENTS_MAX} of 56"
        )));
    }
    let mut loaded = Loaded {
        entry,
        pvh: None,
        end: 0,
    };
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for i in 0..u64::from(count) {
        let header = offset
            .checked_add(i * 56)
            .ok_or_else(|| bad("its program headers lie beyond the end of the address space"))?;
        let kind = u32_at(file, header)?;
        let (at, address) = (u64_at(file, header + 8)?, u64_at(file, header + 24)?);
        let (file_bytes, bytes) = (u64_at(file, header + 32)?, u64_at(file, header + 40)?);
        if kind == PT_NOTE && loaded.pvh.is_none() {
            loaded.pvh = pvh_note(slice(file, "a note segment", at, file_bytes)?);
        }
        if kind != PT_LOAD || bytes == 0 {
            continue;
        }
        let end = segment_end(address, bytes, file_bytes, from, low_end)?;
        if spans.iter().any(|&(s, e)| s < end && address < e) {
            return Err(bad(format!("two segments overlap at {address:#x}")));
        }
        spans.push((address, end));
        put(
            memory,
            "a kernel segment",
            address,
            slice(file, "a segment", at, file_bytes)?,
        )?;
        clear(memory, address + file_bytes, end)?;
        loaded.end = loaded.end.max(end);
    }
    if !spans.iter().any(|&(s, e)| (s..e).contains(&entry)) {
        return Err(bad(format!("its entry point {entry:#x} lies in no segment")));
    }
    Ok(loaded)
}

fn segment_end(address: u64, bytes: u64, file_bytes: u64, from: u64, low_end: u64) -> Result<u64, BootError> {
    if file_bytes > bytes {
        return Err(bad(format!(
            "the segment at {address:#x} has more bytes in the file ({file_bytes:#x}) than in memory ({bytes:#x})"
        )));
    }
    if address < from {
        return Err(bad(format!(
            "a segment loads at {address:#x}, below {from:#x} where the boot structures are"
        )));
    }
    match address.checked_add(bytes) {
        Some(end) if end <= low_end => Ok(end),
        other => Err(BootError::NoRoom {
            start: address,
            end: other.unwrap_or(u64::MAX),
            low_end,
        }),
    }
}

/// Writes zeros to `from..to`.
fn clear(memory: &GuestMemory, mut from: u64, to: u64) -> Result<(), BootError> {
    while from < to {
        let n = (to - from).min(ZEROS.len() as u64);
        put(memory, "zeros after a segment", from, &ZEROS[..n as usize])?;
        from += n;
    }
    Ok(())
}

/// The PVH entry point in a note segment. A segment that does not parse has none.
fn pvh_note(notes: &[u8]) -> Option<u32> {
    let mut at = 0usize;
    for _ in 0..NOTES_MAX {
        let word = |i: usize| {
            let bytes = notes.get(i..i.checked_add(4)?)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (name_len, value_len, kind) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let name = at + 12;
        let value = name.checked_add(usize::try_from(name_len).ok()?.checked_next_multiple_of(4)?)?;
        let next = value.checked_add(usize::try_from(value_len).ok()?.checked_next_multiple_of(4)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY
            && name_len == 4
            && value_len >= 4
            && notes.get(name..name + 4)? == b"Xen\0"
        {
            return word(value);
        }
        at = next;
    }
    None
}
