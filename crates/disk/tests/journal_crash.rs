//! Power cut at every write and sync of a workload: what is recovered must be exactly one committed epoch (I3) that
//! holds everything that was promised (I4, I5). Rows 15 and 45 of the fault catalogue. Each deliberately broken
//! variant must fail the same sweep.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::Arc;
use steadfast_disk::checksum::{self, BLOCK, UNKNOWN};
use steadfast_disk::storage::{Storage, StorageFile};
use steadfast_disk::testing::FaultStorage;
use steadfast_disk::testing::rng::Rng;
use steadfast_disk::volume::{self, Core, EpochOp, Options, Recovered, Sabotage, VolumeError};
use steadfast_types::{Epoch, Term};

const CAPACITY: u64 = 192 * 1024 + 1536;

fn options(sabotage: Sabotage) -> Options {
    Options {
        journal_bytes: 1 << 20,
        memory_bytes_max: 96 * 1024,
        batch_bytes: 48 * 1024,
        apply_bytes: 64 * 1024,
        sabotage,
        ..Options::new(0xfeed)
    }
}

/// What must hold, kept outside of the volume.
struct Model {
    live: Vec<u8>,
    /// Contents after each sealed epoch.
    at: BTreeMap<Epoch, Vec<u8>>,
    tip: Epoch,
    committed: Epoch,
    /// Promised to be durable.
    synced: Epoch,
    durable_commit: Epoch,
    salt: u8,
}

impl Model {
    fn new() -> Self {
        let live = vec![0; CAPACITY as usize];
        Self {
            at: BTreeMap::from([(Epoch(0), live.clone())]),
            live,
            tip: Epoch(0),
            committed: Epoch(0),
            synced: Epoch(0),
            durable_commit: Epoch(0),
            salt: 0,
        }
    }

    fn op(&mut self, rng: &mut Rng) -> EpochOp {
        let unit = if rng.one_in(3) { BLOCK } else { 512 };
        let len = ((1 + rng.below(12)) * unit).min(CAPACITY);
        let offset = rng.below((CAPACITY - len) / 512 + 1) * 512;
        let range = offset as usize..(offset + len) as usize;
        match rng.below(8) {
            0 => {
                self.live[range].fill(0);
                EpochOp::Discard { offset, len }
            }
            1 => {
                self.live[range].fill(0);
                EpochOp::WriteZeroes { offset, len }
            }
            _ => {
                self.salt = self.salt.wrapping_add(1);
                let data: Vec<u8> = (0..len).map(|i| self.salt ^ (i / 512) as u8 ^ 0x40).collect();
                self.live[range].copy_from_slice(&data);
                EpochOp::Write {
                    offset,
                    data: Arc::new(data),
                }
            }
        }
    }

    /// After recovery: what was not found again never happened.
    fn rewind(&mut self, found: &Recovered) {
        self.at.retain(|e, _| *e <= found.last_staged);
        self.live.clone_from(&self.at[&found.last_staged]);
        self.tip = found.last_staged;
        self.committed = found.last_committed;
        self.synced = found.last_staged;
        self.durable_commit = found.last_committed;
    }
}

fn journal_step(core: &mut Core) -> Result<bool, VolumeError> {
    let Some(batch) = core.take_journal() else {
        return Ok(false);
    };
    let result = core.files().clone().run(&batch);
    core.complete_journal(&batch, result.is_ok());
    result.map(|()| true)
}

fn apply_step(core: &mut Core) -> Result<bool, VolumeError> {
    let Some(job) = core.take_apply() else {
        return Ok(false);
    };
    let result = job.run(&core.files().clone());
    core.complete_apply(&job, result.is_ok());
    result.map(|()| true)
}

fn checkpoint_step(core: &mut Core) -> Result<bool, VolumeError> {
    let Some(job) = core.take_checkpoint() else {
        return Ok(false);
    };
    let result = job.run(&core.files().clone());
    core.complete_checkpoint(&job, result.is_ok());
    result.map(|()| true)
}

fn drain(core: &mut Core) -> Result<(), VolumeError> {
    core.request_sync_all();
    for _ in 0..200 {
        let mut any = journal_step(core)?;
        any |= apply_step(core)?;
        any |= checkpoint_step(core)?;
        if !any {
            break;
        }
    }
    Ok(())
}

fn live_read(core: &Core, at: u64, len: u64) -> Vec<u8> {
    let mut buf = vec![0; len as usize];
    core.plan_read(at, len)
        .unwrap()
        .run(core.files(), &mut buf, true)
        .unwrap();
    buf
}

fn workload(core: &mut Core, model: &mut Model, rng: &mut Rng, actions: u64) -> Result<(), VolumeError> {
    core.promote(Term(1))?;
    for _ in 0..actions {
        match rng.below(16) {
            0..=5 => {
                let before = model.live.clone();
                let op = model.op(rng);
                match core.write(op) {
                    Ok(()) => {}
                    Err(e) if e.is_back_pressure() => {
                        model.live = before;
                        drain(core)?;
                    }
                    Err(e) => return Err(e),
                }
            }
            6 => core.flush_with_epoch()?,
            7 | 8 => {
                let epoch = model.tip.next();
                core.seal(epoch, Term(1))?;
                model.tip = epoch;
                model.at.insert(epoch, model.live.clone());
            }
            9 => {
                journal_step(core)?;
            }
            10 => {
                core.request_sync(model.tip);
                while journal_step(core)? {}
            }
            11 => {
                let through = Epoch(model.committed.0 + rng.below(model.tip.0 - model.committed.0 + 1));
                // Recorded before the call: what is called committed may be found committed.
                let before = model.committed;
                model.committed = model.committed.max(through);
                match core.commit(through) {
                    Err(VolumeError::NotDurable { .. }) => model.committed = before,
                    other => other?,
                }
            }
            12 => {
                apply_step(core)?;
            }
            13 => {
                checkpoint_step(core)?;
            }
            14 => {
                core.request_sync_all();
                while journal_step(core)? {}
            }
            _ if rng.one_in(4) => {
                // Demoted and promoted again, after some epoch that is not committed.
                let after = Epoch(model.committed.0 + rng.below(model.tip.0 - model.committed.0 + 1));
                model.synced = model.synced.min(after);
                core.discard_after(after)?;
                // A record of the drop may be lost with power, so what was dropped may be staged again: as a real
                // caller does, wait for it before anything else is promised.
                core.request_sync_all();
                while journal_step(core)? {}
                model.at.retain(|e, _| *e <= after);
                model.live.clone_from(&model.at[&after]);
                model.tip = after;
                core.promote(Term(1))?;
            }
            _ => {
                let at = rng.below(CAPACITY / 512) * 512;
                let len = (1 + rng.below(40)) * 512;
                let len = len.min(CAPACITY - at);
                let range = at as usize..(at + len) as usize;
                assert!(
                    live_read(core, at, len) == model.live[range],
                    "a guest read at {at}+{len}"
                );
            }
        }
        let p = core.progress();
        model.synced = model.synced.max(p.synced);
        model.durable_commit = model.durable_commit.max(p.durable_commit);
    }
    Ok(())
}

fn fresh(disk: &FaultStorage, options: &Options) {
    let image = disk.open("image", true).unwrap();
    image.allocate(CAPACITY).unwrap();
    image.sync().unwrap();
    volume::format(disk, &*image, options, Epoch(0), Term(0)).unwrap();
}

fn open(disk: &FaultStorage, options: &Options) -> Result<(Core, Recovered), VolumeError> {
    let image: Arc<dyn StorageFile> = disk
        .open("image", false)
        .map_err(|e| VolumeError::Mismatch(e.to_string()))?;
    volume::open(disk, image, options)
}

fn check_sums(core: &Core, image: &[u8]) {
    let sums = core
        .files()
        .sums
        .read(0, CAPACITY.div_ceil(BLOCK) as usize)
        .unwrap();
    for (b, sum) in sums.iter().enumerate() {
        let from = b * BLOCK as usize;
        let data = &image[from..image.len().min(from + BLOCK as usize)];
        assert!(
            *sum == UNKNOWN || *sum == checksum::block_sum(b as u64, data),
            "checksum of block {b}"
        );
    }
}

/// Checks what recovery found against the model.
fn check(disk: &FaultStorage, core: &Core, found: &Recovered, model: &Model) {
    assert!(
        found.last_staged >= model.synced,
        "I5: staged {} but {} was synced",
        found.last_staged,
        model.synced
    );
    assert!(found.last_staged <= model.tip.next(), "nothing from the future");
    assert!(
        found.last_committed >= model.durable_commit && found.last_committed <= model.committed,
        "I4: committed {} outside of {}..={}",
        found.last_committed,
        model.durable_commit,
        model.committed
    );
    assert_eq!(found.last_applied, found.last_committed);
    let image = disk.contents("image");
    let want = &model.at[&found.last_committed];
    if let Some(at) = (0..want.len()).find(|&i| image[i] != want[i]) {
        panic!("I3: image is not epoch {} at byte {at}", found.last_committed);
    }
    check_sums(core, &image);
}

/// One run: lives that each end with a power cut, then a check to the end. Returns the steps of the first life.
fn run(seed: u64, cut: Option<u64>, sabotage: Sabotage) -> u64 {
    let options = options(sabotage);
    let disk = FaultStorage::new(seed.wrapping_mul(1000) + cut.unwrap_or(0));
    fresh(&disk, &options);
    let start = disk.steps();
    let mut model = Model::new();
    let mut rng = Rng::new(seed);
    if let Some(cut) = cut {
        disk.cut_power_at(start + cut);
    }
    let first =
        open(&disk, &options).and_then(|(mut core, _)| workload(&mut core, &mut model, &mut rng, 140));
    let steps = disk.steps() - start;
    if !disk.is_off() {
        first.unwrap();
    }
    disk.cut_power();
    // Further lives, each with a cut of its own, some of them inside of recovery.
    let mut rng = Rng::new(seed ^ cut.unwrap_or(0).rotate_left(32));
    for _ in 0..2 {
        disk.reboot();
        let now = disk.steps();
        disk.cut_power_at(now + rng.below(40));
        let life = open(&disk, &options).and_then(|(mut core, found)| {
            check(&disk, &core, &found, &model);
            model.rewind(&found);
            workload(&mut core, &mut model, &mut rng, 20)
        });
        assert!(
            life.is_ok() || disk.is_off(),
            "failed with the power on: {life:?}"
        );
        disk.cut_power();
    }
    disk.reboot();
    let (mut core, found) = open(&disk, &options).unwrap();
    check(&disk, &core, &found, &model);
    // What is staged can be committed, epoch by epoch, each a boundary.
    for e in found.last_committed.0 + 1..=found.last_staged.0 {
        core.commit(Epoch(e)).unwrap();
        drain(&mut core).unwrap();
        assert!(
            disk.contents("image") == model.at[&Epoch(e)],
            "I3: epoch {e} after recovery"
        );
    }
    check_sums(&core, &disk.contents("image"));
    core.promote(Term(2)).unwrap();
    assert!(live_read(&core, 0, CAPACITY) == model.at[&found.last_staged]);
    steps
}

fn sweep(seeds: std::ops::Range<u64>, sabotage: Sabotage) -> u64 {
    let mut runs = 0;
    for seed in seeds {
        let steps = run(seed, None, sabotage);
        for cut in 0..steps {
            run(seed, Some(cut), sabotage);
            runs += 1;
        }
    }
    runs
}

#[test]
fn power_cut_at_every_step() {
    let runs = sweep(0..24, Sabotage::None);
    println!("{runs} power cuts");
    assert!(runs > 500, "the sweep must have swept");
}

/// The same sweep must fail for each of these, or it proves nothing.
#[test]
fn broken_variants_are_caught() {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let missed: Vec<Sabotage> = [
        Sabotage::TrimBeforeImageSync,
        Sabotage::ApplyBeforeDurable,
        Sabotage::TrustRecords,
        Sabotage::SkipJournalSync,
    ]
    .into_iter()
    .filter(|&s| std::panic::catch_unwind(|| sweep(0..24, s)).is_ok())
    .collect();
    std::panic::set_hook(quiet);
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
