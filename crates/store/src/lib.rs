//! The pool's store: a small linearizable key-value interface, and what implements it.
//!
//! ```text
//! Kv  read | list | commit (checks, then changes, all or nothing) | watch (a hint, never proof)
//!      |
//!      +-- embedded   one host: a folder with one log, shared by the host's processes, safe against kill and power loss
//!      +-- etcd       a pool: linearizable reads and transactions of an etcd cluster
//! ```
//! Decisions are made on a linearizable read and a commit whose checks name what was read. Every answer carries the store's
//! [`Identity`], which changes when the store's data is replaced or restored (fault 37 of `docs/testing.md`).
//!
//! All calls block and are bounded in time. A commit whose fate is not known says so ([`StoreError::Unknown`]): it may have
//! happened, or may yet happen; the caller reads back. The etcd API is that of etcd 3.4 (`etcdserverpb.KV`).

pub mod embedded;
mod error;
pub mod etcd;
mod log;
mod members;
mod order;
mod random;
pub mod spec;

pub use embedded::Embedded;
pub use error::StoreError;
pub use etcd::Etcd;
pub use random::random_u64;
pub use spec::{EtcdSpec, StoreSpec, TlsFiles};

use std::sync::Arc;

/// Longest key in bytes.
pub const KEY_MAX: usize = 512;
/// Longest value in bytes. etcd takes 1.5 MiB a request.
pub const VALUE_MAX: usize = 1 << 20;
/// Most changes of one commit; etcd's own limit is 128 operations.
pub const CHANGES_MAX: usize = 100;

/// Names one incarnation of a store's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity(pub u64);

/// A key's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// The commit that wrote it.
    pub revision: u64,
}

/// Answer to a read, as of one instant between call and return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The store's identity.
    pub identity: Identity,
    /// The newest commit it shows.
    pub revision: u64,
    /// [`Kv::read`]: those of the keys that exist. [`Kv::list`]: all below the prefix, sorted.
    pub entries: Vec<Entry>,
}

impl Snapshot {
    /// The entry of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.key == key)
    }
}

/// What a commit demands of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// It does not exist.
    Absent,
    /// It was last written by this commit.
    Revision(u64),
    /// It has this value.
    Value(Vec<u8>),
}

/// What a commit does to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets its value.
    Put(Vec<u8>),
    /// Removes it; one that does not exist stays so.
    Delete,
}

/// All checks hold and all changes are made, or nothing happens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// The incarnation that the checks are about; none: whichever it is.
    pub identity: Option<Identity>,
    /// Key and demand.
    pub checks: Vec<(String, Check)>,
    /// Key and change; a key may appear once.
    pub changes: Vec<(String, Change)>,
}

impl Commit {
    /// Demands that a key is as it was read.
    #[must_use]
    pub fn unchanged(mut self, key: impl Into<String>, seen: Option<&Entry>) -> Self {
        let check = seen.map_or(Check::Absent, |e| Check::Revision(e.revision));
        self.checks.push((key.into(), check));
        self
    }

    /// Sets a key.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.changes.push((key.into(), Change::Put(value.into())));
        self
    }

    /// Removes a key.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.changes.push((key.into(), Change::Delete));
        self
    }

    fn validate(&self) -> Result<(), StoreError> {
        let wrong = |why: String| Err(StoreError::Refused(why));
        for key in self
            .checks
            .iter()
            .map(|(k, _)| k)
            .chain(self.changes.iter().map(|(k, _)| k))
        {
            if key.is_empty() || key.len() > KEY_MAX {
                return wrong(format!("a key has 1 to {KEY_MAX} bytes, not {}", key.len()));
            }
        }
        if self.changes.len() > CHANGES_MAX || self.checks.len() > CHANGES_MAX {
            return wrong(format!(
                "a commit has at most {CHANGES_MAX} changes and as many checks"
            ));
        }
        for (i, (key, change)) in self.changes.iter().enumerate() {
            if self.changes[..i].iter().any(|(k, _)| k == key) {
                return wrong(format!("{key} is changed twice in one commit"));
            }
            if let Change::Put(value) = change
                && value.len() > VALUE_MAX
            {
                return wrong(format!("{key}: {} bytes; at most {VALUE_MAX}", value.len()));
            }
        }
        Ok(())
    }
}

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Committed {
    /// All changes are made and durable.
    Done {
        /// The commit's number.
        revision: u64,
    },
    /// A check failed: nothing was changed by this call. The checked keys as they are now.
    Conflict(Snapshot),
}

impl Committed {
    /// Whether it is done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

/// Called when something below a prefix may have changed.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// A linearizable store of small values.
pub trait Kv: Send + Sync {
    /// Reads these keys, all as of the same instant.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read(&self, keys: &[&str]) -> Result<Snapshot, StoreError>;

    /// Reads all keys that begin with one of these prefixes, all as of the same instant.
    ///
    /// # Errors
    /// [`StoreError`].
    fn list_all(&self, prefixes: &[&str]) -> Result<Snapshot, StoreError>;

    /// Reads all keys that begin with `prefix`.
    ///
    /// # Errors
    /// [`StoreError`].
    fn list(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        self.list_all(&[prefix])
    }

    /// Checks and changes, all or nothing.
    ///
    /// # Errors
    /// [`StoreError::Unknown`]: nobody knows whether it happened or will. All other errors: it did not and will not.
    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError>;

    /// Commits, and reads all keys that begin with one of these prefixes as they are then: one question instead of two. Nothing is read
    /// after a conflict.
    ///
    /// # Errors
    /// As [`Kv::commit`]; what it changed may have happened when the reading failed.
    fn commit_and_list(
        &self,
        commit: &Commit,
        prefixes: &[&str],
    ) -> Result<(Committed, Option<Snapshot>), StoreError> {
        let done = self.commit(commit)?;
        let all = done.is_done().then(|| self.list_all(prefixes)).transpose()?;
        Ok((done, all))
    }

    /// Where the members of the cluster are from now on, the nearest first; an empty list changes nothing. A folder has no members.
    fn set_endpoints(&self, _endpoints: &[String]) {}

    /// Calls `wake` when something below `prefix` may have changed, as long as the returned guard lives. A hint: changes
    /// by other processes may go unnoticed, so look again at intervals too.
    fn watch(&self, prefix: &str, wake: Wake) -> WatchGuard;
}

/// Ends a watch when dropped.
pub struct WatchGuard {
    _alive: Arc<()>,
}

/// Opens the store that a spec names.
///
/// # Errors
/// [`StoreError`]. An etcd that does not answer is no error here: it may come later.
pub fn open(spec: &StoreSpec) -> Result<Arc<dyn Kv>, StoreError> {
    Ok(match spec {
        StoreSpec::Folder(folder) => Arc::new(Embedded::open(folder)?),
        StoreSpec::Etcd { etcd } => Arc::new(Etcd::new(etcd)?),
    })
}
