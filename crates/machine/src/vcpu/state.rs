//! State of one vCPU: what is saved, and the order in which it must be given back.
//!
//! The order is measured, not folklore (FACTS; api.rst): CPUID first of all; `mp_state`, segment and general registers;
//! FPU and extended state; the local APIC before the MSRs, since the deadline timer's MSR is refused without an APIC
//! in deadline mode; the TSC before the deadline, which goes last; events at the end.

use crate::state::{StateError, StateKind, StateRecord};
use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

const STATE_VERSION: u16 = 1;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// History: 1, the first.
#[derive(Serialize, Deserialize)]
struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

/// MSRs out of `indices` that this vCPU can read. KVM stops at the first that it cannot: that one is dropped.
pub fn readable_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u32>, StateError> {
    let mut wanted = indices.to_vec();
    loop {
        let mut msrs = to_msrs(wanted.iter().map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        }))?;
        let got = vcpu.get_msrs(&mut msrs).map_err(StateError::kvm("get MSRs"))?;
        if got >= wanted.len() {
            return Ok(wanted);
        }
        wanted.remove(got);
    }
}

fn to_msrs(entries: impl Iterator<Item = kvm_msr_entry>) -> Result<Msrs, StateError> {
    let entries: Vec<_> = entries.take(KVM_MAX_MSR_ENTRIES).collect();
    Msrs::from_entries(&entries).map_err(|e| StateError::Refused(format!("MSR list: {e:?}")))
}

/// Takes the state. The vCPU is parked, with no exit pending.
///
/// # Errors
/// [`StateError::Kvm`] names the call.
pub fn save(vcpu: &VcpuFd, index: u32, msr_indices: &[u32]) -> Result<StateRecord, StateError> {
    // mp_state first: reading it lets KVM settle pending APIC events into the rest.
    let mp_state = vcpu.get_mp_state().map_err(StateError::kvm("get mp_state"))?;
    let mut msrs = to_msrs(msr_indices.iter().map(|&index| kvm_msr_entry {
        index,
        ..Default::default()
    }))?;
    let state = VcpuState {
        mp_state,
        regs: vcpu.get_regs().map_err(StateError::kvm("get registers"))?,
        sregs: vcpu
            .get_sregs()
            .map_err(StateError::kvm("get segment registers"))?,
        xsave: vcpu.get_xsave().map_err(StateError::kvm("get XSAVE state"))?,
        xcrs: vcpu.get_xcrs().map_err(StateError::kvm("get XCRs"))?,
        debug: vcpu
            .get_debug_regs()
            .map_err(StateError::kvm("get debug registers"))?,
        lapic: vcpu.get_lapic().map_err(StateError::kvm("get local APIC"))?,
        msrs: {
            let got = vcpu.get_msrs(&mut msrs).map_err(StateError::kvm("get MSRs"))?;
            if got != msr_indices.len() {
                let at = msr_indices.get(got).copied().unwrap_or_default();
                return Err(StateError::Refused(format!(
                    "vCPU {index}: MSR {at:#x} cannot be read any more"
                )));
            }
            msrs.as_slice().to_vec()
        },
        events: vcpu
            .get_vcpu_events()
            .map_err(StateError::kvm("get vCPU events"))?,
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
    };
    StateRecord::encode(StateKind::Vcpu, index as u16, STATE_VERSION, &state)
}

/// Gives a fresh vCPU (CPUID already set) its state.
///
/// # Errors
/// [`StateError`]; the vCPU must not run then.
pub fn restore(vcpu: &VcpuFd, record: &StateRecord) -> Result<(), StateError> {
    let s: VcpuState = record.decode(STATE_VERSION)?;
    if s.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|now| now != s.tsc_khz) {
        // Without TSC scaling KVM refuses; then guest time would run at another speed, so the restore must not go on.
        vcpu.set_tsc_khz(s.tsc_khz)
            .map_err(StateError::kvm(format!("set the TSC to {} kHz", s.tsc_khz)))?;
    }
    vcpu.set_mp_state(s.mp_state)
        .map_err(StateError::kvm("set mp_state"))?;
    vcpu.set_sregs(&s.sregs)
        .map_err(StateError::kvm("set segment registers"))?;
    vcpu.set_regs(&s.regs).map_err(StateError::kvm("set registers"))?;
    vcpu.set_xcrs(&s.xcrs).map_err(StateError::kvm("set XCRs"))?;
    crate::kvm::set_xsave(vcpu, &s.xsave).map_err(StateError::kvm("set XSAVE state"))?;
    vcpu.set_debug_regs(&s.debug)
        .map_err(StateError::kvm("set debug registers"))?;
    vcpu.set_lapic(&s.lapic)
        .map_err(StateError::kvm("set local APIC"))?;
    set_msrs(vcpu, &s.msrs)?;
    vcpu.set_vcpu_events(&s.events)
        .map_err(StateError::kvm("set vCPU events"))?;
    // EINVAL without an active kvmclock: then there is nothing to tell the guest.
    let _ = vcpu.kvmclock_ctrl();
    Ok(())
}

/// Sets MSRs in an order that KVM takes; one that it refuses but that has the value already is no loss.
///
/// # Errors
/// [`StateError`] names the MSR.
pub fn set_msrs(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), StateError> {
    let rank = |e: &kvm_msr_entry| match e.index {
        MSR_IA32_TSC => 0,
        MSR_IA32_TSC_DEADLINE => 2,
        _ => 1,
    };
    let mut ordered = saved.to_vec();
    ordered.sort_by_key(rank);
    let mut from = 0;
    while from < ordered.len() {
        let msrs = to_msrs(ordered[from..].iter().copied())?;
        let set = vcpu.set_msrs(&msrs).map_err(StateError::kvm("set MSRs"))?;
        from += set;
        let Some(refused) = ordered.get(from) else { break };
        if set == msrs.as_slice().len() {
            continue;
        }
        // KVM stops at an MSR that it will not set. One that already has the value (read-only identification,
        // or a feature that both sides lack) is no loss; any other would change the guest.
        let mut now = to_msrs(std::iter::once(kvm_msr_entry {
            index: refused.index,
            ..Default::default()
        }))?;
        let same = vcpu
            .get_msrs(&mut now)
            .is_ok_and(|n| n == 1 && now.as_slice()[0].data == refused.data);
        if !same {
            return Err(StateError::Refused(format!(
                "this host refuses MSR {:#x} = {:#x} of the saved guest; restore it on a host with the same CPU baseline",
                refused.index, refused.data
            )));
        }
        from += 1;
    }
    Ok(())
}

/// Sets CPUID; before anything else of the vCPU.
///
/// # Errors
/// [`StateError::Kvm`].
pub fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), StateError> {
    let cpuid = CpuId::from_entries(entries).map_err(|e| StateError::Refused(format!("CPUID: {e:?}")))?;
    vcpu.set_cpuid2(&cpuid).map_err(StateError::kvm("set CPUID"))
}
