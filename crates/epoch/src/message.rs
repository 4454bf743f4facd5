//! The protocol's messages as plain enums: no encoding (that is the `wire` crate's), no bulk data.
//!
//! Every message carries the sender's term and the number of the session it belongs to. A session is one
//! conversation of one primary instance with one standby, opened by [`Body::Hello`]; numbers grow per primary
//! instance. A message of an older term or session is refused, so frames that were delayed, repeated or replayed
//! can neither be acted on nor be counted.
//!
//! ```text
//!   primary                                   standby
//!   Hello ------------------------------------>
//!         <------------------------------------ Welcome { what I have }
//!   Resume { go on after E } ----------------->            (state matches: nothing is copied)
//!   or Join, Chunk.., Epoch { base } --------->            (state does not match: full copy while the VM runs)
//!         <------------------------------------ ChunkAck / Ack
//!   Epoch.. / Heartbeat.. -------------------->
//!         <------------------------------------ Ack { staged, durable, echo } | Resend { after }
//! ```

use crate::arbiter::Instance;
use steadfast_types::{Epoch, Term};

/// One epoch of one history: the number, and the term of the primary that produced it. Two records with the same
/// reference are the same record and have the same past.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpochRef {
    /// The epoch's number.
    pub epoch: Epoch,
    /// The term of the primary that sealed it.
    pub term: Term,
}

impl EpochRef {
    /// Before the first epoch.
    pub const ZERO: Self = Self {
        epoch: Epoch::ZERO,
        term: Term::ZERO,
    };

    /// Shorthand for tests and for building references.
    #[must_use]
    pub const fn new(epoch: u64, term: u64) -> Self {
        Self {
            epoch: Epoch(epoch),
            term: Term(term),
        }
    }
}

impl std::fmt::Display for EpochRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.epoch, self.term)
    }
}

/// A message between two replicas of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The sender's term: its authority, not the term in which an epoch was made.
    pub term: Term,
    /// Session number, chosen by the primary, echoed by the standby; 0 outside of a session.
    pub session: u64,
    /// What is said.
    pub body: Body,
}

impl Message {
    /// Whether a sound peer could say it. Every term and epoch is below [`Term::LIMIT`] and [`Epoch::LIMIT`]: beyond them
    /// numbers would stop growing, or a session's number (made of its term) would be one of the past. An epoch follows the
    /// one before it: a copy that ends with one that follows a later one would be a window that goes round in a circle.
    #[must_use]
    pub fn is_plausible(&self) -> bool {
        let e = |e: Epoch| e < Epoch::LIMIT;
        let t = |t: Term| t < Term::LIMIT;
        let r = |r: EpochRef| e(r.epoch) && t(r.term);
        let c = |c: Cursors| e(c.sent) && e(c.committed) && e(c.released) && e(c.stable);
        let body = match &self.body {
            Body::Resume { after } | Body::Resend { after } => r(*after),
            Body::Epoch(h) => {
                let follows = h.prev.epoch.next() == h.epoch.epoch && h.prev.term <= h.epoch.term;
                r(h.epoch) && r(h.prev) && c(h.cursors) && follows
            }
            Body::Heartbeat { cursors, .. } => c(*cursors),
            Body::Handover { at, released } => r(*at) && e(*released),
            Body::Welcome(w) => w.staged.is_none_or(r) && r(w.applied) && e(w.durable) && r(w.disk),
            Body::Ack {
                staged, durable, top, ..
            } => r(*staged) && e(*durable) && t(*top),
            Body::PollReply { staged, .. } => r(*staged),
            Body::Hello
            | Body::Join { .. }
            | Body::Chunk { .. }
            | Body::ChunkAck { .. }
            | Body::Alive { .. }
            | Body::NoSession
            | Body::Fenced
            | Body::Poll => true,
        };
        body && t(self.term) && self.session >> 24 < Term::LIMIT.0
    }
}

/// The primary's cursors, carried by every epoch and heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursors {
    /// Newest sealed epoch that was sent to this standby.
    pub sent: Epoch,
    /// Newest committed epoch: the standby applies up to here.
    pub committed: Epoch,
    /// Newest epoch whose outputs were released.
    pub released: Epoch,
    /// Every in-sync standby has staged up to here: older records need not be kept to serve another standby.
    pub stable: Epoch,
}

/// Marks an epoch that completes a full copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Which copy.
    pub join: u64,
    /// How many chunks it has; all must have arrived.
    pub chunks: u64,
}

/// The head of one epoch's record; the runtime sends the sealed record behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochHeader {
    /// Which epoch.
    pub epoch: EpochRef,
    /// The epoch it follows; the standby accepts only what follows its own tip.
    pub prev: EpochRef,
    /// The guest flushed a disk in it: it commits only when its disk writes are fsynced on both sides.
    pub flush: bool,
    /// Size of the sealed record in bytes.
    pub bytes: u64,
    /// Set when this epoch completes a full copy.
    pub base: Option<Base>,
    /// The primary's cursors.
    pub cursors: Cursors,
}

/// What a standby has, in answer to a Hello.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// Newest epoch of the unbroken staged sequence; `None`: no usable memory state.
    pub staged: Option<EpochRef>,
    /// Newest epoch applied; it cannot go back behind it.
    pub applied: EpochRef,
    /// The disk writes of every flush epoch up to here are fsynced.
    pub durable: Epoch,
    /// A full copy that was under way: its number and the next chunk expected.
    pub join: Option<(u64, u64)>,
    /// Which process this is: one that was started anew cannot vouch for what an earlier one did.
    pub instance: Instance,
    /// Newest epoch that its disk volumes stand at (also without memory state), for a delta re-sync.
    pub disk: EpochRef,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Primary: opens a session.
    Hello,
    /// Primary: go on after this epoch; drop what was staged beyond it.
    Resume {
        /// The last epoch both have.
        after: EpochRef,
    },
    /// Primary: forget your state, a full copy begins (or goes on at `next`).
    Join {
        /// Number of this copy, unique per primary instance.
        join: u64,
        /// First chunk that will be sent.
        next: u64,
    },
    /// Primary: one piece of the full copy; bulk behind it.
    Chunk {
        /// Number of the copy.
        join: u64,
        /// Number of the chunk, from 0.
        seq: u64,
    },
    /// Primary: one sealed epoch; bulk behind it.
    Epoch(EpochHeader),
    /// Primary: I am alive, and where I am.
    Heartbeat {
        /// Grows with every heartbeat; echoed in [`Body::Ack`].
        seq: u64,
        /// The primary's cursors.
        cursors: Cursors,
        /// The standby's place among the in-sync ones, so that not all ask at once: the first asks first and
        /// speculates, the others wait a little longer. `None`: not in sync. A hint; the store decides.
        rank: Option<u8>,
    },
    /// Primary: the right is yours (the store's record says so); go on after this epoch.
    Handover {
        /// The epoch the guest was stopped at.
        at: EpochRef,
        /// Everything up to here has left this host.
        released: Epoch,
    },
    /// Standby: what I have.
    Welcome(Welcome),
    /// Standby: I could repeat everything up to `staged`.
    Ack {
        /// Newest epoch of the unbroken staged sequence.
        staged: EpochRef,
        /// The disk writes of every flush epoch up to here are fsynced.
        durable: Epoch,
        /// The last heartbeat seen.
        echo: u64,
        /// The highest term it has seen or proposed: a proposal whose outcome is unknown may still arrive at the
        /// store; the primary rises above it.
        top: Term,
    },
    /// Standby: chunks before `next` arrived.
    ChunkAck {
        /// Number of the copy.
        join: u64,
        /// Next chunk expected.
        next: u64,
        /// The last heartbeat seen.
        echo: u64,
    },
    /// Standby: bulk of yours keeps arriving. On a slow link a record takes longer than the detector waits, and heartbeats
    /// wait behind it; that is a busy link, not a dead host (I7).
    Alive {
        /// Pieces of bulk that arrived in this session. Grows.
        heard: u64,
    },
    /// Standby: send again everything after this epoch.
    Resend {
        /// The newest epoch that arrived whole and in order.
        after: EpochRef,
    },
    /// Standby: there is no session; say Hello.
    NoSession,
    /// Either: your term is old; the message's term is the one I know.
    Fenced,
    /// Standby to standby, before it asks for the grant where fewer acknowledgements than standbys are required:
    /// what have you staged, and will you acknowledge nothing more of this term?
    Poll,
    /// The answer: `staged` is final for this term if `promised`.
    PollReply {
        /// Newest epoch of the unbroken staged sequence.
        staged: EpochRef,
        /// Whether nothing more of this term will be acknowledged.
        promised: bool,
    },
}
