//! The KVM virtual machine monitor: vCPUs, memory, devices, boot, quiesce, state.
//!
//! Data flows through the folders: `boot` fills `memory`, `vcpu` threads run on `kvm` and reach `devices` over
//! the buses, `quiesce` stops all of it at one instant, `state` carries it to another process.
//!
//! Invariants of this crate: nothing a guest does may panic or hang the monitor (I9); a machine restores from
//! exactly the state that was saved, or not at all (I3); between `quiesce` and resume nothing changes guest
//! memory or device state.

pub mod boot;
pub mod cpuid;
pub mod devices;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod quiesce;
pub mod state;
pub mod vcpu;
