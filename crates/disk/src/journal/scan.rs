//! Reading the ring: the scan at opening, and single payloads later.

use super::record::{ALIGN, Bad, HEADER_BYTES, Header, Kind, PAYLOAD_MAX};
use super::ring::Position;
use super::{RING_START, Superblock};
use crate::storage::StorageFile;
use crate::volume::VolumeError;

/// How much is read at a time; holds any record whole.
const WINDOW: u64 = 4 << 20;

/// What the scan found.
#[derive(Debug)]
pub struct Scan {
    /// All valid records in order, pads left out.
    pub records: Vec<Header>,
    /// Behind the last of them.
    pub tail: Position,
    /// Number of the next record.
    pub sequence: u64,
    /// Whether something that looks like a torn record stood at the tail.
    pub torn: bool,
}

struct Window<'a> {
    file: &'a dyn StorageFile,
    ring: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// `len` bytes at ring offset `at`; fewer at the ring's end.
    fn get(&mut self, at: u64, len: usize) -> Result<&[u8], VolumeError> {
        let len = (len as u64).min(self.ring - at);
        let have = at >= self.start && at + len <= self.start + self.bytes.len() as u64;
        if !have {
            let n = WINDOW.min(self.ring - at);
            self.bytes.resize(n as usize, 0);
            self.start = at;
            let pos = RING_START + at;
            // One more try: a read may fail once for reasons that pass.
            if self.file.read_at(pos, &mut self.bytes).is_err() {
                self.file
                    .read_at(pos, &mut self.bytes)
                    .map_err(VolumeError::io("read", "journal", pos))?;
            }
        }
        let from = (at - self.start) as usize;
        Ok(&self.bytes[from..from + len as usize])
    }
}

fn header_in(bytes: &[u8]) -> Result<Header, Bad> {
    let bytes: &[u8; HEADER_BYTES] = bytes
        .get(..HEADER_BYTES)
        .and_then(|b| b.try_into().ok())
        .ok_or(Bad::Header)?;
    Header::decode(bytes)
}

/// Walks the ring from the superblock's trim position to the first record that does not count. With `trusting`
/// (a broken variant for tests) payload checksums and generations are not looked at.
///
/// # Errors
/// [`VolumeError::Io`]; [`VolumeError::Damaged`] when the chain ends before something that was durable;
/// [`VolumeError::Version`].
pub fn scan(file: &dyn StorageFile, sb: &Superblock, trusting: bool) -> Result<Scan, VolumeError> {
    let mut window = Window {
        file,
        ring: sb.ring,
        start: 0,
        bytes: Vec::new(),
    };
    let mut found = Scan {
        records: Vec::new(),
        tail: Position(sb.trim),
        sequence: sb.trim_sequence,
        torn: false,
    };
    let mut generation = 0;
    let mut durable = sb.trim;
    loop {
        let mut at = found.tail.0;
        let room = sb.ring - at % sb.ring;
        if room < HEADER_BYTES as u64 {
            at += room;
        }
        let header = match header_in(window.get(at % sb.ring, HEADER_BYTES)?) {
            Ok(h) => h,
            Err(Bad::Version(found)) => {
                return Err(VolumeError::Version {
                    what: "journal record",
                    found: found.into(),
                    known: 1,
                });
            }
            Err(Bad::Header) => break,
        };
        let next = at.saturating_add(header.span());
        let mine = header.volume == sb.volume && header.position == at && header.sequence == found.sequence;
        let current = trusting || (header.generation >= generation && header.generation <= sb.generation);
        let inside = next <= sb.trim + sb.ring && at % sb.ring + header.span() <= sb.ring;
        if !(mine && current && inside && range_ok(&header, sb.capacity)) {
            found.torn |= header.volume == sb.volume && header.position >= at;
            break;
        }
        if header.kind == Kind::Write && !trusting {
            let bytes = window.get(at % sb.ring, header.span() as usize)?;
            let payload = &bytes[HEADER_BYTES..HEADER_BYTES + header.payload_len as usize];
            if crc32fast::hash(payload) != header.payload_crc {
                found.torn = true;
                break;
            }
        }
        generation = header.generation;
        durable = durable.max(header.durable);
        found.tail = Position(next);
        found.sequence += 1;
        if header.kind != Kind::Pad {
            found.records.push(header);
        }
    }
    if !trusting && (durable > found.tail.0 || later_proof(&mut window, sb, found.tail.0)?) {
        return Err(VolumeError::Damaged {
            what: "journal record",
            at: found.tail.0,
        });
    }
    Ok(found)
}

fn range_ok(h: &Header, capacity: u64) -> bool {
    match h.kind {
        Kind::Write | Kind::Discard | Kind::WriteZeroes => {
            h.offset.checked_add(h.length).is_some_and(|end| end <= capacity)
        }
        _ => true,
    }
}

/// Whether a whole record stands behind the tail that was written when more than the tail was durable already: then
/// the tail is not a torn write but damage.
fn later_proof(window: &mut Window<'_>, sb: &Superblock, tail: u64) -> Result<bool, VolumeError> {
    let mut at = tail.next_multiple_of(ALIGN);
    let end = sb.trim + sb.ring;
    while at < end {
        let chunk_len = (sb.ring - at % sb.ring).min(end - at).min(WINDOW - 4096);
        let chunk = window.get(at % sb.ring, chunk_len as usize)?;
        let mut i = 0;
        while i + HEADER_BYTES <= chunk.len() {
            if chunk[i] == b'S'
                && let Ok(h) = header_in(&chunk[i..])
                && h.volume == sb.volume
                && h.position == at + i as u64
                && h.generation <= sb.generation
                && h.durable > tail
            {
                return Ok(true);
            }
            i += ALIGN as usize;
        }
        // Headers that straddle two chunks are looked at again with the next one.
        let done = chunk_len.saturating_sub(HEADER_BYTES as u64) / ALIGN * ALIGN;
        at += if at % sb.ring + chunk_len == sb.ring || done == 0 {
            chunk_len
        } else {
            done
        };
    }
    Ok(false)
}

/// Reads one record's payload again and checks all of it.
///
/// # Errors
/// [`VolumeError::Io`]; [`VolumeError::Damaged`] if it is not the record that was written there.
pub fn read_payload(
    file: &dyn StorageFile,
    volume: u64,
    ring: u64,
    at: Position,
    len: usize,
) -> Result<Vec<u8>, VolumeError> {
    let damaged = VolumeError::Damaged {
        what: "journal record",
        at: at.0,
    };
    if len > PAYLOAD_MAX {
        return Err(damaged);
    }
    let mut bytes = vec![0; HEADER_BYTES + len];
    let pos = RING_START + at.0 % ring;
    if file.read_at(pos, &mut bytes).is_err() {
        file.read_at(pos, &mut bytes)
            .map_err(VolumeError::io("read", "journal", pos))?;
    }
    match header_in(&bytes) {
        Ok(h)
            if h.volume == volume
                && h.position == at.0
                && h.kind == Kind::Write
                && h.payload_len as usize == len
                && h.payload_crc == crc32fast::hash(&bytes[HEADER_BYTES..]) =>
        {
            bytes.drain(..HEADER_BYTES);
            Ok(bytes)
        }
        _ => Err(damaged),
    }
}
