//! Random numbers for identities.

use std::fs::File;
use std::io::{self, Read};

/// A random number from the kernel.
///
/// # Errors
/// What the kernel said.
pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
