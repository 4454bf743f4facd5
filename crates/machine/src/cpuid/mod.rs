//! CPUID: what a vCPU tells its guest about itself.
//!
//! Three kinds of [`Template`]:
//! - `host`: what KVM supports here, without what cannot be saved and restored;
//! - named baselines (`x86-64-v2`, `x86-64-v3`): built from constants, so every host gives identical bytes;
//! - a pool's own baseline: the [`CpuFeatures`] that all its hosts share.
//!
//! Rules, for all of them: one package, one thread per core, the APIC id is the vCPU's index. No nested
//! virtualization, no performance counters, no shadow stacks, no AMX (KVM gives no complete way to save them, or
//! they need a permission per process). Of KVM's paravirtual features: clock, EOI, unhalt and IPI; no asynchronous page
//! faults and no steal time, whose shared pages the host kernel writes at any time.
//!
//! A baseline holds on every host of one CPU vendor. Two vendors never share one: guests patch themselves by vendor.
//!
//! Specifications: Intel SDM volume 2 (CPUID), AMD APM volume 3 appendix E, Linux Documentation/virt/kvm/x86/cpuid.rst,
//! x86-64 psABI (micro-architecture levels).

mod baseline;
mod detect;
mod features;
mod guest;
mod host;
mod topology;

pub use detect::{HostView, WhyNot, can_run_linux_64, linux_64_verdict};
pub use features::{CpuFeatures, WORDS, XsaveComponent};
pub use guest::GuestCpu;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Most vCPUs of a machine.
pub use crate::boot::acpi::CPUS_MAX;

/// Names that [`Template::from_str`] knows.
pub const TEMPLATE_NAMES: [&str; 3] = ["host", "x86-64-v2", "x86-64-v3"];

/// Which CPU the guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Template {
    /// All that this host and KVM offer and that can be saved. The VM can move to equal hosts only.
    #[default]
    Host,
    /// SSE4.2, POPCNT, CX16: Intel since 2008, AMD since 2011.
    V2,
    /// AVX2, BMI, FMA, and AES: Intel since 2013, AMD since 2017.
    V3,
    /// What the hosts of a pool share.
    Pool(Box<CpuFeatures>),
}

impl Template {
    /// The name, as for the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::Pool(_) => "pool",
        }
    }
}

impl FromStr for Template {
    type Err = CpuidError;

    fn from_str(name: &str) -> Result<Self, CpuidError> {
        match name {
            "host" => Ok(Self::Host),
            "x86-64-v2" => Ok(Self::V2),
            "x86-64-v3" => Ok(Self::V3),
            _ => Err(CpuidError::Unknown { name: name.into() }),
        }
    }
}

/// What of KVM's abilities `KVM_GET_SUPPORTED_CPUID` does not tell, and what of the VM's clock CPUID shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmCaps {
    /// `KVM_CAP_TSC_DEADLINE_TIMER`. A baseline needs it.
    pub tsc_deadline: bool,
    /// Show the TSC as invariant: only for a VM whose hosts can all scale to its frequency.
    pub invariant_tsc: bool,
    /// Frequency of the VM's TSC, for leaf 4000_0010h. It belongs to the VM, not to the host it is on.
    pub tsc_khz: Option<u32>,
}

/// A CPU that cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// No template of that name.
    #[error("no CPU template {name:?}; known are {}", TEMPLATE_NAMES.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The host lacks features of a baseline.
    #[error(
        "this host cannot provide the CPU {template}: it lacks {}; choose a lower baseline, or place the VM elsewhere",
        missing.join(", ")
    )]
    Missing {
        /// Name of the template.
        template: &'static str,
        /// Names of the missing features.
        missing: Vec<String>,
    },
    /// A pool with CPUs of several vendors, or a baseline of another vendor than the host's.
    #[error("a VM cannot move between CPUs of {0} and {1}; make one pool for each vendor")]
    Vendors(String, String),
    /// A vCPU number that is not possible.
    #[error("vCPU {vcpu} of {ncpus} is not possible; a VM has 1 to {CPUS_MAX} vCPUs")]
    Vcpu {
        /// Index of the vCPU.
        vcpu: u32,
        /// Number of vCPUs.
        ncpus: u32,
    },
    /// More leaves than KVM takes.
    #[error("{0} CPUID leaves are more than KVM takes")]
    Leaves(usize),
}

/// CPUID of one vCPU, for `KVM_SET_CPUID2`. `supported` is `KVM_GET_SUPPORTED_CPUID` of this host. The result
/// depends on nothing else; for a baseline not even on `supported`, beyond the vendor and the check that the host has
/// it all.
///
/// # Errors
/// [`CpuidError`] names the features that are missing.
pub fn build(
    supported: &CpuId,
    template: &Template,
    vcpu: u32,
    ncpus: u32,
    caps: &KvmCaps,
) -> Result<CpuId, CpuidError> {
    if ncpus == 0 || ncpus > CPUS_MAX || vcpu >= ncpus {
        return Err(CpuidError::Vcpu { vcpu, ncpus });
    }
    let place = topology::Place { vcpu, ncpus };
    let leaves = match template {
        Template::Host => host::leaves(supported.as_slice(), place, caps),
        baseline => {
            let have = CpuFeatures::of(supported, caps);
            let want = match baseline {
                Template::V2 => baseline::v2(have.vendor()),
                Template::V3 => baseline::v3(have.vendor()),
                Template::Pool(features) => (**features).clone().normalised(),
                Template::Host => have.clone(),
            };
            have.check_provides(&want, baseline.name())?;
            baseline::leaves(&want, baseline.name(), place, caps)
        }
    };
    let count = leaves.len();
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::Leaves(count))
}

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the leaf has subleaves.
const HAS_INDEX: u32 = 1;

/// One leaf without subleaves.
fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    }
}

/// One subleaf.
fn subleaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        index,
        flags: HAS_INDEX,
        ..leaf(function, registers)
    }
}

/// The leaves in which KVM shows itself: signature, paravirtual features, TSC frequency.
fn kvm_leaves(features: u32, caps: &KvmCaps) -> Vec<kvm_cpuid_entry2> {
    const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d]; // "KVMKVMKVM\0\0\0"
    const APIC_BUS_KHZ: u32 = 1_000_000; // KVM's local APIC timer runs at 1 GHz
    let last = if caps.tsc_khz.is_some() {
        0x4000_0010
    } else {
        0x4000_0001
    };
    let mut leaves = vec![
        leaf(0x4000_0000, [last, SIGNATURE[0], SIGNATURE[1], SIGNATURE[2]]),
        leaf(0x4000_0001, [features, 0, 0, 0]),
    ];
    if let Some(khz) = caps.tsc_khz {
        leaves.push(leaf(0x4000_0010, [khz, APIC_BUS_KHZ, 0, 0]));
    }
    leaves
}

#[cfg(test)]
mod tests;
