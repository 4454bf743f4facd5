//! Requests of the guest: parsing (virtio 1.2, 5.2.6) and progress in parts.
//!
//! A request is served in parts of at most [`BUFFER_MAX`] bytes, so that its size, which the guest chooses, does not
//! decide how much memory it takes.

use super::super::DeviceError;
use super::super::common::{Chain, driver_error};
use super::buffer::BUFFER_MAX;
use crate::memory::GuestMemory;
use std::io;

pub(super) const SECTOR: u64 = 512;
pub(super) const HEADER: u32 = 16;
pub(super) const SERIAL: usize = 20;
/// Ranges in one discard or write-zeroes request.
pub(super) const SEGMENTS_MAX: u32 = 16;
/// Sectors in one such range.
pub(super) const SEGMENT_SECTORS_MAX: u32 = 1 << 21;

pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write zeroes",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// What a chain asks for.
pub(super) enum Parsed {
    /// Goes to the backend.
    Io { kind: Kind, ranges: Vec<Range> },
    /// The serial number.
    GetId,
    /// Answered at once with this status.
    Answer(u8),
}

/// Limits that a request is checked against.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) capacity_bytes: u64,
    pub(super) read_only: bool,
}

/// Reads a request.
pub(super) fn parse(
    device: &str,
    memory: &GuestMemory,
    chain: &Chain,
    limits: Limits,
) -> Result<Parsed, DeviceError> {
    let mut header = [0u8; HEADER as usize];
    let got = chain
        .read_at(memory, 0, &mut header)
        .map_err(|e| driver_error(device, e))?;
    if got < header.len() {
        return Err(driver_error(
            device,
            format_args!("request header of {got} bytes"),
        ));
    }
    if chain.writable_len() == 0 {
        return Err(driver_error(device, "request without a place for its status"));
    }
    let sector = u64::from_le_bytes(take(&header, 8));
    let request = u32::from_le_bytes(take(&header, 0));
    Ok(match request {
        0 => data(Kind::Read, sector, chain.writable_len() - 1, limits),
        1 if limits.read_only => Parsed::Answer(S_IOERR),
        1 => data(Kind::Write, sector, chain.readable_len() - HEADER, limits),
        4 => Parsed::Io {
            kind: Kind::Flush,
            ranges: Vec::new(),
        },
        8 => Parsed::GetId,
        11 | 13 if limits.read_only => Parsed::Answer(S_IOERR),
        11 => segments(device, Kind::Discard, memory, chain, limits)?,
        13 => segments(device, Kind::WriteZeroes, memory, chain, limits)?,
        _ => Parsed::Answer(S_UNSUPP),
    })
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (o, b) in out.iter_mut().zip(bytes.iter().skip(at)) {
        *o = *b;
    }
    out
}

fn inside(sector: u64, len: u64, limits: Limits) -> Option<Range> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    (end <= limits.capacity_bytes).then_some(Range {
        offset,
        len,
        unmap: false,
    })
}

fn data(kind: Kind, sector: u64, len: u32, limits: Limits) -> Parsed {
    let len = u64::from(len);
    match inside(sector, len, limits) {
        Some(range) if len.is_multiple_of(SECTOR) && len > 0 => Parsed::Io {
            kind,
            ranges: vec![range],
        },
        _ => Parsed::Answer(S_IOERR),
    }
}

fn segments(
    device: &str,
    kind: Kind,
    memory: &GuestMemory,
    chain: &Chain,
    limits: Limits,
) -> Result<Parsed, DeviceError> {
    let len = chain.readable_len() - HEADER;
    if len == 0 || !len.is_multiple_of(16) || len / 16 > SEGMENTS_MAX {
        return Ok(Parsed::Answer(S_IOERR));
    }
    let mut raw = vec![0; len as usize];
    chain
        .read_at(memory, HEADER, &mut raw)
        .map_err(|e| driver_error(device, e))?;
    let mut ranges = Vec::with_capacity(raw.len() / 16);
    for segment in raw.chunks_exact(16) {
        let sectors = u32::from_le_bytes(take(segment, 8));
        let flags = u32::from_le_bytes(take(segment, 12));
        // Bit 0 is unmap, which only write-zeroes has.
        if flags > 1 || (flags == 1 && kind == Kind::Discard) {
            return Ok(Parsed::Answer(S_UNSUPP));
        }
        let range = inside(
            u64::from_le_bytes(take(segment, 0)),
            u64::from(sectors) * SECTOR,
            limits,
        );
        match range {
            Some(range) if sectors <= SEGMENT_SECTORS_MAX => ranges.push(Range {
                unmap: flags == 1,
                ..range
            }),
            _ => return Ok(Parsed::Answer(S_IOERR)),
        }
    }
    Ok(Parsed::Io { kind, ranges })
}

/// What is done next for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Transfer through a buffer: disk offset, position in the guest's data, length.
    Data { offset: u64, position: u64, len: usize },
    /// Zeroes through a buffer.
    Zeroes { offset: u64, len: usize },
    /// One backend operation over a whole range.
    Whole(Range),
    /// A flush.
    Sync,
}

/// A request of the guest that is not answered yet.
pub(super) struct Flight {
    pub(super) queue: u16,
    pub(super) chain: Chain,
    pub(super) kind: Kind,
    pub(super) ranges: Vec<Range>,
    /// Rising with acceptance; the order in which requests are issued again.
    pub(super) order: u64,
    /// A flush follows the data (write-through).
    pub(super) sync: bool,
    /// Zeroes are written from buffers.
    pub(super) emulate: bool,
    /// Parts in the backend.
    pub(super) outstanding: u32,
    pub(super) error: Option<io::Error>,
    /// In the backlog.
    pub(super) queued: bool,
    range: usize,
    position: u64,
    synced: bool,
}

impl Flight {
    pub(super) fn new(queue: u16, chain: Chain, kind: Kind, ranges: Vec<Range>, order: u64) -> Self {
        Self {
            queue,
            chain,
            kind,
            ranges,
            order,
            sync: kind == Kind::Flush,
            emulate: false,
            outstanding: 0,
            error: None,
            queued: true,
            range: 0,
            position: 0,
            synced: false,
        }
    }

    /// Starts over; all operations can be repeated.
    pub(super) fn restart(&mut self) {
        self.error = None;
        self.range = 0;
        self.position = 0;
        self.synced = false;
    }

    /// The next part that can be submitted now; `None` when there is none (yet).
    pub(super) fn peek(&self) -> Option<Part> {
        if self.error.is_some() {
            return None;
        }
        if let Some(range) = self.ranges.get(self.range) {
            let left = (range.len - self.position).min(BUFFER_MAX as u64) as usize;
            let offset = range.offset + self.position;
            return Some(match self.kind {
                Kind::Read | Kind::Write => Part::Data {
                    offset,
                    position: self.position,
                    len: left,
                },
                Kind::WriteZeroes if self.emulate => Part::Zeroes { offset, len: left },
                _ => Part::Whole(*range),
            });
        }
        // A flush covers only what completed before it was submitted.
        (self.sync && !self.synced && self.outstanding == 0).then_some(Part::Sync)
    }

    /// The part that `peek` gave was submitted (or needs no submission).
    pub(super) fn advance(&mut self, part: Part) {
        match part {
            Part::Data { len, .. } | Part::Zeroes { len, .. } => {
                self.position += len as u64;
                if self.ranges.get(self.range).is_none_or(|r| self.position >= r.len) {
                    self.range += 1;
                    self.position = 0;
                }
            }
            Part::Whole(_) => self.range += 1,
            Part::Sync => self.synced = true,
        }
    }

    /// Nothing is left to submit or to wait for.
    pub(super) fn finished(&self) -> bool {
        self.outstanding == 0 && self.peek().is_none()
    }

    /// Bytes of the guest's request.
    pub(super) fn len(&self) -> u64 {
        self.ranges.iter().map(|r| r.len).sum()
    }
}
