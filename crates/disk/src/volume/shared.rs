//! A volume on storage that both hosts reach (SAN, NFS, Ceph RBD, any path or block device): no journal of ours.
//!
//! What it promises, with the storage itself alive:
//! * Nothing of an uncommitted epoch reaches the storage: an epoch's writes are buffered in memory, on the primary and
//!   as staged on the standby, until it committed (so I2 and I3 hold across a failover).
//! * After a promotion the new primary replays the committed epochs it has buffered, in order, before the guest goes
//!   on: writing them twice, or after the old primary wrote part of them, gives the same bytes.
//! * A flush commits with its epoch: buffered on both hosts. [`SharedVolume::apply`] then writes and syncs the storage.
//!
//! What it does not promise: I5 when *all* hosts lose power at once. Epochs that were committed but not yet applied
//! live in memory only. Use [`Alone`](super::Mode::Alone) semantics ([`SharedVolume::flush_through`]) or a replicated
//! volume where that matters. The old primary must be kept from writing after a promotion: it applies only what is
//! committed under its own term, and stops when it loses the term; storage that can fence should fence as well.

use super::op::{pop_back_if, pop_front_if};
use super::{EpochOp, VolumeError};
use crate::journal::record::check_range;
use crate::storage::StorageFile;
use std::collections::VecDeque;
use std::sync::Arc;
use steadfast_types::Epoch;

/// See the module. Not shared between threads: its owner is the data path of one VM instance.
pub struct SharedVolume {
    file: Arc<dyn StorageFile>,
    capacity: u64,
    bytes_max: usize,
    bytes: usize,
    /// Sealed or staged epochs that are not applied.
    epochs: VecDeque<(Epoch, Arc<Vec<EpochOp>>)>,
    open: Option<Vec<EpochOp>>,
    tip: Epoch,
    committed: Epoch,
    applied: Epoch,
}

/// Memory that an operation counts for, besides its bytes.
const OP_COST: usize = 64;

fn cost(op: &EpochOp) -> usize {
    OP_COST
        + match op {
            EpochOp::Write { data, .. } => data.len(),
            _ => 0,
        }
}

fn put(file: &dyn StorageFile, op: &EpochOp) -> Result<(), VolumeError> {
    let (offset, len) = op.range();
    match op {
        EpochOp::Write { data, .. } => file.write_at(offset, data),
        EpochOp::Discard { .. } => file.zero(offset, len, true),
        EpochOp::WriteZeroes { .. } => file.zero(offset, len, false),
    }
    .map_err(VolumeError::io("write", "shared volume", offset))
}

impl SharedVolume {
    /// Uses `file`; at most `bytes_max` of writes are buffered. `at` is the epoch the VM stands at.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn new(
        file: Arc<dyn StorageFile>,
        bytes_max: usize,
        at: Epoch,
        primary: bool,
    ) -> Result<Self, VolumeError> {
        let capacity = file.len().map_err(VolumeError::io("size", "shared volume", 0))?;
        Ok(Self {
            file,
            capacity,
            bytes_max,
            bytes: 0,
            epochs: VecDeque::new(),
            open: primary.then(Vec::new),
            tip: at,
            committed: at,
            applied: at,
        })
    }

    /// Last sealed or staged, last committed, last applied epoch.
    #[must_use]
    pub const fn cursors(&self) -> (Epoch, Epoch, Epoch) {
        (self.tip, self.committed, self.applied)
    }

    /// A guest request, into the open epoch.
    ///
    /// # Errors
    /// [`VolumeError::Throttled`]: commit and apply first. [`VolumeError::OutOfRange`].
    pub fn write(&mut self, op: EpochOp) -> Result<(), VolumeError> {
        let (offset, len) = op.range();
        check_range(offset, len, self.capacity)?;
        let cost = cost(&op);
        let Some(open) = &mut self.open else {
            return Err(VolumeError::Refused("a standby takes no guest writes"));
        };
        if self.bytes > 0 && self.bytes + cost > self.bytes_max {
            return Err(VolumeError::Throttled {
                bytes: self.bytes as u64,
                max: self.bytes_max as u64,
            });
        }
        self.bytes += cost;
        open.push(op);
        Ok(())
    }

    /// Reads the latest bytes: the storage, and over it what is buffered.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`], [`VolumeError::Io`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        check_range(offset, buf.len() as u64, self.capacity)?;
        self.file
            .read_at(offset, buf)
            .map_err(VolumeError::io("read", "shared volume", offset))?;
        let end = offset + buf.len() as u64;
        let sealed = self.epochs.iter().flat_map(|(_, ops)| ops.iter());
        for op in sealed.chain(self.open.iter().flatten()) {
            let (start, len) = op.range();
            let (from, to) = (start.max(offset), (start + len).min(end));
            if from >= to {
                continue;
            }
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            match op {
                EpochOp::Write { data, .. } => {
                    part.copy_from_slice(&data[(from - start) as usize..(to - start) as usize]);
                }
                _ => part.fill(0),
            }
        }
        Ok(())
    }

    /// Closes the open epoch and yields its writes for the standby.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`].
    pub fn seal(&mut self, epoch: Epoch) -> Result<Arc<Vec<EpochOp>>, VolumeError> {
        if epoch != self.tip.next() {
            return Err(VolumeError::OutOfOrder {
                expected: self.tip.next(),
                got: epoch,
            });
        }
        let Some(open) = &mut self.open else {
            return Err(VolumeError::Refused("a standby seals no epoch"));
        };
        let ops = Arc::new(std::mem::take(open));
        self.tip = epoch;
        self.epochs.push_back((epoch, ops.clone()));
        Ok(ops)
    }

    /// Standby: buffers an epoch.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`], [`VolumeError::OutOfRange`], [`VolumeError::Throttled`].
    pub fn stage(&mut self, epoch: Epoch, ops: Arc<Vec<EpochOp>>) -> Result<(), VolumeError> {
        if epoch != self.tip.next() || self.open.is_some() {
            return Err(VolumeError::OutOfOrder {
                expected: self.tip.next(),
                got: epoch,
            });
        }
        for op in ops.iter() {
            let (offset, len) = op.range();
            check_range(offset, len, self.capacity)?;
        }
        let cost: usize = ops.iter().map(cost).sum();
        if self.bytes > 0 && self.bytes + cost > self.bytes_max {
            return Err(VolumeError::Throttled {
                bytes: self.bytes as u64,
                max: self.bytes_max as u64,
            });
        }
        self.bytes += cost;
        self.tip = epoch;
        self.epochs.push_back((epoch, ops));
        Ok(())
    }

    /// These epochs are committed.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`] beyond the last one.
    pub fn commit(&mut self, through: Epoch) -> Result<(), VolumeError> {
        if through > self.tip {
            return Err(VolumeError::OutOfOrder {
                expected: self.tip,
                got: through,
            });
        }
        self.committed = self.committed.max(through);
        Ok(())
    }

    /// Primary: writes committed epochs to the storage and syncs it. After an error it is run again.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn apply(&mut self) -> Result<Epoch, VolumeError> {
        for (_, ops) in self.epochs.iter().filter(|(e, _)| *e <= self.committed) {
            for op in ops.iter() {
                put(&*self.file, op)?;
            }
        }
        self.file
            .sync()
            .map_err(VolumeError::io("sync", "shared volume", 0))?;
        self.forget(self.committed);
        Ok(self.applied)
    }

    /// Standby: the primary has applied these epochs and synced the storage: they need not be buffered here.
    pub fn forget(&mut self, through: Epoch) {
        while let Some((_, ops)) = pop_front_if(&mut self.epochs, |(e, _)| *e <= through) {
            self.bytes -= ops.iter().map(cost).sum::<usize>();
        }
        self.applied = self.applied.max(through.min(self.tip));
        self.committed = self.committed.max(self.applied);
        assert!(
            self.applied <= self.committed && self.committed <= self.tip,
            "I6: cursors of a shared volume"
        );
    }

    /// A flush without a standby: everything so far is written and synced at once.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn flush_through(&mut self) -> Result<(), VolumeError> {
        self.committed = self.tip;
        self.apply()?;
        for op in self.open.iter().flatten() {
            put(&*self.file, op)?;
        }
        self.file
            .sync()
            .map_err(VolumeError::io("sync", "shared volume", 0))
    }

    /// Promotion: drops what is after `at`, writes what is committed, and takes guest writes.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] when `at` lies before a committed epoch (I4); [`VolumeError::Io`].
    pub fn promote(&mut self, at: Epoch) -> Result<(), VolumeError> {
        if at < self.committed {
            return Err(VolumeError::Refused("a committed epoch is never dropped (I4)"));
        }
        while let Some((_, ops)) = pop_back_if(&mut self.epochs, |(e, _)| *e > at) {
            self.bytes -= ops.iter().map(cost).sum::<usize>();
        }
        self.tip = self.tip.min(at);
        self.apply()?;
        self.open = Some(Vec::new());
        Ok(())
    }
}
