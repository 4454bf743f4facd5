//! Services of the mini guest on its vsock device.

use super::Guest;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Serves a port, one connection at a time, for ever. A machine without vsock has none.
pub fn serve(guest: &Guest, port: u32, serve: fn(&Guest, File) -> io::Result<()>) {
    let run = || -> io::Result<()> {
        let Some(listener) = listen(port)? else {
            return Ok(());
        };
        loop {
            // The peer's leaving is no fault.
            let _ = serve(guest, accept(&listener)?);
        }
    };
    if let Err(e) = run() {
        guest.fault(format!("TROUBLE vsock port {port}: {e}"));
    }
}

fn listen(port: u32) -> io::Result<Option<File>> {
    // SAFETY: plain numbers; the descriptor is checked and owned by the File alone. `address` is a whole
    // `struct sockaddr_vm` with its length, valid for the call.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Ok(None);
        }
        let listener = File::from_raw_fd(fd);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as u16;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let length = size_of::<libc::sockaddr_vm>() as u32;
        if libc::bind(fd, (&raw const address).cast(), length) < 0 || libc::listen(fd, 4) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(listener))
    }
}

fn accept(listener: &File) -> io::Result<File> {
    let fd = listener.as_raw_fd();
    // SAFETY: an open listening descriptor; the peer's address is not asked for; the result is owned here alone.
    unsafe {
        let fd = libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC);
        match fd < 0 {
            true => Err(io::Error::last_os_error()),
            false => Ok(File::from_raw_fd(fd)),
        }
    }
}
