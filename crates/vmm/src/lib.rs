//! The process that holds one VM: its specification, its machine, its control socket.
//!
//! `steadfast vmm` is one process per VM instance. It takes a [`spec::VmSpec`], puts a machine together
//! ([`assemble`]), boots or restores it, and then does what the guest and the control socket ask ([`process`]).

pub mod assemble;
pub mod control;
pub mod guest_care;
mod happened;
pub mod isolation;
pub mod last_words;
pub mod process;
pub mod resident;
pub mod resources;
pub mod spec;

pub use assemble::{AssembleError, Surroundings, Vm, assemble, assemble_from};
pub use spec::VmSpec;
