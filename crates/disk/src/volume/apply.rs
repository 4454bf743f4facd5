//! Jobs that change the image: applying committed epochs, and the checkpoint that lets the journal be trimmed.
//!
//! Order, which is what makes a crash anywhere harmless:
//! 1. the epochs and their commit record are durable in the journal (`Core::take_apply` asserts it),
//! 2. blocks are written, then their checksums,
//! 3. a checkpoint syncs the image, the checksums and the maps of changes,
//! 4. then writes and syncs the superblock,
//! 5. and only then is the room in the journal used again.

use super::op::{EpochWrites, JournalReader, JournaledOp};
use super::overlay::Overlay;
use super::{Sabotage, VolumeError};
use crate::checksum::{self, BAD, BLOCK, Sums, UNKNOWN};
use crate::journal::{Batch, Kind, Superblock};
use crate::resync::{MapChanges, PEER_FILES};
use crate::storage::StorageFile;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use steadfast_types::{Epoch, Term};

/// How much is written to the image at a time.
const RUN_MAX: u64 = 1 << 20;

/// The files of one replica.
pub struct Files {
    /// Byte N of this is byte N of the volume.
    pub image: Arc<dyn StorageFile>,
    /// The journal.
    pub journal: Arc<dyn StorageFile>,
    /// The journal again, opened on its own: an error that one sync reports is not reported to the other.
    pub super_file: Arc<dyn StorageFile>,
    /// Checksums of the image's blocks.
    pub sums: Sums,
    /// Maps of changes, one for each standby.
    pub maps: Vec<Arc<dyn StorageFile>>,
    /// Size of the image in bytes.
    pub capacity: u64,
    /// Volume id.
    pub volume: u64,
    /// Size of the journal's ring in bytes.
    pub ring: u64,
    /// A deliberately broken variant for tests.
    pub sabotage: Sabotage,
    /// Held by whoever changes the image, or reads blocks together with their sums.
    pub(crate) image_lock: Mutex<()>,
}

impl Files {
    pub(crate) fn lock_image(&self) -> std::sync::MutexGuard<'_, ()> {
        self.image_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a journal job.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn run(&self, batch: &Batch) -> Result<(), VolumeError> {
        if self.sabotage == Sabotage::SkipJournalSync {
            return batch.write_records(&*self.journal);
        }
        batch.run(&*self.journal)
    }

    pub(crate) fn reader(&self) -> JournalReader {
        JournalReader {
            file: self.journal.clone(),
            volume: self.volume,
            ring: self.ring,
        }
    }

    /// Reads one block from the image; it is shorter at the end.
    pub(crate) fn read_block(&self, block: u64) -> Result<Vec<u8>, VolumeError> {
        let at = block * BLOCK;
        let mut bytes = vec![0; BLOCK.min(self.capacity - at) as usize];
        // A read may fail once for reasons that pass.
        if self.image.read_at(at, &mut bytes).is_err() {
            self.image
                .read_at(at, &mut bytes)
                .map_err(VolumeError::io("read", "image", at))?;
        }
        Ok(bytes)
    }

    /// Zeroes whole blocks, gives their space back, and writes their sums. The caller holds the image lock.
    pub(crate) fn zero_blocks(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.image
            .zero(offset, len, true)
            .map_err(VolumeError::io("zero", "image", offset))?;
        self.sums.write_zeroed(offset / BLOCK, len.div_ceil(BLOCK))
    }

    /// Writes whole blocks with their sums. The caller holds the image lock.
    pub(crate) fn write_blocks(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.image
            .write_at(offset, data)
            .map_err(VolumeError::io("write", "image", offset))?;
        let first = offset / BLOCK;
        let sums: Vec<u32> = data
            .chunks(BLOCK as usize)
            .zip(first..)
            .map(|(d, b)| checksum::block_sum(b, d))
            .collect();
        self.sums.write(first, &sums)
    }
}

/// Epochs to be applied together: only the latest bytes of each range are written.
#[derive(Debug, Default)]
pub struct ApplyJob {
    pub(super) ops: Vec<Arc<JournaledOp>>,
    pub(super) through: Epoch,
    pub(super) term: Term,
    pub(super) bytes: u64,
    /// Recovery: the image may hold some of this already, so old sums prove nothing.
    pub(super) redo: bool,
}

/// Sums of blocks that were written in part, until they are stored.
type Pending = BTreeMap<u64, u32>;

impl ApplyJob {
    pub(super) fn add(&mut self, epoch: &EpochWrites, bytes: u64) {
        self.ops.extend(epoch.ops.iter().cloned());
        self.through = epoch.epoch;
        self.term = epoch.term;
        self.bytes += bytes;
    }

    pub(super) fn redo() -> Self {
        Self {
            redo: true,
            ..Self::default()
        }
    }

    pub(super) fn add_op(&mut self, op: &Arc<JournaledOp>) {
        self.ops.push(op.clone());
    }

    /// The last epoch in it.
    #[must_use]
    pub const fn through(&self) -> Epoch {
        self.through
    }

    /// Writes it. Running it again after a failure, or after a crash, gives the same image.
    ///
    /// # Errors
    /// [`VolumeError::Io`]; [`VolumeError::Damaged`] if the journal lost bytes that it had.
    pub fn run(&self, files: &Files) -> Result<(), VolumeError> {
        let _image = files.lock_image();
        let mut latest = Overlay::default();
        for op in &self.ops {
            latest.insert(op);
        }
        let mut pending = Pending::new();
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        let reader = files.reader();
        for piece in latest.pieces() {
            let Some(op) = piece.op else { continue };
            let adjacent = run.0 + run.1.len() as u64 == piece.start && (run.1.len() as u64) < RUN_MAX;
            if !(adjacent && op.kind == Kind::Write) {
                self.put(files, &mut pending, &run)?;
                run = (piece.start, Vec::new());
            }
            if op.kind == Kind::Write {
                let data = op.load(&reader)?;
                run.1.extend_from_slice(
                    &data[(piece.start - op.offset) as usize..(piece.end - op.offset) as usize],
                );
            } else {
                self.put_zeroes(
                    files,
                    &mut pending,
                    piece.start,
                    piece.end,
                    op.kind == Kind::Discard,
                )?;
            }
        }
        self.put(files, &mut pending, &run)?;
        store(&files.sums, pending)
    }

    fn put(&self, files: &Files, pending: &mut Pending, run: &(u64, Vec<u8>)) -> Result<(), VolumeError> {
        let (start, data) = run;
        if data.is_empty() {
            return Ok(());
        }
        let end = start + data.len() as u64;
        for block in start / BLOCK..end.div_ceil(BLOCK) {
            let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(files.capacity));
            if *start <= from && to <= end {
                let bytes = &data[(from - start) as usize..(to - start) as usize];
                pending.insert(block, checksum::block_sum(block, bytes));
            } else {
                let (lo, hi) = (from.max(*start), to.min(end));
                let part = &data[(lo - start) as usize..(hi - start) as usize];
                self.merge(files, pending, block, (lo - from) as usize, part)?;
            }
        }
        files
            .image
            .write_at(*start, data)
            .map_err(VolumeError::io("write", "image", *start))
    }

    fn put_zeroes(
        &self,
        files: &Files,
        pending: &mut Pending,
        start: u64,
        end: u64,
        free: bool,
    ) -> Result<(), VolumeError> {
        let first_full = start.div_ceil(BLOCK);
        let behind_full = if end == files.capacity {
            end.div_ceil(BLOCK)
        } else {
            end / BLOCK
        };
        if first_full > behind_full || (first_full == behind_full && start / BLOCK == (end - 1) / BLOCK) {
            // Inside of one block.
            let zeroes = vec![0; (end - start) as usize];
            self.merge(files, pending, start / BLOCK, (start % BLOCK) as usize, &zeroes)?;
        } else {
            if !start.is_multiple_of(BLOCK) {
                let zeroes = vec![0; (BLOCK - start % BLOCK) as usize];
                self.merge(files, pending, start / BLOCK, (start % BLOCK) as usize, &zeroes)?;
            }
            if end > behind_full * BLOCK {
                let zeroes = vec![0; (end % BLOCK) as usize];
                self.merge(files, pending, behind_full, 0, &zeroes)?;
            }
            files.sums.write_zeroed(first_full, behind_full - first_full)?;
        }
        files
            .image
            .zero(start, end - start, free)
            .map_err(VolumeError::io("zero", "image", start))
    }

    /// Works out the sum of a block that is written in part. Bytes that stay are checked first, so that rot is not
    /// given a good sum.
    fn merge(
        &self,
        files: &Files,
        pending: &mut Pending,
        block: u64,
        at: usize,
        part: &[u8],
    ) -> Result<(), VolumeError> {
        let mut bytes = match files.read_block(block) {
            Ok(bytes) => bytes,
            Err(e) if self.redo => return Err(e),
            Err(e) => {
                tracing::error!(block, error = %e, "block unreadable, left to the scrub");
                pending.insert(block, BAD);
                return Ok(());
            }
        };
        let known = match pending.get(&block) {
            Some(&sum) => sum,
            None => files.sums.read(block, 1)?.first().copied().unwrap_or(UNKNOWN),
        };
        let good =
            known == UNKNOWN || (self.redo && known != BAD) || known == checksum::block_sum(block, &bytes);
        bytes[at..at + part.len()].copy_from_slice(part);
        let sum = if good {
            checksum::block_sum(block, &bytes)
        } else {
            BAD
        };
        if !good {
            tracing::error!(block, "block does not match its checksum, left to the scrub");
        }
        pending.insert(block, sum);
        Ok(())
    }
}

fn store(sums: &Sums, pending: Pending) -> Result<(), VolumeError> {
    let mut run: (u64, Vec<u32>) = (0, Vec::new());
    for (block, sum) in pending {
        if run.0 + run.1.len() as u64 != block {
            if !run.1.is_empty() {
                sums.write(run.0, &run.1)?;
            }
            run = (block, Vec::new());
        }
        run.1.push(sum);
    }
    if run.1.is_empty() {
        Ok(())
    } else {
        sums.write(run.0, &run.1)
    }
}

/// Makes what was applied durable, then says so in the superblock.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) superblock: Superblock,
    pub(super) maps: [MapChanges; PEER_FILES],
}

impl Checkpoint {
    /// Does it.
    ///
    /// # Errors
    /// [`VolumeError::Io`]. What was applied since the last checkpoint must then be applied again.
    pub fn run(&self, files: &Files) -> Result<(), VolumeError> {
        if files.sabotage != Sabotage::TrimBeforeImageSync {
            files.image.sync().map_err(VolumeError::io("sync", "image", 0))?;
            files.sums.sync()?;
        }
        for (changes, file) in self.maps.iter().zip(&files.maps) {
            changes.write(&**file)?;
        }
        self.superblock.write(&*files.super_file)
    }
}
