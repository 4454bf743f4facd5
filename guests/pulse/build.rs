//! Builds the guest: runs the same rustc as the workspace on `guest/main.rs`, as a bare static ELF.
//!
//! The guest may not use SSE (a KVM that emulates instructions does not know it), and there is no prebuilt `core` for a
//! bare target, so the host's `core` is used with SSE switched off for our own code. rustc warns that this changes
//! how floats are passed; the guest has none. The result is searched for xmm registers by a test.

use std::path::PathBuf;
use std::process::Command;
use std::{env, process};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("pulse.elf");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    for path in ["guest", "src/shared.rs", "build.rs"] {
        println!("cargo::rerun-if-changed={}", manifest.join(path).display());
    }
    let mut script = std::ffi::OsString::from("link-arg=-Wl,-T,");
    script.push(manifest.join("guest/link.ld"));
    // Panics name files; those names must not depend on where the workspace lies.
    let mut remap = manifest.clone().into_os_string();
    remap.push("=pulse");
    let result = Command::new(rustc)
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "pulse_guest",
            "--crate-type",
            "bin",
        ])
        .args([
            "--target",
            "x86_64-unknown-linux-gnu",
            "--cap-lints",
            "warn",
            "-A",
            "unused_features",
        ])
        .args([
            "-C",
            "opt-level=2",
            "-C",
            "codegen-units=1",
            "-C",
            "panic=abort",
            "-C",
            "overflow-checks=off",
        ])
        .args([
            "-C",
            "debuginfo=0",
            "-C",
            "strip=debuginfo",
            "-C",
            "relocation-model=static",
        ])
        .args([
            "-C",
            "code-model=small",
            "-C",
            "force-frame-pointers=no",
            "-C",
            "no-redzone=yes",
        ])
        .args(["-C", "target-feature=-sse,-sse2"])
        .args([
            "-C",
            "link-arg=-nostdlib",
            "-C",
            "link-arg=-nostartfiles",
            "-C",
            "link-arg=-static",
        ])
        .args([
            "-C",
            "link-arg=-Wl,--build-id=none,-z,norelro,-z,max-page-size=4096",
        ])
        .arg("-C")
        .arg(script)
        .arg("--remap-path-prefix")
        .arg(remap)
        .arg("-o")
        .arg(&out)
        .arg(manifest.join("guest/main.rs"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .output();
    match result {
        Ok(r) if r.status.success() => {
            // Warnings of our own code matter; the two about SSE and the ABI are the subject of the note above.
            let text = String::from_utf8_lossy(&r.stderr);
            if env::var_os("PULSE_GUEST_WARNINGS").is_some() {
                for line in text.lines() {
                    println!("cargo::warning={line}");
                }
            }
        }
        Ok(r) => {
            eprintln!(
                "building the pulse guest failed:\n{}",
                String::from_utf8_lossy(&r.stderr)
            );
            process::exit(1);
        }
        Err(e) => {
            eprintln!("cannot run rustc to build the pulse guest: {e}");
            process::exit(1);
        }
    }
}
