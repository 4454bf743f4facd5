//! The `host` template: what KVM supports, less what cannot be saved, with our own topology.

use super::features::{
    ARCH_CAPABILITIES, CMP_LEGACY, HTT, HYPERVISOR, KVM_EAX, L7_EDX, Reg, TABLE, TSC_DEADLINE, find, is_amd,
    vendor,
};
use super::topology::Place;
use super::{KvmCaps, kvm_leaves};
use kvm_bindings::kvm_cpuid_entry2;

/// Leaves that are not shown: performance counters, SGX, tracing, TSC and bus frequency of this host, hybrid, LBR, AMX,
/// SVM, IBS, LWP, SEV, extended counters, AMD's extended topology (ours is in leaf Bh), and KVM's own (made anew).
const HIDDEN: [u32; 17] = [
    0xa,
    0x12,
    0x14,
    0x15,
    0x16,
    0x1a,
    0x1c,
    0x1d,
    0x1e,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001c,
    0x8000_001f,
    0x8000_0022,
    0x8000_0023,
    0x8000_0026,
];

/// XCR0 bits of AMX, and XSS bits of shadow stacks.
const AMX_STATES: u32 = 3 << 17;
const CET_STATES: u32 = 3 << 11;

/// All leaves of one vCPU.
pub(super) fn leaves(supported: &[kvm_cpuid_entry2], place: Place, caps: &KvmCaps) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(&vendor(supported));
    let kvm = find(supported, 0x4000_0001, 0).map_or(0, |e| e.eax) & TABLE[KVM_EAX].allowed;
    let mut out = Vec::with_capacity(supported.len() + 8);
    let mut levels_done = [false; 2];
    for entry in supported {
        let mut e = *entry;
        match e.function {
            f if HIDDEN.contains(&f) || (0x4000_0000..0x5000_0000).contains(&f) => continue,
            0xb | 0x1f => {
                let done = &mut levels_done[usize::from(e.function == 0x1f)];
                if !std::mem::replace(done, true) {
                    out.extend(place.levels(e.function));
                }
                continue;
            }
            // Components of AMX and shadow stacks.
            0xd if matches!(e.index, 11 | 12 | 17 | 18) => continue,
            _ => {}
        }
        mask_words(&mut e);
        match (e.function, e.index) {
            (1, _) => {
                e.ebx = place.leaf1_ebx();
                e.ecx = e.ecx & !TSC_DEADLINE | HYPERVISOR;
                e.ecx |= if caps.tsc_deadline { TSC_DEADLINE } else { 0 };
                e.edx |= if place.ncpus > 1 { HTT } else { 0 };
            }
            (0xd, 0) => e.eax &= !AMX_STATES,
            (0xd, 1) => e.ecx &= !CET_STATES,
            (0x8000_0001, _) if amd && place.ncpus > 1 => e.ecx |= CMP_LEGACY,
            (0x8000_0007, _) => e.edx = e.edx & !(1 << 8) | u32::from(caps.invariant_tsc) << 8,
            (0x8000_0008, _) if amd => e.ecx = place.extended_ecx(),
            (0x8000_001e, _) => [e.eax, e.ebx, e.ecx, e.edx] = place.amd_ids(),
            _ => {}
        }
        out.push(e);
    }
    out.extend(kvm_leaves(kvm, caps));
    out
}

/// Clears the bits of feature words that may not be shown.
fn mask_words(e: &mut kvm_cpuid_entry2) {
    for (i, word) in TABLE.iter().enumerate() {
        if (word.leaf, word.sub) != (e.function, e.index) {
            continue;
        }
        // The guest reads the host's own value of the MSR, which is saved with the rest: right for equal hosts.
        let allowed = word.allowed | if i == L7_EDX { ARCH_CAPABILITIES } else { 0 };
        match word.reg {
            Reg::Eax => e.eax &= allowed,
            Reg::Ebx => e.ebx &= allowed,
            Reg::Ecx => e.ecx &= allowed,
            Reg::Edx => e.edx &= allowed,
        }
    }
}
