//! Laying a volume out, and opening it after anything.
//!
//! Opening: newest superblock, scan of the journal from its trim position, then everything that is committed is
//! written to the image (again) and made durable, then what is complete but not committed is presented as staged.
//! Doing this twice, or being cut off in the middle of it, changes nothing.

use super::apply::{ApplyJob, Files};
use super::core::{Core, PEERS};
use super::op::{EpochWrites, JournaledOp};
use super::{Options, Recovered, Sabotage, VolumeError};
use crate::checksum::Sums;
use crate::journal::ring::Entry;
use crate::journal::{Header, Kind, Position, RING_MIN, RING_START, Ring, State, Superblock, Terms, scan};
use crate::resync::DirtyMap;
use crate::storage::{Storage, StorageFile};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};
use steadfast_types::{Epoch, Term};

const JOURNAL: &str = "journal";
const SUMS: &str = "sums";

fn map_name(slot: usize) -> String {
    format!("changes-{slot}")
}

/// Lays out the files of a replica beside an image, which is taken as it is (epoch `at`). Whatever was there is
/// lost. Nothing counts before the last step, so a crash leaves "no volume" or "damaged", and it can be run again.
///
/// # Errors
/// [`VolumeError::Io`] (also when the disk is full: all space is reserved here), [`VolumeError::Mismatch`].
pub fn format(
    storage: &dyn Storage,
    image: &dyn StorageFile,
    options: &Options,
    at: Epoch,
    term: Term,
) -> Result<(), VolumeError> {
    let capacity = image.len().map_err(VolumeError::io("size", "image", 0))?;
    if capacity == 0 || !capacity.is_multiple_of(512) {
        return Err(VolumeError::Mismatch(format!(
            "an image of {capacity} bytes is no disk: use a multiple of 512"
        )));
    }
    // First: what an earlier journal holds may be in the image only, and not durable there.
    image.sync().map_err(VolumeError::io("sync", "image", 0))?;
    let ring = options.journal_bytes.max(RING_MIN).next_multiple_of(4096);
    let open = |name: &str| {
        storage
            .open(name, true)
            .map_err(VolumeError::io("create", "volume directory", 0))
    };
    let journal = open(JOURNAL)?;
    journal
        .zero(0, RING_START, false)
        .map_err(VolumeError::io("clear", "journal", 0))?;
    journal.sync().map_err(VolumeError::io("sync", "journal", 0))?;
    journal
        .allocate(RING_START + ring)
        .map_err(VolumeError::io("allocate", "journal", RING_START + ring))?;
    // Records of an earlier life must not be taken for ours.
    journal
        .zero(RING_START, ring, false)
        .map_err(VolumeError::io("clear", "journal", RING_START))?;
    Sums::format(open(SUMS)?, options.volume_id, capacity)?;
    for slot in 0..PEERS {
        DirtyMap::format(&*open(&map_name(slot))?, options.volume_id, capacity, at)?;
    }
    journal.sync().map_err(VolumeError::io("sync", "journal", 0))?;
    storage
        .sync_names()
        .map_err(VolumeError::io("sync", "volume directory", 0))?;
    let mut terms = Terms::default();
    terms.note(term, at);
    let superblock = Superblock {
        number: 1,
        volume: options.volume_id,
        capacity,
        ring,
        generation: 0,
        trim: 0,
        trim_sequence: 0,
        applied: at,
        applied_term: term,
        state: State::Consistent,
        terms,
    };
    superblock.write(&*journal)
}

/// Whether a volume was laid out in this folder, be it damaged since. Not if laying it out was begun only: the superblock comes last, and until
/// then all is zero.
#[must_use]
pub fn is_laid_out(folder: &Path) -> bool {
    let mut file = match File::open(folder.join(JOURNAL)) {
        Ok(file) => file,
        // Who opens it will say why.
        Err(e) => return e.kind() != std::io::ErrorKind::NotFound,
    };
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return false,
            Ok(read) if piece[..read].iter().all(|b| *b == 0) => {}
            // It will be opened, and then this is told.
            Ok(_) | Err(_) => return true,
        }
    }
}

/// What the journal says, put in order.
#[derive(Default)]
struct Story {
    epochs: Vec<EpochWrites>,
    /// Operations of an epoch without an end.
    open: Vec<Arc<JournaledOp>>,
    open_start: Option<(Position, u64)>,
    committed: Epoch,
    /// Everything before this place counts as committed.
    barrier: Position,
}

impl Story {
    fn tell(&mut self, h: &Header, applied: Epoch) -> Result<(), VolumeError> {
        let damaged = VolumeError::Damaged {
            what: "journal: order of records",
            at: h.position,
        };
        let (at, end) = (Position(h.position), Position(h.position + h.span()));
        let epoch = Epoch(h.epoch);
        let tip = self.epochs.last().map_or(applied, |e| e.epoch);
        match h.kind {
            Kind::Write | Kind::Discard | Kind::WriteZeroes => {
                if epoch != tip.next() {
                    return Err(damaged);
                }
                self.open_start.get_or_insert((at, h.sequence));
                self.open.push(Arc::new(JournaledOp::new(
                    h.kind, h.offset, h.length, at, end, None,
                )));
            }
            Kind::EpochEnd => {
                if epoch != tip.next() || h.length != self.open.len() as u64 {
                    return Err(damaged);
                }
                self.epochs.push(EpochWrites {
                    epoch,
                    term: Term(h.term),
                    flush: h.flush,
                    ops: std::mem::take(&mut self.open),
                    start: self.open_start.take().unwrap_or((at, h.sequence)),
                    end,
                });
            }
            Kind::Commit => {
                if epoch > tip {
                    return Err(damaged);
                }
                self.committed = self.committed.max(epoch);
            }
            Kind::Rollback => {
                self.epochs.retain(|e| e.epoch <= epoch);
                self.open.clear();
                self.open_start = None;
                // A barrier commits nothing that was dropped later on purpose.
                self.committed = self.committed.min(epoch.max(applied));
            }
            Kind::Barrier => {
                self.barrier = at;
                self.committed = self.committed.max(tip);
            }
            Kind::Pad => {}
        }
        Ok(())
    }
}

/// Opens a replica after a clean stop or a crash at any point.
///
/// # Errors
/// [`VolumeError::Mismatch`] when there is no volume or another one, [`VolumeError::Damaged`] when something durable
/// is not what was written (re-sync from the peer), [`VolumeError::Io`], [`VolumeError::Version`].
pub fn open(
    storage: &dyn Storage,
    image: Arc<dyn StorageFile>,
    options: &Options,
) -> Result<(Core, Recovered), VolumeError> {
    let get = |name: &str| {
        storage
            .open(name, false)
            .map_err(VolumeError::io("open", "volume directory", 0))
    };
    let journal = get(JOURNAL)?;
    let mut sb = Superblock::read(&*journal)?.ok_or_else(|| {
        VolumeError::Mismatch("there is no volume in this directory: create it first".to_owned())
    })?;
    let capacity = image.len().map_err(VolumeError::io("size", "image", 0))?;
    if sb.volume != options.volume_id || sb.capacity != capacity {
        return Err(VolumeError::Mismatch(format!(
            "journal of volume {:x} with {} bytes found beside image of volume {:x} with {capacity} bytes",
            sb.volume, sb.capacity, options.volume_id
        )));
    }
    // The generation is durable before anything is written under it: no record of an earlier life can follow one of
    // this life.
    sb.generation += 1;
    sb.number += 1;
    let super_file = get(JOURNAL)?;
    sb.write(&*super_file)?;
    let sums = Sums::open(get(SUMS)?, sb.volume, capacity)?;
    let maps: Vec<Arc<dyn StorageFile>> = (0..PEERS)
        .map(|slot| get(&map_name(slot)))
        .collect::<Result<_, _>>()?;
    let files = Arc::new(Files {
        image,
        journal,
        super_file,
        sums,
        maps,
        capacity,
        volume: sb.volume,
        ring: sb.ring,
        sabotage: options.sabotage,
        image_lock: Mutex::new(()),
    });

    let found = scan::scan(&*files.journal, &sb, options.sabotage == Sabotage::TrustRecords)?;
    // Only the memory of a dead process may have held what was just read: make it durable before building on it.
    files
        .journal
        .sync()
        .map_err(VolumeError::io("sync", "journal", 0))?;
    let mut story = Story {
        committed: sb.applied,
        ..Story::default()
    };
    for header in &found.records {
        story.tell(header, sb.applied)?;
    }

    let tip = story.epochs.last().map_or(sb.applied, |e| e.epoch);
    let load = |slot: usize| DirtyMap::load(&*files.maps[slot], sb.volume, capacity, tip);
    let mut maps: [DirtyMap; PEERS] = std::array::from_fn(load);
    let mut redo = ApplyJob::redo();
    let mut alone_tail = false;
    let redone = |e: &EpochWrites| e.epoch <= story.committed;
    for op in story.epochs.iter().flat_map(|e| e.ops.iter()).chain(&story.open) {
        maps.iter_mut().for_each(|m| m.mark(op.offset, op.len));
    }
    for e in story.epochs.iter().filter(|e| redone(e)) {
        redo.add(e, 0);
    }
    let tail = story
        .epochs
        .iter()
        .filter(|e| !redone(e))
        .flat_map(|e| e.ops.iter())
        .chain(&story.open);
    for op in tail.filter(|op| op.at < story.barrier) {
        alone_tail = true;
        redo.add_op(op);
    }
    redo.run(&files)?;

    let mut ring = Ring::new(&sb, found.tail, found.sequence);
    let leftover = !story.open.is_empty();
    if leftover {
        // What stands there of an epoch that never ended must not run into the next one.
        let rollback = Entry {
            kind: Kind::Rollback,
            epoch: tip.0,
            term: 0,
            offset: 0,
            length: 0,
            flush: false,
        };
        ring.append(rollback, None)?;
        if let Some(batch) = ring.take(usize::MAX, Some(ring.head())) {
            batch.run(&*files.journal)?;
            ring.complete(&batch, true);
        }
    }
    let last = story.epochs.iter().rev().find(|e| redone(e));
    let (applied, applied_term) = last.map_or((sb.applied, sb.applied_term), |e| (e.epoch, e.term));
    let mut core = Core::new(files.clone(), options.clone(), ring, sb, maps);
    core.adopt(story.epochs, applied, applied_term);
    // Image first, then the superblock that says so.
    if let Some(checkpoint) = core.take_checkpoint() {
        let result = checkpoint.run(&files);
        core.complete_checkpoint(&checkpoint, result.is_ok());
        result?;
    } else {
        files.image.sync().map_err(VolumeError::io("sync", "image", 0))?;
        files.sums.sync()?;
    }
    let p = core.progress();
    let recovered = Recovered {
        last_staged: p.tip,
        staged_term: p.tip_term,
        last_committed: p.committed,
        committed_term: core.applied_term,
        last_applied: p.applied,
        torn_tail: found.torn || leftover,
        alone_tail,
        state: p.state,
    };
    Ok((core, recovered))
}

impl Core {
    /// Takes over what recovery found: everything is durable, and applied up to `applied`.
    fn adopt(&mut self, epochs: Vec<EpochWrites>, applied: Epoch, term: Term) {
        self.applied = applied;
        self.applied_term = term;
        if let Some(last) = epochs.last() {
            self.tip = last.epoch;
            self.tip_term = last.term;
        }
        self.synced = self.tip;
        self.committed = applied;
        self.durable_commit = applied;
        self.recorded(applied);
        for e in epochs {
            self.terms.note(e.term, e.epoch);
            self.ops += e.ops.len();
            if e.epoch > applied {
                e.ops.iter().for_each(|op| self.overlay.insert(op));
            }
            self.epochs.push_back(Arc::new(e));
        }
        assert!(applied <= self.tip, "I6: applied <= tip after recovery");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::storage::DirStorage;

    #[test]
    fn a_volume_that_was_begun_only_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sfj");
        assert!(!is_laid_out(&path), "there is nothing");
        let storage = DirStorage::new(&path).unwrap();
        assert!(!is_laid_out(&path));
        let image = storage.open("image", true).unwrap();
        image.allocate(1 << 20).unwrap();
        // The power fails before the superblock is written.
        let journal = storage.open(JOURNAL, true).unwrap();
        assert!(!is_laid_out(&path));
        journal.zero(0, RING_START, false).unwrap();
        journal.allocate(RING_START + RING_MIN).unwrap();
        assert!(!is_laid_out(&path));
        format(&storage, &*image, &Options::new(1), Epoch::ZERO, Term::ZERO).unwrap();
        assert!(is_laid_out(&path));
        // Damaged is laid out all the same: what is in it is not thrown away.
        journal.write_at(0, &[0xff; 4096]).unwrap();
        assert!(is_laid_out(&path));
        journal.zero(0, RING_START, false).unwrap();
        assert!(!is_laid_out(&path), "nothing is in it");
        journal.write_at(RING_START + 4096, &[1; 512]).unwrap();
        assert!(is_laid_out(&path), "its superblock is lost, its records are not");
    }
}
