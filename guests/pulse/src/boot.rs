//! The flat boot contract as data: what a monitor writes into guest memory, and the registers each vCPU starts with.
//!
//! ```text
//! 0x7000            boot info (one page)
//! 0x9000            PML4; 0xA000 PDPT; 0x10000.. page directories (2 MiB pages, up to 64 GiB; 0x10000 + 64 pages = 0x50000)
//! 0x100000          the ELF's segments, zero-filled up to their size in memory
//! ```
//! Every vCPU: 64-bit long mode, CPL 0, flat segments, IF=0, cr3 = [`PML4_GPA`], rip = entry, rdi = index, rsi = boot info.

use crate::Config;
use crate::shared::*;

/// Where [`FlatBoot`] puts the root of the page tables.
pub const PML4_GPA: u64 = 0x9000;
const PDPT_GPA: u64 = 0xA000;
const PD_GPA: u64 = 0x1_0000;
/// Most page directories: 64 GiB.
const PD_MAX: u64 = 64;

/// Why a guest cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootError {
    /// Fewer than 32 MiB.
    Memory(u64),
    /// None, or more than 64.
    Vcpus(u32),
    /// Longer than [`CMDLINE_MAX`].
    CommandLine(usize),
    /// The image in this library is not an ELF that can be loaded (a defect of the build).
    Image,
}

impl std::fmt::Display for BootError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory(n) => write!(f, "pulse needs at least 32 MiB of memory, not {n} bytes"),
            Self::Vcpus(n) => write!(f, "pulse runs on 1 to {MAX_VCPUS} vCPUs, not {n}"),
            Self::CommandLine(n) => write!(f, "the command line has {n} bytes, at most {CMDLINE_MAX} fit"),
            Self::Image => write!(
                f,
                "the built-in pulse image is not a loadable ELF; build the crate anew"
            ),
        }
    }
}

impl std::error::Error for BootError {}

/// A guest ready to be written into memory.
#[derive(Clone, Debug)]
pub struct FlatBoot {
    /// Address and bytes of everything that must be written. All other memory must be zero.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// Initial rip of every vCPU.
    pub entry: u64,
    /// Initial cr3 of every vCPU.
    pub cr3: u64,
    /// Initial rsi of every vCPU (rdi is its index).
    pub rsi: u64,
}

impl FlatBoot {
    /// Lays out the guest. `mem_bytes` is all RAM: up to 3 GiB of it from address 0, the rest from 4 GiB.
    pub fn new(config: &Config, ncpus: u32, mem_bytes: u64) -> Result<Self, BootError> {
        if mem_bytes < 32 << 20 {
            return Err(BootError::Memory(mem_bytes));
        }
        if ncpus == 0 || ncpus as usize > MAX_VCPUS {
            return Err(BootError::Vcpus(ncpus));
        }
        let (entry, mut writes) = segments().ok_or(BootError::Image)?;
        writes.push((BOOT_INFO_GPA, boot_info(config, ncpus, mem_bytes)?));
        let top = if mem_bytes > LOW_RAM_END {
            mem_bytes - LOW_RAM_END + (4 << 30)
        } else {
            4 << 30
        };
        writes.extend(page_tables(top));
        Ok(Self {
            writes,
            entry,
            cr3: PML4_GPA,
            rsi: BOOT_INFO_GPA,
        })
    }
}

/// The boot-info page.
pub fn boot_info(config: &Config, ncpus: u32, mem_bytes: u64) -> Result<Vec<u8>, BootError> {
    let line = config.to_string();
    if line.len() > CMDLINE_MAX {
        return Err(BootError::CommandLine(line.len()));
    }
    let mut page = Vec::with_capacity(4096);
    page.extend(BOOT_INFO_MAGIC.to_le_bytes());
    page.extend(BOOT_INFO_VERSION.to_le_bytes());
    page.extend(ncpus.to_le_bytes());
    page.extend(mem_bytes.to_le_bytes());
    page.extend((line.len() as u32).to_le_bytes());
    page.resize(BOOT_INFO_CMDLINE, 0);
    page.extend(line.as_bytes());
    page.resize(4096, 0);
    Ok(page)
}

/// Identity tables in 2 MiB pages up to `top` (rounded up to 1 GiB, at most 64 GiB).
fn page_tables(top: u64) -> Vec<Piece> {
    let gib = top.div_ceil(1 << 30).min(PD_MAX);
    let words = |it: &mut dyn Iterator<Item = u64>| it.flat_map(u64::to_le_bytes).collect::<Vec<u8>>();
    vec![
        (PML4_GPA, words(&mut std::iter::once(PDPT_GPA | 3))),
        (PDPT_GPA, words(&mut (0..gib).map(|i| (PD_GPA + i * PAGE) | 3))),
        (PD_GPA, words(&mut (0..gib * 512).map(|i| (i << 21) | 0x83))),
    ]
}

/// Address and bytes.
type Piece = (u64, Vec<u8>);

/// Entry and loadable bytes of the image.
fn segments() -> Option<(u64, Vec<Piece>)> {
    let elf = crate::elf();
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    if elf.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (entry, phoff, phnum) = (u64_at(24)?, u64_at(32)? as usize, usize::from(u16_at(56)?));
    let mut out = Vec::new();
    for p in (0..phnum).map(|i| phoff + i * 56) {
        let loadable = u16_at(p)? == 1;
        let (offset, gpa, size) = (u64_at(p + 8)? as usize, u64_at(p + 24)?, u64_at(p + 32)? as usize);
        if loadable && size > 0 {
            out.push((gpa, elf.get(offset..offset.checked_add(size)?)?.to_vec()));
        }
    }
    Some((entry, out))
}
