//! Writable disks of a protected VM: what the protocol says, done to a replicated volume per disk.
//!
//! ```text
//! guest --> LateBlock --> Volume (primary) --seal at the cut--> record --> Replica (standby): stage, sync, commit
//! ```
//! Each image (raw or qcow2) or block device of a host has a folder with journal and checksums (`docs/disk-format.md`): `<image>.sfj`
//! beside it, or one in the folder that the protection names. Every epoch is
//! sealed and staged on every volume, also when nothing was written, so that their numbers never part.
//! Invariants: I3 (disk and memory are cut at one instant and applied to one epoch), I4, I5 (an epoch with a flush is
//! reported as synced only when all volumes are). The engine never waits here for a disk that works, but at a cold boot.

use crate::ask::{self, Asks, LinkPeer, Question, Shelf};
use crate::block::{Blocks, LateBlock};
use crate::config::ProtectSpec;
use crate::disk_care::{Copied, stand_equal};
use crate::input::{Input, Inputs};
use crate::scrubber::Scrubber;
use std::collections::VecDeque;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use steadfast_disk::image::{self, BlockIo, ImageFormat, ImageOptions};
use steadfast_disk::journal::State;
use steadfast_disk::resync::Residue;
use steadfast_disk::storage::{BlockFile, DirStorage, Storage, StorageFile};
use steadfast_disk::testing::LiveFaults;
use steadfast_disk::volume::{self, EpochOp, Notify, Options, Replica, Sealed, Volume, VolumeError};
use steadfast_epoch::io::Event;
use steadfast_epoch::message::EpochRef;
use steadfast_types::{Epoch, Term};
use steadfast_vmm::spec::VmSpec;
use steadfast_wire::record::{DiskKind, DiskOp};
use steadfast_wire::{StagedRecord, vm_hash};

/// Standbys that a volume can keep apart.
pub const SLOTS: usize = steadfast_disk::volume::PEERS;
/// Bytes of a disk in one chunk of a full copy.
pub const CHUNK_BYTES: u64 = 4 << 20;
/// A disk whose journal takes nothing for so long is as good as dead: the standby is better off.
const STUCK: Duration = Duration::from_secs(5);
/// Numbers of copies are drawn at random by each process and then count up.
const SAME_SOURCE: u64 = 1 << 32;
/// Replaying a journal at a cold boot.
const REPLAY: Duration = Duration::from_secs(120);
/// The longest gap between a VM's disks that is filled with empty epochs at a cold boot.
const EMPTY_EPOCHS_MAX: u64 = 4096;

/// An operation and the volume that it belongs to.
pub type NumberedOp = (u16, EpochOp);

/// As it is written into a record.
pub fn wire_op((volume, op): &NumberedOp) -> DiskOp<'_> {
    let (offset, len) = op.range();
    let (kind, data): (_, &[u8]) = match op {
        EpochOp::Write { data, .. } => (DiskKind::Write, data),
        EpochOp::Discard { .. } => (DiskKind::Discard, &[]),
        EpochOp::WriteZeroes { .. } => (DiskKind::WriteZeroes, &[]),
    };
    DiskOp {
        kind,
        volume: *volume,
        offset,
        len,
        data,
    }
}

pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) image: Arc<dyn BlockIo>,
    file: Arc<dyn StorageFile>,
    storage: Box<dyn Storage>,
    options: Options,
    pub(crate) late: Arc<LateBlock>,
    notify: Notify,
    peer: Arc<LinkPeer>,
    /// Where other threads find the volume.
    shelf: Shelf,
    /// None: what is in the folder cannot be used, and why.
    pub(crate) replica: Result<Replica, String>,
    /// What is in the folder cannot be used because the disk below failed, not because of what it says.
    pub(crate) unreadable: bool,
}

impl Disk {
    pub(crate) fn text(&self) -> impl Fn(VolumeError) -> String + use<> {
        let path = self.path.display().to_string();
        move |e| format!("disk {path}: {e}")
    }

    fn format(&mut self, at: EpochRef) -> Result<&Replica, String> {
        self.take_down()?;
        self.replica = Err("being laid out".into());
        let laid_out = volume::format(&*self.storage, &*self.file, &self.options, at.epoch, at.term);
        if let Err(error) = laid_out {
            // No greeting is answered before the disk works: the next copy would fail as this one does.
            self.unreadable = matches!(error, VolumeError::Io { .. });
            let why = self.text()(error);
            self.replica = Err(why.clone());
            return Err(why);
        }
        self.open();
        self.replica()
    }

    /// No other thread works on the volume any more.
    fn take_down(&self) -> Result<(), String> {
        let until = Instant::now() + STUCK;
        loop {
            match self.shelf.try_write() {
                Ok(mut shelf) => {
                    *shelf = None;
                    return Ok(());
                }
                Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => {
                    return Err(format!(
                        "disk {}: something still works on it; is it hung?",
                        self.path.display()
                    ));
                }
            }
        }
    }

    pub(crate) fn open(&mut self) {
        let opened = Replica::open(
            &*self.storage,
            Arc::clone(&self.file),
            &self.options,
            Some(Arc::clone(&self.notify)),
        );
        self.unreadable = matches!(opened, Err(VolumeError::Io { .. }));
        self.replica = opened.map(|(r, _)| r).map_err(self.text());
        if let Ok(replica) = &self.replica {
            let peer: Arc<LinkPeer> = Arc::clone(&self.peer);
            replica.set_peer(Some(peer));
            *self.shelf.write().unwrap_or_else(PoisonError::into_inner) = Some(replica.common());
        }
    }

    pub(crate) fn replica(&self) -> Result<&Replica, String> {
        self.replica.as_ref().map_err(Clone::clone)
    }
}

/// An epoch that the standby's volumes have not taken yet.
struct Waiting {
    epoch: EpochRef,
    flush: bool,
    /// For each volume.
    ops: Vec<Vec<EpochOp>>,
    /// Volumes that have it.
    done: usize,
}

/// What a cut sealed on all volumes.
pub struct Cut {
    sealed: Vec<Sealed>,
    /// For each base: its residues.
    bases: Vec<Result<Vec<Residue>, String>>,
    /// The guest flushed one of them.
    pub flush: bool,
}

/// All writable disks of the VM.
pub struct Disks {
    pub(crate) list: Vec<Disk>,
    /// Questions to other hosts that wait for their answer, and where those of other hosts are answered.
    pub(crate) asks: Asks,
    pub(crate) serve: SyncSender<Question>,
    pub(crate) scrubber: Scrubber,
    /// The present or last copy to the standby in each slot.
    pub(crate) copied: [Copied; SLOTS],
    pub(crate) hang: Duration,
    pub(crate) reopened: Option<Instant>,
    pub(crate) inputs: Inputs,
    /// What the devices of the machine stand on.
    pub(crate) blocks: Blocks,
    queue: VecDeque<Waiting>,
    /// Number of the copy whose end is under way on a thread.
    finishing: Option<u64>,
    /// A piece of the copy was lost here: its end is refused.
    pub copy_failed: bool,
    /// Reported as synced.
    reported: Epoch,
    /// To be committed, and whether that is to be reported as applied.
    commit: Option<(Epoch, bool)>,
}

impl Disks {
    /// Opens the writable disks of `spec` that are mirrored.
    ///
    /// # Errors
    /// Which disk cannot be protected, why, and what to do.
    pub fn open(spec: &VmSpec, protect: &ProtectSpec, inputs: &Inputs) -> Result<Self, String> {
        let mut list = Vec::new();
        let (name, asks, blocks) = (&spec.name, Asks::default(), Blocks::default());
        let faults = protect.disk_faults.clone().map(LiveFaults::new);
        for (index, disk) in protect.mirrored_disks(spec) {
            let path = disk.path.display();
            let meta = std::fs::metadata(&disk.path).map_err(|e| format!("disk {path}: {e}"))?;
            if !meta.is_file() && !meta.file_type().is_block_device() {
                return Err(format!("disk {path} is neither a file nor a block device"));
            }
            if !meta.is_file() && protect.journals.is_none() {
                return Err(format!(
                    "disk {path} is a block device: name a folder for the journals of this VM's disks (`journals`)"
                ));
            }
            let format = match &disk.format {
                Some(format) => format.parse::<ImageFormat>(),
                None => image::detect(&disk.path),
            };
            let format = format.map_err(|e| format!("disk {path}: {e}"))?;
            if disk.format.is_none() && format != ImageFormat::Raw {
                // A guest can write such a header into a raw disk, and with it the name of any file of this host. It is not even opened.
                return Err(format!(
                    "disk {path} looks like a {0} image and is not declared to be one: say `format={0}` if it is, `format=raw` if these \
                     are the guest's bytes",
                    format.name()
                ));
            }
            let options = ImageOptions {
                format: Some(format),
                direct: disk.direct,
                // The process that runs the VM has it until it is taken over.
                lock: protect.takes_over.is_none(),
                ..ImageOptions::default()
            };
            let image = image::open(&disk.path, &options).map_err(|e| format!("disk {path}: {e}"))?;
            let folder = match &protect.journals {
                Some(folder) => folder.join(format!("{name}-{index}.sfj")),
                None => {
                    let mut beside = disk.path.clone().into_os_string();
                    beside.push(".sfj");
                    PathBuf::from(beside)
                }
            };
            let plain = DirStorage::new(&folder).map_err(|e| format!("journal {}: {e}", folder.display()))?;
            let mut storage: Box<dyn Storage> = Box::new(plain);
            let mut file: Arc<dyn StorageFile> = Arc::new(BlockFile(Arc::clone(&image)));
            if let Some(faults) = &faults {
                (storage, file) = (faults.storage(storage), faults.file("image", file));
            }
            let peer = Arc::new(LinkPeer {
                volume: u16::try_from(list.len()).map_err(|_| "too many disks".to_owned())?,
                inputs: inputs.clone(),
                asks: asks.clone(),
            });
            let late = Arc::new(LateBlock::new(index, image.info(), inputs.clone()));
            let notify: Notify = {
                // Weak: the block holds the volume, which holds this.
                let (inputs, blocks) = (inputs.clone(), Arc::downgrade(&blocks));
                Arc::new(move |_| {
                    if let Some(blocks) = blocks.upgrade() {
                        let blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner);
                        blocks.get(&index).inspect(|late| late.room());
                    }
                    inputs.disk_moved();
                })
            };
            let mut all = blocks.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(index, Arc::clone(&late));
            drop(all);
            let options = Options {
                journal_bytes: image.info().capacity_bytes.clamp(4 << 20, 64 << 20),
                // The engine never waits: what has no room now is tried again when a cursor has moved.
                wait_ms: 0,
                ..Options::new(vm_hash(name) ^ (index as u64 + 1))
            };
            let mut disk = Disk {
                path: disk.path.clone(),
                image,
                file,
                storage,
                options,
                late,
                notify,
                peer,
                shelf: Shelf::default(),
                replica: Err("not opened".into()),
                unreadable: false,
            };
            if volume::is_laid_out(&folder) {
                disk.open();
            } else {
                disk.format(EpochRef::ZERO)?;
            }
            list.push(disk);
        }
        stand_equal(&list);
        let shelves = list.iter().map(|d| Arc::clone(&d.shelf)).collect();
        let pause = Duration::from_secs(protect.scrub_pause_s);
        let threads = |e: std::io::Error| format!("a thread for disks: {e}");
        Ok(Self {
            list,
            asks,
            serve: ask::serve(inputs.clone()).map_err(threads)?,
            scrubber: Scrubber::start(shelves, protect.scrub_bytes_per_s, pause).map_err(threads)?,
            copied: std::array::from_fn(|_| Copied::default()),
            hang: Duration::from_millis(protect.disk_hang_ms.max(100)),
            reopened: None,
            inputs: inputs.clone(),
            blocks,
            queue: VecDeque::new(),
            finishing: None,
            copy_failed: false,
            reported: Epoch::ZERO,
            commit: None,
        })
    }

    /// Takes the images of a process that has let go of them.
    ///
    /// # Errors
    /// The one that somebody has.
    pub fn lock_images(&self) -> Result<(), String> {
        let mut images = self.list.iter();
        images.try_for_each(|d| {
            d.image
                .reacquire()
                .map_err(|e| format!("disk {}: {e}", d.path.display()))
        })
    }

    /// The VM has no writable disk.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// What the devices of the present machine stand on.
    pub fn blocks(&self) -> Blocks {
        Arc::clone(&self.blocks)
    }

    /// Where other threads find volume `number`.
    pub fn shelf(&self, number: u16) -> Option<Shelf> {
        self.list.get(usize::from(number)).map(|d| Arc::clone(&d.shelf))
    }

    pub(crate) fn volumes(&self) -> impl Iterator<Item = Volume> + '_ {
        self.list
            .iter()
            .filter_map(|d| d.replica.as_ref().ok().map(Replica::common))
    }

    // ---- primary -------------------------------------------------------------------------------------------------

    /// Cold boot: all complete epochs count (they may have been committed), then numbers go on from `at`.
    ///
    /// # Errors
    /// The disk that cannot be used.
    pub fn boot(&mut self, at: EpochRef, term: Term) -> Result<(), String> {
        for d in &mut self.list {
            let text = d.text();
            let replica = d
                .replica()
                .map_err(|e| format!("{e}; start the VM on the host with the good copy"))?
                .clone();
            let p = replica.progress();
            if let State::Copying { join } = p.state {
                return Err(text(VolumeError::Copying { join }));
            }
            replica.wait_synced(p.tip, REPLAY).map_err(&text)?;
            replica.commit(p.tip).map_err(&text)?;
            replica.common().wait_applied(p.tip, REPLAY).map_err(&text)?;
            // A new disk of an old VM has no account of what standbys lack, and one that is far behind has more to write
            // into its journal than the copy that this costs.
            let far = at.epoch.0.saturating_sub(p.tip.0) > EMPTY_EPOCHS_MAX;
            if p.tip > at.epoch || far {
                // The last of them ends the volume's threads.
                drop(replica);
                d.format(at)?;
                continue;
            }
            // Numbers go on from the highest of all disks, and the account of what standbys lack goes on with them. What
            // fills the gap is empty, and of this term: nobody else has it.
            for n in p.tip.0 + 1..=at.epoch.0 {
                let until = Instant::now() + REPLAY;
                while let Err(e) = replica.stage(Epoch(n), term, false, &[]) {
                    if !e.is_back_pressure() || Instant::now() >= until {
                        return Err(text(e));
                    }
                    replica.commit(Epoch(n - 1)).map_err(&text)?;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            replica.commit(at.epoch).map_err(&text)?;
        }
        self.go_live(at, term)
    }

    /// The standby's volumes become the primary's, after exactly epoch `at`.
    ///
    /// # Errors
    /// The disk that does not stand there.
    pub fn promote(&mut self, at: EpochRef, term: Term) -> Result<(), String> {
        self.queue.clear();
        for d in &self.list {
            let replica = d.replica()?;
            replica.discard_after(at.epoch).map_err(d.text())?;
        }
        self.go_live(at, term)
    }

    fn go_live(&mut self, at: EpochRef, term: Term) -> Result<(), String> {
        self.reported = Epoch::ZERO;
        self.commit = None;
        for d in &self.list {
            let replica = d.replica()?;
            let tip = replica.progress().tip;
            if tip != at.epoch {
                return Err(format!(
                    "disk {} stands at epoch {tip}, not at {at}",
                    d.path.display()
                ));
            }
            replica.clone().promote(term).map_err(d.text())?;
            d.late.bind(replica.common());
        }
        Ok(())
    }

    /// Seals `epoch` on all volumes, and ends the copies of the standbys in the slots `bases`.
    ///
    /// # Errors
    /// A disk that is stuck: this instance must end, its standby is better off.
    pub fn seal(&mut self, epoch: Epoch, term: Term, bases: &[usize]) -> Result<Cut, String> {
        // No request of the guest may fall between two volumes, or between an epoch and the residue of a copy.
        let gates: Vec<_> = self.list.iter().map(|d| d.late.shut()).collect();
        let mut sealed = Vec::with_capacity(self.list.len());
        for d in &self.list {
            let volume = d.replica()?.common();
            let until = Instant::now() + STUCK;
            sealed.push(loop {
                match volume.seal(epoch, term) {
                    Ok(s) => break s,
                    Err(e) if e.is_back_pressure() && Instant::now() < until => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(e) => return Err(d.text()(e)),
                }
            });
        }
        let bases = bases
            .iter()
            .map(|slot| {
                let end =
                    |(d, s): (&Disk, &Sealed)| d.replica()?.common().end_resync(*slot, s).map_err(d.text());
                self.list.iter().zip(&sealed).map(end).collect()
            })
            .collect();
        drop(gates);
        self.list.iter().for_each(|d| d.late.cut());
        let flush = sealed.iter().any(Sealed::flush);
        Ok(Cut { sealed, bases, flush })
    }

    /// The sealed operations, to be sent. Before the epoch can be committed.
    ///
    /// # Errors
    /// What could not be read.
    pub fn writes(&self, cut: &Cut) -> Result<Vec<NumberedOp>, String> {
        let mut all = Vec::new();
        for ((number, d), sealed) in (0..).zip(&self.list).zip(&cut.sealed) {
            for op in sealed.ops() {
                all.push((number, op.map_err(d.text())?));
            }
        }
        Ok(all)
    }

    /// What completes the copy of base `n` of the cut. Before the epoch can be committed.
    ///
    /// # Errors
    /// What could not be read.
    pub fn residue(&self, cut: &Cut, n: usize) -> Result<Vec<NumberedOp>, String> {
        let mut all = Vec::new();
        let Some(residues) = cut.bases.get(n) else {
            return Ok(all);
        };
        let residues = residues.as_ref().map_err(Clone::clone)?;
        for ((number, d), residue) in (0..).zip(&self.list).zip(residues) {
            let ops = d.replica()?.common().read_residue(residue).map_err(d.text())?;
            all.extend(ops.into_iter().map(|op| (number, op)));
        }
        Ok(all)
    }

    /// A copy to the standby in `slot` begins; its disks stand at `have`. What changed since then is sent, and all of a disk
    /// whose past does not hold that epoch for certain.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn begin_resync(&mut self, slot: usize, have: EpochRef) -> Result<(), String> {
        let mut copied = Copied::default();
        for v in self.volumes() {
            let known = have.epoch > Epoch::ZERO && v.holds(have.epoch, have.term);
            let plan = v
                .begin_resync(slot, known.then_some(have.epoch))
                .map_err(|e| e.to_string())?;
            copied.full |= plan.full;
            copied.planned += plan.bytes;
        }
        if let Some(place) = self.copied.get_mut(slot) {
            *place = copied;
        }
        Ok(())
    }

    /// Bytes that the standby in `slot` lacks.
    pub fn remaining(&self, slot: usize) -> u64 {
        self.volumes().map(|v| v.resync_remaining(slot)).sum()
    }

    /// The next piece of the copy; none if nothing is missing now.
    ///
    /// # Errors
    /// It could not be read and counts as missing.
    pub fn next_chunk(&mut self, slot: usize, bytes: u64) -> Result<Option<NumberedOp>, String> {
        for (number, volume) in (0..).zip(self.list.iter().filter_map(|d| d.replica.as_ref().ok())) {
            let chunk = volume
                .common()
                .next_chunk(slot, bytes)
                .map_err(|e| e.to_string())?;
            if let Some(c) = chunk {
                if let Some(copied) = self.copied.get_mut(slot) {
                    copied.sent += c.data.len() as u64;
                }
                let data = Arc::new(c.data);
                return Ok(Some((
                    number,
                    EpochOp::Write {
                        offset: c.offset,
                        data,
                    },
                )));
            }
        }
        Ok(None)
    }

    /// A piece was lost on the way.
    pub fn chunk_lost(&self, slot: usize, (number, offset, len): (u16, u64, u64)) {
        if let Some(v) = self.volumes().nth(usize::from(number))
            && let Err(error) = v.chunk_lost(slot, offset, len)
        {
            tracing::warn!(%error, "a lost piece of a copy");
        }
    }

    /// All journals are to be durable up to `through`; an event tells.
    pub fn request_sync(&mut self, through: Epoch) -> Vec<Event> {
        self.reported = Epoch::ZERO;
        self.volumes().for_each(|v| v.request_sync(through));
        self.moved()
    }

    // ---- standby -------------------------------------------------------------------------------------------------

    /// A full copy begins: nothing of what is here counts any more.
    pub fn begin_copy(&mut self, join: u64) {
        self.forget();
        self.copy_failed = false;
        // What is here counts until the copy ends, and the source sends what changed since. Not so where that is nothing, or the
        // mixture that another source left behind.
        let full = match self.unfinished() {
            Some((old, _)) => join.wrapping_sub(old) > SAME_SOURCE,
            None => self.have() == EpochRef::ZERO,
        };
        for d in &mut self.list {
            if let Err(error) = begin_copy(d, join, full) {
                tracing::error!(%error, "the copy of a disk cannot begin");
                self.copy_failed = true;
            }
        }
    }

    fn forget(&mut self) {
        self.queue.clear();
        self.finishing = None;
        self.commit = None;
        self.reported = Epoch::ZERO;
    }

    fn split(&self, record: &StagedRecord) -> Result<Vec<Vec<EpochOp>>, String> {
        let mut ops = vec![Vec::new(); self.list.len()];
        for op in record.disk_ops() {
            let of = ops.get_mut(usize::from(op.volume)).ok_or_else(|| {
                format!(
                    "the peer speaks of disk {}, which this VM does not have",
                    op.volume
                )
            })?;
            let (offset, len) = (op.offset, op.len);
            match op.kind {
                DiskKind::Write => of.push(EpochOp::Write {
                    offset,
                    data: Arc::new(op.data.to_vec()),
                }),
                DiskKind::WriteZeroes => of.push(EpochOp::WriteZeroes { offset, len }),
                DiskKind::Discard => of.push(EpochOp::Discard { offset, len }),
                DiskKind::Flush => {}
            }
        }
        Ok(ops)
    }

    /// Pieces of a full copy, straight to the images.
    ///
    /// # Errors
    /// They are not there, and the copy is void.
    pub fn store_chunk(&mut self, join: u64, record: &StagedRecord) -> Result<(), String> {
        for (d, ops) in self.list.iter().zip(self.split(record)?) {
            for op in ops {
                if let EpochOp::Write { offset, data } = op {
                    d.replica()?.store_chunk(join, offset, &data).map_err(d.text())?;
                }
            }
        }
        Ok(())
    }

    /// Takes an epoch into the journals, as soon as they have room; events tell.
    ///
    /// # Errors
    /// The record does not fit this VM.
    pub fn stage(
        &mut self,
        epoch: EpochRef,
        flush: bool,
        record: &StagedRecord,
    ) -> Result<Vec<Event>, String> {
        let ops = self.split(record)?;
        self.queue.push_back(Waiting {
            epoch,
            flush,
            ops,
            done: 0,
        });
        Ok(self.moved())
    }

    /// Commits up to `through`; with `report`, an event tells when all have.
    pub fn commit(&mut self, through: Epoch, report: bool) -> Vec<Event> {
        self.commit = Some((through, report));
        self.moved()
    }

    /// Drops epochs after `after`.
    ///
    /// # Errors
    /// One of them is committed here.
    pub fn truncate(&mut self, after: Epoch) -> Result<(), String> {
        self.queue.retain(|w| w.epoch.epoch <= after);
        self.reported = Epoch::ZERO;
        for d in &self.list {
            d.replica()?.discard_after(after).map_err(d.text())?;
        }
        Ok(())
    }

    /// The end of a copy is done, or not.
    pub fn copied(&mut self, join: u64, result: Result<(), String>) -> Vec<Event> {
        if self.finishing != Some(join) {
            return Vec::new();
        }
        self.finishing = None;
        let Some(base) = self.queue.pop_front() else {
            return Vec::new();
        };
        if let Err(error) = result {
            return self.lost(&error);
        }
        let mut events = vec![Event::Staged { epoch: base.epoch }];
        events.extend(self.moved());
        events
    }

    fn lost(&mut self, error: &str) -> Vec<Event> {
        tracing::error!(%error, "this host's replica is of no use any more; a full copy follows");
        self.forget();
        vec![Event::StateLost]
    }

    /// Looks what is possible now that something moved, and what there is to report.
    pub fn moved(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        if self.list.is_empty() || self.finishing.is_some() {
            return events;
        }
        if let Err(error) = self.pump(&mut events) {
            return self.lost(&error);
        }
        if self.finishing.is_some() {
            return events;
        }
        let synced = self.volumes().map(|v| v.progress().synced).min();
        if let Some(through) = synced.filter(|s| *s > self.reported) {
            self.reported = through;
            events.push(Event::JournalSynced { through });
        }
        if let Some((through, report)) = self.commit {
            let done = self.volumes().try_for_each(|v| v.commit(through));
            match done {
                Ok(()) => {
                    self.commit = None;
                    if report {
                        events.push(Event::Applied { through });
                    }
                }
                Err(VolumeError::NotDurable { .. }) => self.volumes().for_each(|v| v.request_sync(through)),
                Err(error) => tracing::error!(%error, %through, "epochs cannot be committed now"),
            }
        }
        events
    }

    fn pump(&mut self, events: &mut Vec<Event>) -> Result<(), String> {
        while let Some(w) = self.queue.front_mut() {
            for d in self.list.iter().skip(w.done) {
                let replica = d.replica()?;
                if let State::Copying { join } = replica.progress().state {
                    return self.finish(join);
                }
                let ops = w.ops.get(w.done).map_or(&[][..], Vec::as_slice);
                match replica.stage(w.epoch.epoch, w.epoch.term, w.flush, ops) {
                    Ok(()) => w.done += 1,
                    Err(e) if e.is_back_pressure() => return Ok(()),
                    Err(e) => return Err(d.text()(e)),
                }
            }
            events.push(Event::Staged { epoch: w.epoch });
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Ends a copy on a thread: it syncs whole images.
    fn finish(&mut self, join: u64) -> Result<(), String> {
        if self.copy_failed {
            return Err("a piece of the copy is missing".into());
        }
        let Some(w) = self.queue.front_mut() else {
            return Ok(());
        };
        let mut work = Vec::new();
        for (d, ops) in self.list.iter().zip(std::mem::take(&mut w.ops)) {
            work.push((d.replica()?.clone(), Arc::clone(&d.image), ops));
        }
        let (epoch, inputs) = (w.epoch, self.inputs.clone());
        std::thread::Builder::new()
            .name("disk-copied".into())
            .spawn(move || {
                let done = work.into_iter().try_for_each(|(replica, image, ops)| {
                    // Most of the sync happens here, where it holds nobody up.
                    image.flush().map_err(|e| e.to_string())?;
                    finish_copy(&replica, join, &ops, epoch).map_err(|e| e.to_string())
                });
                inputs.send(Input::DiskCopied(join, done));
            })
            .map_err(|e| format!("the end of a copy needs a thread: {e}"))?;
        self.finishing = Some(join);
        Ok(())
    }
}

fn finish_copy(replica: &Replica, join: u64, ops: &[EpochOp], at: EpochRef) -> Result<(), VolumeError> {
    until_still(|| replica.finish_copy(join, ops, at.epoch, at.term))
}

fn begin_copy(d: &mut Disk, join: u64, full: bool) -> Result<(), String> {
    if d.replica.is_err() {
        d.format(EpochRef::ZERO)?;
    }
    let replica = d.replica()?;
    until_still(|| replica.begin_copy(join, full)).map_err(d.text())
}

/// A copy begins and ends between two jobs of the volume's threads.
fn until_still(mut what: impl FnMut() -> Result<(), VolumeError>) -> Result<(), VolumeError> {
    let until = Instant::now() + STUCK;
    loop {
        match what() {
            Err(VolumeError::Refused(_)) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}
