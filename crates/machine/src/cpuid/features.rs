//! The feature words of CPUID: which may be shown, what their bits are called, and what hosts have in common.

use super::{CpuidError, KvmCaps};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// Number of feature words.
pub const WORDS: usize = 12;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature word: where it is, and which of its bits a guest may see.
pub(super) struct Word {
    pub leaf: u32,
    pub sub: u32,
    pub reg: Reg,
    /// Bits that can be shown in every template. The comment beside each says what is left out.
    pub allowed: u32,
    names: &'static str,
}

pub(super) const L1_ECX: usize = 0;
pub(super) const L1_EDX: usize = 1;
pub(super) const L7_EBX: usize = 2;
pub(super) const L7_ECX: usize = 3;
pub(super) const L7_EDX: usize = 4;
pub(super) const L7S1_EAX: usize = 5;
pub(super) const LD1_EAX: usize = 6;
pub(super) const E1_ECX: usize = 7;
pub(super) const E1_EDX: usize = 8;
pub(super) const E8_EBX: usize = 9;
pub(super) const E21_EAX: usize = 10;
pub(super) const KVM_EAX: usize = 11;

/// Word of the bits named here.
pub(super) const fn bits(list: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < list.len() {
        word |= 1 << list[i];
        i += 1;
    }
    word
}

/// Leaf 1 ECX: the TSC deadline timer, told by [`KvmCaps`].
pub(super) const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: XSAVE.
pub(super) const XSAVE: u32 = 1 << 26;
/// Leaf 1 ECX: a hypervisor is there. Always shown.
pub(super) const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package. Shown by topology.
pub(super) const HTT: u32 = 1 << 28;
/// Leaf 7 EDX: IA32_ARCH_CAPABILITIES. Its value is the host's, so a baseline cannot have it.
pub(super) const ARCH_CAPABILITIES: u32 = 1 << 29;
/// Leaf 8000_0001h ECX (AMD): legacy multi-core. Shown by topology.
pub(super) const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 8000_0001h ECX (AMD): leaves 8000_001Dh and 8000_001Eh.
pub(super) const TOPOEXT: u32 = 1 << 22;

/// The words. In all: what KVM does not save completely, what is the host's own business, what topology decides.
pub(super) static TABLE: [Word; WORDS] = [
    Word {
        leaf: 1,
        sub: 0,
        reg: Reg::Ecx,
        // DTES64, MONITOR, DS-CPL, VMX, SMX, EST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA, OSXSAVE (follows CR4), HYPERVISOR
        allowed: !(bits(&[2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18, 27]) | HYPERVISOR),
        names: "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cnxt_id sdbg fma cx16 xtpr pdcm - pcid dca \
                sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline aes xsave osxsave avx f16c rdrand hypervisor",
    },
    Word {
        leaf: 1,
        sub: 0,
        reg: Reg::Edx,
        // PSN, DS, ACPI, HTT, TM, IA64, PBE
        allowed: !bits(&[18, 21, 22, 28, 29, 30, 31]),
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 psn clflush - ds acpi mmx fxsr \
                sse sse2 ss htt tm ia64 pbe",
    },
    Word {
        leaf: 7,
        sub: 0,
        reg: Reg::Ebx,
        // SGX, PQM, MPX, PQE, PT
        allowed: !bits(&[2, 12, 14, 15, 25]),
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn smep bmi2 erms invpcid rtm pqm zero_fcs mpx pqe avx512f \
                avx512dq rdseed adx smap avx512ifma - clflushopt clwb pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    },
    Word {
        leaf: 7,
        sub: 0,
        reg: Reg::Ecx,
        // OSPKE (follows CR4), CET_SS, TME, bus lock detection, ENQCMD, SGX_LC, PKS
        allowed: !bits(&[4, 7, 13, 24, 29, 30, 31]),
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 cet_ss gfni vaes vpclmulqdq avx512_vnni \
                avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock cldemote - movdiri movdir64b \
                enqcmd sgx_lc pks",
    },
    Word {
        leaf: 7,
        sub: 0,
        reg: Reg::Edx,
        // SGX keys, UINTR, HYBRID, PCONFIG, ARCH_LBR, CET_IBT, AMX, CORE_CAPABILITIES, ARCH_CAPABILITIES
        allowed: !(bits(&[1, 5, 15, 18, 19, 20, 22, 24, 25, 30]) | ARCH_CAPABILITIES),
        names: "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
                rtm_always_abort - - serialize hybrid tsxldtrk - pconfig arch_lbr cet_ibt - amx_bf16 avx512_fp16 amx_tile \
                amx_int8 spec_ctrl stibp l1d_flush arch_capabilities core_capabilities ssbd",
    },
    Word {
        leaf: 7,
        sub: 1,
        reg: Reg::Eax,
        // FRED, LKGS, AMX_FP16
        allowed: !bits(&[17, 18, 21]),
        names: "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - \
                amx_fp16 hreset avx_ifma - - lam",
    },
    Word {
        leaf: 0xd,
        sub: 1,
        reg: Reg::Eax,
        // XFD, which is for AMX
        allowed: bits(&[0, 1, 2, 3]),
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    Word {
        leaf: 0x8000_0001,
        sub: 0,
        reg: Reg::Ecx,
        // CMP_LEGACY, SVM, EXTAPIC, IBS, SKINIT, WDT, LWP, NODEID_MSR, PERFCTR_CORE, PERFCTR_NB, BPEXT, PTSC,
        // PERFCTR_LLC, MWAITX
        allowed: !bits(&[1, 2, 3, 10, 12, 13, 15, 19, 23, 24, 26, 27, 28, 29]),
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
                lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    },
    Word {
        leaf: 0x8000_0001,
        sub: 0,
        reg: Reg::Edx,
        allowed: u32::MAX,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
                fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    },
    Word {
        leaf: 0x8000_0008,
        sub: 0,
        reg: Reg::Ebx,
        // RDPRU, PPIN, CPPC
        allowed: !bits(&[4, 23, 27]),
        names: "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
                amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no amd_ibpb_ret",
    },
    Word {
        leaf: 0x8000_0021,
        sub: 0,
        reg: Reg::Eax,
        allowed: u32::MAX,
        names: "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - - - - \
                prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no",
    },
    Word {
        leaf: 0x4000_0001,
        sub: 0,
        reg: Reg::Eax,
        // Only these: clock (3 bits), I/O delay, EOI, unhalt, IPI, polling.
        allowed: bits(&[0, 1, 3, 6, 7, 11, 12, 24]),
        names: "kvm_clock kvm_nop_io_delay kvm_mmu_op kvm_clock2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
                kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int \
                kvm_msi_ext_dest_id - - - - - - - - kvm_clock_stable",
    },
];

impl Word {
    /// Name of a bit, as Linux has it in `/proc/cpuinfo` where it has one.
    pub fn bit_name(&self, bit: u32) -> String {
        match self.names.split_whitespace().nth(bit as usize) {
            Some(name) if name != "-" => name.to_owned(),
            _ => format!("CPUID {:x}h.{} {:?} bit {bit}", self.leaf, self.sub, self.reg),
        }
    }

    fn of(&self, entries: &[kvm_cpuid_entry2]) -> u32 {
        find(entries, self.leaf, self.sub).map_or(0, |e| register(e, self.reg))
    }
}

fn register(e: &kvm_cpuid_entry2, reg: Reg) -> u32 {
    match reg {
        Reg::Eax => e.eax,
        Reg::Ebx => e.ebx,
        Reg::Ecx => e.ecx,
        Reg::Edx => e.edx,
    }
}

/// A leaf among those that KVM gave.
pub(super) fn find(entries: &[kvm_cpuid_entry2], leaf: u32, sub: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| e.function == leaf && e.index == sub)
}

/// A part of the XSAVE area (leaf Dh): the hosts of a pool must agree on it to the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct XsaveComponent {
    /// Bit of XCR0.
    pub index: u8,
    /// Size in bytes.
    pub size: u32,
    /// Offset in the standard format.
    pub offset: u32,
    /// ECX of the subleaf: alignment in the compacted format.
    pub flags: u32,
}

/// What a host can show a guest that may move: exchanged between hosts, intersected, used as [`super::Template::Pool`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CpuFeatures {
    vendor: [u8; 12],
    /// Leaf 1 EAX: family, model, stepping.
    signature: u32,
    words: [u32; WORDS],
    phys_bits: u8,
    xsave: Vec<XsaveComponent>,
}

/// XSAVE components beyond x87 and SSE that a guest may have: AVX, AVX-512 (three), PKRU.
const XSAVE_ALLOWED: [u8; 5] = [2, 5, 6, 7, 9];
const AVX: u8 = 2;
const AVX512: [u8; 3] = [5, 6, 7];
const PKRU: u8 = 9;

impl CpuFeatures {
    /// From explicit words; for the named baselines.
    pub(super) fn from_parts(
        vendor: [u8; 12],
        signature: u32,
        words: [u32; WORDS],
        phys_bits: u8,
        xsave: Vec<XsaveComponent>,
    ) -> Self {
        Self {
            vendor,
            signature,
            words,
            phys_bits,
            xsave,
        }
    }

    /// What this host supports, by `KVM_GET_SUPPORTED_CPUID`.
    #[must_use]
    pub fn of(supported: &CpuId, caps: &KvmCaps) -> Self {
        let entries = supported.as_slice();
        let mut words = [0; WORDS];
        for (word, def) in words.iter_mut().zip(&TABLE) {
            *word = def.of(entries) & def.allowed;
        }
        words[L1_ECX] = words[L1_ECX] & !TSC_DEADLINE | if caps.tsc_deadline { TSC_DEADLINE } else { 0 };
        let xsave = XSAVE_ALLOWED
            .iter()
            .filter_map(|&index| {
                let e = find(entries, 0xd, u32::from(index))?;
                (e.eax != 0).then_some(XsaveComponent {
                    index,
                    size: e.eax,
                    offset: e.ebx,
                    flags: e.ecx,
                })
            })
            .collect();
        Self {
            vendor: vendor(entries),
            signature: find(entries, 1, 0).map_or(0, |e| e.eax),
            words,
            phys_bits: find(entries, 0x8000_0008, 0).map_or(36, |e| e.eax as u8),
            xsave,
        }
        .normalised()
    }

    /// What both hosts have.
    ///
    /// # Errors
    /// [`CpuidError::Vendors`].
    pub fn intersect(&self, other: &Self) -> Result<Self, CpuidError> {
        self.same_vendor(other)?;
        let mut words = self.words;
        for (word, theirs) in words.iter_mut().zip(other.words) {
            *word &= theirs;
        }
        let older = if model(self.signature) <= model(other.signature) {
            self.signature
        } else {
            other.signature
        };
        Ok(Self {
            vendor: self.vendor,
            signature: older,
            words,
            phys_bits: self.phys_bits.min(other.phys_bits),
            xsave: self
                .xsave
                .iter()
                .filter(|c| other.xsave.contains(c))
                .copied()
                .collect(),
        }
        .normalised())
    }

    /// Drops what depends on something that is not there, and what no guest may have.
    pub(super) fn normalised(mut self) -> Self {
        for (word, def) in self.words.iter_mut().zip(&TABLE) {
            *word &= def.allowed;
        }
        self.xsave.retain(|c| XSAVE_ALLOWED.contains(&c.index));
        self.xsave.sort_by_key(|c| c.index);
        self.xsave.dedup_by_key(|c| c.index);
        if self.words[L1_ECX] & XSAVE == 0 {
            self.xsave.clear();
            self.words[LD1_EAX] = 0;
        }
        if !self.has_state(AVX) {
            self.words[L1_ECX] &= !bits(&[12, 28, 29]); // FMA, AVX, F16C
            self.words[L7_EBX] &= !bits(&[5]); // AVX2
            self.words[L7_ECX] &= !bits(&[9, 10]); // VAES, VPCLMULQDQ
            self.words[L7S1_EAX] &= !bits(&[0, 1, 2, 4, 23]); // SHA512, SM3, SM4, AVX-VNNI, AVX-IFMA
            self.words[E1_ECX] &= !bits(&[11, 16]); // XOP, FMA4
        }
        if !self.has_state(AVX) || !AVX512.iter().all(|&c| self.has_state(c)) {
            self.xsave.retain(|c| !AVX512.contains(&c.index));
            self.words[L7_EBX] &= !bits(&[16, 17, 21, 26, 27, 28, 30, 31]);
            self.words[L7_ECX] &= !bits(&[1, 6, 11, 12, 14]);
            self.words[L7_EDX] &= !bits(&[2, 3, 8, 23]);
            self.words[L7S1_EAX] &= !bits(&[5]);
        }
        if self.words[L7_ECX] & 1 << 3 == 0 || !self.has_state(PKRU) {
            self.xsave.retain(|c| c.index != PKRU);
            self.words[L7_ECX] &= !(1 << 3);
        }
        self
    }

    fn has_state(&self, index: u8) -> bool {
        self.xsave.iter().any(|c| c.index == index)
    }

    fn same_vendor(&self, other: &Self) -> Result<(), CpuidError> {
        if self.vendor == other.vendor {
            Ok(())
        } else {
            Err(CpuidError::Vendors(self.vendor_name(), other.vendor_name()))
        }
    }

    /// Checks that a host with these features can show all of `want`.
    ///
    /// # Errors
    /// [`CpuidError::Missing`] names every missing feature; [`CpuidError::Vendors`].
    pub fn check_provides(&self, want: &Self, template: &'static str) -> Result<(), CpuidError> {
        self.same_vendor(want)?;
        let mut missing = Vec::new();
        for ((have, need), def) in self.words.iter().zip(want.words).zip(&TABLE) {
            let lacks = need & !have;
            for name in (0..32).filter(|b| lacks & 1 << b != 0).map(|b| def.bit_name(b)) {
                // AMD repeats a word.
                if !missing.contains(&name) {
                    missing.push(name);
                }
            }
        }
        for c in want.xsave.iter().filter(|c| !self.xsave.contains(c)) {
            missing.push(format!(
                "XSAVE component {} of {} bytes at {}",
                c.index, c.size, c.offset
            ));
        }
        if self.phys_bits < want.phys_bits {
            missing.push(format!(
                "{} physical address bits (it has {})",
                want.phys_bits, self.phys_bits
            ));
        }
        if missing.is_empty() {
            Ok(())
        } else {
            Err(CpuidError::Missing { template, missing })
        }
    }

    /// Vendor string of leaf 0.
    #[must_use]
    pub fn vendor(&self) -> [u8; 12] {
        self.vendor
    }

    /// Vendor as text.
    #[must_use]
    pub fn vendor_name(&self) -> String {
        String::from_utf8_lossy(&self.vendor).into_owned()
    }

    /// Family, model and stepping as in leaf 1 EAX.
    #[must_use]
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// Physical address bits.
    #[must_use]
    pub fn phys_bits(&self) -> u8 {
        self.phys_bits
    }

    /// Names of all features, for a person to read.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.words
            .iter()
            .zip(&TABLE)
            .flat_map(|(w, def)| (0..32).filter(move |b| w & 1 << b != 0).map(|b| def.bit_name(b)))
            .collect()
    }

    pub(super) fn word(&self, index: usize) -> u32 {
        self.words[index]
    }

    pub(super) fn xsave(&self) -> &[XsaveComponent] {
        &self.xsave
    }
}

/// Vendor string: EBX, EDX, ECX of leaf 0.
pub(super) fn vendor(entries: &[kvm_cpuid_entry2]) -> [u8; 12] {
    let mut out = [0; 12];
    if let Some(e) = find(entries, 0, 0) {
        for (chunk, word) in out.chunks_exact_mut(4).zip([e.ebx, e.edx, e.ecx]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }
    out
}

/// Whether leaves follow AMD's manual.
pub(super) fn is_amd(vendor: &[u8; 12]) -> bool {
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
}

/// (family, model, stepping) of a signature, in the order of age within a vendor.
fn model(signature: u32) -> (u32, u32, u32) {
    let base = signature >> 8 & 0xf;
    let family = if base == 0xf {
        base + (signature >> 20 & 0xff)
    } else {
        base
    };
    let model = (signature >> 4 & 0xf) | (signature >> 12 & 0xf0);
    (family, model, signature & 0xf)
}
