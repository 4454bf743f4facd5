//! A file that gets its name only when it is whole.
//!
//! ```text
//! create   no name at all (O_TMPFILE): whoever is killed leaves nothing
//!          or, where the file system has no such files, NAME.partial under a lock: the next save takes it over
//! keep     on disk -> its name -> the folder on disk
//! drop     without keep: it is gone
//! ```
//! A leftover is therefore never more than one per name, is never taken for a whole file, and needs no sweeping.

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, linkat, openat, unlinkat};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// See the module. What is written to it goes through [`PendingFile::file`].
#[derive(Debug)]
pub struct PendingFile {
    file: File,
    path: PathBuf,
    /// Its name until then; none: it has none.
    temp: Option<PathBuf>,
    done: bool,
}

fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(more);
    name.into()
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

impl PendingFile {
    /// Starts the file that is to be `path`. Guest memory is nobody else's to read: its mode is 0600.
    ///
    /// # Errors
    /// Those of the system; `WouldBlock` if another process is writing it.
    pub fn create(path: &Path) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        match openat(CWD, folder(path), flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Self {
                file: file.into(),
                path: path.to_owned(),
                temp: None,
                done: false,
            }),
            // No such files in this file system; or no such flag, and then the kernel takes it for a folder to write to.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
                Self::named(path)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// As [`PendingFile::create`], under a name from the start: for a process that may not look at its own descriptors
    /// in /proc, as naming a nameless file needs.
    ///
    /// # Errors
    /// As [`PendingFile::create`].
    pub fn named(path: &Path) -> io::Result<Self> {
        let temp = beside(path, ".partial");
        loop {
            let mut open = File::options();
            // Not truncated before it is known to be nobody else's.
            open.write(true).create(true).truncate(false).mode(0o600);
            let file = open.open(&temp)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
                let e = io::Error::from(e);
                match e.kind() {
                    io::ErrorKind::WouldBlock => {
                        io::Error::new(e.kind(), "another save to this file is under way")
                    }
                    _ => e,
                }
            })?;
            // Between opening and locking its writer may have finished, and then it is not the partial file any more.
            let (ours, named) = (file.metadata()?, std::fs::symlink_metadata(&temp));
            if named.is_ok_and(|n| (n.dev(), n.ino()) == (ours.dev(), ours.ino())) {
                file.set_len(0)?;
                return Ok(Self {
                    file,
                    path: path.to_owned(),
                    temp: Some(temp),
                    done: false,
                });
            }
        }
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes it durable, gives it its name, in place of whatever had it, and makes that durable.
    ///
    /// # Errors
    /// Those of the system: then there is no file of this name that was not there before.
    pub fn keep(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if self.temp.is_none() {
            self.name()?;
        }
        if let Some(temp) = &self.temp {
            std::fs::rename(temp, &self.path)?;
        }
        self.done = true;
        File::open(folder(&self.path))?.sync_all()
    }

    /// Names a nameless file, beside its place: a link cannot replace what is there.
    fn name(&mut self) -> io::Result<()> {
        let temp = beside(&self.path, &format!(".partial-{}", std::process::id()));
        match unlinkat(CWD, &temp, AtFlags::empty()) {
            Err(e) if e != rustix::io::Errno::NOENT => return Err(e.into()),
            _ => {}
        }
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        linkat(CWD, own, CWD, &temp, AtFlags::SYMLINK_FOLLOW)?;
        self.temp = Some(temp);
        Ok(())
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let (false, Some(temp)) = (self.done, &self.temp) {
            let _ = std::fs::remove_file(temp);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn it_appears_whole_or_not_at_all() {
        for make in [PendingFile::create, PendingFile::named] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("save");
            std::fs::write(&path, "before").unwrap();
            let pending = make(&path).unwrap();
            pending.file().write_all(b"half").unwrap();
            drop(pending);
            assert_eq!(names(dir.path()), ["save"]);
            assert_eq!(std::fs::read(&path).unwrap(), b"before");
            let pending = make(&path).unwrap();
            pending.file().write_all(b"whole").unwrap();
            pending.keep().unwrap();
            assert_eq!(names(dir.path()), ["save"]);
            assert_eq!(std::fs::read(&path).unwrap(), b"whole");
            let mode = std::fs::metadata(&path).unwrap().mode() & 0o777;
            assert_eq!(mode, 0o600, "others can read guest memory");
        }
    }

    #[test]
    fn a_killed_writer_leaves_nothing_or_what_the_next_one_takes_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("save");
        // As if killed: descriptors are closed, nothing else is done.
        let killed = |pending: PendingFile| {
            pending.file().write_all(&[7; 5000]).unwrap();
            let left = std::mem::ManuallyDrop::new(pending);
            // SAFETY: `left` is never used again; its descriptor is closed once.
            unsafe { libc::close(left.file.as_raw_fd()) };
        };
        killed(PendingFile::create(&path).unwrap());
        assert_eq!(names(dir.path()), [""; 0], "a nameless file left a name");
        killed(PendingFile::named(&path).unwrap());
        assert_eq!(names(dir.path()), ["save.partial"]);
        let pending = PendingFile::named(&path).unwrap();
        let busy = PendingFile::named(&path).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        pending.file().write_all(b"next").unwrap();
        pending.keep().unwrap();
        assert_eq!(names(dir.path()), ["save"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"next");
    }
}
