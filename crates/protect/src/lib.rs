//! The engine that protects a running VM: capture, epoch protocol, links, hold and release, takeover.
//!
//! ```text
//! codec   messages <-> bytes            engine   the loop: inputs -> Replica -> actions
//! store   the arbiter's record          primary  cut, copy, release     standby  stage, apply, promote
//! peer    a link and its streams        run      the process around it
//! ```
//! What it does not do yet is refused with a clear error, never pretended (I8): writable disks are not replicated by
//! this engine, so a VM that has one cannot be protected.

pub mod codec;
pub mod config;
mod engine;
mod input;
mod peer;
mod primary;
pub mod run;
mod standby;
pub mod store;

pub use config::{PeerSpec, ProtectSpec, TlsSpec};
pub use run::run;
