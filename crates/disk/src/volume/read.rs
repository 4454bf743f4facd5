//! Reading: the latest bytes for the guest, the committed view for peers, and repair of bad blocks.

use super::apply::Files;
use super::core::Core;
use super::op::JournaledOp;
use super::overlay::Overlay;
use super::{Piece, VolumeError};
use crate::checksum::{self, BLOCK, UNKNOWN};
use crate::journal::Kind;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use steadfast_types::Epoch;

/// Blocks (by offset) that came from the peer, with the epoch of their content.
pub(crate) type Served = BTreeMap<u64, (Epoch, Vec<u8>)>;

/// Where the bytes of a range are, as of one instant.
pub struct ReadPlan {
    start: u64,
    pieces: Vec<Piece>,
}

impl Core {
    /// Plans a read of the latest bytes, open epoch included. The plan must be run before the journal is trimmed:
    /// the runtime holds off trims while plans run.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`], [`VolumeError::Copying`].
    pub fn plan_read(&self, offset: u64, len: u64) -> Result<ReadPlan, VolumeError> {
        self.must_be_whole()?;
        crate::journal::record::check_range(offset, len, self.capacity())?;
        Ok(ReadPlan {
            start: offset,
            pieces: self.overlay.look_up(offset, offset + len),
        })
    }

    /// The operations on a range that are not in the image for certain, up to `through`, in order.
    pub(crate) fn pending_ops(&self, through: Epoch, start: u64, end: u64) -> Vec<Arc<JournaledOp>> {
        let epochs = self
            .epochs
            .iter()
            .filter(|e| e.epoch > self.applied && e.epoch <= through);
        epochs
            .flat_map(|e| e.ops.iter())
            .filter(|op| op.offset < end && start < op.offset + op.len)
            .cloned()
            .collect()
    }
}

/// What a read of the image found wrong.
#[derive(Debug)]
pub enum ReadFault {
    /// Blocks from this byte on are unreadable or do not match their sums: `offset`, bytes.
    Block(u64),
    /// Anything else.
    Other(VolumeError),
}

impl From<VolumeError> for ReadFault {
    fn from(e: VolumeError) -> Self {
        Self::Other(e)
    }
}

impl ReadPlan {
    /// Fills `buf`. With `verify`, blocks that are read whole from the image are checked.
    ///
    /// # Errors
    /// [`ReadFault::Block`] names a block that needs repair.
    pub fn run(&self, files: &Files, buf: &mut [u8], verify: bool) -> Result<(), ReadFault> {
        self.run_with(files, buf, verify, &BTreeMap::new())
    }

    /// The same, with blocks (by offset) that came from the peer instead of the image.
    pub(crate) fn run_with(
        &self,
        files: &Files,
        buf: &mut [u8],
        verify: bool,
        served: &Served,
    ) -> Result<(), ReadFault> {
        for p in &self.pieces {
            let part = &mut buf[(p.start - self.start) as usize..(p.end - self.start) as usize];
            match &p.op {
                None if served.is_empty() => read_image(files, p.start, part, verify)?,
                None => read_around(files, p.start, part, verify, served)?,
                Some(op) if op.kind == Kind::Write => {
                    let data = op.load(&files.reader())?;
                    part.copy_from_slice(&data[(p.start - op.offset) as usize..(p.end - op.offset) as usize]);
                }
                Some(_) => part.fill(0),
            }
        }
        Ok(())
    }
}

impl ReadPlan {
    /// Fills `buf` if all of it is in memory, and good. `false`: it is not, or something is wrong with it; whoever may wait finds out.
    pub(crate) fn run_cached(&self, files: &Files, buf: &mut [u8], verify: bool) -> bool {
        self.pieces.iter().all(|p| {
            let part = &mut buf[(p.start - self.start) as usize..(p.end - self.start) as usize];
            match &p.op {
                None => {
                    files.image.read_cached(p.start, part) && (!verify || known_good(files, p.start, part))
                }
                Some(op) if op.kind == Kind::Write => op.in_memory().is_some_and(|data| {
                    part.copy_from_slice(&data[(p.start - op.offset) as usize..(p.end - op.offset) as usize]);
                    true
                }),
                Some(_) => {
                    part.fill(0);
                    true
                }
            }
        })
    }
}

/// Reads block by block, past those that came from the peer.
fn read_around(
    files: &Files,
    start: u64,
    part: &mut [u8],
    verify: bool,
    served: &Served,
) -> Result<(), ReadFault> {
    let end = start + part.len() as u64;
    let mut at = start;
    while at < end {
        let block = at / BLOCK * BLOCK;
        let to = (block + BLOCK).min(end);
        let bytes = &mut part[(at - start) as usize..(to - start) as usize];
        match served.get(&block) {
            Some((_, good)) => bytes.copy_from_slice(&good[(at - block) as usize..(to - block) as usize]),
            None => read_image(files, at, bytes, verify)?,
        }
        at = to;
    }
    Ok(())
}

fn read_image(files: &Files, start: u64, part: &mut [u8], verify: bool) -> Result<(), ReadFault> {
    // A read may fail once for reasons that pass.
    if files.image.read_at(start, part).is_err() && files.image.read_at(start, part).is_err() {
        return Err(ReadFault::Block(first_unreadable(
            files,
            start,
            part.len() as u64,
        )));
    }
    if verify && let Some(bad) = first_bad(files, start, part)? {
        // An epoch may have been applied between reading the block and reading its sum: look again with the image
        // held still.
        let _still = files.lock_image();
        files
            .image
            .read_at(start, part)
            .map_err(|_| ReadFault::Block(bad))?;
        if let Some(bad) = first_bad(files, start, part)? {
            return Err(ReadFault::Block(bad));
        }
    }
    Ok(())
}

fn first_unreadable(files: &Files, start: u64, len: u64) -> u64 {
    let blocks = start / BLOCK..(start + len).div_ceil(BLOCK);
    blocks
        .into_iter()
        .find(|&b| files.read_block(b).is_err())
        .map_or(start / BLOCK * BLOCK, |b| b * BLOCK)
}

/// The blocks that are whole in this range.
fn whole_blocks(files: &Files, start: u64, len: u64) -> Range<u64> {
    let end = start + len;
    let behind = if end == files.capacity {
        end.div_ceil(BLOCK)
    } else {
        end / BLOCK
    };
    start.div_ceil(BLOCK)..behind
}

/// The first of these blocks that does not match its sum, as a byte offset. `data` begins at `start`.
fn mismatch(blocks: Range<u64>, sums: Vec<u32>, start: u64, data: &[u8]) -> Option<u64> {
    let wrong = |&(block, sum): &(u64, u32)| {
        let from = (block * BLOCK - start) as usize;
        let bytes = &data[from..data.len().min(from + BLOCK as usize)];
        sum != UNKNOWN && sum != checksum::block_sum(block, bytes)
    };
    blocks.zip(sums).find(wrong).map(|(block, _)| block * BLOCK)
}

/// The first whole block in the range that does not match its sum, as a byte offset.
fn first_bad(files: &Files, start: u64, data: &[u8]) -> Result<Option<u64>, VolumeError> {
    let blocks = whole_blocks(files, start, data.len() as u64);
    if blocks.is_empty() {
        return Ok(None);
    }
    let sums = files
        .sums
        .read(blocks.start, (blocks.end - blocks.start) as usize)?;
    Ok(mismatch(blocks, sums, start, data))
}

/// Whether all whole blocks in the range match their sums, as far as memory can tell.
fn known_good(files: &Files, start: u64, data: &[u8]) -> bool {
    let blocks = whole_blocks(files, start, data.len() as u64);
    blocks.is_empty()
        || files
            .sums
            .read_cached(blocks.start, (blocks.end - blocks.start) as usize)
            .is_some_and(|sums| mismatch(blocks, sums, start, data).is_none())
}

/// Reads a range as of `through`: the image and the pending operations up to there. The caller holds the image lock
/// and took `ops` under it.
pub(crate) fn read_with(
    files: &Files,
    ops: &[Arc<JournaledOp>],
    offset: u64,
    buf: &mut [u8],
    verify: bool,
) -> Result<(), ReadFault> {
    let mut overlay = Overlay::default();
    ops.iter().for_each(|op| overlay.insert(op));
    let end = offset + buf.len() as u64;
    let plan = ReadPlan {
        start: offset,
        pieces: overlay.look_up(offset, end),
    };
    for p in plan.pieces.iter().filter(|p| p.op.is_none()) {
        // No image lock here: the caller holds it.
        let part = &mut buf[(p.start - offset) as usize..(p.end - offset) as usize];
        if files.image.read_at(p.start, part).is_err() && files.image.read_at(p.start, part).is_err() {
            return Err(ReadFault::Block(first_unreadable(
                files,
                p.start,
                part.len() as u64,
            )));
        }
        if verify && let Some(bad) = first_bad(files, p.start, part)? {
            return Err(ReadFault::Block(bad));
        }
    }
    let written = ReadPlan {
        start: offset,
        pieces: plan.pieces.into_iter().filter(|p| p.op.is_some()).collect(),
    };
    written.run(files, buf, false)
}
