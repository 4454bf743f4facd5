//! Baselines: all leaves from constants and a [`CpuFeatures`], so that every host gives the same bytes.
//!
//! The family and model of the named baselines are those of the first CPUs that have the level, so that guests apply
//! the workarounds of that generation; caches are invented, the same for all. Bits against speculation (SPEC_CTRL and
//! others) are in a pool's baseline if all its hosts have them, and not in the named ones, which promise nothing but
//! their level. (A guest of the AMD baselines therefore says once at boot that it has no microcode against SRSO; claiming
//! an older family would silence it and lose the half of the mitigation that works.)

use super::features::{
    CMP_LEGACY, CpuFeatures, E1_ECX, E1_EDX, E8_EBX, E21_EAX, HTT, HYPERVISOR, KVM_EAX, L1_ECX, L1_EDX,
    L7_EBX, L7_ECX, L7_EDX, L7S1_EAX, LD1_EAX, TOPOEXT, TSC_DEADLINE, WORDS, XSAVE, XsaveComponent, bits,
    is_amd,
};
use super::topology::Place;
use super::{KvmCaps, kvm_leaves, leaf, subleaf};
use kvm_bindings::kvm_cpuid_entry2;

/// The smallest of any CPU with the level; enough for 512 GiB.
const PHYS_BITS: u8 = 39;
/// Bits of leaf 1 EDX that AMD repeats in 8000_0001h EDX.
const AMD_REPEATED: u32 = 0x0183_f3ff;
/// Family 17h, model 1, stepping 2: the first Zen.
const AMD_SIGNATURE: u32 = 0x0080_0f12;
/// Family 6, model 2Ch, stepping 2: Westmere.
const INTEL_V2_SIGNATURE: u32 = 0x0002_06c2;
/// Family 6, model 3Fh, stepping 2: Haswell server.
const INTEL_V3_SIGNATURE: u32 = 0x0003_06f2;

/// x86-64-v2.
pub(super) fn v2(vendor: [u8; 12]) -> CpuFeatures {
    let signature = if is_amd(&vendor) {
        AMD_SIGNATURE
    } else {
        INTEL_V2_SIGNATURE
    };
    CpuFeatures::from_parts(vendor, signature, v2_words(&vendor), PHYS_BITS, Vec::new())
}

fn v2_words(vendor: &[u8; 12]) -> [u32; WORDS] {
    let mut words = [0; WORDS];
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, x2APIC, POPCNT, and the timer.
    words[L1_ECX] = bits(&[0, 9, 13, 19, 20, 21, 23]) | TSC_DEADLINE;
    // FPU, DE PSE TSC MSR PAE MCE CX8 APIC, SEP MTRR PGE MCA CMOV PAT PSE36, CLFLUSH, MMX FXSR SSE SSE2
    words[L1_EDX] = bits(&[
        0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26,
    ]);
    words[E1_ECX] = bits(&[0]); // LAHF
    words[E1_EDX] = bits(&[11, 20, 29]); // SYSCALL, NX, LM
    if is_amd(vendor) {
        words[E1_EDX] |= words[L1_EDX] & AMD_REPEATED;
    }
    // Clock, EOI, unhalt, IPI: in every KVM since Linux 4.20.
    words[KVM_EAX] = bits(&[0, 1, 3, 6, 7, 11, 24]);
    words
}

/// x86-64-v3, with AES, PCLMULQDQ, SMEP and FSGSBASE, which all CPUs of the level have.
pub(super) fn v3(vendor: [u8; 12]) -> CpuFeatures {
    let mut words = v2_words(&vendor);
    // PCLMULQDQ, FMA, MOVBE, AES, AVX, F16C
    words[L1_ECX] |= bits(&[1, 12, 22, 25, 28, 29]) | XSAVE;
    words[L7_EBX] = bits(&[0, 3, 5, 7, 8]); // FSGSBASE, BMI1, AVX2, SMEP, BMI2
    words[E1_ECX] |= bits(&[5]); // LZCNT
    let signature = if is_amd(&vendor) {
        AMD_SIGNATURE
    } else {
        INTEL_V3_SIGNATURE
    };
    let avx = XsaveComponent {
        index: 2,
        size: 256,
        offset: 576,
        flags: 0,
    };
    CpuFeatures::from_parts(vendor, signature, words, PHYS_BITS, vec![avx])
}

/// All leaves of one vCPU.
pub(super) fn leaves(f: &CpuFeatures, name: &str, place: Place, caps: &KvmCaps) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(&f.vendor());
    let many = place.ncpus > 1;
    let mut out = Vec::with_capacity(48);
    let [v0, v1, v2] = vendor_words(&f.vendor());
    out.push(leaf(0, [0xd, v0, v2, v1]));
    out.push(leaf(
        1,
        [
            f.signature(),
            place.leaf1_ebx(),
            f.word(L1_ECX) | HYPERVISOR,
            f.word(L1_EDX) | if many { HTT } else { 0 },
        ],
    ));
    if !amd {
        // "No descriptors here, see leaf 4."
        out.push(leaf(2, [0x00ff_ff01, 0, 0, 0]));
        out.extend(intel_caches(place));
    }
    // The APIC timer always runs.
    out.push(leaf(6, [1 << 2, 0, 0, 0]));
    let last = u32::from(f.word(L7S1_EAX) != 0);
    out.push(subleaf(
        7,
        0,
        [last, f.word(L7_EBX), f.word(L7_ECX), f.word(L7_EDX)],
    ));
    if last > 0 {
        out.push(subleaf(7, 1, [f.word(L7S1_EAX), 0, 0, 0]));
    }
    out.extend(place.levels(0xb));
    out.extend(xsave(f));
    out.extend(kvm_leaves(f.word(KVM_EAX), caps));
    out.extend(extended(f, name, place, caps));
    out
}

fn extended(f: &CpuFeatures, name: &str, place: Place, caps: &KvmCaps) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(&f.vendor());
    let many = place.ncpus > 1;
    let topoext = amd && f.word(E1_ECX) & TOPOEXT != 0;
    let last = match (f.word(E21_EAX) != 0, topoext) {
        (true, _) => 0x8000_0021,
        (_, true) => 0x8000_001e,
        _ => 0x8000_0008,
    };
    let [v0, v1, v2] = if amd { vendor_words(&f.vendor()) } else { [0; 3] };
    let legacy = if amd && many { CMP_LEGACY } else { 0 };
    let mut out = vec![
        leaf(0x8000_0000, [last, v0, v2, v1]),
        leaf(
            0x8000_0001,
            [
                if amd { f.signature() } else { 0 },
                0,
                f.word(E1_ECX) | legacy,
                f.word(E1_EDX),
            ],
        ),
    ];
    out.extend(brand(name));
    if amd {
        // L1: 32 KiB, 8 ways, lines of 64 bytes. L2: 512 KiB, 8 ways. L3: 16 MiB, 16 ways.
        out.push(leaf(0x8000_0005, [0, 0, 0x2008_0140, 0x2008_0140]));
        out.push(leaf(0x8000_0006, [0, 0, 0x0200_6140, 0x0080_8140]));
    } else {
        // L2: 256 KiB, 8 ways, lines of 64 bytes.
        out.push(leaf(0x8000_0006, [0, 0, 0x0100_6040, 0]));
    }
    out.push(leaf(0x8000_0007, [0, 0, 0, u32::from(caps.invariant_tsc) << 8]));
    const LINEAR_BITS: u32 = 48;
    out.push(leaf(
        0x8000_0008,
        [
            LINEAR_BITS << 8 | u32::from(f.phys_bits()),
            f.word(E8_EBX),
            if amd { place.extended_ecx() } else { 0 },
            0,
        ],
    ));
    if topoext {
        out.extend(amd_caches(place));
        out.push(leaf(0x8000_001e, place.amd_ids()));
    }
    if f.word(E21_EAX) != 0 {
        out.push(leaf(0x8000_0021, [f.word(E21_EAX), 0, 0, 0]));
    }
    out
}

fn vendor_words(vendor: &[u8; 12]) -> [u32; 3] {
    let word = |i: usize| u32::from_le_bytes([vendor[i], vendor[i + 1], vendor[i + 2], vendor[i + 3]]);
    [word(0), word(4), word(8)]
}

/// Brand string: the baseline's name, never the host's.
fn brand(name: &str) -> Vec<kvm_cpuid_entry2> {
    let mut text = [0u8; 48];
    for (to, from) in text.iter_mut().zip(b"Steadfast ".iter().chain(name.as_bytes())) {
        *to = *from;
    }
    text.chunks_exact(16)
        .zip(0x8000_0002..)
        .map(|(chunk, function)| {
            let word = |i: usize| u32::from_le_bytes([chunk[i], chunk[i + 1], chunk[i + 2], chunk[i + 3]]);
            leaf(function, [word(0), word(4), word(8), word(12)])
        })
        .collect()
}

/// Type (1 data, 2 instructions, 3 both), level, ways, sets, shared by all vCPUs or by none.
type Cache = (u32, u32, u32, u32, bool);
const LINE: u32 = 64;

/// EAX to ECX of a cache in leaf 4 and 8000_001Dh; both vendors agree on them.
fn cache((kind, level, ways, sets, shared): Cache, place: Place) -> [u32; 4] {
    let sharing = if shared { (1 << place.core_bits()) - 1 } else { 0 };
    let eax = kind | level << 5 | 1 << 8 | sharing << 14;
    [eax, (ways - 1) << 22 | (LINE - 1), sets - 1, 0]
}

fn intel_caches(place: Place) -> Vec<kvm_cpuid_entry2> {
    // L1 32 KiB each, L2 256 KiB, L3 16 MiB.
    let caches = [
        (1, 1, 8, 64, false),
        (2, 1, 8, 64, false),
        (3, 2, 8, 512, false),
        (3, 3, 16, 16384, true),
    ];
    let cores = ((1 << place.core_bits()) - 1).min(63) << 26;
    let mut out: Vec<_> = (0..)
        .zip(caches)
        .map(|(i, c)| {
            let mut registers = cache(c, place);
            registers[0] |= cores;
            subleaf(4, i, registers)
        })
        .collect();
    out.push(subleaf(4, 4, [0; 4]));
    out
}

fn amd_caches(place: Place) -> Vec<kvm_cpuid_entry2> {
    // As in leaves 8000_0005h and 8000_0006h.
    let caches = [
        (1, 1, 8, 64, false),
        (2, 1, 8, 64, false),
        (3, 2, 8, 1024, false),
        (3, 3, 16, 16384, true),
    ];
    let mut out: Vec<_> = (0..)
        .zip(caches)
        .map(|(i, c)| subleaf(0x8000_001d, i, cache(c, place)))
        .collect();
    out.push(subleaf(0x8000_001d, 4, [0; 4]));
    out
}

/// Leaf Dh. KVM keeps the sizes that follow XCR0 (subleaf 0 EBX, subleaf 1 EBX) up to date itself.
fn xsave(f: &CpuFeatures) -> Vec<kvm_cpuid_entry2> {
    const LEGACY_AND_HEADER: u32 = 512 + 64;
    if f.word(L1_ECX) & XSAVE == 0 {
        return Vec::new();
    }
    let mask = f.xsave().iter().fold(3u32, |m, c| m | 1 << c.index);
    let size = f
        .xsave()
        .iter()
        .map(|c| c.offset.saturating_add(c.size))
        .fold(LEGACY_AND_HEADER, u32::max);
    let mut out = vec![
        subleaf(0xd, 0, [mask, LEGACY_AND_HEADER, size, 0]),
        subleaf(0xd, 1, [f.word(LD1_EAX), 0, 0, 0]),
    ];
    out.extend(
        f.xsave()
            .iter()
            .map(|c| subleaf(0xd, u32::from(c.index), [c.size, c.offset, c.flags, 0])),
    );
    out
}
