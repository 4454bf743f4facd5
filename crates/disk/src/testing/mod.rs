//! A disk in memory that fails on demand, for tests and for the simulation. Not part of the product, but for
//! [`LiveFaults`], which a running process obeys if its specification names a file of rules.
//!
//! Model: a write goes to a cache; a sync makes what was written before durable; cutting the power loses every write
//! that was not synced, or keeps it, or keeps a random subset of its 512-byte sectors, each decided by the seed. It can
//! also fail the n-th operation with EIO (once or for good), flip bits, send a write to the wrong place, and be full.
//! Everything is decided by the seed and the order of operations.

mod fault;
mod live;
pub mod rng;

pub use fault::{Fault, FaultStorage, Kind};
pub use live::LiveFaults;
