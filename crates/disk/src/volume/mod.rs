//! A replicated disk: on each host that holds a replica, a raw image plus an epoch journal.
//!
//! ```text
//!  guest write ─> open epoch (journal + overlay) ─seal─> sealed ─sent─> standby: stage (journal)
//!                                                           │  flush in it: both journals synced (I5)
//!                                                        commit ─> apply to the image ─> checkpoint ─> trim
//! ```
//!
//! [`Volume`] is the primary's side, [`Replica`] the standby's; both run one [`Core`] on two threads (journal, apply),
//! so that neither guest requests nor the protocol wait for a disk. `docs/disk-format.md` has the layouts, the life of
//! a write, and what a crash at each step leaves.
//!
//! Invariants: I3 (image and journal are exactly one committed epoch after recovery), I4 (no committed epoch is
//! dropped), I5 (flushed and acknowledged survives power loss), I6 (cursors in order), asserted in [`Core`] in
//! release builds. Bounds: journal size, bytes in memory, number of operations and of epochs; beyond them callers get
//! [`VolumeError::JournalFull`] or [`VolumeError::Throttled`] and wait.

mod apply;
pub mod bench;
mod block;
mod core;
mod error;
mod health;
mod jobs;
mod op;
mod overlay;
mod read;
mod recover;
mod replica;
mod runtime;
mod shared;

pub use apply::{ApplyJob, Checkpoint, Files};
pub use block::VolumeBlock;
pub use core::{Core, PEERS};
pub use error::VolumeError;
pub use health::Health;
pub use op::{EpochOp, EpochWrites, Sealed};
pub use overlay::{Overlay, Piece};
pub use read::{ReadFault, ReadPlan};
pub use recover::{format, is_laid_out, open};
pub use replica::Replica;
pub(crate) use replica::read_view;
pub(crate) use runtime::Shared;
pub use runtime::{Notify, Volume};
pub use shared::SharedVolume;

use crate::journal::State;
use steadfast_types::{Epoch, Term};

/// How a volume is run. The bounds hold from the moment it is opened; `journal_bytes` only counts when it is laid out.
#[derive(Clone, Debug)]
pub struct Options {
    /// Identity of the volume, the same on all its replicas.
    pub volume_id: u64,
    /// Size of the journal in bytes.
    pub journal_bytes: u64,
    /// The most bytes of writes held in memory.
    pub memory_bytes_max: usize,
    /// The most operations that are not trimmed yet (each costs about 150 bytes of memory).
    pub ops_max: usize,
    /// The most epochs that are not trimmed yet.
    pub epochs_max: usize,
    /// Bytes written to the journal at a time.
    pub batch_bytes: usize,
    /// Bytes applied to the image at a time.
    pub apply_bytes: u64,
    /// Committed epochs are applied at the latest after this time, in milliseconds; earlier under pressure.
    pub apply_delay_ms: u64,
    /// A checkpoint is made at the latest after this time, in milliseconds; earlier under pressure.
    pub checkpoint_ms: u64,
    /// How long a guest request may wait for room before it fails, in milliseconds.
    pub wait_ms: u64,
    /// Check blocks against their checksums when the guest reads them whole.
    pub verify_reads: bool,
    /// A deliberately broken variant, for tests that must catch it.
    #[doc(hidden)]
    pub sabotage: Sabotage,
}

impl Options {
    /// Defaults for a volume: 256 MiB of journal, 24 MiB of memory.
    #[must_use]
    pub const fn new(volume_id: u64) -> Self {
        Self {
            volume_id,
            journal_bytes: 256 << 20,
            memory_bytes_max: 24 << 20,
            ops_max: 64 * 1024,
            epochs_max: 8192,
            batch_bytes: 4 << 20,
            apply_bytes: 8 << 20,
            apply_delay_ms: 50,
            checkpoint_ms: 1000,
            wait_ms: 60_000,
            verify_reads: true,
            sabotage: Sabotage::None,
        }
    }
}

/// Deliberately broken variants. Each must be caught by the crash sweep.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// Right.
    #[default]
    None,
    /// Trims the journal without syncing the image.
    TrimBeforeImageSync,
    /// Applies epochs whose journal records are not durable.
    ApplyBeforeDurable,
    /// Believes records without looking at payload checksums and generations.
    TrustRecords,
    /// Calls the journal synced without a sync.
    SkipJournalSync,
}

/// When a guest flush completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// At once: the epoch commits only when it is durable everywhere, and nothing it says gets out before.
    Protected,
    /// When everything before it is durable in this host's journal: there is no standby, and outputs are not held.
    Alone,
}

/// Where a replica stands. All cursors are inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The last sealed or staged epoch.
    pub tip: Epoch,
    /// The term in which it was made.
    pub tip_term: Term,
    /// Durable in the journal.
    pub synced: Epoch,
    /// Committed.
    pub committed: Epoch,
    /// Committed, and this host will know it after power loss.
    pub durable_commit: Epoch,
    /// In the image.
    pub applied: Epoch,
    /// Bytes of journal in use.
    pub journal_used: u64,
    /// Bytes of journal.
    pub journal_size: u64,
    /// Bytes of writes held in memory.
    pub memory_bytes: usize,
    /// Whether the replica is whole.
    pub state: State,
}

/// What opening a replica found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Complete epochs up to here can be committed, or dropped if they are beyond `last_committed`.
    pub last_staged: Epoch,
    /// The term of that epoch.
    pub staged_term: Term,
    /// Known to be committed. More may have been: the peer or the store knows.
    pub last_committed: Epoch,
    /// The term of that epoch.
    pub committed_term: Term,
    /// In the image; always equal to `last_committed` after opening.
    pub last_applied: Epoch,
    /// The journal ended in something unfinished, which was dropped.
    pub torn_tail: bool,
    /// Writes of an open epoch that a guest flush made durable while there was no standby were applied beyond
    /// `last_committed`.
    pub alone_tail: bool,
    /// Whether the replica is whole.
    pub state: State,
}
