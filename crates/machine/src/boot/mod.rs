//! From a kernel, a flat guest or nothing to the first instruction.
//!
//! Everything that is parsed here (a kernel, an initrd, a command line) comes from a guest's image and is hostile
//! (I9): every offset is checked against the image and against RAM, every loop is bounded by a constant, and what
//! does not fit is a typed [`BootError`]. The structures that the monitor puts into guest memory before the first
//! instruction all lie below 1 MiB:
//!
//! ```text
//! 0x0000_0500  GDT (see `registers`)
//! 0x0000_6000  PVH start info, its module list and memory map
//! 0x0000_7000  Linux zero page; for a flat guest its boot-info page
//! 0x0000_9000  page tables of a Linux guest, 6 pages
//! 0x0001_0000  page tables of a flat guest, up to 0x8_0000
//! 0x0002_0000  command line of a Linux guest, up to 64 KiB
//! 0x0009_FC00  end of conventional memory: from here to 1 MiB nothing is RAM to the guest
//! 0x000E_0000  ACPI tables, the RSDP first, up to 0xF_0000
//! 0x000F_FFF0  reset stub, for a guest that restarts through the BIOS
//! 0x0010_0000  kernels
//! ```
//!
//! Specifications: Linux x86 boot protocol 2.15 (Documentation/arch/x86/boot.rst), Xen PVH (docs/misc/pvh.pandoc),
//! ELF-64, ACPI 6.5.

pub mod acpi;
mod e820;
mod elf;
mod flat;
mod linux;
mod paging;
mod pvh;
mod registers;

pub use e820::{E820Entry, E820Type, e820};
pub use flat::{BOOT_INFO_ADDRESS, FLAT_CMDLINE_MAX, flat};
pub use linux::linux;
pub use registers::{Entry, Mode, initial_msrs, initial_registers};

use crate::memory::{GuestMemory, RamBacking};
use std::sync::OnceLock;
use vm_memory::{Bytes, GuestAddress};

/// GDT of the first instruction.
pub(crate) const GDT_ADDRESS: u64 = 0x500;
/// PVH start info page.
pub(crate) const PVH_INFO_ADDRESS: u64 = 0x6000;
/// Linux zero page.
pub(crate) const ZERO_PAGE_ADDRESS: u64 = 0x7000;
/// Page tables of a Linux guest.
pub(crate) const LINUX_TABLES: std::ops::Range<u64> = 0x9000..0xF000;
/// Page tables of a flat guest.
pub(crate) const FLAT_TABLES: std::ops::Range<u64> = 0x1_0000..0x8_0000;
/// Command line of a Linux guest.
pub(crate) const CMDLINE_ADDRESS: u64 = 0x2_0000;
/// Room for the command line of a Linux guest, with its terminating zero.
pub(crate) const CMDLINE_ROOM: usize = 0x1_0000;
/// First byte of the extended BIOS data area, where conventional memory ends.
pub(crate) const EBDA_START: u64 = 0x9_FC00;
/// Where kernels may be: RAM from here on.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// A guest that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither a bzImage nor an ELF file.
    #[error(
        "the kernel is not a bzImage or an ELF vmlinux (it starts with {start:02x?}); give /boot/vmlinuz-* of an x86-64 guest"
    )]
    NotAKernel {
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// The kernel ends before its own headers say so.
    #[error("the kernel is cut off: {what} needs {need} bytes, the file has {have}; copy it again")]
    Truncated {
        /// Which part is missing.
        what: &'static str,
        /// Bytes that were needed.
        need: u64,
        /// Size of the file.
        have: u64,
    },
    /// A kernel older than the 64-bit boot protocol, or built without it.
    #[error(
        "the kernel cannot be started in 64-bit mode: {why}; use a 64-bit Linux kernel of version 3.8 or newer"
    )]
    Protocol {
        /// What is missing.
        why: String,
    },
    /// ELF headers that make no sense or are not for this machine.
    #[error("the ELF kernel is not usable: {why}")]
    Elf {
        /// Which rule was broken.
        why: String,
    },
    /// The kernel does not fit into low memory.
    #[error(
        "the kernel needs memory {start:#x} to {end:#x}, the machine has low memory up to {low_end:#x}; give the VM more memory"
    )]
    NoRoom {
        /// First byte needed.
        start: u64,
        /// One past the last byte needed.
        end: u64,
        /// End of RAM below the hole.
        low_end: u64,
    },
    /// The initrd does not fit between the kernel and the end of low memory.
    #[error(
        "the initrd of {len} bytes does not fit between the kernel's end {kernel_end:#x} and {limit:#x}; give the VM more memory or use a smaller initrd"
    )]
    NoRoomForInitrd {
        /// Size of the initrd.
        len: u64,
        /// End of the memory that the kernel needs.
        kernel_end: u64,
        /// Where the initrd must end, at the latest.
        limit: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {len} bytes, this kernel takes {max}; shorten it")]
    CmdlineLength {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The command line has a character that is not printable ASCII.
    #[error("the kernel command line has {character:?} at byte {at}; use printable ASCII")]
    CmdlineCharacter {
        /// The character.
        character: char,
        /// Its offset.
        at: usize,
    },
    /// Too much RAM for identity page tables, or an impossible number of vCPUs.
    #[error("a flat guest cannot have {what}")]
    Flat {
        /// What exceeds the limit.
        what: String,
    },
    /// ACPI tables that do not fit, or a bad number of vCPUs.
    #[error("ACPI tables: {0}")]
    Acpi(String),
    /// Guest memory did not take a write; a bug of the layout.
    #[error("cannot write {what} at guest address {address:#x}: {why}")]
    Memory {
        /// What was written.
        what: &'static str,
        /// Where.
        address: u64,
        /// What vm-memory said.
        why: String,
    },
}

/// Writes boot data, with an error that says what it was.
pub(crate) fn put(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|e| BootError::Memory {
            what,
            address,
            why: e.to_string(),
        })
}

/// Little-endian 64-bit words as bytes.
pub(crate) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The bytes `at..at + len` of a file, or [`BootError::Truncated`].
pub(crate) fn slice<'a>(
    file: &'a [u8],
    what: &'static str,
    at: u64,
    len: u64,
) -> Result<&'a [u8], BootError> {
    let truncated = BootError::Truncated {
        what,
        need: at.saturating_add(len),
        have: file.len() as u64,
    };
    let (Ok(from), Ok(n)) = (usize::try_from(at), usize::try_from(len)) else {
        return Err(truncated);
    };
    from.checked_add(n)
        .and_then(|to| file.get(from..to))
        .ok_or(truncated)
}

/// A fixed-size field of a file.
pub(crate) fn field<const N: usize>(file: &[u8], what: &'static str, at: u64) -> Result<[u8; N], BootError> {
    let mut out = [0; N];
    out.copy_from_slice(slice(file, what, at, N as u64)?);
    Ok(out)
}

/// Rejects what no kernel command line may hold.
pub(crate) fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineLength {
            len: cmdline.len(),
            max,
        });
    }
    match cmdline.char_indices().find(|(_, c)| !(' '..='~').contains(c)) {
        Some((at, character)) => Err(BootError::CmdlineCharacter { character, at }),
        None => Ok(()),
    }
}

/// Fuzz entry: `data` as kernel, as flat guest, and its tail as initrd and command line. Must return, whatever it is.
#[doc(hidden)]
pub fn fuzz_kernel(data: &[u8]) {
    static RAM: OnceLock<Option<crate::memory::Ram>> = OnceLock::new();
    let ram = RAM.get_or_init(|| crate::memory::Ram::new(128 << 20, &RamBacking::Memfd).ok());
    let Some(ram) = ram else { return };
    let tail = data.get(data.len() / 2..).unwrap_or_default();
    let cmdline = String::from_utf8_lossy(tail.get(..tail.len().min(4096)).unwrap_or_default());
    for initrd in [None, Some(tail)] {
        for line in ["console=ttyS0", &cmdline] {
            let _ = linux(ram, data, initrd, line, Some(acpi::RSDP_ADDRESS));
        }
    }
    let _ = flat(ram, data, "", 2);
}

#[cfg(test)]
mod tests;
