//! Seeded simulation of the epoch protocol over a fake world.
//!
//! One seed is one run: hosts with drifting clocks, disks that lose unsynced writes, links that lose, delay, double,
//! reorder and damage, a store that can be cut off, slow, lost and restored from an old snapshot, a guest whose every
//! state is known, and clients who remember everything they were told. First faults, limited to what must be survived;
//! then the world heals and the VM must serve and be protected again. See `docs/testing` rows in `docs/invariants.md`.
//!
//! - `run::run(seed, Sabotage::None, false)` runs a seed; `SIM_SEED=n` with the test or `--seed n` with the binary
//!   replays one with a trace.
//! - Each checker in `invariants/` is proven by a deliberately broken variant of the protocol (`tests/sabotage.rs`).

pub mod batch;
pub mod disk;
pub mod faults;
pub mod guest;
pub mod invariants;
mod manager;
mod node;
pub mod rng;
pub mod run;
pub mod store;
pub mod world;

pub use faults::{Coverage, Kind, Profile, Step};
pub use run::{Report, run};
