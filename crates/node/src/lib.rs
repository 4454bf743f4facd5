//! The daemon of a host: `steadfast node`.
//!
//! ```text
//!            api   <-- command line (unix socket), other hosts (TLS with the pool's certificates)
//!             |
//!   store <--+--> leader   on the elected host: pool -> observe -> cluster::decide -> actions
//!             |      |
//!             |      v  (the API of each host)
//!             +--> agent   on every host: report and lease, instances as the store wants them
//!                    |
//!                    v
//!   steadfast vmm (one process a VM)     steadfast guard (ends `restart` VMs without a lease)     etcd
//! ```
//! The three below outlive the daemon: it can be restarted and upgraded while VMs go on. What the daemon knows is in the store or
//! with those processes; it keeps nothing of its own but `node.json` and the certificates.
//!
//! Invariants here: I2 (a `restart` VM is started only under the next term, once the old host is fenced by its lease), I8 (status is
//! computed from what holds now), I9 (requests are bounded), I10 (actions are idempotent; a round carries on what a dead daemon
//! began).

mod agent;
pub mod api;
pub mod binary;
pub mod certs;
pub mod config;
mod daemon;
pub mod drill;
mod engine;
mod error;
mod etcd;
pub mod fence;
mod guard;
pub mod health;
mod heard;
pub mod http;
mod instances;
pub mod journal;
mod leader;
pub mod limits;
mod loads;
mod measure;
mod migrate;
mod node;
mod observe;
pub mod paths;
pub mod pki;
mod pool;
mod precedence;
mod predict;
mod procs;
pub mod records;
mod relocate;
mod seat;
pub mod setup;
pub mod tls;
mod upgrade;
mod watch;
pub mod watchdog;
mod words;

pub use config::Folders;
pub use daemon::{Ended, run};
pub use error::{NodeError, Result};
pub use guard::run as run_guard;
pub use precedence::take as take_precedence;
pub use steadfast_cluster::model;
pub use steadfast_store::TlsFiles;
