//! A block from the other host's replica: who asks waits on its own thread, the engine only passes messages on.
//!
//! ```text
//! guest's read, scrub --LinkPeer--> Input::DiskAsk --engine--> link ==> engine --Server--> its volume
//!        waits (bounded) <-- Asks <--engine-- link <== engine <-- Input::DiskServed <--'
//! ```
//! Nobody waits without a bound, and the engine's own thread never waits: it would wait for itself.

use crate::aside::READ_MAX;
use crate::input::{Input, Inputs};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use steadfast_disk::scrub::{PeerError, PeerSource};
use steadfast_disk::volume::Volume;
use steadfast_types::{Epoch, HostId};

/// How long an answer is awaited.
const PATIENCE: Duration = Duration::from_secs(1);
/// Questions under way at a time, each way.
const WAITING_MAX: usize = 64;

thread_local! {
    static ENGINE: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread is the engine's: it is never made to wait for an answer.
pub fn this_is_the_engine() {
    ENGINE.set(true);
}

/// What came back.
pub type Answer = Result<(Epoch, Vec<u8>), PeerError>;
/// Where threads beside the engine find a disk's volume; empty while it is laid out anew.
pub type Shelf = Arc<RwLock<Option<Volume>>>;

#[derive(Default)]
struct Table {
    last: u64,
    waiting: BTreeMap<u64, SyncSender<Answer>>,
}

/// Questions that wait for their answers. Clones share them.
#[derive(Clone, Default)]
pub struct Asks(Arc<Mutex<Table>>);

impl Asks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer has come; one that nobody waits for any more is dropped.
    pub fn answer(&self, id: u64, answer: Answer) {
        let waiting = self.table().waiting.remove(&id);
        if let Some(to) = waiting {
            let _ = to.try_send(answer);
        }
    }
}

/// The other host's replica of one disk.
pub struct LinkPeer {
    /// Number among the writable disks.
    pub volume: u16,
    /// To the engine.
    pub inputs: Inputs,
    /// Where answers come.
    pub asks: Asks,
}

impl PeerSource for LinkPeer {
    fn read_committed(&self, offset: u64, buf: &mut [u8]) -> Result<Epoch, PeerError> {
        if ENGINE.get() {
            return Err(PeerError::Failed(
                "the engine does not wait for other hosts".into(),
            ));
        }
        let len = u32::try_from(buf.len()).unwrap_or(u32::MAX);
        if len > READ_MAX {
            return Err(PeerError::Failed(format!("{len} bytes are too many at a time")));
        }
        let (to, answer) = sync_channel(1);
        let id = {
            let mut table = self.asks.table();
            if table.waiting.len() >= WAITING_MAX {
                return Err(PeerError::Failed("too many questions are under way".into()));
            }
            table.last += 1;
            let id = table.last;
            table.waiting.insert(id, to);
            id
        };
        self.inputs.send(Input::DiskAsk {
            id,
            volume: self.volume,
            offset,
            len,
        });
        let got = answer.recv_timeout(PATIENCE);
        self.asks.table().waiting.remove(&id);
        let (epoch, bytes) =
            got.map_err(|_| PeerError::Failed(format!("no answer within {PATIENCE:?}")))??;
        if bytes.len() != buf.len() {
            return Err(PeerError::Failed("the answer has another length".into()));
        }
        buf.copy_from_slice(&bytes);
        Ok(epoch)
    }
}

/// A question of another host.
pub struct Question {
    /// Who asks.
    pub host: HostId,
    /// To be repeated.
    pub id: u64,
    /// The disk.
    pub from: Shelf,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

/// Starts the thread that answers other hosts' questions.
///
/// # Errors
/// No thread to be had.
pub fn serve(inputs: Inputs) -> std::io::Result<SyncSender<Question>> {
    let (to, questions) = sync_channel::<Question>(WAITING_MAX);
    std::thread::Builder::new()
        .name("disk-serve".into())
        .spawn(move || {
            for q in questions {
                let got = read(&q);
                inputs.send(Input::DiskServed(q.host, q.id, got));
            }
        })?;
    Ok(to)
}

fn read(q: &Question) -> Answer {
    let shelf = q.from.read().unwrap_or_else(PoisonError::into_inner);
    let volume = shelf.as_ref().ok_or(PeerError::Absent)?;
    let mut bytes = vec![0; q.len as usize];
    let epoch = PeerSource::read_committed(volume, q.offset, &mut bytes)?;
    Ok((epoch, bytes))
}
