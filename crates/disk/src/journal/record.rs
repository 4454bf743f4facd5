//! One record of the journal: a header of 96 bytes, then the payload, then zeroes up to a multiple of 32 bytes.
//!
//! All numbers are little-endian. Checksums are CRC-32 (IEEE 802.3, as in zlib).
//!
//! ```text
//!  0 magic u32   4 version u8   5 kind u8   6 flags u16   8 volume id u64   16 position u64   24 sequence u64
//! 32 generation u32   36 payload length u32   40 epoch u64   48 term u64   56 offset u64   64 length u64
//! 72 durable u64   80 payload crc u32   84 zero u64   92 header crc u32 (of bytes 0..92)
//! ```

use crate::volume::VolumeError;

/// Size of a header in bytes.
pub const HEADER_BYTES: usize = 96;
/// Records begin at multiples of this many bytes.
pub const ALIGN: u64 = 32;
/// The most payload of one record in bytes; a longer write becomes several records.
pub const PAYLOAD_MAX: usize = 1 << 20;

const MAGIC: u32 = 0x524a_4653; // "SFJR"
/// History: 1 = first.
const VERSION: u8 = 1;
const FLAG_FLUSH: u16 = 1;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Payload was written at `offset`.
    Write = 1,
    /// `length` bytes at `offset` were given back; they read as zeroes.
    Discard = 2,
    /// `length` bytes at `offset` read as zeroes.
    WriteZeroes = 3,
    /// The epoch is complete; `length` counts its operations.
    EpochEnd = 4,
    /// All epochs up to `epoch` are committed.
    Commit = 5,
    /// All epochs after `epoch` that were recorded before this are void.
    Rollback = 6,
    /// A guest flush without a standby: everything before this counts as committed.
    Barrier = 7,
    /// Nothing; fills the ring up to its end.
    Pad = 8,
}

impl Kind {
    const fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            1 => Self::Write,
            2 => Self::Discard,
            3 => Self::WriteZeroes,
            4 => Self::EpochEnd,
            5 => Self::Commit,
            6 => Self::Rollback,
            7 => Self::Barrier,
            8 => Self::Pad,
            _ => return None,
        })
    }
}

/// A record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it says.
    pub kind: Kind,
    /// On [`Kind::EpochEnd`]: the guest flushed in this epoch.
    pub flush: bool,
    /// Whose journal it belongs to.
    pub volume: u64,
    /// Its own logical position in bytes.
    pub position: u64,
    /// Number of the record.
    pub sequence: u64,
    /// How often the journal had been opened when it was written.
    pub generation: u32,
    /// Bytes of payload behind it.
    pub payload_len: u32,
    /// The epoch it belongs to.
    pub epoch: u64,
    /// The term of the primary that made it.
    pub term: u64,
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes in the volume, or the number of operations.
    pub length: u64,
    /// Everything below this position was known to be durable when this was written.
    pub durable: u64,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
}

/// Why a header does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// No record begins here, or its header is torn or rotten.
    Header,
    /// It is whole, but a newer version wrote it.
    Version(u8),
}

impl Header {
    /// Bytes a record with this much payload takes in the ring.
    #[must_use]
    pub const fn span_of(payload_len: usize) -> u64 {
        ((HEADER_BYTES + payload_len) as u64).next_multiple_of(ALIGN)
    }

    /// Bytes this record takes in the ring.
    #[must_use]
    pub const fn span(&self) -> u64 {
        Self::span_of(self.payload_len as usize)
    }

    /// The bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0_u8; HEADER_BYTES];
        let flags = if self.flush { FLAG_FLUSH } else { 0 };
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4] = VERSION;
        b[5] = self.kind as u8;
        b[6..8].copy_from_slice(&flags.to_le_bytes());
        b[8..16].copy_from_slice(&self.volume.to_le_bytes());
        b[16..24].copy_from_slice(&self.position.to_le_bytes());
        b[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        b[32..36].copy_from_slice(&self.generation.to_le_bytes());
        b[36..40].copy_from_slice(&self.payload_len.to_le_bytes());
        b[40..48].copy_from_slice(&self.epoch.to_le_bytes());
        b[48..56].copy_from_slice(&self.term.to_le_bytes());
        b[56..64].copy_from_slice(&self.offset.to_le_bytes());
        b[64..72].copy_from_slice(&self.length.to_le_bytes());
        b[72..80].copy_from_slice(&self.durable.to_le_bytes());
        b[80..84].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32fast::hash(&b[..92]);
        b[92..96].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads a header and checks all that can be checked without knowing where it stood.
    ///
    /// # Errors
    /// [`Bad`].
    pub fn decode(b: &[u8; HEADER_BYTES]) -> Result<Self, Bad> {
        if u32_at(b, 0) != MAGIC || u32_at(b, 92) != crc32fast::hash(&b[..92]) {
            return Err(Bad::Header);
        }
        if b[4] != VERSION {
            return Err(Bad::Version(b[4]));
        }
        let flags = u16::from_le_bytes([b[6], b[7]]);
        let kind = Kind::from_u8(b[5]).ok_or(Bad::Header)?;
        let payload_len = u32_at(b, 36);
        let unknown = flags & !FLAG_FLUSH != 0 || u64_at(b, 84) != 0;
        let payload_ok = match kind {
            Kind::Write => payload_len as usize <= PAYLOAD_MAX && u64::from(payload_len) == u64_at(b, 64),
            Kind::Pad => true,
            _ => payload_len == 0,
        };
        if unknown || !payload_ok {
            return Err(Bad::Header);
        }
        Ok(Self {
            kind,
            flush: flags & FLAG_FLUSH != 0,
            volume: u64_at(b, 8),
            position: u64_at(b, 16),
            sequence: u64_at(b, 24),
            generation: u32_at(b, 32),
            payload_len,
            epoch: u64_at(b, 40),
            term: u64_at(b, 48),
            offset: u64_at(b, 56),
            length: u64_at(b, 64),
            durable: u64_at(b, 72),
            payload_crc: u32_at(b, 80),
        })
    }
}

/// Four bytes at `at`; the caller's slice is long enough by its type or by a check before.
pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(n)
}

/// Eight bytes at `at`.
pub(crate) fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(n)
}

/// Checks that a range lies in a volume and is not empty.
pub(crate) fn check_range(offset: u64, len: u64, capacity: u64) -> Result<(), VolumeError> {
    match offset.checked_add(len) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(VolumeError::OutOfRange {
            offset,
            len,
            capacity,
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            kind: Kind::Write,
            flush: false,
            volume: 7,
            position: 4192,
            sequence: 3,
            generation: 2,
            payload_len: 512,
            epoch: 9,
            term: 1,
            offset: 1024,
            length: 512,
            durable: 4096,
            payload_crc: 5,
        }
    }

    #[test]
    fn round_trip() {
        let h = sample();
        assert_eq!(Header::decode(&h.encode()), Ok(h));
        let end = Header {
            kind: Kind::EpochEnd,
            flush: true,
            payload_len: 0,
            ..h
        };
        assert_eq!(Header::decode(&end.encode()), Ok(end));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut b = good;
            b[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&b).is_err(), "bit {bit}");
        }
    }

    /// The bytes that version 1 wrote: they must be readable for ever.
    #[test]
    fn version_1_bytes() {
        let b = sample().encode();
        assert_eq!(&b[..8], b"SFJR\x01\x01\0\0");
        assert_eq!(
            u32_at(&b, 92),
            0x0000_0000_u32.wrapping_add(crc32fast::hash(&b[..92]))
        );
    }
}
