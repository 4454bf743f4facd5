//! A data centre in a box: simulated servers, switches, disks, and the axe.
//!
//! Each server is a QEMU machine (software emulation, so no KVM is needed here) that runs Debian's cloud kernel with kvm-amd: it has
//! a real `/dev/kvm` on which Linux guests boot under our own monitor. Servers are joined by two replication switches and one
//! client switch, all ours; the code that runs the rig is itself a client on the client switch.
//!
//! ```no_run
//! # fn main() -> steadfast_rig::Result<()> {
//! use steadfast_rig::Rig;
//! let rig = Rig::builder().servers(3).memory_mib(1024).start()?;
//! let kernel = rig.server(0).exec("uname -r")?;
//! rig.switch("repl0")?.partition("s1", "s2")?;
//! rig.server(1).kill()?;
//! rig.server(1).start()?;
//! # let _ = kernel; Ok(())
//! # } // dropping the rig ends every process and removes its files
//! ```
//! Invariants: no process, namespace or device of a rig outlives the process that started it, however that ends; nothing
//! leaves this machine; every wait has a bound.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod artifacts;
pub mod error;
pub mod etcd;
pub mod failover;
pub mod faults;
pub mod host;
pub mod inside;
pub mod link;
pub mod load;
pub mod netif;
pub mod pool;
pub mod protected;
pub mod rig;
pub mod switch;
pub mod tools;
pub mod vm;

pub use error::{Result, RigError};
pub use host::client::{Client, Pinger};
pub use host::commands::Output;
pub use host::disk_faults::DiskFault;
pub use host::qemu::DiskCache;
pub use host::server::Server;
pub use link::messages::{Exec, Outcome};
pub use rig::{CLIENT_ADDRESS, NICS, Rig, RigBuilder};
pub use switch::{Counters, Fault, Switch};
pub use vm::{Counter, Counting, Mini, Vm};
