//! Faults that are switched on and off while a process runs: a file of rules, looked at before every operation.
//!
//! ```text
//! # file    kind (read, write, sync, any)  what                 how often
//! image     read                           eio                  3
//! journal   sync                           hang
//! *         write                          slow 50
//! ```
//! `eio` and `full` fail the operation, `slow N` delays it by N milliseconds, `hang` holds it until the rule is gone. The
//! count starts anew when the file changes. Files have the names of `docs/disk-format.md`; the image is `image`.

use super::Kind;
use crate::storage::{Storage, StorageFile};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Eio,
    Full,
    Slow(Duration),
    Hang,
}

#[derive(Debug)]
struct Rule {
    file: String,
    kind: Option<Kind>,
    what: What,
    left: u64,
}

fn parse(line: &str) -> Option<Rule> {
    let mut words = line.split_whitespace();
    let file = words.next().filter(|w| !w.starts_with('#'))?.to_owned();
    let kind = match words.next()? {
        "read" => Some(Kind::Read),
        "write" => Some(Kind::Write),
        "sync" => Some(Kind::Sync),
        _ => None,
    };
    let what = match words.next()? {
        "full" => What::Full,
        "slow" => What::Slow(Duration::from_millis(words.next()?.parse().ok()?)),
        "hang" => What::Hang,
        _ => What::Eio,
    };
    let left = words.next().and_then(|w| w.parse().ok()).unwrap_or(u64::MAX);
    Some(Rule {
        file,
        kind,
        what,
        left,
    })
}

#[derive(Debug, Default)]
struct Rules {
    read: Option<(SystemTime, u64)>,
    list: Vec<Rule>,
}

/// The rules of one process. Clones share them.
#[derive(Clone, Debug)]
pub struct LiveFaults {
    path: PathBuf,
    rules: Arc<Mutex<Rules>>,
}

impl LiveFaults {
    /// Rules stand in the file at `path`; while there is none, nothing fails.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            rules: Arc::default(),
        }
    }

    fn find(&self, file: &str, kind: Kind) -> Option<What> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let now = std::fs::metadata(&self.path)
            .ok()
            .and_then(|m| Some((m.modified().ok()?, m.len())));
        if now != rules.read {
            let text = std::fs::read_to_string(&self.path).unwrap_or_default();
            rules.list = text.lines().filter_map(parse).collect();
            rules.read = now;
        }
        let fits = |r: &&mut Rule| {
            r.left > 0 && (r.file == "*" || r.file == file) && r.kind.is_none_or(|k| k == kind)
        };
        let rule = rules.list.iter_mut().find(fits)?;
        rule.left -= 1;
        Some(rule.what)
    }

    fn suffer(&self, file: &str, kind: Kind) -> io::Result<()> {
        loop {
            match self.find(file, kind) {
                None => return Ok(()),
                Some(What::Eio) => return Err(io::Error::other("injected I/O error")),
                Some(What::Full) => return Err(io::ErrorKind::StorageFull.into()),
                Some(What::Slow(by)) => {
                    std::thread::sleep(by);
                    return Ok(());
                }
                Some(What::Hang) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// A file under these rules.
    #[must_use]
    pub fn file(&self, name: &str, inner: Arc<dyn StorageFile>) -> Arc<dyn StorageFile> {
        Arc::new(LiveFile {
            name: name.to_owned(),
            inner,
            faults: self.clone(),
        })
    }

    /// A directory under these rules.
    #[must_use]
    pub fn storage(&self, inner: Box<dyn Storage>) -> Box<dyn Storage> {
        Box::new(LiveStorage {
            inner,
            faults: self.clone(),
        })
    }
}

struct LiveFile {
    name: String,
    inner: Arc<dyn StorageFile>,
    faults: LiveFaults,
}

impl StorageFile for LiveFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.faults.suffer(&self.name, Kind::Read)?;
        self.inner.read_at(offset, buf)
    }

    /// Only while there are no rules: these are for reads that may wait, and fail.
    fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        !self.faults.path.exists() && self.inner.read_cached(offset, buf)
    }

    fn write_parts(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.faults.suffer(&self.name, Kind::Write)?;
        self.inner.write_parts(offset, parts)
    }

    fn zero(&self, offset: u64, len: u64, free: bool) -> io::Result<()> {
        self.faults.suffer(&self.name, Kind::Write)?;
        self.inner.zero(offset, len, free)
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.suffer(&self.name, Kind::Sync)?;
        self.inner.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.faults.suffer(&self.name, Kind::Write)?;
        self.inner.allocate(len)
    }
}

struct LiveStorage {
    inner: Box<dyn Storage>,
    faults: LiveFaults,
}

impl Storage for LiveStorage {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn StorageFile>> {
        Ok(self.faults.file(name, self.inner.open(name, create)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn sync_names(&self) -> io::Result<()> {
        self.inner.sync_names()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::FaultStorage;

    #[test]
    fn rules_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rules");
        let faults = LiveFaults::new(path.clone());
        let storage = faults.storage(Box::new(FaultStorage::new(1)));
        let file = storage.open("journal", true).unwrap();
        file.write_at(0, &[1; 512]).unwrap();
        std::fs::write(&path, "# x\nimage any eio\njournal write full 2\n").unwrap();
        for _ in 0..2 {
            let e = file.write_at(0, &[2; 512]).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::StorageFull);
        }
        file.write_at(0, &[2; 512]).unwrap();
        file.sync().unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "* sync eio").unwrap();
        assert!(file.sync().is_err());
        std::fs::remove_file(&path).unwrap();
        file.sync().unwrap();
    }
}
