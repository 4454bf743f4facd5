//! The standby's half of a copy.

use super::DirtyMap;
use crate::checksum::BLOCK;
use crate::journal::{State, Superblock, Terms};
use crate::volume::{Core, EpochOp, Replica, VolumeError};
use steadfast_types::{Epoch, Term};

/// Runs of zeroes of this length become holes: a copy of a thin disk stays thin.
const HOLE: usize = 64 << 10;

fn is_hole(piece: &[u8]) -> bool {
    piece.len() >= HOLE && piece.iter().all(|b| *b == 0)
}

/// Splits bytes into runs that are holes and runs that are not.
fn runs(data: &[u8]) -> Vec<&[u8]> {
    let pieces: Vec<&[u8]> = data.chunks(HOLE).collect();
    let mut at = 0;
    let alike = pieces.chunk_by(|a, b| is_hole(a) == is_hole(b));
    alike
        .map(|run| {
            let len: usize = run.iter().map(|p| p.len()).sum();
            at += len;
            &data[at - len..at]
        })
        .collect()
}

impl Core {
    /// No job may be out: they belong to what is about to be forgotten.
    fn still(&self) -> Result<(), VolumeError> {
        if self.busy() {
            Err(VolumeError::Refused("a disk job is under way: try again at once"))
        } else {
            Ok(())
        }
    }

    /// Begins to take a copy: durable before it returns. See [`Replica::begin_copy`].
    ///
    /// # Errors
    /// As there.
    pub fn begin_copy(&mut self, join: u64, full: bool) -> Result<(), VolumeError> {
        self.still()?;
        let copying = matches!(self.progress().state, State::Copying { .. });
        if !full && !copying && self.progress().committed > self.progress().applied {
            return Err(VolumeError::Refused(
                "committed epochs must be applied before a copy of changes begins",
            ));
        }
        let p = self.progress();
        let (epoch, term) = if full {
            (Epoch::ZERO, Term::ZERO)
        } else {
            (p.applied, self.applied_term())
        };
        // The image must be as durable as the superblock says before it becomes a mixture.
        if !full {
            self.files()
                .image
                .sync()
                .map_err(VolumeError::io("sync", "image", 0))?;
            self.files().sums.sync()?;
        }
        self.each_map(DirtyMap::forget)?;
        self.restart_at(State::Copying { join }, epoch, term)?;
        if full {
            self.files().sums.forget_all()?;
        }
        Ok(())
    }

    /// Takes pieces of a copy. They need whole blocks.
    ///
    /// # Errors
    /// [`VolumeError::Refused`], [`VolumeError::OutOfRange`], [`VolumeError::Io`].
    pub fn check_chunk(&self, join: u64, offset: u64, len: u64) -> Result<(), VolumeError> {
        match self.progress().state {
            State::Copying { join: ours } if ours == join => {}
            _ => return Err(VolumeError::Refused("no copy with this number is under way")),
        }
        crate::journal::record::check_range(offset, len, self.capacity())?;
        let whole =
            offset.is_multiple_of(BLOCK) && (len.is_multiple_of(BLOCK) || offset + len == self.capacity());
        if whole {
            Ok(())
        } else {
            Err(VolumeError::Refused(
                "a piece of a copy must be whole blocks of 4 KiB",
            ))
        }
    }

    /// Ends a copy: the replica holds exactly `epoch`, durably.
    ///
    /// # Errors
    /// [`VolumeError::Refused`], [`VolumeError::Io`]: then the copy is still under way.
    pub fn finish_copy(&mut self, join: u64, epoch: Epoch, term: Term) -> Result<(), VolumeError> {
        self.still()?;
        self.check_chunk(join, 0, 0)?;
        self.files()
            .image
            .sync()
            .map_err(VolumeError::io("sync", "image", 0))?;
        self.files().sums.sync()?;
        self.each_map(|map| map.start_at(epoch))?;
        self.restart_at(State::Verifying { from: 0 }, epoch, term)
    }

    /// Changes the maps of this replica's own peers and makes that durable at once.
    fn each_map(&mut self, change: impl Fn(&mut DirtyMap)) -> Result<(), VolumeError> {
        let files = self.files().clone();
        for (map, file) in self.maps.iter_mut().zip(&files.maps) {
            change(map);
            let changes = map.unsaved();
            changes.write(&**file)?;
            map.saved(&changes);
        }
        Ok(())
    }

    fn restart_at(&mut self, state: State, epoch: Epoch, term: Term) -> Result<(), VolumeError> {
        let (trim, trim_sequence) = self.ring_head();
        let now = self.superblock();
        // What the source knows of its past is not known here: of the copy only the epoch that it stands at.
        let mut terms = match state {
            State::Copying { .. } => now.terms.up_to(epoch, term),
            _ => Terms::default(),
        };
        terms.note(term, epoch);
        let next = Superblock {
            number: now.number + 1,
            trim: trim.0,
            trim_sequence,
            applied: epoch,
            applied_term: term,
            state,
            terms,
            ..now
        };
        next.write(&*self.files().super_file)?;
        self.restart(next);
        Ok(())
    }
}

impl Replica {
    /// A copy begins: from now on, also after a crash, the image counts as a mixture until [`Replica::finish_copy`].
    /// `full`: nothing of what is here counts. Otherwise the epochs up to the last applied one do: a copy that was
    /// cut short may be begun again with the changes since that one, which `Progress::applied` still tells. Staged
    /// epochs are dropped.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] while disk jobs run (try again) or committed epochs are not applied yet (wait);
    /// [`VolumeError::Io`].
    pub fn begin_copy(&self, join: u64, full: bool) -> Result<(), VolumeError> {
        self.shared().core().begin_copy(join, full)
    }

    /// Takes a piece: straight to the image, with its checksums.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] for another copy's number or a piece that is not whole blocks;
    /// [`VolumeError::OutOfRange`], [`VolumeError::Io`].
    pub fn store_chunk(&self, join: u64, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        let shared = self.shared();
        shared.core().check_chunk(join, offset, data.len() as u64)?;
        let _still = shared.files.lock_image();
        let mut at = offset;
        for part in runs(data) {
            let len = part.len() as u64;
            match is_hole(part) {
                true => shared.files.zero_blocks(at, len)?,
                false => shared.files.write_blocks(at, part)?,
            }
            at += len;
        }
        Ok(())
    }

    /// The switch: stores the residue, makes everything durable and becomes a replica that holds exactly `epoch`.
    /// Compare with the peer afterwards ([`crate::scrub::Scrub::verify`]).
    ///
    /// # Errors
    /// As [`Replica::store_chunk`]; after an error the copy is still under way.
    pub fn finish_copy(
        &self,
        join: u64,
        residue: &[EpochOp],
        epoch: Epoch,
        term: Term,
    ) -> Result<(), VolumeError> {
        for op in residue {
            match op {
                EpochOp::Write { offset, data } => self.store_chunk(join, *offset, data)?,
                _ => return Err(VolumeError::Refused("a residue is made of writes")),
            }
        }
        self.shared().core().finish_copy(join, epoch, term)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_zeroes_are_holes_and_nothing_is_lost() {
        let mut data = vec![0; 5 * HOLE + 4096];
        data[HOLE + 7] = 1;
        data[4 * HOLE] = 2;
        let parts: Vec<_> = runs(&data).iter().map(|p| (p.len(), is_hole(p))).collect();
        // The end is too short for one.
        assert_eq!(
            parts,
            [
                (HOLE, true),
                (HOLE, false),
                (2 * HOLE, true),
                (HOLE + 4096, false)
            ]
        );
        assert_eq!(runs(&data).concat(), data);
        assert_eq!(runs(&data[..4096]), [&data[..4096]]);
        assert!(runs(&[]).is_empty());
    }
}
