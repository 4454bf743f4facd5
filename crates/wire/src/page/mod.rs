//! Encodings of one 4 KiB guest page.
//!
//! ```text
//! page record:  tag u8 (class in bits 0 to 3, bit 7: a checksum follows)
//!               page number: zigzag varint, difference to the record before (first: to 0)
//!               [CRC-32 of the whole new content, if bit 7]
//!               body
//! class 0 zero     no body
//! class 1 fill     8 bytes, repeated
//! class 2 runs     varint n, n bytes of runs: { varint skip, varint count (1..), count * 8 new bytes }, in words of 8
//! class 3 runs+lz4 varint raw, varint n, n bytes: LZ4 block of `raw` bytes of runs
//! class 4 lz4      varint n, n bytes: LZ4 block of 4096 bytes
//! class 5 raw      4096 bytes
//! ```
//!
//! Runs carry the new bytes, not a XOR: applying a page record twice gives the same content, so an apply that was
//! interrupted is simply done again (I10). What the runs leave out is what the receiver has from the record before
//! (W3). A page whose content did not change since it was last sent has no record at all.
//!
//! Every n-th delta carries a checksum of the whole page, so that a divergence of the two memories, which should be
//! impossible, would be found and not be carried on.

pub mod codec;
pub mod delta;
pub mod gain;
pub mod shadow;

pub use codec::{PageCodec, PageError, PageOp};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Content of a page.
pub type Page = [u8; PAGE_BYTES];
/// Page numbers stay below this (2^40 pages: 4 PiB of guest physical addresses).
pub const GFN_MAX: u64 = 1 << 40;

/// How a page went over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// All bytes zero.
    Zero = 0,
    /// One word of eight bytes, repeated.
    Fill = 1,
    /// The changed words.
    Runs = 2,
    /// The changed words, compressed.
    RunsLz4 = 3,
    /// The whole page, compressed.
    Lz4 = 4,
    /// The whole page as it is.
    Raw = 5,
    /// Not sent: its content is what was sent last.
    Same = 6,
}

/// Number of classes.
pub const CLASSES: usize = 7;

/// Pages and bytes per class; the index is `Class as usize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Pages of each class.
    pub pages: [u64; CLASSES],
    /// Bytes of their records.
    pub bytes: [u64; CLASSES],
    /// Pages for which LZ4 was tried.
    pub lz4_tried: u64,
    /// Pages for which LZ4 was not tried because their neighbours had not gained.
    pub lz4_skipped: u64,
    /// Pages that pushed another out of the cache of sent content.
    pub evicted: u64,
}

impl PageStats {
    /// Pages of all classes.
    #[must_use]
    pub fn pages_total(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// Bytes of all page records.
    #[must_use]
    pub fn bytes_total(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// Bytes sent per dirty byte (4096 for each page that was given to the encoder).
    #[must_use]
    pub fn wire_ratio(&self) -> f64 {
        self.bytes_total() as f64 / (self.pages_total().max(1) as f64 * PAGE_BYTES as f64)
    }
}

/// Settings of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodeConfig {
    /// Memory for the content that was last sent, in bytes; 0 switches deltas off.
    pub shadow_bytes_max: usize,
    /// Use LZ4 where it gains.
    pub lz4: bool,
    /// What a byte on the wire costs in nanoseconds: 8 for 1 Gbit/s, 0.8 for 10 Gbit/s. LZ4 is used where the bytes it
    /// saves are worth more than the time it takes, both measured.
    pub wire_ns_per_byte: f64,
    /// Every n-th delta carries a checksum of its whole page; 0: none.
    pub check_every: u32,
    /// Size of a chunk's payload in bytes.
    pub chunk_bytes: usize,
}

impl Default for EncodeConfig {
    fn default() -> Self {
        Self {
            shadow_bytes_max: 40 << 20,
            lz4: true,
            wire_ns_per_byte: 8.0,
            check_every: 64,
            chunk_bytes: 1 << 20,
        }
    }
}

/// The one word that the page repeats, if it does.
#[must_use]
pub fn fill_word(page: &Page) -> Option<u64> {
    let (words, _) = page.as_chunks::<8>();
    let first = u64::from_ne_bytes(words[0]);
    // Most pages differ early: look at the first lines before the whole page is read.
    if words[1..8].iter().any(|w| u64::from_ne_bytes(*w) != first) {
        return None;
    }
    let differs = words
        .iter()
        .fold(0, |acc, w| acc | (u64::from_ne_bytes(*w) ^ first));
    (differs == 0).then_some(first)
}
