//! Numbers that tell instances apart. Not secret: security comes from TLS.

use std::hash::{BuildHasher, RandomState};

/// A number that another process, or another call, does not get; never 0.
pub fn nonce() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // `RandomState` is seeded by the operating system for each process and differs for each call.
    RandomState::new()
        .hash_one((std::process::id(), since.map_or(0, |d| d.as_nanos())))
        .max(1)
}
