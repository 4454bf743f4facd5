//! Frames: a fixed header of 64 bytes and a payload, each with a checksum, all numbers little-endian.
//!
//! ```text
//!  0 magic "SFW1"   4 version u16   6 kind u8   7 flags u8
//!  8 vm u64 (hash of the VM's name)            16 term u64
//! 24 epoch u64                                 32 seq u64 (session sequence number; 0: not numbered)
//! 40 ack u64 (all before it arrived)           48 length u32   52 payload CRC-32
//! 56 index u32 (chunk number in its record)    60 header CRC-32 (of bytes 0 to 59)
//! ```
//!
//! A header is believed only after its checksum, version, kind and length have been checked; only then is memory for
//! the payload taken, never more than the limit in force (small until the peer is known).

pub mod hello;

use crate::buf::Buf;
use std::sync::Arc;
use steadfast_types::{Epoch, Term, VmId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 64;
/// First four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"SFW1";
/// Newest protocol version that this code speaks. History: 1, the first.
pub const VERSION_MAX: u16 = 1;
/// Oldest protocol version that this code speaks.
pub const VERSION_MIN: u16 = 1;
/// No frame may carry more payload than this, whatever was negotiated.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;
/// Most payload that a peer may send before its Hello was accepted.
pub const PAYLOAD_BYTES_MAX_UNKNOWN_PEER: usize = 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Opens a connection: versions, names, session (connecting side).
    Hello = 1,
    /// Answer to a Hello (listening side).
    Welcome = 2,
    /// Signs of life with timestamps, acknowledgement and credit; not numbered.
    Heartbeat = 3,
    /// Orderly end of the session; not numbered.
    Bye = 4,
    /// A message of the epoch protocol, opaque here.
    Control = 16,
    /// A chunk of a record.
    Bulk = 17,
}

impl Kind {
    const fn from_wire(v: u8) -> Option<Self> {
        Some(match v {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Heartbeat,
            4 => Self::Bye,
            16 => Self::Control,
            17 => Self::Bulk,
            _ => return None,
        })
    }

    /// Whether frames of this kind carry a session sequence number and are resent until acknowledged.
    #[must_use]
    pub const fn is_numbered(self) -> bool {
        matches!(self, Self::Control | Self::Bulk)
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol.
    #[error(
        "the connection does not speak Steadfast's protocol (starts with {0:02x?}); check address and port"
    )]
    Magic([u8; 4]),
    /// A header damaged on the way.
    #[error("frame header checksum is {found:08x}, expected {expected:08x}: damaged on the wire")]
    HeaderChecksum {
        /// As sent.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A payload damaged on the way.
    #[error(
        "payload checksum of a {length}-byte frame is {found:08x}, expected {expected:08x}: damaged on the wire"
    )]
    PayloadChecksum {
        /// As sent.
        expected: u32,
        /// As computed.
        found: u32,
        /// Length of the payload in bytes.
        length: usize,
    },
    /// A version outside of what this code speaks.
    #[error(
        "frame of protocol version {0}; this host speaks {VERSION_MIN} to {VERSION_MAX}: upgrade the older host"
    )]
    Version(u16),
    /// A kind that does not exist.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A payload beyond the limit in force.
    #[error("frame of {length} bytes, the limit is {limit}")]
    TooLong {
        /// Announced length in bytes.
        length: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// A sequence number where none belongs, or none where one belongs.
    #[error("sequence number {seq} on a frame of kind {kind:?}")]
    Sequence {
        /// The kind.
        kind: Kind,
        /// The number.
        seq: u64,
    },
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    kind: u8,
    flags: u8,
    vm: U64,
    term: U64,
    epoch: U64,
    seq: U64,
    ack: U64,
    length: U32,
    payload_crc: U32,
    index: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Protocol version of the frame.
    pub version: u16,
    /// What the payload is.
    pub kind: Kind,
    /// Meaning depends on the kind.
    pub flags: u8,
    /// [`vm_hash`] of the VM.
    pub vm: u64,
    /// Term of the sender.
    pub term: Term,
    /// Epoch that the frame belongs to, if any.
    pub epoch: Epoch,
    /// Session sequence number, from 1; 0 on frames that are not numbered.
    pub seq: u64,
    /// The sender has received every numbered frame before this one.
    pub ack: u64,
    /// Payload length in bytes.
    pub length: usize,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
    /// Number of the chunk in its record.
    pub index: u32,
}

impl Header {
    /// The header's bytes, checksum included. `length` is below 2^32: frames are bounded where they are made.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            magic: MAGIC,
            version: U16::new(self.version),
            kind: self.kind as u8,
            flags: self.flags,
            vm: U64::new(self.vm),
            term: U64::new(self.term.0),
            epoch: U64::new(self.epoch.0),
            seq: U64::new(self.seq),
            ack: U64::new(self.ack),
            length: U32::new(u32::try_from(self.length).unwrap_or(u32::MAX)),
            payload_crc: U32::new(self.payload_crc),
            index: U32::new(self.index),
            header_crc: U32::ZERO,
        };
        raw.header_crc = U32::new(crc32fast::hash(&raw.as_bytes()[..HEADER_BYTES - 4]));
        zerocopy::transmute!(raw)
    }

    /// Checks and reads a header; `payload_max` is the limit in force for this peer, in bytes.
    ///
    /// # Errors
    /// [`FrameError`] says what is wrong; the connection is then of no further use.
    pub fn decode(bytes: &[u8; HEADER_BYTES], payload_max: usize) -> Result<Self, FrameError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(FrameError::Magic(raw.magic));
        }
        let found = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
        let expected = raw.header_crc.get();
        if found != expected {
            return Err(FrameError::HeaderChecksum { expected, found });
        }
        let version = raw.version.get();
        if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
            return Err(FrameError::Version(version));
        }
        let kind = Kind::from_wire(raw.kind).ok_or(FrameError::Kind(raw.kind))?;
        let length = raw.length.get() as usize;
        let limit = payload_max.min(PAYLOAD_BYTES_MAX);
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        let seq = raw.seq.get();
        if kind.is_numbered() != (seq != 0) {
            return Err(FrameError::Sequence { kind, seq });
        }
        Ok(Self {
            version,
            kind,
            flags: raw.flags,
            vm: raw.vm.get(),
            term: Term(raw.term.get()),
            epoch: Epoch(raw.epoch.get()),
            seq,
            ack: raw.ack.get(),
            length,
            payload_crc: raw.payload_crc.get(),
            index: raw.index.get(),
        })
    }

    /// Compares the payload with its checksum.
    ///
    /// # Errors
    /// [`FrameError::PayloadChecksum`].
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), FrameError> {
        let found = crc32fast::hash(payload);
        if found == self.payload_crc && payload.len() == self.length {
            return Ok(());
        }
        Err(FrameError::PayloadChecksum {
            expected: self.payload_crc,
            found,
            length: payload.len(),
        })
    }
}

/// A numbered frame as the users of a link see it. Clones share the payload.
#[derive(Clone, Debug)]
pub struct Frame {
    /// [`Kind::Control`] or [`Kind::Bulk`].
    pub kind: Kind,
    /// For the user: see [`crate::record`] for bulk frames.
    pub flags: u8,
    /// [`vm_hash`] of the VM.
    pub vm: u64,
    /// Term of the sender; a frame of an old term is delivered with it, so that the protocol can refuse it.
    pub term: Term,
    /// Epoch it belongs to, if any.
    pub epoch: Epoch,
    /// Number of the chunk in its record.
    pub index: u32,
    crc: u32,
    payload: Arc<Buf>,
}

impl Frame {
    /// A message of the epoch protocol.
    #[must_use]
    pub fn control(vm: u64, term: Term, payload: Vec<u8>) -> Self {
        Self::new(Kind::Control, 0, vm, term, Epoch::ZERO, 0, Buf::from(payload))
    }

    pub(crate) fn new(
        kind: Kind,
        flags: u8,
        vm: u64,
        term: Term,
        epoch: Epoch,
        index: u32,
        payload: Buf,
    ) -> Self {
        let crc = crc32fast::hash(&payload);
        Self {
            kind,
            flags,
            vm,
            term,
            epoch,
            index,
            crc,
            payload: Arc::new(payload),
        }
    }

    /// From a header and the payload that was checked against it.
    pub(crate) fn received(h: &Header, payload: Buf) -> Self {
        Self {
            kind: h.kind,
            flags: h.flags,
            vm: h.vm,
            term: h.term,
            epoch: h.epoch,
            index: h.index,
            crc: h.payload_crc,
            payload: Arc::new(payload),
        }
    }

    pub(crate) fn header(&self, version: u16, seq: u64, ack: u64) -> Header {
        Header {
            version,
            kind: self.kind,
            flags: self.flags,
            vm: self.vm,
            term: self.term,
            epoch: self.epoch,
            seq,
            ack,
            length: self.payload.len(),
            payload_crc: self.crc,
            index: self.index,
        }
    }

    /// The payload.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    pub(crate) fn shared_payload(&self) -> Arc<Buf> {
        Arc::clone(&self.payload)
    }

    /// CRC-32 of the payload, checked on receipt.
    #[must_use]
    pub const fn crc(&self) -> u32 {
        self.crc
    }

    /// Bytes on the wire, header included.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }
}

/// Hash of a VM's name for frame headers (FNV-1a, 64 bits): tells streams apart, proves nothing.
#[must_use]
pub fn vm_hash(vm: &VmId) -> u64 {
    vm.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Header {
        let frame = Frame::control(7, Term(3), b"hello".to_vec());
        frame.header(1, 42, 40)
    }

    #[test]
    fn every_single_bit_flip_is_noticed() {
        let bytes = sample().encode();
        assert_eq!(Header::decode(&bytes, 100), Ok(sample()));
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged, usize::MAX).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn limits_and_kinds_are_checked() {
        let h = Header {
            length: 4097,
            ..sample()
        };
        assert_eq!(
            Header::decode(&h.encode(), 4096),
            Err(FrameError::TooLong {
                length: 4097,
                limit: 4096
            })
        );
        let h = Header {
            length: PAYLOAD_BYTES_MAX + 1,
            ..sample()
        };
        assert!(matches!(
            Header::decode(&h.encode(), usize::MAX),
            Err(FrameError::TooLong { .. })
        ));
        let h = Header { seq: 0, ..sample() };
        assert!(matches!(
            Header::decode(&h.encode(), 4096),
            Err(FrameError::Sequence { .. })
        ));
        let h = Header {
            version: 9,
            ..sample()
        };
        assert_eq!(Header::decode(&h.encode(), 4096), Err(FrameError::Version(9)));
        assert!(matches!(
            sample().check_payload(b"hellO"),
            Err(FrameError::PayloadChecksum { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::array::uniform32(any::<u8>()), magic in any::<bool>()) {
            let mut all = [0u8; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            if magic { all[..4].copy_from_slice(&MAGIC); }
            let _ = Header::decode(&all, 4096);
            let crc = crc32fast::hash(&all[..60]);
            all[60..].copy_from_slice(&crc.to_le_bytes());
            let _ = Header::decode(&all, 4096);
        }
    }
}
