//! The journal's superblock: where scanning begins and what the image holds for certain.
//!
//! State number n is written to slots 2·(n mod 2) and 2·(n mod 2)+1, two copies of 4 KiB each; then the file is
//! synced before anything that relies on it happens. So a torn write leaves the state before intact, and one
//! rotten copy is healed by its twin.

use super::record::{u32_at, u64_at};
use super::terms::Terms;
use crate::storage::StorageFile;
use crate::volume::VolumeError;
use steadfast_types::{Epoch, Term};

/// Size of one copy in bytes.
pub const SLOT_BYTES: usize = 4096;
const MAGIC: u64 = 0x4c4f_5646_4441_5453; // "STADFVOL"
/// History: 1 = first. Bytes 136 on (terms) came later; a state without them is read as knowing none.
const VERSION: u32 = 1;
const USED: usize = 136;

/// What the replica as a whole is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Image and journal hold exactly the epochs they say.
    Consistent,
    /// A copy from the peer is under way: the image is a mixture and must not be promoted.
    Copying {
        /// Number of the copy, chosen by the source.
        join: u64,
    },
    /// The copy is complete and the replica usable; its blocks are compared with the peer from this byte on.
    Verifying {
        /// First byte not yet compared.
        from: u64,
    },
}

/// One state of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Grows by one with every write of the superblock.
    pub number: u64,
    /// The volume.
    pub volume: u64,
    /// Size of the image in bytes.
    pub capacity: u64,
    /// Size of the ring in bytes.
    pub ring: u64,
    /// Grows by one with every opening.
    pub generation: u32,
    /// Position of the first record still needed.
    pub trim: u64,
    /// Sequence number of that record.
    pub trim_sequence: u64,
    /// The image holds all epochs up to this, durably.
    pub applied: Epoch,
    /// The term in which that epoch was made.
    pub applied_term: Term,
    /// What the replica is.
    pub state: State,
    /// The past up to the applied epoch.
    pub terms: Terms,
}

impl Superblock {
    fn encode(&self) -> [u8; SLOT_BYTES] {
        let (state, word) = match self.state {
            State::Consistent => (0_u32, 0),
            State::Copying { join } => (1, join),
            State::Verifying { from } => (2, from),
        };
        let mut b = [0_u8; SLOT_BYTES];
        b[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&self.generation.to_le_bytes());
        for (i, n) in [
            self.number,
            self.volume,
            self.capacity,
            self.ring,
            self.trim,
            self.trim_sequence,
            self.applied.0,
            self.applied_term.0,
            u64::from(state),
            word,
        ]
        .into_iter()
        .enumerate()
        {
            b[16 + i * 8..24 + i * 8].copy_from_slice(&n.to_le_bytes());
        }
        let crc = crc32fast::hash(&b[..USED - 4]);
        b[USED - 4..USED].copy_from_slice(&crc.to_le_bytes());
        self.terms.encode(&mut b);
        b
    }

    fn decode(b: &[u8]) -> Result<Option<Self>, VolumeError> {
        if u64_at(b, 0) != MAGIC || u32_at(b, USED - 4) != crc32fast::hash(&b[..USED - 4]) {
            return Ok(None);
        }
        if u32_at(b, 8) != VERSION {
            return Err(VolumeError::Version {
                what: "journal",
                found: u32_at(b, 8),
                known: VERSION,
            });
        }
        let n = |i: usize| u64_at(b, 16 + i * 8);
        let state = match n(8) {
            0 => State::Consistent,
            1 => State::Copying { join: n(9) },
            2 => State::Verifying { from: n(9) },
            _ => return Ok(None),
        };
        Ok(Some(Self {
            number: n(0),
            volume: n(1),
            capacity: n(2),
            ring: n(3),
            generation: u32_at(b, 12),
            trim: n(4),
            trim_sequence: n(5),
            applied: Epoch(n(6)),
            applied_term: Term(n(7)),
            state,
            terms: Terms::decode(b),
        }))
    }

    /// Writes this state under its number and syncs the file.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn write(&self, file: &dyn StorageFile) -> Result<(), VolumeError> {
        let b = self.encode();
        let at = self.number % 2 * 2 * SLOT_BYTES as u64;
        file.write_parts(at, &[&b, &b])
            .map_err(VolumeError::io("write the superblock", "journal", at))?;
        file.sync().map_err(VolumeError::io("sync", "journal", at))
    }

    /// Reads the newest state; `None` if the file never was a journal.
    ///
    /// # Errors
    /// [`VolumeError::Io`], [`VolumeError::Version`], [`VolumeError::Damaged`] when something was there once but no
    /// copy is whole.
    pub fn read(file: &dyn StorageFile) -> Result<Option<Self>, VolumeError> {
        let len = file.len().map_err(VolumeError::io("size", "journal", 0))?;
        if len < super::RING_START {
            return Ok(None);
        }
        let mut newest: Option<Self> = None;
        let mut blank = true;
        for slot in 0..4 {
            let mut b = vec![0_u8; SLOT_BYTES];
            let at = slot * SLOT_BYTES as u64;
            if let Err(e) = file.read_at(at, &mut b) {
                // A twin may still be readable; if none is, this is reported below.
                tracing::error!(slot, error = %e, "superblock copy unreadable");
                blank = false;
                continue;
            }
            blank &= b.iter().all(|&x| x == 0);
            if let Some(s) = Self::decode(&b)?
                && newest.is_none_or(|n| s.number > n.number)
            {
                newest = Some(s);
            }
        }
        match newest {
            None if blank => Ok(None),
            None => Err(VolumeError::Damaged {
                what: "journal superblock",
                at: 0,
            }),
            Some(s) => s.checked().map(Some),
        }
    }

    fn checked(self) -> Result<Self, VolumeError> {
        let sane = self.ring >= super::RING_MIN
            && self.ring.is_multiple_of(4096)
            && self.trim.is_multiple_of(super::ALIGN)
            && self.capacity > 0;
        if sane {
            Ok(self)
        } else {
            Err(VolumeError::Damaged {
                what: "journal superblock",
                at: 0,
            })
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::storage::Storage as _;
    use crate::testing::FaultStorage;

    #[test]
    fn torn_update_leaves_the_one_before() {
        let disk = FaultStorage::new(1);
        let file = disk.open("journal", true).unwrap();
        file.allocate(1 << 21).unwrap();
        assert_eq!(Superblock::read(&*file).unwrap(), None);
        let mut s = Superblock {
            number: 1,
            volume: 3,
            capacity: 4096,
            ring: 1 << 20,
            generation: 1,
            trim: 0,
            trim_sequence: 0,
            applied: Epoch(4),
            applied_term: Term(1),
            state: State::Copying { join: 9 },
            terms: Terms::default(),
        };
        s.terms.note(Term(1), Epoch(4));
        s.write(&*file).unwrap();
        assert_eq!(Superblock::read(&*file).unwrap(), Some(s));
        let first = s;
        s.number = 2;
        s.write(&*file).unwrap();
        // Both copies of number 2 stand in slots 0 and 1.
        disk.flip_bit("journal", 20, 0);
        assert_eq!(Superblock::read(&*file).unwrap(), Some(s), "healed by its twin");
        disk.flip_bit("journal", 4096 + 20, 0);
        assert_eq!(Superblock::read(&*file).unwrap(), Some(first));
    }
}
