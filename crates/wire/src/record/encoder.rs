//! Encoder: a sealed (or still open) epoch in, chunk frames out, in buffers that are used again.

use super::chunk::{CHUNK_HEAD_BYTES, ChunkHead, ChunkKind, END_BYTES, Totals, fold_digest};
use super::disk::DISK_OP_HEAD_BYTES_MAX;
use super::{DiskKind, DiskOp, FLAG_RESET, RecordId};
use crate::buf::{Buf, BufPool};
use crate::frame::{Frame, Kind, PAYLOAD_BYTES_MAX};
use crate::nonce::nonce;
use crate::page::codec::PAGE_RECORD_BYTES_MAX;
use crate::page::delta::diff;
use crate::page::gain::Gain;
use crate::page::{EncodeConfig, GFN_MAX, PAGE_BYTES, Page, PageCodec, PageStats};
use crate::varint::{self, VARINT_BYTES_MAX};
use steadfast_types::{Epoch, Gfn, Term};

/// Smallest chunk size that makes sense.
const CHUNK_BYTES_MIN: usize = 16 << 10;
/// Device state beyond this is refused: 64 MiB would be thousands of vCPUs.
pub(super) const DEVICE_BYTES_MAX: usize = 64 << 20;
/// Disk chunks below this size are not packed.
const DISK_PACK_BYTES_MIN: usize = 512;

/// Where the encoder reads pages: the sealed arena, or guest memory while it stands still.
pub trait PageSource {
    /// The page's content: a reference to it, or to a copy made in `scratch` (needed where a vCPU may write meanwhile).
    /// `None` if there is no such page.
    fn page<'a>(&'a self, gfn: Gfn, scratch: &'a mut Page) -> Option<&'a Page>;
}

/// Where finished chunks go. A record's chunks come in order.
pub trait ChunkSink {
    /// Takes one chunk.
    fn chunk(&mut self, frame: Frame);
}

impl ChunkSink for Vec<Frame> {
    fn chunk(&mut self, frame: Frame) {
        self.push(frame);
    }
}

/// What the caller says at the end of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trailer {
    /// The guest flushed a disk in it.
    pub has_flush: bool,
    /// Outputs that the guest emitted up to here, since it was created.
    pub output_boundary: u64,
}

/// Why something cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// `begin` inside of a record, or content outside of one.
    #[error("encoder called out of order: {0}")]
    Order(&'static str),
    /// The source has no such page.
    #[error("dirty page {0} is outside of the VM's memory")]
    Page(u64),
    /// Device state too large.
    #[error("device state of {0} bytes, the limit is {DEVICE_BYTES_MAX}")]
    Device(usize),
    /// A write whose length is not that of its data.
    #[error("disk operation whose length does not match its data")]
    Disk,
}

struct Open {
    id: RecordId,
    term: Term,
    flags: u8,
    totals: Totals,
    kind: ChunkKind,
    items: u32,
    at: usize,
    prev_gfn: u64,
}

/// Turns epochs into chunk frames. One encoder serves all standbys that get the same records; one that needs
/// something else (a full copy) has its own.
pub struct Encoder {
    vm: u64,
    codec: PageCodec,
    pool: BufPool,
    chunk_bytes: usize,
    lz4: bool,
    disk_gain: Gain,
    stream: u32,
    record: u64,
    reset: bool,
    device: Vec<Page>,
    device_len: usize,
    open: Option<Open>,
    buf: Buf,
    scratch: Box<Page>,
    bytes_out: u64,
}

impl Encoder {
    /// An encoder for the VM with this hash; buffers come from `pool`.
    #[must_use]
    pub fn new(vm: u64, config: &EncodeConfig, pool: BufPool) -> Self {
        let chunk_bytes = config.chunk_bytes.clamp(CHUNK_BYTES_MIN, PAYLOAD_BYTES_MAX);
        Self {
            vm,
            codec: PageCodec::new(config),
            buf: pool.take(chunk_bytes),
            pool,
            chunk_bytes,
            lz4: config.lz4,
            disk_gain: Gain::new(config.wire_ns_per_byte),
            stream: nonce() as u32,
            record: 0,
            reset: true,
            device: Vec::new(),
            device_len: 0,
            open: None,
            scratch: Box::new([0; PAGE_BYTES]),
            bytes_out: 0,
        }
    }

    /// Forgets what the receiver has, and an unfinished record: the next record refers to nothing before it. To be
    /// called whenever a receiver may have missed a record that will not be sent again as it was.
    pub fn reset(&mut self) {
        self.codec.reset();
        self.device.clear();
        self.reset = true;
        self.open = None;
    }

    /// Counters of pages.
    #[must_use]
    pub const fn stats(&self) -> &PageStats {
        self.codec.stats()
    }

    /// Payload bytes of all chunks so far.
    #[must_use]
    pub const fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// Price of a byte on the wire, e.g. from the link's measured rate; see [`EncodeConfig`].
    pub fn set_wire_ns_per_byte(&mut self, ns: f64) {
        self.codec.set_wire_ns_per_byte(ns);
        self.disk_gain.set_wire_ns_per_byte(ns);
    }

    /// Starts a record.
    ///
    /// # Errors
    /// [`EncodeError::Order`] if one is open.
    pub fn begin(&mut self, term: Term, id: RecordId) -> Result<(), EncodeError> {
        if self.open.is_some() {
            return Err(EncodeError::Order("begin inside of a record"));
        }
        self.record += 1;
        let flags = id.to_wire().2
            | if std::mem::take(&mut self.reset) {
                FLAG_RESET
            } else {
                0
            };
        self.open = Some(Open {
            id,
            term,
            flags,
            totals: Totals::default(),
            kind: ChunkKind::Pages,
            items: 0,
            at: CHUNK_HEAD_BYTES,
            prev_gfn: 0,
        });
        Ok(())
    }

    /// Makes room for `bytes` in a chunk of this kind, finishing the one before if need be.
    fn room(&mut self, kind: ChunkKind, bytes: usize, out: &mut impl ChunkSink) -> Result<(), EncodeError> {
        let limit = self.buf.len();
        let open = self
            .open
            .as_ref()
            .ok_or(EncodeError::Order("content outside of a record"))?;
        if open.kind != kind || open.at + bytes > limit {
            self.flush(out);
        }
        if let Some(open) = &mut self.open {
            open.kind = kind;
        }
        Ok(())
    }

    /// Sends what is in the buffer, if anything.
    fn flush(&mut self, out: &mut impl ChunkSink) {
        let Some(open) = &mut self.open else { return };
        if open.items == 0 && open.kind != ChunkKind::End {
            return;
        }
        let mut head = ChunkHead {
            kind: open.kind,
            items: open.items,
            record: self.record,
            part: open.id.to_wire().1,
            unpacked: 0,
            stream: self.stream,
        };
        let mut payload = None;
        if open.kind == ChunkKind::Disk
            && self.lz4
            && open.at > DISK_PACK_BYTES_MIN
            && self.disk_gain.wants(0, &self.buf[CHUNK_HEAD_BYTES..open.at])
        {
            let body = &self.buf[CHUNK_HEAD_BYTES..open.at];
            let room = lz4_flex::block::get_maximum_output_size(body.len());
            let mut packed = self.pool.take(CHUNK_HEAD_BYTES + room);
            let started = self.disk_gain.start();
            let n =
                lz4_flex::block::compress_into(body, &mut packed[CHUNK_HEAD_BYTES..]).unwrap_or(body.len());
            if self.disk_gain.result(0, started, body.len(), n) {
                head.unpacked = body.len() as u32;
                packed.truncate(CHUNK_HEAD_BYTES + n);
                payload = Some(packed);
            }
        }
        let mut payload = match payload {
            Some(p) => p,
            // A buffer that is mostly empty is copied, so that what waits for acknowledgement takes little more memory
            // than it counts for.
            None if open.at < self.buf.len() / 2 => {
                let mut small = self.pool.take(open.at);
                small.copy_from_slice(&self.buf[..open.at]);
                small
            }
            None => {
                let mut full = std::mem::replace(&mut self.buf, self.pool.take(self.chunk_bytes));
                full.truncate(open.at);
                full
            }
        };
        head.write(&mut payload);
        let index = open.totals.chunks;
        let (epoch, _, _) = open.id.to_wire();
        let len = payload.len();
        let frame = Frame::new(
            Kind::Bulk,
            open.flags,
            self.vm,
            open.term,
            Epoch(epoch),
            index,
            payload,
        );
        open.totals.digest = fold_digest(open.totals.digest, index, len, frame.crc());
        open.totals.chunks += 1;
        open.items = 0;
        open.at = CHUNK_HEAD_BYTES;
        open.prev_gfn = 0;
        self.bytes_out += len as u64;
        out.chunk(frame);
    }

    /// Ends the chunk that is being filled, if there is anything in it: the receiver hears from a record that takes long.
    pub fn end_chunk(&mut self, out: &mut impl ChunkSink) {
        self.flush(out);
    }

    /// Adds a page. A page that the receiver has already costs nothing.
    ///
    /// # Errors
    /// [`EncodeError`] outside of a record, or for a page number out of range.
    pub fn page(&mut self, gfn: Gfn, page: &Page, out: &mut impl ChunkSink) -> Result<(), EncodeError> {
        if gfn.0 >= GFN_MAX {
            return Err(EncodeError::Page(gfn.0));
        }
        self.room(ChunkKind::Pages, PAGE_RECORD_BYTES_MAX, out)?;
        let Some(open) = &mut self.open else { return Ok(()) };
        let end = self
            .codec
            .encode(open.prev_gfn, gfn.0, page, &mut self.buf, open.at);
        if end != open.at {
            open.at = end;
            open.prev_gfn = gfn.0;
            open.items += 1;
            open.totals.pages += 1;
        }
        Ok(())
    }

    /// Adds pages from a source. Rising page numbers encode best.
    ///
    /// # Errors
    /// [`EncodeError::Page`] if the source does not have one.
    pub fn pages<S: PageSource + ?Sized>(
        &mut self,
        gfns: impl IntoIterator<Item = Gfn>,
        source: &S,
        out: &mut impl ChunkSink,
    ) -> Result<(), EncodeError> {
        let mut scratch = std::mem::replace(&mut self.scratch, Box::new([0; PAGE_BYTES]));
        let mut result = Ok(());
        for gfn in gfns {
            result = match source.page(gfn, &mut scratch) {
                Some(page) => self.page(gfn, page, out),
                None => Err(EncodeError::Page(gfn.0)),
            };
            if result.is_err() {
                break;
            }
        }
        self.scratch = scratch;
        result
    }

    /// Adds the device state; at most once in a record.
    ///
    /// # Errors
    /// [`EncodeError`] if it is too large or there is one already.
    pub fn device(&mut self, state: &[u8], out: &mut impl ChunkSink) -> Result<(), EncodeError> {
        if state.len() > DEVICE_BYTES_MAX {
            return Err(EncodeError::Device(state.len()));
        }
        let open = self
            .open
            .as_mut()
            .ok_or(EncodeError::Order("content outside of a record"))?;
        if open.totals.device_bytes != 0 {
            return Err(EncodeError::Order("device state twice"));
        }
        open.totals.device_bytes = state.len() as u64;
        let base = self.device_len == state.len() && !self.device.is_empty();
        let count = state.len().div_ceil(PAGE_BYTES);
        if !base {
            self.device.clear();
            self.device.resize(count, [0; PAGE_BYTES]);
            self.device_len = state.len();
        }
        let head = 2 + 2 * VARINT_BYTES_MAX;
        for (i, part) in state.chunks(PAGE_BYTES).enumerate() {
            self.room(ChunkKind::Device, head + PAGE_RECORD_BYTES_MAX, out)?;
            let Some(open) = &mut self.open else { return Ok(()) };
            let buf: &mut [u8] = &mut self.buf;
            if open.items == 0 {
                let p = varint::put(buf, open.at, state.len() as u64);
                let p = varint::put(buf, p, i as u64);
                buf[p] = u8::from(base);
                open.at = p + 1;
            }
            let mut page = [0; PAGE_BYTES];
            page[..part.len()].copy_from_slice(part);
            let old = &mut self.device[i];
            let changed = diff(&page, old);
            // Two bytes hold any length of a page's runs; written as a padded varint so that nothing must move.
            let body = open.at + 2;
            let end = changed.encode(&page, old, buf, body);
            let n = end - body;
            buf[open.at] = (n & 0x7f) as u8 | 0x80;
            buf[open.at + 1] = (n >> 7) as u8;
            open.at = end;
            open.items += 1;
        }
        Ok(())
    }

    /// Adds a disk operation. A large write becomes several.
    ///
    /// # Errors
    /// [`EncodeError::Disk`] if length and data do not agree.
    pub fn disk(&mut self, op: &DiskOp<'_>, out: &mut impl ChunkSink) -> Result<(), EncodeError> {
        let is_write = op.kind == DiskKind::Write;
        if (is_write && op.len != op.data.len() as u64) || (!is_write && !op.data.is_empty()) {
            return Err(EncodeError::Disk);
        }
        if !is_write {
            return self.disk_part(op, out);
        }
        // A multiple of the page size, so that blocks stay whole.
        let part_bytes = (self.chunk_bytes / 2) / PAGE_BYTES * PAGE_BYTES;
        for (i, data) in op.data.chunks(part_bytes).enumerate() {
            let offset = op
                .offset
                .checked_add((i * part_bytes) as u64)
                .ok_or(EncodeError::Disk)?;
            self.disk_part(
                &DiskOp {
                    offset,
                    len: data.len() as u64,
                    data,
                    ..*op
                },
                out,
            )?;
        }
        Ok(())
    }

    fn disk_part(&mut self, op: &DiskOp<'_>, out: &mut impl ChunkSink) -> Result<(), EncodeError> {
        self.room(ChunkKind::Disk, DISK_OP_HEAD_BYTES_MAX + op.data.len(), out)?;
        let Some(open) = &mut self.open else { return Ok(()) };
        open.at = op.write(&mut self.buf, open.at);
        open.items += 1;
        open.totals.disk_ops += 1;
        Ok(())
    }

    /// Ends the record and says what it holds.
    ///
    /// # Errors
    /// [`EncodeError::Order`] if none is open.
    pub fn finish(&mut self, trailer: Trailer, out: &mut impl ChunkSink) -> Result<Totals, EncodeError> {
        self.room(ChunkKind::End, END_BYTES, out)?;
        // `room` has flushed unless the buffer was empty; either way only the end is to be written now.
        let Some(open) = &mut self.open else {
            return Err(EncodeError::Order("finish outside of a record"));
        };
        open.totals.has_flush = trailer.has_flush;
        open.totals.output_boundary = trailer.output_boundary;
        let totals = open.totals;
        totals.write(&mut self.buf[open.at..]);
        open.at += END_BYTES;
        self.flush(out);
        self.open = None;
        Ok(totals)
    }
}
