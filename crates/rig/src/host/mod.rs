//! The rig's side of things: QEMU processes, what is asked of them, and the client.

pub mod client;
pub mod commands;
pub mod disk_faults;
pub mod qemu;
pub mod qmp;
pub mod server;
pub mod spawn;
