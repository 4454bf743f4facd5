//! Fuzzing: what a guest, an image or a peer can feed the monitor must never crash or hang it (I9).
//!
//! - [`targets`]: the list of targets, each a plain function over bytes with seeds and a dictionary.
//! - [`mutate`]: makes new inputs of old ones, by a seeded generator.
//! - [`worker`]: the process that runs inputs: catches panics, ends itself when one input takes too long.
//! - [`supervisor`]: starts the worker, and keeps the input when it died of anything else (abort, stack, memory).
//!
//! The program `steadfast-fuzz` needs no nightly compiler: it has no coverage feedback, but seeds that already reach
//! deep. Coverage-guided runs of the same targets are in the `fuzz/` folder (see `docs/testing.md`).

pub mod mutate;
pub mod supervisor;
pub mod targets;
pub mod worker;

/// Longest input that the runner makes.
pub const INPUT_BYTES_MAX: usize = 1 << 20;
