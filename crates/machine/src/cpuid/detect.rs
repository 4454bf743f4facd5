//! Whether this host's KVM can run a 64-bit Linux kernel.
//!
//! There are KVMs without hardware virtualization: PVM (module `kvm_pvm`) answers the whole KVM API and runs small
//! flat guests, but emulates an ordinary kernel at a few million instructions a second, without SSE: it would not boot
//! in hours. It shows the same CPUID signature as any KVM, so the loaded module tells them apart.

use super::features::{Reg, find};
use kvm_bindings::CpuId;
use std::path::Path;

/// Why a 64-bit Linux kernel would not run here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WhyNot {
    /// KVM without hardware virtualization.
    #[error(
        "the KVM of this host works without hardware virtualization ({how}) and cannot boot an ordinary 64-bit Linux; use a \
         host with Intel VT-x or AMD-V, switched on in its firmware (in a VM: nested virtualization), with kvm_intel or kvm_amd"
    )]
    NoHardware {
        /// What showed it.
        how: String,
    },
    /// Features that every 64-bit Linux kernel checks for at its start.
    #[error("KVM does not offer guests {}, which 64-bit Linux needs; use another host", .0.join(", "))]
    Features(Vec<&'static str>),
}

/// What of the host the verdict is based on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostView {
    /// `/sys/module/kvm_intel` or `/sys/module/kvm_amd` is there.
    pub hardware_module: bool,
    /// `/sys/module/kvm_pvm` is there.
    pub pvm_module: bool,
    /// `/proc/cpuinfo` shows `vmx` or `svm`; `None` if it cannot be read.
    pub cpu_flag: Option<bool>,
}

impl HostView {
    /// Looks at this host.
    #[must_use]
    pub fn here() -> Self {
        let module = |name: &str| Path::new("/sys/module").join(name).exists();
        let cpu_flag = std::fs::read_to_string("/proc/cpuinfo").ok().map(|text| {
            text.lines()
                .filter(|l| l.starts_with("flags"))
                .any(|l| l.split_whitespace().any(|f| f == "vmx" || f == "svm"))
        });
        Self {
            hardware_module: module("kvm_intel") || module("kvm_amd"),
            pvm_module: module("kvm_pvm"),
            cpu_flag,
        }
    }
}

/// Whether this host's KVM can run a 64-bit Linux kernel. `supported` is `KVM_GET_SUPPORTED_CPUID`.
///
/// # Errors
/// [`WhyNot`] says why, and what to do.
pub fn can_run_linux_64(supported: &CpuId) -> Result<(), WhyNot> {
    linux_64_verdict(supported, HostView::here())
}

/// [`can_run_linux_64`] for a given view of a host.
///
/// # Errors
/// [`WhyNot`].
pub fn linux_64_verdict(supported: &CpuId, host: HostView) -> Result<(), WhyNot> {
    let no_hardware = |how: &str| Err(WhyNot::NoHardware { how: how.into() });
    if !host.hardware_module {
        if host.pvm_module {
            return no_hardware("PVM: the module kvm_pvm is loaded, kvm_intel and kvm_amd are not");
        }
        // Where /sys cannot be seen (a container), the CPU's own flag decides; if that is hidden too, let it try.
        if host.cpu_flag == Some(false) {
            return no_hardware(
                "neither kvm_intel nor kvm_amd is loaded, and the CPU shows neither vmx nor svm",
            );
        }
    }
    let missing: Vec<&'static str> = REQUIRED
        .iter()
        .filter(|(leaf, reg, bit, _)| {
            let word = find(supported.as_slice(), *leaf, 0).map_or(0, |e| match reg {
                Reg::Eax => e.eax,
                Reg::Ebx => e.ebx,
                Reg::Ecx => e.ecx,
                Reg::Edx => e.edx,
            });
            word & 1 << bit == 0
        })
        .map(|(.., name)| *name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(WhyNot::Features(missing))
    }
}

/// What `verify_cpu` of Linux (arch/x86/include/asm/required-features.h) asks of a 64-bit CPU.
const REQUIRED: [(u32, Reg, u32, &str); 12] = [
    (1, Reg::Edx, 0, "fpu"),
    (1, Reg::Edx, 3, "pse"),
    (1, Reg::Edx, 5, "msr"),
    (1, Reg::Edx, 6, "pae"),
    (1, Reg::Edx, 8, "cx8"),
    (1, Reg::Edx, 13, "pge"),
    (1, Reg::Edx, 15, "cmov"),
    (1, Reg::Edx, 24, "fxsr"),
    (1, Reg::Edx, 25, "sse"),
    (1, Reg::Edx, 26, "sse2"),
    (0x8000_0001, Reg::Edx, 11, "syscall"),
    (0x8000_0001, Reg::Edx, 29, "lm"),
];
