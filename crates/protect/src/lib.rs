//! The engine that protects a running VM: capture, epoch protocol, links, hold and release, takeover.
//!
//! ```text
//! codec   messages <-> bytes            engine   the loop: inputs -> Replica -> actions
//! store   the arbiter's record          primary  cut, copy, release     standby  stage, apply, promote
//! peer    a link and its streams        run      the process around it
//! disks   volumes of writable disks     block    what their devices stand on    timeline   when what happened
//! shared, shared_block, shared_mark, handing   disks that all hosts reach: passed through, let go and taken in a handover
//! copy_out  what a standby holds, as a saved VM, for a drill
//! cpu     the guest's CPU, and hosts that cannot show it      counters   numbers for the status
//! ask, aside   blocks of other hosts' replicas      disk_care, disk_engine, scrubber   faults, repair, pace of copies
//! ```
//! What it does not do yet is refused with a clear error, never pretended (I8): writable disks are replicated if they are
//! images or block devices of each host; a VM with disks that all hosts reach can be moved, not protected; writable disks without held outputs
//! cannot be protected.

mod applying;
mod aside;
mod ask;
mod audit;
mod block;
pub mod codec;
pub mod config;
pub mod copy_out;
mod counters;
mod cpu;
mod crowd;
mod disk_care;
mod disk_engine;
mod disks;
mod engine;
mod extent;
pub mod failpoint;
mod former;
mod handing;
mod input;
mod life;
mod outgoing;
mod pace;
mod peer;
mod primary;
mod priority;
mod requests;
pub mod run;
mod samples;
mod scrubber;
mod shared;
mod shared_block;
mod shared_mark;
mod standby;
pub mod store;
pub mod taking;
mod throttle;
mod timeline;

pub use config::{Mapped, PeerSpec, ProtectSpec, TakeOver, TlsSpec};
pub use run::run;
pub use steadfast_disk::volume::is_laid_out;
pub use steadfast_store::{EtcdSpec, StoreSpec};
pub use steadfast_wire::frame::{VERSION_MAX as WIRE_MAX, VERSION_MIN as WIRE_MIN};
