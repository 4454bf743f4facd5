//! Which regions of a volume changed since a standby's last durable epoch.
//!
//! Two generations of bits: `old` covers the epochs after `base`, `new` those after `middle`. When the standby holds
//! `middle` durably, `old` is forgotten and `new` takes its place. Bits are set when an operation enters the
//! journal, so open and uncommitted epochs are covered as well.
//!
//! File: two header copies of 4 KiB (numbered, the newer valid one counts), then pages of 4096 bytes: 4080 of bits,
//! the page's number, a checksum.

use crate::journal::record::{u32_at, u64_at};
use crate::storage::StorageFile;
use crate::volume::VolumeError;
use steadfast_types::Epoch;

/// What one bit stands for, in bytes.
pub const REGION: u64 = 64 * 1024;
const PAGE: usize = 4096;
const WORDS: usize = 510;
const MAGIC: u64 = 0x5952_5444_4644_5453; // "STDFDTRY"
const VERSION: u32 = 1;
/// Epochs between two changes of generation: it costs one pass over the map.
const GENERATION_EPOCHS: u64 = 256;

/// See the module.
pub struct DirtyMap {
    volume: u64,
    capacity: u64,
    old: Vec<u64>,
    new: Vec<u64>,
    base: Option<Epoch>,
    middle: Option<Epoch>,
    peer_durable: Epoch,
    /// Regions still to be sent by the copy under way.
    copy: Option<Vec<u64>>,
    cursor: u64,
    /// Change counter of each page, and what of it is in the file.
    stamps: Vec<(u64, u64)>,
    number: u64,
    header_unsaved: bool,
}

/// What a checkpoint has to write.
#[derive(Debug, Default)]
pub struct MapChanges {
    header: Option<(u64, Vec<u8>)>,
    pages: Vec<(usize, u64, Vec<u8>)>,
}

impl MapChanges {
    /// Writes and syncs them: the header first, since bits may be too many but never too few for their base.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn write(&self, file: &dyn StorageFile) -> Result<(), VolumeError> {
        if let Some((number, bytes)) = &self.header {
            let at = number % 2 * PAGE as u64;
            file.write_at(at, bytes)
                .map_err(VolumeError::io("write", "dirty map", at))?;
            file.sync().map_err(VolumeError::io("sync", "dirty map", at))?;
        }
        for (page, _, bytes) in &self.pages {
            let at = (*page as u64 + 2) * PAGE as u64;
            file.write_at(at, bytes)
                .map_err(VolumeError::io("write", "dirty map", at))?;
        }
        if self.pages.is_empty() {
            return Ok(());
        }
        file.sync().map_err(VolumeError::io("sync", "dirty map", 0))
    }
}

impl DirtyMap {
    fn blank(volume: u64, capacity: u64) -> Self {
        let regions = capacity.div_ceil(REGION) as usize;
        let pages = regions.div_ceil(64).div_ceil(WORDS);
        Self {
            volume,
            capacity,
            old: vec![0; pages * WORDS],
            new: vec![0; pages * WORDS],
            base: None,
            middle: None,
            peer_durable: Epoch::ZERO,
            copy: None,
            cursor: 0,
            stamps: vec![(0, 0); pages],
            number: 0,
            header_unsaved: false,
        }
    }

    /// Lays the file out anew: nothing is known of any standby.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn format(file: &dyn StorageFile, volume: u64, capacity: u64) -> Result<(), VolumeError> {
        let map = Self::blank(volume, capacity);
        let len = (map.stamps.len() as u64 + 2) * PAGE as u64;
        file.allocate(len)
            .map_err(VolumeError::io("allocate", "dirty map", len))?;
        file.zero(0, len, false)
            .map_err(VolumeError::io("clear", "dirty map", 0))?;
        file.sync().map_err(VolumeError::io("sync", "dirty map", 0))
    }

    /// Reads the file. What cannot be read or trusted counts as changed, never as unchanged; an unreadable header
    /// means a full copy.
    #[must_use]
    pub fn load(file: &dyn StorageFile, volume: u64, capacity: u64, tip: Epoch) -> Self {
        let mut map = Self::blank(volume, capacity);
        for slot in 0..2_u64 {
            let mut b = vec![0; PAGE];
            if file.read_at(slot * PAGE as u64, &mut b).is_ok()
                && u64_at(&b, 0) == MAGIC
                && u32_at(&b, 8) == VERSION
                && u32_at(&b, 48) == crc32fast::hash(&b[..48])
                && u64_at(&b, 24) == volume
                && u64_at(&b, 32) == capacity
                && u64_at(&b, 16) >= map.number
            {
                map.number = u64_at(&b, 16);
                map.base = (b[12] != 0).then(|| Epoch(u64_at(&b, 40)));
            }
        }
        if map.base.is_none() {
            return map;
        }
        for page in 0..map.stamps.len() {
            let mut b = vec![0; PAGE];
            let at = (page as u64 + 2) * PAGE as u64;
            let whole = file.read_at(at, &mut b).is_ok()
                && u64_at(&b, 4080) == page as u64
                && u32_at(&b, 4088) == crc32fast::hash(&b[..4088]);
            for w in 0..WORDS {
                map.old[page * WORDS + w] = if whole { u64_at(&b, w * 8) } else { u64::MAX };
            }
        }
        map.middle = Some(tip.max(map.base.unwrap_or_default()));
        map
    }

    /// The operations after this epoch are all in the map; `None`: a full copy is needed.
    #[must_use]
    pub const fn base(&self) -> Option<Epoch> {
        self.base
    }

    fn regions(&self) -> u64 {
        self.capacity.div_ceil(REGION)
    }

    /// A range changes.
    pub fn mark(&mut self, offset: u64, len: u64) {
        if len == 0 || (self.middle.is_none() && self.copy.is_none()) {
            return;
        }
        for region in offset / REGION..(offset + len).div_ceil(REGION) {
            let (word, bit) = ((region / 64) as usize, 1_u64 << (region % 64));
            if self.middle.is_some() {
                if (self.new[word] | self.old[word]) & bit == 0 {
                    self.stamps[word / WORDS].0 += 1;
                }
                self.new[word] |= bit;
            }
            if let Some(copy) = &mut self.copy {
                copy[word] |= bit;
            }
        }
    }

    /// All operations up to this epoch are marked, none after it.
    pub(crate) fn epoch_ended(&mut self, epoch: Epoch) {
        if let Some(middle) = self.middle
            && self.peer_durable >= middle
            && (self.base.is_none() || epoch.0.saturating_sub(middle.0) >= GENERATION_EPOCHS)
        {
            self.base = Some(middle);
            self.old = std::mem::replace(&mut self.new, vec![0; self.old.len()]);
            self.middle = Some(epoch);
            self.all_unsaved();
        }
    }

    fn all_unsaved(&mut self) {
        self.stamps.iter_mut().for_each(|s| s.0 += 1);
        self.number += 1;
        self.header_unsaved = true;
    }

    /// The standby says that it holds this epoch durably, committed: what it changed need not be sent again.
    pub fn peer_durable(&mut self, epoch: Epoch) {
        self.peer_durable = self.peer_durable.max(epoch);
    }

    /// The standby is known to hold exactly this epoch now (a fresh pair of equal images, or a finished copy): start
    /// to keep track from here. Must be called when no later epoch has operations.
    pub(crate) fn start_at(&mut self, epoch: Epoch) {
        self.old.fill(0);
        self.new.fill(0);
        self.base = Some(epoch);
        self.middle = Some(epoch);
        self.peer_durable = epoch;
        self.all_unsaved();
    }

    /// Plans a copy to a standby that holds `have`, durably and with nothing of later epochs.
    pub(crate) fn begin_copy(&mut self, have: Option<Epoch>) -> bool {
        let full = match (have, self.base) {
            (Some(have), Some(base)) => have < base,
            _ => true,
        };
        self.cursor = 0;
        let mut copy: Vec<u64> = self
            .old
            .iter()
            .zip(&self.new)
            .map(|(a, b)| if full { u64::MAX } else { a | b })
            .collect();
        let regions = self.regions() as usize;
        copy.truncate(regions.div_ceil(64));
        if let Some(last) = copy.last_mut()
            && !regions.is_multiple_of(64)
        {
            *last &= (1 << (regions % 64)) - 1;
        }
        copy.resize(self.old.len(), 0);
        self.copy = Some(copy);
        full
    }

    pub(crate) fn copying(&self) -> bool {
        self.copy.is_some()
    }

    /// Takes the next run of regions to be sent, at most `bytes_max` (at least one region).
    pub(crate) fn next_run(&mut self, bytes_max: u64) -> Option<(u64, u64)> {
        let regions = self.regions();
        let copy = self.copy.as_mut()?;
        let words = copy.len() as u64;
        let first_word = self.cursor / 64;
        let word = (first_word..words)
            .chain(0..first_word)
            .find(|&w| copy[w as usize] != 0)?;
        let first = word * 64 + u64::from(copy[word as usize].trailing_zeros());
        let mut end = first;
        while end < regions && (end - first + 1) * REGION <= bytes_max.max(REGION) {
            let (w, bit) = ((end / 64) as usize, 1_u64 << (end % 64));
            if copy[w] & bit == 0 {
                break;
            }
            copy[w] &= !bit;
            end += 1;
        }
        self.cursor = end;
        let offset = first * REGION;
        Some((offset, (end * REGION).min(self.capacity) - offset))
    }

    /// Regions were not sent after all.
    pub(crate) fn unsend(&mut self, offset: u64, len: u64) {
        if let Some(copy) = &mut self.copy {
            for region in offset / REGION..(offset + len).div_ceil(REGION) {
                copy[(region / 64) as usize] |= 1 << (region % 64);
            }
        }
    }

    /// Bytes still to be sent, a little too many at the volume's end.
    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        let bits: u64 = self
            .copy
            .iter()
            .flatten()
            .map(|w| u64::from(w.count_ones()))
            .sum();
        bits * REGION
    }

    /// The copy ends with this epoch, just sealed: from its durability on the standby, the map counts from here.
    pub(crate) fn end_copy(&mut self, epoch: Epoch) {
        self.copy = None;
        for (old, new) in self.old.iter_mut().zip(&mut self.new) {
            *old |= std::mem::take(new);
        }
        self.middle = Some(epoch);
        self.peer_durable = self.peer_durable.min(epoch.prev());
        self.all_unsaved();
    }

    /// The copy is given up; the map stays as it was.
    pub(crate) fn abort_copy(&mut self) {
        self.copy = None;
    }

    /// What the file does not hold yet.
    pub(crate) fn unsaved(&self) -> MapChanges {
        let mut changes = MapChanges::default();
        if self.header_unsaved {
            let mut b = vec![0_u8; PAGE];
            b[0..8].copy_from_slice(&MAGIC.to_le_bytes());
            b[8..12].copy_from_slice(&VERSION.to_le_bytes());
            b[12] = u8::from(self.base.is_some());
            b[16..24].copy_from_slice(&self.number.to_le_bytes());
            b[24..32].copy_from_slice(&self.volume.to_le_bytes());
            b[32..40].copy_from_slice(&self.capacity.to_le_bytes());
            b[40..48].copy_from_slice(&self.base.unwrap_or_default().0.to_le_bytes());
            let crc = crc32fast::hash(&b[..48]);
            b[48..52].copy_from_slice(&crc.to_le_bytes());
            changes.header = Some((self.number, b));
        }
        for (page, (now, _)) in self
            .stamps
            .iter()
            .enumerate()
            .filter(|(_, (now, saved))| now != saved)
        {
            let mut b = vec![0_u8; PAGE];
            for w in 0..WORDS {
                let word = self.old[page * WORDS + w] | self.new[page * WORDS + w];
                b[w * 8..w * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
            b[4080..4088].copy_from_slice(&(page as u64).to_le_bytes());
            let crc = crc32fast::hash(&b[..4088]);
            b[4088..4092].copy_from_slice(&crc.to_le_bytes());
            changes.pages.push((page, *now, b));
        }
        changes
    }

    /// The file holds these now.
    pub(crate) fn saved(&mut self, changes: &MapChanges) {
        if changes.header.as_ref().is_some_and(|h| h.0 == self.number) {
            self.header_unsaved = false;
        }
        for (page, stamp, _) in &changes.pages {
            self.stamps[*page].1 = *stamp;
        }
    }
}
