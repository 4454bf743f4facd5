//! The primary's half of a copy to a standby, and the word that a standby holds an epoch.

use super::map::REGION;
use crate::checksum::BLOCK;
use crate::volume::{Core, EpochOp, PEERS, ReadFault, Sealed, Volume, VolumeError};
use std::sync::Arc;
use steadfast_types::Epoch;

/// What a copy will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Everything is sent; otherwise only what changed since the standby's epoch.
    pub full: bool,
    /// Bytes to send, without what the guest changes meanwhile.
    pub bytes: u64,
}

/// A piece of the volume on its way to the standby.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// First byte; a multiple of [`REGION`].
    pub offset: u64,
    /// The bytes: whole regions, except at the volume's end.
    pub data: Vec<u8>,
}

impl Core {
    pub(crate) fn map(&mut self, slot: usize) -> Result<&mut super::DirtyMap, VolumeError> {
        self.maps.get_mut(slot).ok_or(VolumeError::Refused(
            "a volume has maps for three standbys: slots 0 to 2",
        ))
    }
}

impl Volume {
    /// The standby in this slot (0 to 2) holds this epoch durably and knows it as committed.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] for a slot that does not exist.
    pub fn peer_durable(&self, slot: usize, epoch: Epoch) -> Result<(), VolumeError> {
        self.handle.shared.core().map(slot)?.peer_durable(epoch);
        Ok(())
    }

    /// Map phase: plans a copy for the standby in `slot`, which holds `have` durably and nothing after it (`None`: it
    /// holds nothing). A copy that was under way for the slot starts again.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] for a slot that does not exist.
    pub fn begin_resync(&self, slot: usize, have: Option<Epoch>) -> Result<Plan, VolumeError> {
        let mut core = self.handle.shared.core();
        if slot >= PEERS {
            return Err(VolumeError::Refused(
                "a volume has maps for three standbys: slots 0 to 2",
            ));
        }
        let map = core.map(slot)?;
        let full = map.begin_copy(have);
        Ok(Plan {
            full,
            bytes: map.remaining_bytes(),
        })
    }

    /// Bytes still to be sent to the standby in `slot`; guest writes let it grow again.
    #[must_use]
    pub fn resync_remaining(&self, slot: usize) -> u64 {
        self.handle
            .shared
            .core()
            .map(slot)
            .map_or(0, |m| m.remaining_bytes())
    }

    /// Copy phase: the next piece, about `bytes_max` long (at least one region); `None` when nothing is left now.
    ///
    /// # Errors
    /// As [`Volume::read`]; the piece then counts as not sent.
    pub fn next_chunk(&self, slot: usize, bytes_max: u64) -> Result<Option<Chunk>, VolumeError> {
        // The mark is cleared before the bytes are read: a write in between marks the region again.
        let Some((offset, len)) = self.handle.shared.core().map(slot)?.next_run(bytes_max) else {
            return Ok(None);
        };
        let mut data = vec![0; len as usize];
        match self.read(offset, &mut data) {
            Ok(()) => Ok(Some(Chunk { offset, data })),
            Err(e) => {
                self.handle.shared.core().map(slot)?.unsend(offset, len);
                Err(e)
            }
        }
    }

    /// A piece was lost on the way: it is sent again.
    ///
    /// # Errors
    /// [`VolumeError::Refused`].
    pub fn chunk_lost(&self, slot: usize, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.handle.shared.core().map(slot)?.unsend(offset, len);
        Ok(())
    }

    /// Switch phase, at the cut that completes the copy: call it between [`Volume::seal`] of that epoch and the
    /// guest's next write. Ends the copy; the returned residue goes with the epoch.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] when no copy is under way or `sealed` is not the last epoch.
    pub fn end_resync(&self, slot: usize, sealed: &Sealed) -> Result<Residue, VolumeError> {
        let mut core = self.handle.shared.core();
        if core.progress().tip != sealed.epoch() || core.has_open_writes() {
            return Err(VolumeError::Refused(
                "the copy must end with the epoch that was sealed last",
            ));
        }
        let map = core.map(slot)?;
        if !map.copying() {
            return Err(VolumeError::Refused("no copy is under way for this standby"));
        }
        let mut ranges = Vec::new();
        while let Some(run) = map.next_run(16 * REGION) {
            ranges.push(run);
        }
        map.end_copy(sealed.epoch());
        Ok(Residue {
            epoch: sealed.epoch(),
            ranges,
        })
    }

    /// The copy is given up. The map stays: the next copy sends all of it again.
    ///
    /// # Errors
    /// [`VolumeError::Refused`].
    pub fn abort_resync(&self, slot: usize) -> Result<(), VolumeError> {
        self.handle.shared.core().map(slot)?.abort_copy();
        Ok(())
    }

    /// The residue's bytes as of its epoch, as writes. May run while the guest goes on, until the epoch is committed.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`] when a later epoch reached the image; [`VolumeError::NoGoodCopy`].
    pub fn read_residue(&self, residue: &Residue) -> Result<Vec<EpochOp>, VolumeError> {
        let shared = &self.handle.shared;
        let mut ops = Vec::with_capacity(residue.ranges.len());
        for &(offset, len) in &residue.ranges {
            let mut data = vec![0; len as usize];
            let mut tries = len / BLOCK + 2;
            loop {
                tries -= 1;
                if tries == 0 {
                    return Err(VolumeError::Damaged {
                        what: "image",
                        at: offset,
                    });
                }
                match crate::volume::read_view(shared, Some(residue.epoch), offset, &mut data)? {
                    Ok(_) => break,
                    Err(ReadFault::Block(at)) => {
                        if !crate::scrub::repair(shared, at)?.written {
                            return Err(VolumeError::Damaged {
                                what: "image block",
                                at,
                            });
                        }
                    }
                    Err(ReadFault::Other(e)) => return Err(e),
                }
            }
            ops.push(EpochOp::Write {
                offset,
                data: Arc::new(data),
            });
        }
        Ok(ops)
    }
}

/// What a copy still lacked when its epoch was sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residue {
    /// The epoch that completes the copy.
    pub epoch: Epoch,
    /// Offsets and lengths in bytes.
    pub ranges: Vec<(u64, u64)>,
}
