//! Where a vCPU stands: one package, `ncpus` cores of one thread, APIC id = vCPU index.

use super::subleaf;
use kvm_bindings::kvm_cpuid_entry2;

/// A vCPU among its siblings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub vcpu: u32,
    pub ncpus: u32,
}

impl Place {
    /// Bits of the APIC id that number the cores of a package.
    pub fn core_bits(self) -> u32 {
        self.ncpus.next_power_of_two().trailing_zeros()
    }

    /// Leaf 1 EBX: initial APIC id, logical processors, cache line of 64 bytes, no brand index.
    pub fn leaf1_ebx(self) -> u32 {
        (self.vcpu & 0xff) << 24 | (self.ncpus & 0xff) << 16 | 8 << 8
    }

    /// Leaf 8000_0008h ECX: size of the core part of the APIC id, number of cores less one.
    pub fn extended_ecx(self) -> u32 {
        self.core_bits() << 12 | (self.ncpus - 1)
    }

    /// Leaf 8000_001Eh (AMD): extended APIC id, core id with one thread each, node 0 of 1.
    pub fn amd_ids(self) -> [u32; 4] {
        [self.vcpu, self.vcpu, 0, 0]
    }

    /// Leaves Bh and 1Fh: thread level, core level, end.
    pub fn levels(self, function: u32) -> [kvm_cpuid_entry2; 3] {
        const THREAD: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        [
            subleaf(function, 0, [0, 1, THREAD, self.vcpu]),
            subleaf(function, 1, [self.core_bits(), self.ncpus, CORE | 1, self.vcpu]),
            subleaf(function, 2, [0, 0, 2, self.vcpu]),
        ]
    }
}
