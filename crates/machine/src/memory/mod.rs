//! Guest RAM: where it lives, how it is mapped, what of it the monitor itself has written.
//!
//! RAM is one memfd or one file, mapped shared: region `i` of [`layout::ram_regions`] follows region `i-1` in it.
//! A page number ([`Gfn`]) is a guest physical address; the file offset of a page is its rank among RAM pages.
//!
//! All access goes through vm-memory, which checks bounds and marks the monitor's writes in a [`DirtyMap`].
//! Code that hands guest memory to the kernel (io_uring, readv) marks it with [`Ram::mark_dirty`] itself.

pub mod dirty_map;
mod filled;
pub mod layout;

pub use dirty_map::DirtyMap;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use steadfast_types::{Gfn, PAGE_SIZE};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// The vm-memory type of guest RAM: shared mappings with a [`DirtyMap`] per region. Cloning shares the mappings.
pub type GuestMemory = GuestMemoryMmap<DirtyMap>;

/// Smallest machine: 64 MiB.
pub const RAM_BYTES_MIN: u64 = 64 << 20;

/// Where guest RAM lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RamBacking {
    /// Anonymous shared memory; goes away with the process.
    #[default]
    Memfd,
    /// Anonymous shared memory on transparent huge pages where the host gives them.
    MemfdHuge,
    /// A file, created or grown to the size of RAM: one cheap host can stand by for many VMs.
    File(PathBuf),
}

/// Guest RAM could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size asked for is out of range or not a multiple of the page size.
    #[error("guest memory of {0} bytes is not possible; use at least 64 MiB, a multiple of 4 KiB")]
    Size(u64),
    /// The host cannot give that much.
    #[error(
        "cannot get {bytes} bytes of guest memory ({available} bytes are available on this host); \
             lower --memory or free memory on the host"
    )]
    Shortage {
        /// What was asked for.
        bytes: u64,
        /// `MemAvailable` of the host.
        available: u64,
    },
    /// The file that should hold guest memory could not be opened or sized.
    #[error("cannot use {path} as guest memory: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// memfd or mmap failed.
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// An address range outside guest RAM.
    #[error("guest address range {address:#x}+{len:#x} is not RAM")]
    Range {
        /// First byte.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Guest RAM with its regions and the mapping that backs them.
#[derive(Clone, Debug)]
pub struct Ram {
    memory: GuestMemory,
    file: Arc<File>,
    bytes: u64,
}

/// One contiguous piece of RAM, a KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// KVM memory slot number.
    pub slot: u32,
    /// Guest physical address of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address of the mapping in this process.
    pub host: u64,
    /// Offset of the first byte in the backing file.
    pub file_offset: u64,
}

impl Ram {
    /// Maps `bytes` of RAM. Pages are given by the host on first touch; see [`Ram::prefault`].
    ///
    /// # Errors
    /// [`MemoryError`] names the size, the file or the shortage.
    pub fn new(bytes: u64, backing: &RamBacking) -> Result<Self, MemoryError> {
        if bytes < RAM_BYTES_MIN || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size(bytes));
        }
        let file = match backing {
            RamBacking::Memfd | RamBacking::MemfdHuge => {
                let available = host_available_bytes();
                if bytes > available {
                    return Err(MemoryError::Shortage { bytes, available });
                }
                let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                    .map_err(|e| MemoryError::Map(format!("memfd_create: {e}")))?;
                File::from(fd)
            }
            RamBacking::File(path) => open_ram_file(path)?,
        };
        ftruncate(&file, bytes).map_err(|e| MemoryError::Map(format!("setting the size to {bytes}: {e}")))?;
        let ram = Self::map(file, bytes)?;
        if *backing == RamBacking::MemfdHuge {
            ram.use_huge_pages();
        }
        // Guest memory has no place in a core dump of the monitor.
        ram.advise(Advice::LinuxDontDump);
        Ok(ram)
    }

    /// Maps `bytes` of RAM onto a file that is already open for reading and writing, as [`RamBacking::File`].
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn on_file(file: File, bytes: u64) -> Result<Self, MemoryError> {
        if bytes < RAM_BYTES_MIN || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size(bytes));
        }
        ftruncate(&file, bytes).map_err(|e| MemoryError::Map(format!("setting the size to {bytes}: {e}")))?;
        let ram = Self::map(file, bytes)?;
        ram.advise(Advice::LinuxDontDump);
        Ok(ram)
    }

    fn map(file: File, bytes: u64) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        let file = Arc::new(file);
        let mut offset = 0;
        for (start, len) in layout::ram_regions(bytes) {
            let region = MmapRegion::build(
                Some(FileOffset::from_arc(Arc::clone(&file), offset)),
                usize::try_from(len).map_err(|_| MemoryError::Size(bytes))?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
            )
            .map_err(|e| MemoryError::Map(e.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or(MemoryError::Range { address: start, len })?;
            regions.push(region);
            offset += len;
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Map(e.to_string()))?;
        Ok(Self { memory, file, bytes })
    }

    /// The vm-memory view: bounds-checked, marks writes.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Size of RAM in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file or memfd behind RAM.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The regions in rising order of address; the index is the KVM slot.
    #[must_use]
    pub fn regions(&self) -> Vec<RamRegion> {
        let mut file_offset = 0;
        self.memory
            .iter()
            .zip(0u32..)
            .map(|(r, slot)| {
                let region = RamRegion {
                    slot,
                    start: r.start_addr().0,
                    len: r.len(),
                    host: r.as_ptr() as u64,
                    file_offset,
                };
                file_offset += r.len();
                region
            })
            .collect()
    }

    /// Marks a range that the kernel wrote on the monitor's behalf.
    pub fn mark_dirty(&self, address: u64, len: u64) {
        mark_dirty(&self.memory, address, len);
    }

    /// Takes the pages that the monitor wrote since the last harvest, in rising order.
    pub fn harvest_own_writes(&self, mut visit: impl FnMut(Gfn)) {
        for region in self.memory.iter() {
            let first = region.start_addr().0 / PAGE_SIZE;
            (**region).bitmap().harvest(|page| visit(Gfn(first + page)));
        }
    }

    /// Gives pages back to the host: they read as zero from now on, which is a write like any other and is marked.
    pub fn give_back(&self, first: Gfn, pages: u64) {
        use rustix::fs::{FallocateFlags, fallocate};
        let (from, to) = (
            first.address(),
            first.address().saturating_add(pages.saturating_mul(PAGE_SIZE)),
        );
        for r in self.regions() {
            let (start, end) = (from.max(r.start), to.min(r.start + r.len));
            if start >= end {
                continue;
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&self.file, flags, r.file_offset + (start - r.start), end - start) {
                Ok(()) => self.mark_dirty(start, end - start),
                // A file system without holes keeps the memory; the guest does not care what it reads there.
                Err(error) => tracing::debug!(%error, "memory is not given back"),
            }
        }
    }

    /// Copies pages out of RAM in order, 4096 bytes each; returns how many were copied: pages that are not RAM end it,
    /// as does the end of `into`. vCPUs and devices must stand still for the copy to be of one instant.
    ///
    /// A plain copy with a look ahead: the pages of a cut are scattered, and fetching the next one's first lines
    /// hides its address translation.
    pub fn copy_pages(&self, pages: &[Gfn], into: &mut [u8]) -> usize {
        let regions = self.regions();
        let host = |gfn: Gfn| {
            let address = gfn.0.checked_mul(PAGE_SIZE)?;
            let r = regions.iter().find(|r| address.wrapping_sub(r.start) < r.len)?;
            Some((r.host + (address - r.start)) as *const u8)
        };
        let mut done = 0;
        let mut ahead = pages.iter().map(|&g| host(g)).skip(AHEAD);
        for (&page, to) in pages.iter().zip(into.chunks_exact_mut(PAGE_SIZE as usize)) {
            let Some(from) = host(page) else { break };
            if let Some(Some(next)) = ahead.next() {
                prefetch(next);
            }
            // SAFETY: `host` gave the address of a whole page (regions are multiples of pages) inside a mapping that
            // `self.memory` keeps alive; `to` is an exclusive slice of the same length in other memory. Nobody writes
            // the page meanwhile when the machine stands still, as the caller promises; if somebody did, the bytes
            // would be torn and nothing else: they are plain bytes.
            unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), PAGE_SIZE as usize) };
            done += 1;
        }
        done
    }

    /// Asks for huge pages where the host gives them.
    pub fn use_huge_pages(&self) {
        self.advise(Advice::LinuxHugepage);
    }

    /// Touches every page, so that a later copy into RAM does not pay for first touch.
    pub fn prefault(&self) {
        self.advise(Advice::LinuxPopulateWrite);
    }

    fn advise(&self, advice: Advice) {
        for region in self.memory.iter() {
            let len = usize::try_from(region.len()).unwrap_or(0);
            // SAFETY: the range is exactly one live mapping owned by `self.memory`; none of the advices used
            // (huge page, don't dump, populate) discards or moves data.
            let result = unsafe { madvise(region.as_ptr().cast(), len, advice) };
            if let Err(e) = result {
                tracing::debug!(?advice, error = %e, "memory advice not taken");
            }
        }
    }
}

/// Pages between the one that is copied and the one that is fetched.
const AHEAD: usize = 2;

/// Asks for the first lines of a page.
fn prefetch(page: *const u8) {
    for line in 0..8 {
        // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
        unsafe {
            std::arch::x86_64::_mm_prefetch(
                page.wrapping_add(line * 64).cast(),
                std::arch::x86_64::_MM_HINT_T0,
            );
        }
    }
}

/// Marks a range of guest memory as written by the monitor. Parts outside RAM are ignored.
pub fn mark_dirty(memory: &GuestMemory, address: u64, len: u64) {
    for region in memory.iter() {
        let start = region.start_addr().0;
        let end = start + region.len();
        let from = address.max(start);
        let to = address.saturating_add(len).min(end);
        if from < to {
            (**region)
                .bitmap()
                .mark_dirty((from - start) as usize, (to - from) as usize);
        }
    }
}

fn open_ram_file(path: &Path) -> Result<File, MemoryError> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|source| MemoryError::File {
            path: path.to_owned(),
            source,
        })
}

/// `MemAvailable` in bytes; the maximum where it cannot be read, so that the kernel decides.
fn host_available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|v| v.trim().strip_suffix("kB"))
        .and_then(|v| v.trim().parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn own_writes_are_seen_on_both_sides_of_the_hole() {
        let ram = Ram::new(5 << 30, &RamBacking::Memfd).unwrap();
        ram.memory()
            .write_slice(&[1; 8192], GuestAddress(0x1_0000_0000))
            .unwrap();
        ram.memory().write_obj(7u32, GuestAddress(0x5000)).unwrap();
        ram.mark_dirty(0xBFFF_F000, 1 << 31);
        let mut pages = Vec::new();
        ram.harvest_own_writes(|g| pages.push(g));
        assert_eq!(pages[..3], [Gfn(5), Gfn(0xBFFFF), Gfn(0x10_0000)]);
        assert!(ram.memory().write_slice(&[1], GuestAddress(0xC000_0000)).is_err());
        assert_eq!(ram.regions()[1].file_offset, 3 << 30);
    }

    #[test]
    fn pages_are_copied_in_order_up_to_the_first_that_is_not_ram() {
        let ram = Ram::new(5 << 30, &RamBacking::Memfd).unwrap();
        for (page, value) in [(5u64, 1u8), (0x10_0000, 2), (7, 3)] {
            ram.memory()
                .write_slice(&[value; 4096], GuestAddress(page << 12))
                .unwrap();
        }
        let mut into = vec![9; 4 * 4096];
        let list = [Gfn(0x10_0000), Gfn(5), Gfn(7), Gfn(0xC_0000), Gfn(5)];
        assert_eq!(ram.copy_pages(&list, &mut into), 3);
        for (page, value) in [2, 1, 3, 9].iter().enumerate() {
            assert!(into[page * 4096..][..4096].iter().all(|b| b == value));
        }
        assert_eq!(
            ram.copy_pages(&list, &mut into[..5000]),
            1,
            "what does not fit stays"
        );
        assert_eq!(ram.copy_pages(&[Gfn(u64::MAX)], &mut into), 0);
    }

    #[test]
    fn bad_sizes_are_refused() {
        assert!(matches!(
            Ram::new(1 << 20, &RamBacking::Memfd),
            Err(MemoryError::Size(_))
        ));
        assert!(matches!(
            Ram::new((64 << 20) + 1, &RamBacking::Memfd),
            Err(MemoryError::Size(_))
        ));
        assert!(matches!(
            Ram::new(1 << 50, &RamBacking::Memfd),
            Err(MemoryError::Shortage { .. })
        ));
    }
}
