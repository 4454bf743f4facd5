//! The memory map that the guest is told, in the form of the BIOS call E820h (ACPI 6.5, section 15).

use super::{EBDA_START, HIGH_MEMORY, acpi};
use crate::memory::layout;

/// What a range is for. The numbers are those of ACPI, which Linux and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Type {
    /// Usable memory.
    Ram = 1,
    /// Not to be used or assigned.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is for.
    pub kind: E820Type,
}

/// The map for a machine with `ram_bytes` of RAM: rising, without overlap.
///
/// RAM ends at the extended BIOS data area and goes on at 1 MiB; ECAM (Linux uses it only if it is reserved here),
/// and KVM's identity map and TSS pages are reserved.
#[must_use]
pub fn e820(ram_bytes: u64) -> Vec<E820Entry> {
    let mut map = vec![
        entry(0, EBDA_START, E820Type::Ram),
        entry(EBDA_START, 0xA_0000 - EBDA_START, E820Type::Reserved),
        entry(
            acpi::RSDP_ADDRESS,
            HIGH_MEMORY - acpi::RSDP_ADDRESS,
            E820Type::Acpi,
        ),
    ];
    let mut high = Vec::new();
    for (start, len) in layout::ram_regions(ram_bytes) {
        if start == 0 {
            map.push(entry(HIGH_MEMORY, len.saturating_sub(HIGH_MEMORY), E820Type::Ram));
        } else {
            high.push(entry(start, len, E820Type::Ram));
        }
    }
    map.push(entry(
        layout::PCI_ECAM_START,
        layout::PCI_ECAM_SIZE,
        E820Type::Reserved,
    ));
    map.push(entry(
        layout::KVM_IDENTITY_MAP,
        layout::KVM_TSS + 0x3000 - layout::KVM_IDENTITY_MAP,
        E820Type::Reserved,
    ));
    map.append(&mut high);
    map
}

fn entry(start: u64, len: u64, kind: E820Type) -> E820Entry {
    E820Entry { start, len, kind }
}
