//! The lock on an image file: one writer, or any number of readers.
//!
//! Open file description locks (fcntl(2), `F_OFD_SETLK`): they belong to the opened file, not to the process, go
//! with a passed file descriptor, and vanish when the last copy is closed, also on SIGKILL. QEMU locks single bytes
//! of the same kind, so an image that QEMU has open for writing and one that we have open for writing exclude each
//! other too. They are advisory, and local to a host: who may write a shared image across hosts is the business of
//! terms (I2), not of this lock.

use crate::error::DiskError;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// What to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// With other readers.
    Shared,
    /// Alone.
    Exclusive,
    /// Nothing.
    None,
}

/// Takes, changes or drops the lock, without waiting.
pub(crate) fn set(file: &File, mode: Mode, path: &Path) -> Result<(), DiskError> {
    let kind = match mode {
        Mode::Shared => libc::F_RDLCK,
        Mode::Exclusive => libc::F_WRLCK,
        Mode::None => libc::F_UNLCK,
    };
    let request = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // Zero: to the end of the file, wherever that will be.
        l_len: 0,
        // Must be zero for OFD locks.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the whole call (borrowed from `file`), and F_OFD_SETLK only reads the
    // `flock` that the pointer names, which lives on this frame.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if rc == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(DiskError::InUse {
            path: path.to_owned(),
            read_only: mode == Mode::Shared,
        }),
        // A file system without locks (some network ones): the caller is told, not stopped.
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            tracing::warn!(image = %path.display(), "file system has no locks: nothing stops a second VM from using this image");
            Ok(())
        }
        _ => Err(DiskError::File {
            what: "cannot lock",
            path: path.to_owned(),
            source,
        }),
    }
}
