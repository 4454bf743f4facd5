//! Loads the flat test guest: a static ELF-64 file at its physical addresses, every vCPU in long mode at once.
//!
//! Boot-info page at [`BOOT_INFO_ADDRESS`], little-endian, in this order: magic `PULSEBI1` (8 bytes), version u32 = 1,
//! vCPUs u32, bytes of RAM u64, length of the command line u32, zero u32, then the command line, up to
//! [`FLAT_CMDLINE_MAX`] bytes of ASCII without a terminator. At the entry `rdi` is the vCPU's index and `rsi` the
//! address of the page; the first 4 GiB and all RAM are mapped onto themselves, interrupts are off.

use super::{
    BootError, Entry, FLAT_TABLES, HIGH_MEMORY, Mode, check_cmdline, elf, linux::low_end, paging, put,
    registers,
};
use crate::memory::{Ram, layout};

/// Guest physical address of the boot-info page.
pub const BOOT_INFO_ADDRESS: u64 = 0x7000;
/// Longest command line in bytes.
pub const FLAT_CMDLINE_MAX: usize = 3072;
const MAGIC: &[u8; 8] = b"PULSEBI1";
const VERSION: u32 = 1;

/// Loads a flat guest.
///
/// # Errors
/// [`BootError`] if the file is not a static x86-64 ELF, does not fit, or a limit is exceeded.
pub fn flat(ram: &Ram, file: &[u8], cmdline: &str, ncpus: u32) -> Result<Entry, BootError> {
    if !(1..=super::acpi::CPUS_MAX).contains(&ncpus) {
        return Err(BootError::Flat {
            what: format!("{ncpus} vCPUs; use 1 to {}", super::acpi::CPUS_MAX),
        });
    }
    check_cmdline(cmdline, FLAT_CMDLINE_MAX)?;
    let memory = ram.memory();
    let loaded = elf::load(memory, file, HIGH_MEMORY, low_end(ram))?;
    let mut info = Vec::with_capacity(4096);
    info.extend(MAGIC);
    info.extend(VERSION.to_le_bytes());
    info.extend(ncpus.to_le_bytes());
    info.extend(ram.bytes().to_le_bytes());
    info.extend((cmdline.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    info.extend(cmdline.as_bytes());
    info.resize(4096, 0);
    put(memory, "the boot-info page", BOOT_INFO_ADDRESS, &info)?;
    let end = layout::ram_regions(ram.bytes())
        .iter()
        .map(|(start, len)| start + len)
        .fold(4 << 30, u64::max);
    let cr3 = paging::identity(memory, end, FLAT_TABLES)?;
    registers::write_gdt(memory, true)?;
    Ok(Entry {
        rip: loaded.entry,
        mode: Mode::Flat64 {
            rsi: BOOT_INFO_ADDRESS,
            cr3,
        },
        all_vcpus: true,
    })
}
