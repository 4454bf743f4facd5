//! Guest physical address map of the x86-64 machine.
//!
//! ```text
//! 0                      RAM (low), up to 3 GiB
//! 0x0007_0000            free low memory; boot structures live below 0xA_0000 (see `boot`)
//! 0xC000_0000            32-bit MMIO window: PCI BARs
//! 0xE800_0000            PCI ECAM, bus 0 (1 MiB)
//! 0xFEC0_0000            I/O APIC
//! 0xFEE0_0000            local APICs
//! 0xFFFB_C000            KVM identity map page and TSS (4 pages)
//! 0x1_0000_0000          RAM (high), what did not fit below
//! ```

/// First byte above the low RAM, at most: the 32-bit MMIO hole starts here.
pub const LOW_RAM_END_MAX: u64 = 0xC000_0000;
/// Start of the window for PCI memory BARs.
pub const PCI_MMIO_START: u64 = 0xC000_0000;
/// Size of the window for PCI memory BARs in bytes.
pub const PCI_MMIO_SIZE: u64 = 0x2800_0000;
/// PCI Express enhanced configuration space of bus 0.
pub const PCI_ECAM_START: u64 = 0xE800_0000;
/// Size of the ECAM window in bytes: one bus of 32 devices with 8 functions of 4 KiB.
pub const PCI_ECAM_SIZE: u64 = 1 << 20;
/// I/O APIC registers.
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Local APIC registers.
pub const LAPIC_START: u64 = 0xFEE0_0000;
/// Page for KVM's identity map (used by VMX without unrestricted guest).
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages for KVM's TSS, after the identity map.
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// Start of the RAM that did not fit below the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// `(guest physical address, length)` of each RAM region for a machine with `bytes` of RAM.
#[must_use]
pub fn ram_regions(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_RAM_END_MAX);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((HIGH_RAM_START, bytes - low));
    }
    regions
}

// The windows do not overlap.
const _: () = assert!(PCI_MMIO_START + PCI_MMIO_SIZE <= PCI_ECAM_START);
const _: () = assert!(PCI_ECAM_START + PCI_ECAM_SIZE <= IOAPIC_START);
const _: () = assert!(LOW_RAM_END_MAX <= PCI_MMIO_START);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram_regions(64 << 20), vec![(0, 64 << 20)]);
        assert_eq!(ram_regions(3 << 30), vec![(0, 3 << 30)]);
        assert_eq!(ram_regions(5 << 30), vec![(0, 3 << 30), (4 << 30, 2 << 30)]);
    }
}
