//! `pulse`: a tiny bare-metal guest for KVM tests and benchmarks, and what a host needs to run, question and check it.
//!
//! - [`elf`]: the image, built by `build.rs` from `guest/`.
//! - [`FlatBoot`]: what a monitor must put into memory and registers (the boot contract of the README).
//! - [`Config`]: the command line.
//! - [`shared`]: packets, shared pages, blocks on disk: the one source file that guest and host share.
//! - [`invariants_hold`]: checks a frozen guest's memory from outside.
//! - [`client`]: a user-space network peer (ARP, UDP, TCP over raw frames) that asks the guest.
//!
//! Invariant of all of it: at whatever instruction the guest is frozen, memory, replies and disk agree as [`check`] says.

pub mod boot;
pub mod check;
pub mod client;
pub mod config;
pub mod frames;
pub mod shared;

pub use boot::{BootError, FlatBoot};
pub use check::{Summary, invariants_hold, invariants_hold_with};
pub use config::{Config, Content, DiskMode, DiskOp, Loop};
pub use shared::{DiskRecord, Reply, Request, kind, status};

/// The guest's ELF image (x86-64, static, linked at 1 MiB).
pub fn elf() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/pulse.elf"))
}
