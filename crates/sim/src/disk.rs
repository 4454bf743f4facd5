//! A host's disk, as far as the protocol depends on it: a journal of epochs of which some are fsynced.
//!
//! A power loss keeps what was fsynced and, of the rest, any prefix: a torn record ends the readable journal (its
//! checksum does not match), what came after it is lost. A killed process loses nothing that it wrote.

use crate::rng::Rng;
use steadfast_epoch::EpochRef;
use steadfast_types::Epoch;

/// One journal entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which epoch.
    pub epoch: EpochRef,
    /// The disk's contents after it.
    pub disk: u32,
}

/// The disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Everything up to here is in the image.
    image: Option<Entry>,
    journal: Vec<Entry>,
    synced: usize,
}

impl Disk {
    /// Appends an epoch.
    pub fn append(&mut self, e: Entry) {
        self.journal.push(e);
    }

    /// Everything up to this epoch is fsynced.
    pub fn sync(&mut self, through: Epoch) {
        let n = self.journal.iter().take_while(|e| e.epoch.epoch <= through).count();
        self.synced = self.synced.max(n);
    }

    /// Drops entries after this epoch.
    pub fn truncate(&mut self, after: EpochRef) {
        self.journal.retain(|e| e.epoch.epoch <= after.epoch);
        self.synced = self.synced.min(self.journal.len());
    }

    /// The whole contents are being replaced by a copy.
    pub fn wipe(&mut self) {
        *self = Self::default();
    }

    /// Moves what is fsynced and committed into the image.
    pub fn checkpoint(&mut self, committed: Epoch) {
        let n = self.journal.iter().take_while(|e| e.epoch.epoch <= committed).count().min(self.synced);
        if n > 0 {
            self.image = Some(self.journal[n - 1]);
            self.journal.drain(..n);
            self.synced -= n;
        }
    }

    /// The power fails; how many entries were lost.
    pub fn power_loss(&mut self, rng: &mut Rng) -> usize {
        let loose = self.journal.len() - self.synced;
        let keep = self.synced + rng.below(loose as u64 + 1) as usize;
        let lost = self.journal.len() - keep;
        self.journal.truncate(keep);
        lost
    }

    /// What a recovery finds: the newest readable epoch boundary. All of it is then on the platter.
    pub fn recover(&mut self) -> Option<Entry> {
        self.synced = self.journal.len();
        self.journal.last().copied().or(self.image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_loss_keeps_what_was_synced() {
        let mut rng = Rng::new(1);
        for _ in 0..50 {
            let mut d = Disk::default();
            for e in 1..=6 {
                d.append(Entry { epoch: EpochRef::new(e, 1), disk: e as u32 });
            }
            d.sync(Epoch(3));
            d.checkpoint(Epoch(2));
            d.power_loss(&mut rng);
            let found = d.recover().map(|e| e.disk);
            assert!(found.is_some_and(|d| (3..=6).contains(&d)), "{found:?}");
        }
    }
}
