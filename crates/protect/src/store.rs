//! The arbiter's store: one linearizable record per VM, changed by compare-and-swap only.
//!
//! [`RecordStore`] keeps it in the pool's store: a folder on one host and in tests, etcd on a pool (`steadfast_store`). Calls may
//! block; the engine makes them on a thread of its own and bounds its wait itself.

use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;
use steadfast_epoch::arbiter::{
    CasOutcome, Instance, Nonce, StoreId, StoreReply, VmRecord, compare_and_swap,
};
use steadfast_epoch::message::EpochRef;
use steadfast_store::{Check, Commit, Committed, Identity, Kv, StoreSpec};
use steadfast_types::{Epoch, HostId, Term, VmId};

/// A store that nobody asks is read so often, so that the connection to it stands.
const WARM_EVERY: Duration = Duration::from_secs(4);

/// Where VM records are.
pub trait Store: Send {
    /// A linearizable read: the store's identity and the record, if there is one.
    ///
    /// # Errors
    /// The store cannot be reached or does not answer.
    fn read(&mut self) -> io::Result<(StoreId, Option<VmRecord>)>;

    /// Replaces the record if it still is `expect` (or was never written and `expect` has term 0).
    fn cas(&mut self, expect: &VmRecord, record: &VmRecord) -> CasOutcome;

    /// Where its members are from now on, if it has any.
    fn set_endpoints(&mut self, _endpoints: &[String]) {}
}

/// A record as it is written. History: 1, the first.
#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    /// As `record_store`; kept for readers of the first version.
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

    fn record(self) -> VmRecord {
        VmRecord {
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
        }
    }
}

/// A record that keeps changing its bytes, but not its version, is compared so often.
const TRIES: usize = 3;

/// The record of one VM in a [`Kv`], at the key `vm/NAME/record`.
pub struct RecordStore {
    kv: Arc<dyn Kv>,
    vm: VmId,
}

impl RecordStore {
    /// The record of this VM in the store that a spec names.
    ///
    /// # Errors
    /// Bad settings, or a folder that cannot be used. An etcd that does not answer is no error yet.
    pub fn open(spec: &StoreSpec, vm: VmId) -> io::Result<Self> {
        Ok(Self::new(steadfast_store::open(spec)?, vm))
    }

    /// The record of this VM in an open store.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, vm: VmId) -> Self {
        Self { kv, vm }
    }

    /// Key of a VM's record.
    #[must_use]
    pub fn key(vm: &VmId) -> String {
        format!("vm/{vm}/record")
    }

    /// Writes the record of a VM that was never started, which `owner` may start; one that exists stays as it is.
    ///
    /// # Errors
    /// The store cannot be read or written, or did not say what became of the record.
    pub fn create(&self, owner: &HostId) -> io::Result<()> {
        let key = Self::key(&self.vm);
        let now = self.kv.read(&[&key])?;
        if !now.entries.is_empty() {
            return Ok(());
        }
        let id = StoreId(now.identity.0);
        let first = serde_json::to_vec(&Written::of(id, &VmRecord::new(owner.clone(), id)))?;
        let commit = Commit {
            identity: Some(now.identity),
            ..Commit::default()
        };
        // A conflict is another's record.
        self.kv
            .commit(&commit.unchanged(&key, None).put(&key, first))
            .map(|_| ())
            .map_err(io::Error::from)
    }

    fn try_cas(&self, expect: &VmRecord, record: &VmRecord) -> io::Result<CasOutcome> {
        let key = Self::key(&self.vm);
        let proposed = serde_json::to_vec(&Written::of(record.store, record))?;
        // Equal bytes are the same version of the record: its nonce is in them, and each is used once.
        let mut demand = Check::Value(serde_json::to_vec(&Written::of(expect.store, expect))?);
        for _ in 0..TRIES {
            let commit = Commit {
                identity: Some(Identity(record.store.0)),
                checks: vec![(key.clone(), demand)],
                changes: Vec::new(),
            };
            let Committed::Conflict(now) = self.kv.commit(&commit.put(&key, proposed.clone()))? else {
                return Ok(CasOutcome::Done);
            };
            let current = match now.get(&key) {
                Some(entry) => parse(&entry.value)?,
                // Never written: a record of term 0 is what everybody sees then.
                None => VmRecord::new(expect.owner.clone(), expect.store),
            };
            if current.nonce == record.nonce {
                // An earlier try whose answer was lost.
                return Ok(CasOutcome::Done);
            }
            let outcome = compare_and_swap(&current, StoreId(now.identity.0), expect, record);
            if outcome != CasOutcome::Done {
                return Ok(outcome);
            }
            // The expected version in other bytes: not written yet, or by another version of this program.
            demand = now
                .get(&key)
                .map_or(Check::Absent, |e| Check::Revision(e.revision));
        }
        Ok(CasOutcome::Unknown)
    }
}

/// Reads a record as it is written; also for who only looks at it.
///
/// # Errors
/// The bytes are no record of a version that is known.
pub fn parse(bytes: &[u8]) -> io::Result<VmRecord> {
    let written: Written = serde_json::from_slice(bytes)?;
    if written.version != 1 {
        return Err(io::Error::other(format!(
            "the VM's record has version {}, this program knows 1; upgrade it",
            written.version
        )));
    }
    Ok(written.record())
}

impl Store for RecordStore {
    fn read(&mut self) -> io::Result<(StoreId, Option<VmRecord>)> {
        let key = Self::key(&self.vm);
        let now = self.kv.read(&[&key])?;
        let record = now.get(&key).map(|e| parse(&e.value)).transpose()?;
        Ok((StoreId(now.identity.0), record))
    }

    fn cas(&mut self, expect: &VmRecord, record: &VmRecord) -> CasOutcome {
        self.try_cas(expect, record).unwrap_or_else(|error| {
            // Also when it surely did not happen: who reads back finds that out, and who proposes again is answered.
            tracing::warn!(%error, "the store's answer is unknown");
            CasOutcome::Unknown
        })
    }

    fn set_endpoints(&mut self, endpoints: &[String]) {
        self.kv.set_endpoints(endpoints);
    }
}

/// A random number from the kernel.
///
/// # Errors
/// What the kernel said.
pub fn random_u64() -> io::Result<u64> {
    steadfast_store::random_u64()
}

/// What the engine asks of the store.
pub enum Ask {
    /// Read; the id comes back.
    Read(u64),
    /// Compare and swap; the id comes back.
    Cas(u64, Box<VmRecord>, Box<VmRecord>),
    /// Where the store's members are from now on. Nothing comes back.
    Endpoints(Vec<String>),
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
        let mut idle = Duration::ZERO;
        loop {
            let first = match asked.recv_timeout(std::mem::replace(&mut idle, WARM_EVERY)) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    // Nobody asked. A standby asks for the first time when every millisecond counts: its connection stands
                    // by then.
                    let _ = store.read();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // The engine awaits one answer at a time: what waited behind a slow one was given up, but for the last.
            let mut question = None;
            for ask in std::iter::once(first).chain(asked.try_iter()) {
                if let Ask::Endpoints(endpoints) = ask {
                    store.set_endpoints(&endpoints);
                    continue;
                }
                match question.replace(ask) {
                    Some(Ask::Read(id)) => reply(StoreReply::Failed { id }),
                    Some(Ask::Cas(id, ..)) => reply(StoreReply::Cas {
                        id,
                        outcome: CasOutcome::Unknown,
                    }),
                    Some(Ask::Endpoints(_)) | None => {}
                }
            }
            match question {
                Some(Ask::Read(id)) => reply(match store.read() {
                    Ok((store, record)) => StoreReply::Read { id, store, record },
                    Err(error) => {
                        tracing::warn!(%error, "the store cannot be read");
                        StoreReply::Failed { id }
                    }
                }),
                Some(Ask::Cas(id, expect, record)) => reply(StoreReply::Cas {
                    id,
                    outcome: store.cas(&expect, &record),
                }),
                Some(Ask::Endpoints(_)) | None => {}
            }
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
        let spec = StoreSpec::Folder(dir.path().into());
        let mut one = RecordStore::open(&spec, vm.clone()).unwrap();
        let mut two = RecordStore::open(&spec, vm).unwrap();
        let (id, none) = one.read().unwrap();
        assert_eq!((two.read().unwrap().0, none), (id, None));
        let first = VmRecord::new(a.clone(), id);
        one.create(&a).unwrap();
        two.create(&b).unwrap();
        assert_eq!(two.read().unwrap().1, Some(first.clone()));
        let mine = |owner: &HostId, term| VmRecord {
            term: Term(term),
            // Each proposal has its own: by it an answer that was lost is told from another's success.
            nonce: Nonce {
                instance: Instance(u64::from(owner == &b)),
                count: term,
            },
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
