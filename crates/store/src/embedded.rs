//! The store of one host: `FOLDER/log` under the lock `FOLDER/lock`, shared by any number of processes.
//!
//! Each process keeps what the log says in memory and reads on, under the lock, before it answers. A commit is one record,
//! fsynced before it is confirmed. A reader fsyncs what it finds new before it answers: who wrote it may have been killed
//! before its own fsync, and nobody may be told what a loss of power could take back. When the log has grown to many times
//! what it holds, it is rewritten and atomically replaced.

use crate::log::{self, Next, Written};
use crate::{
    Change, Check, Commit, Committed, Entry, Identity, Kv, Snapshot, StoreError, Wake, WatchGuard, random_u64,
};
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A log this long is rewritten if it is also four times as long as what it would be then.
const REWRITE_BYTES: u64 = 1 << 20;

/// See the module.
pub struct Embedded {
    folder: PathBuf,
    state: Mutex<State>,
    watches: Mutex<Vec<(Weak<()>, String, Wake)>>,
}

#[derive(Default)]
struct State {
    /// The file that was read so far; another process may have replaced it.
    file: Option<File>,
    inode: u64,
    read_to: u64,
    identity: u64,
    revision: u64,
    map: BTreeMap<String, (Vec<u8>, u64)>,
}

impl State {
    fn take(&mut self, written: Written) {
        self.identity = written.identity.unwrap_or(self.identity);
        self.revision = written.revision;
        for (key, value, revision) in written.put {
            self.map.insert(key, (value.into(), revision));
        }
        for key in &written.delete {
            self.map.remove(key);
        }
    }

    /// All of it as the first record of a new log.
    fn whole(&self) -> Written {
        let puts = self.map.iter();
        Written {
            identity: Some(self.identity),
            revision: self.revision,
            put: puts
                .map(|(k, (v, r))| (k.clone(), v.as_slice().into(), *r))
                .collect(),
            delete: Vec::new(),
        }
    }

    fn entry(&self, key: &str) -> Option<Entry> {
        self.map.get(key).map(|(value, revision)| Entry {
            key: key.into(),
            value: value.clone(),
            revision: *revision,
        })
    }

    fn snapshot(&self, entries: Vec<Entry>) -> Snapshot {
        Snapshot {
            identity: Identity(self.identity),
            revision: self.revision,
            entries,
        }
    }
}

impl Embedded {
    /// The store in this folder, which is made if need be.
    ///
    /// # Errors
    /// The folder cannot be made or read, or is damaged.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let store = Self {
            folder: folder.into(),
            state: Mutex::default(),
            watches: Mutex::default(),
        };
        fs::create_dir_all(folder).map_err(|e| store.failed(&e))?;
        store.locked(|_| Ok(()))?;
        Ok(store)
    }

    fn failed(&self, error: &dyn std::fmt::Display) -> StoreError {
        StoreError::Unreachable {
            at: self.folder.display().to_string(),
            why: error.to_string(),
        }
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// Runs `f` on the newest state, while no other process can change it.
    fn locked<T>(&self, f: impl FnOnce(&mut State) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut options = File::options();
        options.create(true).truncate(false).write(true).mode(0o600);
        let lock = options
            .open(self.folder.join("lock"))
            .map_err(|e| self.failed(&e))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| self.failed(&e))?;
        self.catch_up(&mut state)?;
        f(&mut state)
    }

    fn catch_up(&self, state: &mut State) -> Result<(), StoreError> {
        let path = self.log_path();
        match fs::metadata(&path) {
            Ok(found) if state.file.is_some() && found.ino() == state.inode => {}
            Ok(_) => {
                *state = State::default();
                let file = File::options()
                    .read(true)
                    .write(true)
                    .open(&path)
                    .map_err(|e| self.failed(&e))?;
                state.inode = file.metadata().map_err(|e| self.failed(&e))?.ino();
                state.file = Some(file);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                *state = State {
                    identity: random_u64().map_err(|e| self.failed(&e))?.max(1),
                    ..State::default()
                };
                self.replace(state)?;
            }
            Err(e) => return Err(self.failed(&e)),
        }
        let Some(file) = state.file.take() else {
            return Err(self.failed(&"the log is not open"));
        };
        let done = self.read_on(state, &file);
        state.file = Some(file);
        if done.is_err() {
            // Nothing half-read is kept.
            *state = State::default();
        }
        done
    }

    fn read_on(&self, state: &mut State, file: &File) -> Result<(), StoreError> {
        let length = file.metadata().map_err(|e| self.failed(&e))?.len();
        if length == state.read_to {
            return Ok(());
        }
        let damaged = |what: String| StoreError::Damaged {
            at: self.log_path().display().to_string(),
            what,
        };
        let Some(new) = length.checked_sub(state.read_to) else {
            return Err(damaged(format!(
                "it shrank from {} to {length} bytes",
                state.read_to
            )));
        };
        let mut bytes = vec![0; usize::try_from(new).map_err(|e| self.failed(&e))?];
        file.read_exact_at(&mut bytes, state.read_to)
            .map_err(|e| self.failed(&e))?;
        let mut at = 0;
        loop {
            match log::next(&bytes[at..]) {
                Next::Record(written, length) => {
                    state.take(written);
                    at += length;
                }
                Next::End => break,
                // The first record is written before the file has its name: it cannot be torn.
                Next::Torn if state.read_to + at as u64 > 0 => {
                    file.set_len(state.read_to + at as u64)
                        .map_err(|e| self.failed(&e))?;
                    break;
                }
                Next::Torn | Next::Damaged => {
                    let offset = state.read_to + at as u64;
                    return Err(damaged(format!("the record at byte {offset} does not check")));
                }
            }
        }
        file.sync_all().map_err(|e| self.failed(&e))?;
        state.read_to += at as u64;
        Ok(())
    }

    /// Writes all of `state` into a new log in place of the old one.
    fn replace(&self, state: &mut State) -> Result<(), StoreError> {
        let (path, temp) = (self.log_path(), self.folder.join("log.new"));
        let bytes = log::encode(&state.whole()).map_err(StoreError::Refused)?;
        let mut options = File::options();
        options
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .mode(0o600);
        let file = options.open(&temp).map_err(|e| self.failed(&e))?;
        file.write_all_at(&bytes, 0)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temp, &path))
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .map_err(|e| self.failed(&e))?;
        state.inode = file.metadata().map_err(|e| self.failed(&e))?.ino();
        state.file = Some(file);
        state.read_to = bytes.len() as u64;
        Ok(())
    }

    /// Appends a commit. A failure leaves its fate unknown: some of it may be on disk.
    fn append(&self, state: &mut State, written: Written) -> Result<(), StoreError> {
        let bytes = log::encode(&written).map_err(StoreError::Refused)?;
        let Some(file) = &state.file else {
            return Err(self.failed(&"the log is not open"));
        };
        if let Err(e) = file
            .write_all_at(&bytes, state.read_to)
            .and_then(|()| file.sync_data())
        {
            // What is on disk is found out by the next one who reads it.
            *state = State::default();
            return Err(StoreError::Unknown {
                at: self.folder.display().to_string(),
                why: e.to_string(),
            });
        }
        state.read_to += bytes.len() as u64;
        state.take(written);
        if state.read_to > REWRITE_BYTES {
            let held: usize = state.map.iter().map(|(k, (v, _))| k.len() + v.len() + 32).sum();
            if state.read_to > 4 * held as u64
                && let Err(error) = self.replace(state)
            {
                // The commit stands; the old log goes on, or is found damaged by whoever reads it next.
                tracing::warn!(%error, "the store's log could not be rewritten");
                *state = State::default();
            }
        }
        Ok(())
    }

    fn notify(&self, commit: &Commit) {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.retain(|(alive, ..)| alive.strong_count() > 0);
        for (_, prefix, wake) in watches.iter() {
            if commit.changes.iter().any(|(key, _)| key.starts_with(prefix)) {
                wake();
            }
        }
    }
}

impl Kv for Embedded {
    fn read(&self, keys: &[&str]) -> Result<Snapshot, StoreError> {
        self.locked(|s| Ok(s.snapshot(keys.iter().filter_map(|k| s.entry(k)).collect())))
    }

    fn list_all(&self, prefixes: &[&str]) -> Result<Snapshot, StoreError> {
        self.locked(|s| {
            let below = prefixes.iter().flat_map(|prefix| {
                let keys = s.map.range((*prefix).to_owned()..).map(|(k, _)| k);
                keys.take_while(move |k| k.starts_with(prefix))
            });
            Ok(s.snapshot(below.filter_map(|k| s.entry(k)).collect()))
        })
    }

    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError> {
        commit.validate()?;
        let done = self.locked(|s| {
            let holds = |(key, check): &(String, Check)| match (check, s.map.get(key)) {
                (Check::Absent, found) => found.is_none(),
                (Check::Revision(want), found) => found.is_some_and(|(_, r)| r == want),
                (Check::Value(want), found) => found.is_some_and(|(v, _)| v == want),
            };
            let mine = commit.identity.is_none_or(|i| i.0 == s.identity);
            if !mine || !commit.checks.iter().all(holds) {
                let keys = commit.checks.iter();
                return Ok(Committed::Conflict(
                    s.snapshot(keys.filter_map(|(k, _)| s.entry(k)).collect()),
                ));
            }
            let revision = s.revision + 1;
            let mut written = Written {
                revision,
                ..Written::default()
            };
            for (key, change) in &commit.changes {
                match change {
                    Change::Put(value) => written.put.push((key.clone(), value.as_slice().into(), revision)),
                    Change::Delete => written.delete.push(key.clone()),
                }
            }
            self.append(s, written)?;
            Ok(Committed::Done { revision })
        })?;
        if done.is_done() {
            self.notify(commit);
        }
        Ok(done)
    }

    fn watch(&self, prefix: &str, wake: Wake) -> WatchGuard {
        let alive = Arc::new(());
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.push((Arc::downgrade(&alive), prefix.into(), wake));
        WatchGuard { _alive: alive }
    }
}
