//! The arbiter's store: one linearizable record per VM, changed by compare-and-swap only.
//!
//! [`FileStore`] is the embedded one, for one host and for tests: a file that is replaced atomically under a lock.
//! Calls may block; the engine makes them on a thread of its own and bounds its wait itself.

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use steadfast_epoch::arbiter::{
    CasOutcome, Instance, Nonce, StoreId, StoreReply, VmRecord, compare_and_swap,
};
use steadfast_epoch::message::EpochRef;
use steadfast_types::{Epoch, HostId, Term, VmId};

/// Where VM records are.
pub trait Store: Send {
    /// A linearizable read: the store's identity and the record, if there is one.
    ///
    /// # Errors
    /// The store cannot be reached or does not answer.
    fn read(&mut self) -> io::Result<(StoreId, Option<VmRecord>)>;

    /// Replaces the record if it still is `expect` (or was never written and `expect` has term 0).
    fn cas(&mut self, expect: &VmRecord, record: &VmRecord) -> CasOutcome;
}

/// A record as it is written. History: 1, the first.
#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    store: u64,
    term: u64,
    owner: HostId,
    in_sync: Vec<HostId>,
    acks: u8,
    nonce: (u64, u64),
    record_store: u64,
    handover: Option<(u64, u64)>,
}

impl Written {
    fn of(store: StoreId, r: &VmRecord) -> Self {
        Self {
            version: 1,
            store: store.0,
            term: r.term.0,
            owner: r.owner.clone(),
            in_sync: r.in_sync.clone(),
            acks: r.acks,
            nonce: (r.nonce.instance.0, r.nonce.count),
            record_store: r.store.0,
            handover: r.handover.map(|h| (h.epoch.0, h.term.0)),
        }
    }

    fn record(self) -> (StoreId, VmRecord) {
        let record = VmRecord {
            term: Term(self.term),
            owner: self.owner,
            in_sync: self.in_sync,
            acks: self.acks,
            nonce: Nonce {
                instance: Instance(self.nonce.0),
                count: self.nonce.1,
            },
            store: StoreId(self.record_store),
            handover: self.handover.map(|(e, t)| EpochRef {
                epoch: Epoch(e),
                term: Term(t),
            }),
        };
        (StoreId(self.store), record)
    }
}

/// The embedded store: `DIR/VM.json`, replaced under the lock `DIR/VM.lock`.
pub struct FileStore {
    dir: PathBuf,
    vm: VmId,
}

impl FileStore {
    /// A store in this folder, which is made if need be.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(dir: PathBuf, vm: VmId) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        Ok(Self { dir, vm })
    }

    /// Writes the record of a VM that was never started, which `owner` may start; one that exists stays as it is.
    ///
    /// # Errors
    /// The folder cannot be read or written.
    pub fn create(&self, owner: &HostId) -> io::Result<()> {
        self.locked(|s| match s.current()? {
            (_, Some(_)) => Ok(()),
            (id, None) => {
                let first = VmRecord::new(owner.clone(), id);
                replace(&s.path(), &serde_json::to_vec(&Written::of(id, &first))?)
            }
        })
    }

    fn locked<T>(&self, f: impl FnOnce(&Self) -> io::Result<T>) -> io::Result<T> {
        let path = self.dir.join(format!("{}.lock", self.vm));
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        f(self)
    }

    fn path(&self) -> PathBuf {
        self.dir.join(format!("{}.json", self.vm))
    }

    /// Identity of the folder's data: made once, at random.
    fn id(&self) -> io::Result<StoreId> {
        let path = self.dir.join("store-id");
        match std::fs::read_to_string(&path) {
            Ok(text) => text
                .trim()
                .parse()
                .map(StoreId)
                .map_err(|_| io::Error::other("store-id is damaged")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let id = random_u64()?.max(1);
                replace(&path, id.to_string().as_bytes())?;
                Ok(StoreId(id))
            }
            Err(e) => Err(e),
        }
    }

    fn current(&self) -> io::Result<(StoreId, Option<VmRecord>)> {
        let id = self.id()?;
        match std::fs::read(self.path()) {
            Ok(bytes) => {
                let written: Written = serde_json::from_slice(&bytes)?;
                Ok((id, Some(written.record().1)))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok((id, None)),
            Err(e) => Err(e),
        }
    }
}

/// A random number from the kernel.
///
/// # Errors
/// What the kernel said.
pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn replace(path: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    let temp = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = File::create(&temp)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    std::fs::rename(&temp, path)
}

impl Store for FileStore {
    fn read(&mut self) -> io::Result<(StoreId, Option<VmRecord>)> {
        self.locked(Self::current)
    }

    fn cas(&mut self, expect: &VmRecord, record: &VmRecord) -> CasOutcome {
        let done = self.locked(|s| {
            let (id, current) = s.current()?;
            let current = current.unwrap_or_else(|| VmRecord::new(expect.owner.clone(), expect.store));
            let outcome = compare_and_swap(&current, id, expect, record);
            if outcome == CasOutcome::Done {
                replace(&s.path(), &serde_json::to_vec(&Written::of(id, record))?)?;
            }
            Ok(outcome)
        });
        done.unwrap_or_else(|error| {
            tracing::warn!(%error, "the store's answer is unknown");
            CasOutcome::Unknown
        })
    }
}

/// What the engine asks of the store.
pub enum Ask {
    /// Read; the id comes back.
    Read(u64),
    /// Compare and swap; the id comes back.
    Cas(u64, Box<VmRecord>, Box<VmRecord>),
}

/// Runs a store on a thread of its own; answers go to `reply`.
///
/// # Errors
/// The thread cannot be started.
pub fn serve(
    mut store: Box<dyn Store>,
    reply: impl Fn(StoreReply) + Send + 'static,
) -> io::Result<Sender<Ask>> {
    let (ask, asked) = channel();
    std::thread::Builder::new().name("store".into()).spawn(move || {
        // A takeover waits for its answer.
        crate::priority::raise("the store");
        for question in asked {
            reply(match question {
                Ask::Read(id) => match store.read() {
                    Ok((store, record)) => StoreReply::Read { id, store, record },
                    Err(error) => {
                        tracing::warn!(%error, "the store cannot be read");
                        StoreReply::Failed { id }
                    }
                },
                Ask::Cas(id, expect, record) => StoreReply::Cas {
                    id,
                    outcome: store.cas(&expect, &record),
                },
            });
        }
    })?;
    Ok(ask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_two_proposals_wins() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmId::new("v").unwrap();
        let (a, b) = (HostId::new("a").unwrap(), HostId::new("b").unwrap());
        let mut one = FileStore::new(dir.path().into(), vm.clone()).unwrap();
        let mut two = FileStore::new(dir.path().into(), vm).unwrap();
        let (id, none) = one.read().unwrap();
        assert_eq!((two.read().unwrap().0, none), (id, None));
        let first = VmRecord::new(a.clone(), id);
        one.create(&a).unwrap();
        two.create(&b).unwrap();
        assert_eq!(two.read().unwrap().1, Some(first.clone()));
        let mine = |owner: &HostId, term| VmRecord {
            term: Term(term),
            ..VmRecord::new(owner.clone(), id)
        };
        assert_eq!(one.cas(&first, &mine(&a, 1)), CasOutcome::Done);
        let seen = two.read().unwrap().1.unwrap();
        assert_eq!(seen, mine(&a, 1));
        assert_eq!(two.cas(&seen, &mine(&b, 2)), CasOutcome::Done);
        assert!(
            matches!(one.cas(&seen, &mine(&a, 2)), CasOutcome::Conflict { current, .. } if current.owner == b)
        );
    }
}
