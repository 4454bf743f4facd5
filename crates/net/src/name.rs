//! The path of a unix socket that a VM's process serves, and that another process of the same VM can take over.
//!
//! ```text
//! bind -> in its place --release()--> set aside --take_back(), take()--> in its place
//! bind_aside ------------------------> set aside
//! ```
//! A socket that is set aside keeps its descriptor and its queue, under a path that nobody else knows; only its name is
//! given up. Invariant: a name that another living process serves is never removed, and never taken but by [`SocketName::take`], whose
//! caller knows that this process has left it.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Which kind of socket a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// Frames.
    Datagram,
    /// Connections.
    Stream,
}

/// A bound socket's path; removed on drop, which comes before the socket is closed.
#[derive(Debug)]
pub struct SocketName {
    path: PathBuf,
    kind: SocketKind,
    /// Where the socket is while its name is given up.
    aside: Mutex<Option<PathBuf>>,
}

impl SocketName {
    /// Calls `bind` for `path`, after a path left behind by a dead process has been removed.
    ///
    /// # Errors
    /// What `bind` said; `AddrInUse` while a living process serves the path.
    pub fn bind<S>(
        path: &Path,
        kind: SocketKind,
        bind: impl Fn(&Path) -> io::Result<S>,
    ) -> io::Result<(Self, S)> {
        let socket = match bind(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_stale(path, kind) => {
                match std::fs::remove_file(path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => bind(path),
                }
            }
            other => other,
        }?;
        let name = Self {
            path: path.to_owned(),
            kind,
            aside: Mutex::new(None),
        };
        Ok((name, socket))
    }

    /// As [`SocketName::bind`], but set aside: another process serves the path, and will leave it to this one.
    ///
    /// # Errors
    /// What `bind` said.
    pub fn bind_aside<S>(
        path: &Path,
        kind: SocketKind,
        bind: impl Fn(&Path) -> io::Result<S>,
    ) -> io::Result<(Self, S)> {
        let (mut name, socket) = Self::bind(&beside(path), kind, bind)?;
        let hidden = std::mem::replace(&mut name.path, path.to_owned());
        name.aside = Mutex::new(Some(hidden));
        Ok((name, socket))
    }

    /// Where a process keeps a socket whose name, `path`, is another's: what is left of it when it is killed.
    #[must_use]
    pub fn aside_of(path: &Path, process: u32) -> PathBuf {
        let mut hidden = OsString::from(path);
        hidden.push(format!(".aside-{process}"));
        PathBuf::from(hidden)
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the name up, for another process to bind. Doing it twice is no error.
    ///
    /// # Errors
    /// What the system said.
    pub fn release(&self) -> io::Result<()> {
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        if aside.is_none() {
            let hidden = beside(&self.path);
            std::fs::rename(&self.path, &hidden)?;
            *aside = Some(hidden);
        }
        Ok(())
    }

    /// Takes the name back. Doing it twice is no error.
    ///
    /// # Errors
    /// `AddrInUse` while a living process serves the path.
    pub fn take_back(&self) -> io::Result<()> {
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hidden) = &*aside {
            if !is_stale(&self.path, self.kind) {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    format!(
                        "{} is served by another process: the restored VM runs; end it first, or stop this one",
                        self.path.display()
                    ),
                ));
            }
            std::fs::rename(hidden, &self.path)?;
            *aside = None;
        }
        Ok(())
    }

    /// Takes the name from the process that left it to this one, whether it could give it up or not. Doing it twice is no error.
    ///
    /// # Errors
    /// What the system said.
    pub fn take(&self) -> io::Result<()> {
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hidden) = &*aside {
            std::fs::rename(hidden, &self.path)?;
            *aside = None;
        }
        Ok(())
    }
}

/// Where this process keeps a socket whose name is another's.
fn beside(path: &Path) -> PathBuf {
    SocketName::aside_of(path, std::process::id())
}

impl Drop for SocketName {
    fn drop(&mut self) {
        let aside = self.aside.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = std::fs::remove_file(aside.as_ref().unwrap_or(&self.path));
    }
}

/// Whether nobody serves a socket path; also when there is none (any more). A socket that may not be asked counts as
/// served.
fn is_stale(path: &Path, kind: SocketKind) -> bool {
    let connected = match kind {
        SocketKind::Datagram => UnixDatagram::unbound().and_then(|s| s.connect(path)),
        SocketKind::Stream => UnixStream::connect(path).map(drop),
    };
    connected.is_err_and(|e| {
        matches!(
            e.kind(),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_name_is_left_to_a_process_that_is_ready() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listen = |p: &Path| UnixListener::bind(p);
        let (first, old) = SocketName::bind(&path, SocketKind::Stream, listen).unwrap();
        let (second, new) = SocketName::bind_aside(&path, SocketKind::Stream, listen).unwrap();
        new.set_nonblocking(true).unwrap();
        UnixStream::connect(&path).unwrap();
        old.accept().unwrap();
        assert!(new.accept().is_err(), "the name is the first's still");
        // It may not rename there, so its name is in its place.
        second.take().unwrap();
        second.take().unwrap();
        UnixStream::connect(&path).unwrap();
        new.accept().unwrap();
        std::mem::forget(first);
        drop((second, new));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // One that was never left to it leaves nothing behind either.
        drop(SocketName::bind_aside(&path, SocketKind::Stream, listen).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_name_is_handed_over_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bind = || SocketName::bind(&path, SocketKind::Stream, |p| UnixListener::bind(p));
        let (first, _socket) = bind().unwrap();
        assert_eq!(bind().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        first.release().unwrap();
        first.release().unwrap();
        let (second, socket) = bind().unwrap();
        assert!(first.take_back().is_err());
        // The other process is killed: its path stays, nobody serves it.
        std::mem::forget(second);
        drop(socket);
        first.take_back().unwrap();
        first.take_back().unwrap();
        UnixStream::connect(&path).unwrap();
        first.release().unwrap();
        let (third, _socket) = bind().unwrap();
        // The end of the first does not touch the third's name.
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(third);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
