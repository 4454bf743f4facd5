//! Everything between two hosts for the epoch stream: framing, checksums, page encodings, and links over several
//! network paths at once.
//!
//! ```text
//!  primary                                                              standby
//!  sealed pages, state, disk writes                                     guest memory, state, journal
//!     | record::Encoder  (page::PageCodec: zero, fill, delta, LZ4, raw)     ^ record::StagedRecord::apply
//!     v                                                                     | record::Stager (validates whole)
//!  frame::Frame: fixed header, two checksums                            frame::Frame
//!     |                                                                     ^
//!     v link::Link: session numbers, resend, credit                         | link::Link: duplicates out, in order
//!     +---- path 0 (TCP or MPTCP, TLS 1.3) ---------------------------------+
//!     +---- path 1 ---------------------------------------------------------+
//! ```
//!
//! Invariants of this crate:
//! - W1 decoding is total: any bytes give a value or a typed error, never a panic, never an allocation beyond the
//!   stated limit (I9).
//! - W2 a record is applied only after all of it arrived and was validated (I3).
//! - W3 a delta is applied only on the content that it was made against: records are numbered without gaps.
//! - W4 within a session every frame is delivered exactly once and in order, whatever the paths do.
//! - W5 every queue has a bound in bytes; a full one says so to its caller.
//!
//! The format is written down in `docs/wire-format.md`.

pub mod bench;
pub mod buf;
pub mod frame;
pub mod fuzz;
pub mod link;
mod nonce;
pub mod page;
pub mod record;
mod varint;

pub use buf::{Buf, BufPool};
pub use frame::{Frame, Kind, vm_hash};

pub use link::{Event, Link, LinkConfig, LinkSender};
pub use page::{EncodeConfig, Page};
pub use record::{Encoder, PageSink, PageSource, RecordId, StagedRecord, Stager};
