//! The engine that protects a running VM: capture, epoch protocol, links, hold and release, takeover.
//!
//! ```text
//! codec   messages <-> bytes            engine   the loop: inputs -> Replica -> actions
//! store   the arbiter's record          primary  cut, copy, release     standby  stage, apply, promote
//! peer    a link and its streams        run      the process around it
//! disks   volumes of writable disks     block    what their devices stand on    timeline   when what happened
//! ```
//! What it does not do yet is refused with a clear error, never pretended (I8): writable disks are replicated if they are
//! raw image files; others, and writable disks without held outputs, cannot be protected.

mod block;
pub mod codec;
pub mod config;
mod disks;
mod engine;
mod input;
mod peer;
mod primary;
pub mod run;
mod standby;
pub mod store;
mod timeline;

pub use config::{PeerSpec, ProtectSpec, TlsSpec};
pub use run::run;
pub use steadfast_store::{EtcdSpec, StoreSpec};

/// Gives the calling thread precedence over vCPUs, so that a busy guest cannot delay its own protection. Where the host
/// does not allow it, it is said once and the VM is protected all the same, at the mercy of the scheduler.
pub(crate) fn raise_priority(who: &str) {
    const NICE: i32 = -15;
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::warn!(%error, "{who} cannot be given precedence over vCPUs; allow CAP_SYS_NICE for this process");
    }
}
