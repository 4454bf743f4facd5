//! The mini guest's service: programs of a real Linux on a disk, run in a root of their own.
//!
//! `mini.root=vda`: the ext4 file system on this disk is mounted at `/service` and its program `/start` runs there, as in a
//! container, with the guest's own network. See [`crate::artifacts::service`] for such a disk.

use super::Guest;
use crate::inside::sys;
use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

const ROOT: &str = "/service";
/// The program that runs, within the root.
pub const START: &str = "/start";

/// Runs the service of this disk until it ends, which is a fault.
pub fn run(guest: &Guest, disk: &str) {
    let why = match start(disk) {
        Ok(status) => format!("it ended: {status}"),
        Err(e) => e.to_string(),
    };
    if !guest.ending.load(Ordering::Acquire) {
        guest.fault(format!("TROUBLE service on {disk}: {why}"));
    }
}

fn start(disk: &str) -> io::Result<std::process::ExitStatus> {
    let device = format!("/dev/{}", disk.trim_start_matches("/dev/"));
    // Tables of free inodes are written when they are first used, not by a kernel thread that never rests in a short test.
    sys::mount(&device, ROOT, "ext4", libc::MS_NOATIME, "noinit_itable")?;
    sys::mount("devtmpfs", &format!("{ROOT}/dev"), "devtmpfs", 0, "")?;
    sys::mount("proc", &format!("{ROOT}/proc"), "proc", 0, "")?;
    let root = CString::new(ROOT)?;
    let mut command = Command::new(START);
    command
        .env_clear()
        .env("PATH", "/bin:/usr/bin")
        .stdin(Stdio::null())
        .current_dir(ROOT);
    // SAFETY: chroot is async-signal-safe; the string was made before the fork and lives in the closure. The working
    // directory is inside the new root already.
    unsafe {
        command.pre_exec(move || {
            if libc::chroot(root.as_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn()?.wait()
}
