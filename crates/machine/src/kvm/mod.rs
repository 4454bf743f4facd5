//! KVM: opening it, one virtual machine on it, and its interrupt routes and dirty tracking.
//!
//! This folder and `memory` are the only places of the crate with `unsafe`: thin wrappers over ioctls that
//! kvm-ioctls does not have, each with its argument in a SAFETY note. Source: Linux `Documentation/virt/kvm/api.rst`.

mod dirty;
pub mod irq;
mod ring;
pub(crate) mod urgent;
mod vm;

pub use dirty::{DirtyMethod, DirtyTracker};
pub use ring::DirtyRing;
pub use vm::KvmVm;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use std::io;

/// KVM cannot be used, or refused a call.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: this host has no hardware virtualization, or it is switched off in the firmware, \
             or the module is not loaded (try: modprobe kvm_intel or kvm_amd)"
    )]
    NoDevice,
    /// `/dev/kvm` may not be opened by this user.
    #[error("/dev/kvm may not be opened: {0}; add this user to the group 'kvm' or run as root")]
    Permission(io::Error),
    /// `/dev/kvm` is there but does not open.
    #[error("/dev/kvm does not open: {0}")]
    Open(io::Error),
    /// An ancient or strange KVM.
    #[error("KVM speaks API version {0}, not 12; a newer Linux kernel is needed")]
    ApiVersion(i32),
    /// A capability that the monitor cannot do without.
    #[error("KVM on this host lacks {0}; Linux 5.10 or newer has it")]
    Capability(&'static str),
    /// More vCPUs than KVM or the monitor can run.
    #[error("{asked} vCPUs are not possible here; use 1 to {max}")]
    Vcpus {
        /// What was asked for.
        asked: u32,
        /// The limit.
        max: u32,
    },
    /// A call failed.
    #[error("KVM: {what}: {source}")]
    Call {
        /// Which call, on what.
        what: String,
        /// What KVM said.
        source: io::Error,
    },
}

impl KvmError {
    pub(crate) fn call(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |e| Self::Call {
            what,
            source: e.into(),
        }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Call { what, source }
    }
}

/// Largest number of vCPUs of a VM.
pub const VCPUS_MAX: u32 = 64;

/// An opened `/dev/kvm` that can run our machine.
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens KVM and checks what the monitor needs of it.
    ///
    /// # Errors
    /// [`KvmError`] says what is missing and what helps.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|e| {
            let e: io::Error = e.into();
            match e.kind() {
                io::ErrorKind::NotFound => KvmError::NoDevice,
                io::ErrorKind::PermissionDenied => KvmError::Permission(e),
                _ => KvmError::Open(e),
            }
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion(version));
        }
        let needed = [
            (Cap::UserMemory, "user memory regions"),
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::Xsave, "XSAVE state"),
            (Cap::Xcrs, "XCR state"),
            (Cap::Debugregs, "debug register state"),
            (Cap::VcpuEvents, "vCPU event state"),
            (Cap::AdjustClock, "clock adjustment"),
            (Cap::PitState2, "PIT state"),
            (Cap::MpState, "multiprocessor state"),
            (Cap::SetTssAddr, "a TSS address"),
            (Cap::SignalMsi, "MSI"),
        ];
        for (cap, name) in needed {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Capability(name));
            }
        }
        Ok(Self { kvm })
    }

    /// The CPUID leaves that KVM can give a guest on this host.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn supported_cpuid(&self) -> Result<kvm_bindings::CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("get supported CPUID"))
    }

    /// The most vCPUs that one VM can have here.
    #[must_use]
    pub fn vcpus_max(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus())
            .unwrap_or(u32::MAX)
            .min(VCPUS_MAX)
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

/// Stores a byte of a `kvm_run` page that a vCPU thread and KVM read at the same time.
pub(crate) fn store_shared_byte(at: &std::sync::atomic::AtomicPtr<u8>, value: u8) {
    use std::sync::atomic::{AtomicU8, Ordering};
    // SAFETY: the pointer was taken from a live `kvm_run` mapping whose vCPU descriptor is kept by the same owner as
    // the pointer; a byte store cannot tear.
    unsafe { AtomicU8::from_ptr(at.load(Ordering::Relaxed)) }.store(value, Ordering::Release);
}

/// Sets the extended state of a vCPU.
pub(crate) fn set_xsave(
    vcpu: &kvm_ioctls::VcpuFd,
    xsave: &kvm_bindings::kvm_xsave,
) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only for a guest with dynamic features (AMX), for which
    // the process must ask permission (arch_prctl); this monitor never does.
    unsafe { vcpu.set_xsave(xsave) }
}
