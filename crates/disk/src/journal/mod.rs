//! The epoch journal: one preallocated file, a ring of checksummed records, written in order and synced in groups.
//!
//! ```text
//!  file:  | super 0 | super 0' | super 1 | super 1' | ring ..................................... |
//!  ring:        free    | trim ====> applied ... committed ... synced ... written ... head |  free
//!                         (records of epochs not yet safe in the image)
//! ```
//!
//! Positions are logical byte counts that only grow; position P stands at ring offset P modulo the ring's size. A
//! record counts only when its header and payload checksums hold, it carries this volume's id, its own position, the
//! next sequence number and a generation that does not go back. Whatever ends that chain is the tail: a torn or
//! lost write. A later record that says that more than this was durable already turns "torn" into "damaged", which
//! is an error and never silently dropped.
//!
//! The layout in bytes is in `docs/disk-format.md`. The total size is fixed at creation: [`ring::Ring`] answers
//! [`JournalFull`](crate::volume::VolumeError::JournalFull) instead of growing. One file instead of many segments,
//! because then nothing is created, renamed or allocated while the VM runs, and a sync writes no metadata.
//!
//! Nothing here holds a lock or a thread; `volume` does.

pub mod record;
pub mod ring;
pub mod scan;
pub mod superblock;
pub mod terms;

pub use record::{ALIGN, HEADER_BYTES, Header, Kind, PAYLOAD_MAX};
pub use ring::{Batch, Position, Ring};
pub use superblock::{State, Superblock};
pub use terms::Terms;

/// Where the ring begins in the file, in bytes: behind four superblock slots.
pub const RING_START: u64 = 4 * superblock::SLOT_BYTES as u64;

/// Smallest ring, in bytes.
pub const RING_MIN: u64 = 1 << 20;

/// Kept free for records without payload (ends of epochs, commits, rollbacks), so that a ring full of writes can
/// still be committed, applied and trimmed. In bytes.
pub const RESERVE: u64 = 128 * 1024;
