//! What goes in and what comes out: events and actions.
//!
//! Actions are to be carried out in the order given. None of them may block the caller of `handle` for long: the
//! runtime starts the work and reports with an event. An event that comes late (its work was overtaken) is ignored.

use crate::arbiter::{Refusal, StoreId, StoreReply, VmRecord};
use crate::message::{EpochRef, Message};
use steadfast_types::{Epoch, HostId, Term};

/// What the runtime says of an epoch it sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedEpoch {
    /// The number given by [`Action::Cut`].
    pub epoch: Epoch,
    /// Size of the sealed record in bytes.
    pub bytes: u64,
    /// The guest flushed a disk in it.
    pub flush: bool,
    /// How long the cut stopped the guest, in microseconds.
    pub pause_us: u64,
    /// The record has content. A cut that nobody mirrors may only mark the boundary of outputs; it cannot be sent, and a
    /// standby that stands before it is filled anew.
    pub whole: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// A message arrived whole: its checksums are right, and for [`crate::Body::Epoch`] and `Chunk` the bulk behind it is
    /// here and valid. Peers are authenticated: `from` is true.
    Message {
        /// Who sent it.
        from: HostId,
        /// What.
        message: Message,
    },
    /// An epoch or chunk arrived whose bulk failed validation (checksum, format, size).
    Corrupt {
        /// Who sent it.
        from: HostId,
    },
    /// A piece of bulk arrived whose message is not whole yet.
    Bulk {
        /// Who sent it.
        from: HostId,
        /// Under which term.
        term: Term,
    },
    /// A connection to this peer stands: messages can pass.
    Connected(HostId),
    /// All paths to this peer are down. Only a hint: nothing is decided on it but to greet again later.
    Disconnected(HostId),
    /// Proof (not suspicion) that the peer's process is gone, e.g. its host's daemon says so.
    PeerDied(HostId),
    /// The store answered.
    Store(StoreReply),

    /// Start the VM here, from its disks (or empty): ask the store, then [`Action::ColdBoot`]. For a first start, and
    /// for a restart when no memory state is left anywhere; the pool decides that.
    ColdStart,
    /// Primary: mirror to this host.
    AddStandby(HostId),
    /// Primary: mirror to this host no more.
    RemoveStandby(HostId),
    /// Primary: hand over to this in-sync standby (planned promote, live migration).
    HandOver(HostId),
    /// Primary: do not hand over, if that is still possible.
    CancelHandOver,

    /// Primary: the guest emitted output that is held.
    Output,
    /// Primary: a cut is wanted soon, for another reason than output.
    CutWanted,
    /// Primary: the guest flushed a disk. It went on at once, and nobody waits for this.
    Flush,
    /// Primary: estimate of the bytes dirtied in the open epoch.
    Dirty {
        /// In bytes.
        bytes: u64,
    },
    /// Primary: the cut that was asked for is made, its record is sealed; the guest runs on (unless frozen).
    Sealed(SealedEpoch),
    /// Own journal: the disk writes of all flush epochs up to here are fsynced.
    JournalSynced {
        /// Up to and including.
        through: Epoch,
    },
    /// Primary: a chunk was read and handed to the link.
    ChunkSent {
        /// To whom.
        to: HostId,
        /// Number of the copy.
        join: u64,
        /// Number of the chunk.
        seq: u64,
        /// Bytes that are still to be copied, including what was dirtied again; 0 ends the copy.
        remaining: u64,
    },

    /// Standby: this epoch's record is staged in memory, whole.
    Staged {
        /// Which.
        epoch: EpochRef,
    },
    /// Standby: memory, devices and disk stand at this epoch.
    Applied {
        /// Which.
        through: Epoch,
    },
    /// Standby: the speculative run is undone. `intact`: everything stands at the acknowledged state again.
    SpeculationDiscarded {
        /// Whether the acknowledged state still exists.
        intact: bool,
    },
    /// Standby: its state is lost or found to be damaged.
    StateLost,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message. For `Epoch` the sealed record of that epoch goes behind it.
    Send {
        /// To whom.
        to: HostId,
        /// What.
        message: Message,
    },
    /// Read the VM's record, linearizably; answer with [`StoreReply::Read`] or `Failed`.
    StoreRead {
        /// To be repeated in the answer.
        id: u64,
    },
    /// Replace the record if it still is `expect` (same term, nonce and store); answer with [`StoreReply::Cas`].
    StoreCas {
        /// To be repeated in the answer.
        id: u64,
        /// The record as it was read.
        expect: VmRecord,
        /// The record to write.
        record: VmRecord,
    },

    /// Primary: cut now; seal the epoch under this number; report [`Event::Sealed`].
    Cut {
        /// The number.
        epoch: Epoch,
        /// Standbys whose full copy this epoch completes: the record must also hold what is still missing there.
        bases: Vec<HostId>,
        /// Do not let the guest run on (handover).
        freeze: bool,
    },
    /// Primary: let the guest run on after a frozen cut (handover cancelled).
    ResumeGuest,
    /// Primary: fsync the disk writes up to this epoch in the own journal; report [`Event::JournalSynced`].
    SyncJournal {
        /// Up to and including.
        through: Epoch,
    },
    /// Primary: these epochs are committed: their disk writes may go to the image, their dirty sets are done with.
    Commit {
        /// Up to and including.
        through: Epoch,
    },
    /// Primary: let the held outputs of these epochs out, in order.
    Release {
        /// Up to and including.
        through: Epoch,
    },
    /// The sealed (or staged) records up to here will not be asked for again.
    Forget {
        /// Up to and including.
        through: Epoch,
    },
    /// Primary: slow the guest's vCPUs down.
    Throttle {
        /// Share of its time that it should not run, 0 to 90.
        percent: u8,
    },
    /// Primary: read the next chunk of the full copy for this host and send it as `Body::Chunk`; report
    /// [`Event::ChunkSent`]. A number lower than before means that chunks from there on were lost: their pages count as not sent.
    SendChunk {
        /// To whom.
        to: HostId,
        /// Message to put in front of the bulk.
        message: Message,
        /// Number of the copy.
        join: u64,
        /// Number of the chunk.
        seq: u64,
        /// The epoch that the standby's disks stand at, for a delta re-sync.
        have: EpochRef,
    },

    /// Standby: forget all state, a full copy begins.
    BeginJoin {
        /// Number of the copy.
        join: u64,
    },
    /// Standby: write the chunk's pages into the memory being filled.
    StoreChunk {
        /// Number of the copy.
        join: u64,
        /// Number of the chunk.
        seq: u64,
    },
    /// Standby: stage this epoch's record: keep it whole, apply nothing; append its disk writes to the journal. Report
    /// [`Event::Staged`]; with `flush` also fsync the journal and report [`Event::JournalSynced`].
    Stage {
        /// Which.
        epoch: EpochRef,
        /// Whether the journal must be fsynced.
        flush: bool,
    },
    /// Standby: apply memory, devices and disk together, up to here. Report [`Event::Applied`].
    Apply {
        /// Up to and including.
        through: Epoch,
    },
    /// Standby: drop epochs after this one, also from the journal. A barrier: a `Staged` or `JournalSynced` report of
    /// a dropped record that was made before must not be delivered after it.
    Truncate {
        /// The last one to keep.
        after: EpochRef,
    },
    /// Standby: run the guest from exactly this staged epoch, with its outputs held and its disk writes undoable.
    Speculate {
        /// The newest acknowledged epoch.
        at: EpochRef,
    },
    /// Standby: stop the speculative run and undo it; report [`Event::SpeculationDiscarded`].
    DiscardSpeculation,
    /// Standby: this instance is the primary now. The guest goes on after `at` (it runs already if it speculated).
    /// Outputs stay held until [`Action::Release`]; inherited epochs after `released` may be released again.
    Promote {
        /// The new term.
        term: Term,
        /// The epoch it goes on from.
        at: EpochRef,
        /// Epochs up to here had left the old host for certain.
        released: Epoch,
        /// Whether the guest already runs speculatively from `at`.
        running: bool,
    },
    /// Start the guest from its disks under this term.
    ColdBoot {
        /// The new term.
        term: Term,
        /// Number of the last epoch: the first cut will be the next one.
        at: EpochRef,
    },
    /// Primary: this instance has lost the right, for good: stop the guest, drop all held outputs and open epochs.
    StopGuest {
        /// The state stands exactly at the handed-over epoch and is kept as a standby's.
        keep: bool,
    },
    /// Something that an operator or a status page wants to know.
    Notice(Notice),
}

/// Things worth an event in the log, in words of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A standby does not answer.
    StandbyLost(HostId),
    /// A standby answers but acknowledges nothing any more.
    StandbyStalled(HostId),
    /// A standby is in sync from now on.
    InSync(HostId),
    /// Outputs are held: no standby acknowledges and the store has not granted to go on alone.
    Holding,
    /// Outputs flow again.
    Flowing,
    /// The VM runs without any standby.
    Alone,
    /// A standby suspects its primary.
    Suspected(HostId),
    /// The suspicion was wrong: the primary is heard again.
    Unsuspected(HostId),
    /// A takeover is not allowed.
    TakeoverRefused(Refusal),
    /// This instance was granted the term.
    Granted(Term),
    /// Another holds this higher term.
    FencedBy(Term),
    /// The store was restored from an older state, or replaced; until the primary has confirmed the record, nobody can
    /// take over.
    StoreRestored {
        /// Its identity now.
        store: StoreId,
        /// The term it came back with.
        term: Term,
    },
    /// A message of an old term or session was refused.
    Stale(HostId),
    /// A message with numbers that no VM reaches was refused: the peer is broken.
    Implausible(HostId),
    /// An epoch failed validation or did not fit; it is asked for again.
    AskedAgain(EpochRef),
    /// A command cannot be done now, and why.
    Refused(&'static str),
    /// Progress of a full copy.
    Copying {
        /// To whom.
        to: HostId,
        /// Chunks sent.
        chunks: u64,
        /// Bytes still to be copied.
        remaining: u64,
    },
}
