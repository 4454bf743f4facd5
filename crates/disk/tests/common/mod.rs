//! Helpers of the disk tests.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

/// Whether the program is there; says so loudly if not.
pub fn have(program: &str, test: &str) -> bool {
    let found = ["", "/usr/sbin/", "/sbin/"].iter().any(|dir| {
        Command::new(format!("{dir}{program}"))
            .arg("--version")
            .output()
            .is_ok()
            || Command::new(format!("{dir}{program}")).arg("-V").output().is_ok()
    });
    if !found {
        println!("SKIPPED: {test}: {program} is not installed");
        eprintln!("SKIPPED: {test}: {program} is not installed");
    }
    found
}

/// Runs a program and asserts that it succeeded.
pub fn run(program: &str, args: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out = Command::new(program)
        .args(args)
        .env("PATH", path)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// `len` bytes that depend on `seed`, compressible by half.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
        out.extend_from_slice(b"steadfas");
    }
    out.truncate(len);
    out
}

pub fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}
