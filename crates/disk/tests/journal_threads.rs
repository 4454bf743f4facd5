//! The volume with its threads, on real files and on a failing disk: replication between two of them, back-pressure,
//! repair from the peer, re-sync, promotion.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_disk::checksum::BLOCK;
use steadfast_disk::image::BlockIo;
use steadfast_disk::journal::State;
use steadfast_disk::scrub::{Scrub, peer};
use steadfast_disk::storage::{DirStorage, OsFile, Storage, StorageFile};
use steadfast_disk::testing::rng::Rng;
use steadfast_disk::testing::{Fault, FaultStorage, Kind};
use steadfast_disk::volume::{self, EpochOp, Mode, Options, Replica, Volume, VolumeBlock, VolumeError};
use steadfast_types::{Epoch, Term};

const CAPACITY: u64 = 4 << 20;
const LONG: Duration = Duration::from_secs(20);

fn options() -> Options {
    Options {
        journal_bytes: 2 << 20,
        memory_bytes_max: 512 * 1024,
        apply_delay_ms: 5,
        checkpoint_ms: 20,
        wait_ms: 20_000,
        ..Options::new(7)
    }
}

fn image(disk: &FaultStorage) -> Arc<dyn StorageFile> {
    disk.open("image", true).unwrap()
}

fn laid_out(seed: u64) -> FaultStorage {
    let disk = FaultStorage::new(seed);
    let image = image(&disk);
    image.allocate(CAPACITY).unwrap();
    volume::format(&disk, &*image, &options(), Epoch(0), Term(0)).unwrap();
    disk
}

fn primary(disk: &FaultStorage) -> Volume {
    Volume::open(disk, image(disk), &options(), Term(1), None)
        .unwrap()
        .0
}

fn standby(disk: &FaultStorage) -> Replica {
    Replica::open(disk, image(disk), &options(), None).unwrap().0
}

fn all(volume: &Volume) -> Vec<u8> {
    let mut buf = vec![0; CAPACITY as usize];
    volume.read(0, &mut buf).unwrap();
    buf
}

fn random_write(volume: &Volume, model: &mut [u8], rng: &mut Rng) {
    write_below(CAPACITY, volume, model, rng);
}

fn write_below(limit: u64, volume: &Volume, model: &mut [u8], rng: &mut Rng) {
    let len = (1 + rng.below(32)) * 512;
    let at = rng.below((limit - len) / 512) * 512;
    let fill = rng.next_u64() as u8;
    let data: Vec<u8> = (0..len).map(|i| fill ^ (i / 512) as u8).collect();
    volume.write(at, &data).unwrap();
    model[at as usize..(at + len) as usize].copy_from_slice(&data);
}

/// Seals, stages, syncs if flushed, commits on both sides: what the protocol does.
fn replicate(p: &Volume, s: &Replica, epoch: Epoch) {
    let sealed = p.seal(epoch, Term(1)).unwrap();
    let ops: Vec<EpochOp> = sealed.ops().map(Result::unwrap).collect();
    s.stage(epoch, Term(1), sealed.flush(), &ops).unwrap();
    if sealed.flush() {
        p.wait_synced(epoch, LONG).unwrap();
        s.wait_synced(epoch, LONG).unwrap();
    }
    p.commit(epoch).unwrap();
    s.commit(epoch).unwrap();
}

#[test]
fn pair_stays_equal_and_the_standby_takes_over() {
    let (a, b) = (laid_out(1), laid_out(2));
    let (p, s) = (primary(&a), standby(&b));
    let mut rng = Rng::new(3);
    let mut model = vec![0; CAPACITY as usize];
    for epoch in 1..=120 {
        for _ in 0..rng.below(24) {
            random_write(&p, &mut model, &mut rng);
        }
        if rng.one_in(4) {
            p.flush().unwrap();
        }
        replicate(&p, &s, Epoch(epoch));
    }
    assert!(all(&p) == model);
    // Speculation: reads, writes, and is undone.
    let spec = s.promote(Term(2)).unwrap();
    assert!(all(&spec) == model);
    spec.write(0, &[9; 4096]).unwrap();
    let s = spec.demote(Epoch(120)).unwrap();
    let q = s.promote(Term(2)).unwrap();
    assert!(all(&q) == model, "the speculative write is gone");
    q.wait_applied(Epoch(120), LONG).unwrap();
    drop(q);
    assert!(b.contents("image") == model, "I3: the image is epoch 120");
    // Reopened: nothing to do, same contents.
    let (q, found) = Volume::open(&b, image(&b), &options(), Term(3), None).unwrap();
    assert_eq!(
        (found.last_staged, found.last_committed),
        (Epoch(120), Epoch(120))
    );
    assert!(all(&q) == model);
}

#[test]
fn journal_full_throttles_and_goes_on() {
    let a = laid_out(1);
    let mut options = options();
    options.wait_ms = 200;
    let (p, _) = Volume::open(&a, image(&a), &options, Term(1), None).unwrap();
    let data = vec![5; 64 * 1024];
    let mut taken = 0;
    let refused = loop {
        match p.write(taken % 32 * 65536, &data) {
            Ok(()) => taken += 1,
            Err(e) => break e,
        }
        assert!(taken < 100, "the journal of 2 MiB must fill up");
    };
    assert!(matches!(refused, VolumeError::JournalFull { .. }), "{refused}");
    assert!(p.progress().journal_used <= p.progress().journal_size);
    // The end of the epoch and its commit fit still, and give the room back.
    p.seal(Epoch(1), Term(1)).unwrap();
    p.commit(Epoch(1)).unwrap();
    p.wait_applied(Epoch(1), LONG).unwrap();
    let until = Instant::now() + LONG;
    while p.write(0, &data).is_err() {
        assert!(Instant::now() < until, "room must come back");
    }
    let mut got = vec![0; 65536];
    p.read(65536 * 3, &mut got).unwrap();
    assert_eq!(got, data);
}

#[test]
fn alone_flush_survives_power_loss() {
    for seed in 0..20 {
        let a = laid_out(seed);
        let p = primary(&a);
        p.set_mode(Mode::Alone);
        let mut rng = Rng::new(seed);
        let mut model = vec![0; CAPACITY as usize];
        for epoch in 1..=rng.below(4) {
            random_write(&p, &mut model, &mut rng);
            p.seal(Epoch(epoch), Term(1)).unwrap();
        }
        for _ in 0..1 + rng.below(20) {
            random_write(&p, &mut model, &mut rng);
        }
        p.flush().unwrap();
        a.cut_power();
        drop(p);
        a.reboot();
        let (p, found) = Volume::open(&a, image(&a), &options(), Term(1), None).unwrap();
        assert!(found.alone_tail, "seed {seed}: {found:?}");
        assert!(all(&p) == model, "seed {seed}: flushed data is lost (I5)");
    }
}

#[test]
fn rot_and_misdirected_writes_are_found_and_repaired_or_refused() {
    let (a, b) = (laid_out(1), laid_out(2));
    let (p, s) = (primary(&a), standby(&b));
    let mut rng = Rng::new(5);
    let mut model = vec![0; CAPACITY as usize];
    for epoch in 1..=40 {
        for _ in 0..10 {
            random_write(&p, &mut model, &mut rng);
        }
        replicate(&p, &s, Epoch(epoch));
    }
    for v in [&p, &s.common()] {
        v.wait_applied(Epoch(40), LONG).unwrap();
        let mut learn = Scrub::new(v, 0);
        while learn.step(0).unwrap().is_some() {}
        assert_eq!((learn.report().bad, learn.report().blocks), (0, CAPACITY / BLOCK));
    }
    // Row 16: without a peer a read refuses, a scrub reports.
    a.flip_bit("image", 5 * BLOCK + 77, 3);
    let mut buf = vec![0; BLOCK as usize];
    let refused = p.read(5 * BLOCK, &mut buf).unwrap_err();
    assert!(matches!(refused, VolumeError::NoGoodCopy { .. }), "{refused}");
    let mut scrub = Scrub::new(&p, 0);
    while scrub.step(0).unwrap().is_some() {}
    assert_eq!(scrub.report().unrepaired, [5 * BLOCK]);
    // A partial write must not launder the rest of the block.
    p.write(5 * BLOCK + 1024, &[1; 512]).unwrap();
    model[5 * BLOCK as usize + 1024..5 * BLOCK as usize + 1536].fill(1);
    replicate(&p, &s, Epoch(41));
    p.wait_applied(Epoch(41), LONG).unwrap();
    assert!(p.read(5 * BLOCK, &mut buf).is_err(), "still refused");
    // With a peer the guest's read is answered, and the scrub mends the rest: rot in image and sums.
    p.set_peer(peer(s.clone()));
    p.read(5 * BLOCK, &mut buf).unwrap();
    assert!(buf == model[5 * BLOCK as usize..6 * BLOCK as usize]);
    a.flip_bit("image", 9 * BLOCK, 0);
    a.flip_bit("sums", 4096 + 4 * 11, 0);
    // Row 17: the next write to the image lands 3 blocks further on.
    a.inject(Fault {
        file: Some("image".into()),
        kind: Kind::Write,
        after: 0,
        count: 1,
        misdirect: Some(3 * BLOCK),
    });
    p.write(20 * BLOCK, &[0xaa; BLOCK as usize]).unwrap();
    model[20 * BLOCK as usize..21 * BLOCK as usize].fill(0xaa);
    replicate(&p, &s, Epoch(42));
    p.wait_applied(Epoch(42), LONG).unwrap();
    s.common().wait_applied(Epoch(42), LONG).unwrap();
    let mut scrub = Scrub::new(&p, 0);
    while scrub.step(0).unwrap().is_some() {}
    let r = scrub.report();
    assert_eq!(
        (r.bad, r.repaired, r.unrepaired.len()),
        (4, 4, 0),
        "9, 11, 20 and 23: {r:?}"
    );
    assert!(all(&p) == model);
    drop(p);
    assert!(a.contents("image") == model && b.contents("image") == model);
}

#[test]
fn single_io_errors_never_reach_the_guest() {
    for (n, (file, kind)) in [
        ("journal", Kind::Write),
        ("journal", Kind::Sync),
        ("image", Kind::Write),
        ("image", Kind::Sync),
        ("sums", Kind::Write),
        ("sums", Kind::Sync),
        ("image", Kind::Read),
        ("journal", Kind::Read),
    ]
    .into_iter()
    .enumerate()
    {
        for after in 0..6 {
            let (a, b) = (laid_out(1), laid_out(2));
            let (p, s) = (primary(&a), standby(&b));
            a.inject(Fault::eio(file, kind, after));
            println!("{file} {kind:?} {after}");
            let mut rng = Rng::new(n as u64 * 10 + after);
            let mut model = vec![0; CAPACITY as usize];
            for epoch in 1..=12 {
                for _ in 0..8 {
                    random_write(&p, &mut model, &mut rng);
                }
                p.flush().unwrap();
                replicate(&p, &s, Epoch(epoch));
                let at = rng.below(CAPACITY / BLOCK) * BLOCK;
                let mut buf = vec![0; BLOCK as usize];
                p.read(at, &mut buf).unwrap();
                assert!(
                    buf == model[at as usize..(at + BLOCK) as usize],
                    "{file} {kind:?} {after}"
                );
            }
            p.wait_applied(Epoch(12), LONG).unwrap();
            // Power loss on both: each side alone holds all that was flushed (I5).
            a.cut_power();
            b.cut_power();
            drop((p, s));
            for disk in [&a, &b] {
                disk.reboot();
                let (r, found) = Replica::open(disk, image(disk), &options(), None).unwrap();
                assert_eq!(found.last_staged, Epoch(12), "{file} {kind:?} {after}");
                r.commit(Epoch(12)).unwrap();
                assert!(
                    all(&r.promote(Term(2)).unwrap()) == model,
                    "{file} {kind:?} {after}"
                );
            }
        }
    }
}

#[test]
fn disk_full_is_refused_at_creation_and_cannot_happen_later() {
    let disk = FaultStorage::new(1);
    let image = image(&disk);
    image.allocate(CAPACITY).unwrap();
    disk.limit_space(CAPACITY + (1 << 20));
    let full = volume::format(&disk, &*image, &options(), Epoch(0), Term(0)).unwrap_err();
    assert!(matches!(full, VolumeError::Io { op: "allocate", .. }), "{full}");
    disk.heal();
    volume::format(&disk, &*image, &options(), Epoch(0), Term(0)).unwrap();
    // Not a byte more from now on.
    disk.limit_space(0);
    let p = primary(&disk);
    let mut rng = Rng::new(1);
    let mut model = vec![0; CAPACITY as usize];
    for epoch in 1..=60 {
        for _ in 0..20 {
            random_write(&p, &mut model, &mut rng);
        }
        p.seal(Epoch(epoch), Term(1)).unwrap();
        p.commit(Epoch(epoch)).unwrap();
    }
    p.wait_applied(Epoch(60), LONG).unwrap();
    assert!(all(&p) == model);
}

/// Sends a copy; `die` is called with the number of the step and may end it.
fn copy(
    p: &Volume,
    s: &Replica,
    join: u64,
    epoch: &mut u64,
    touch: &mut dyn FnMut(u64),
    die: &mut dyn FnMut(u64) -> bool,
) -> Option<u64> {
    let have = s.progress();
    let have = (have.applied > Epoch(0)).then_some(have.applied);
    let plan = p.begin_resync(0, have).unwrap();
    while s.begin_copy(join, plan.full).is_err() {
        std::thread::yield_now();
    }
    let mut step = 0;
    while let Some(chunk) = p.next_chunk(0, 256 * 1024).unwrap() {
        step += 1;
        touch(step);
        if die(step) {
            return None;
        }
        s.store_chunk(join, chunk.offset, &chunk.data).unwrap();
        if step % 4 == 0 {
            // Epochs go on meanwhile; the standby is not part of them yet.
            *epoch += 1;
            p.seal(Epoch(*epoch), Term(1)).unwrap();
            p.commit(Epoch(*epoch)).unwrap();
        }
        if step > 24 {
            break;
        }
    }
    touch(step);
    *epoch += 1;
    let sealed = p.seal(Epoch(*epoch), Term(1)).unwrap();
    let residue = p.end_resync(0, &sealed).unwrap();
    // The guest goes on; the residue is as of the sealed epoch all the same.
    touch(step);
    let ops = p.read_residue(&residue).unwrap();
    if die(step + 1) {
        return None;
    }
    s.finish_copy(join, &ops, Epoch(*epoch), Term(1)).unwrap();
    p.commit(Epoch(*epoch)).unwrap();
    if die(step + 2) {
        return None;
    }
    p.peer_durable(0, Epoch(*epoch)).unwrap();
    Some(plan.bytes)
}

#[test]
fn copy_and_delta_resync_while_the_guest_writes_with_a_crash_at_every_step() {
    let a = laid_out(1);
    let p = primary(&a);
    let rng = std::cell::RefCell::new(Rng::new(9));
    let model = std::cell::RefCell::new(vec![0; CAPACITY as usize]);
    let mut touch = |_| write_below(CAPACITY / 4, &p, &mut model.borrow_mut(), &mut rng.borrow_mut());
    (0..40).for_each(&mut touch);
    let mut epoch = 1;
    p.seal(Epoch(1), Term(1)).unwrap();
    p.commit(Epoch(1)).unwrap();

    // A new standby: full copy.
    let b = laid_out(2);
    let mut s = standby(&b);
    let sent = copy(&p, &s, 1, &mut epoch, &mut touch, &mut |_| false).unwrap();
    assert!(sent >= CAPACITY);
    let mut join = 1;
    for crash in 0..14 {
        // Follow for a while, then lose the standby's host. The last touch of the copy is in the open epoch.
        for _ in 0..3 {
            epoch += 1;
            (0..3).for_each(&mut touch);
            replicate(&p, &s, Epoch(epoch));
        }
        s.wait_synced(Epoch(epoch), LONG).unwrap();
        s.common().wait_applied(Epoch(epoch), LONG).unwrap();
        assert!(b.contents("image") == *model.borrow(), "round {crash}");
        let mut check = Scrub::verify(&s, 0);
        s.set_peer(peer(p.clone()));
        while check.step(0).unwrap().is_some() {}
        let r = check.report();
        assert!(r.diverged.is_empty() && r.unsettled == 0 && r.bad == 0, "{r:?}");
        assert_eq!(s.progress().state, State::Consistent);
        s.set_peer(None);
        drop(s);
        b.crash_process();
        for _ in 0..4 {
            epoch += 1;
            touch(0);
            p.seal(Epoch(epoch), Term(1)).unwrap();
            p.commit(Epoch(epoch)).unwrap();
        }
        // It comes back, the copy is cut short by a power loss at this step, and is begun again.
        s = standby(&b);
        join += 1;
        if copy(&p, &s, join, &mut epoch, &mut touch, &mut |step| step == crash).is_none() {
            b.cut_power();
            drop(s);
            b.reboot();
            s = standby(&b);
            if let State::Copying { .. } = s.progress().state {
                assert!(
                    matches!(s.clone().promote(Term(5)), Err(VolumeError::Copying { .. })),
                    "I3: a mixture is never promoted"
                );
            }
            join += 1;
            let sent = copy(&p, &s, join, &mut epoch, &mut touch, &mut |_| false).unwrap();
            assert!(sent < CAPACITY / 2, "round {crash}: a delta, not {sent} bytes");
        }
    }
}

#[test]
fn real_files_as_a_block_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(CAPACITY).unwrap();
    let storage = DirStorage::new(dir.path().join("volume")).unwrap();
    let file: Arc<dyn StorageFile> = Arc::new(OsFile::open(&path).unwrap());
    volume::format(&storage, &*file, &options(), Epoch(0), Term(0)).unwrap();
    let mut model = vec![0; CAPACITY as usize];
    let mut rng = Rng::new(4);
    let mut epoch = 0;
    for life in 1..=3 {
        let (p, found) = Volume::open(&storage, file.clone(), &options(), Term(life), None).unwrap();
        assert_eq!(found.last_committed, Epoch(epoch));
        assert!(all(&p) == model, "life {life}");
        let block = VolumeBlock::new(p.clone());
        for _ in 0..30 {
            random_write(&p, &mut model, &mut rng);
            let at = rng.below(CAPACITY / BLOCK - 4) * BLOCK;
            block.discard(at, 3 * BLOCK).unwrap();
            model[at as usize..(at + 3 * BLOCK) as usize].fill(0);
            block.flush().unwrap();
            epoch += 1;
            p.seal(Epoch(epoch), Term(life)).unwrap();
            p.wait_synced(Epoch(epoch), LONG).unwrap();
            p.commit(Epoch(epoch)).unwrap();
        }
        drop(block);
        drop(p);
    }
    let (p, _) = Volume::open(&storage, file, &options(), Term(9), None).unwrap();
    assert!(all(&p) == model);
}

/// Reads that wait for nothing give the same bytes as those that may wait, or none at all: from memory, from the page cache, beside writes
/// and their application; and never bytes that do not match their sum.
#[test]
fn reads_out_of_memory_agree_or_decline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file: Arc<dyn StorageFile> = Arc::new({
        std::fs::File::create(&path).unwrap();
        OsFile::open(&path).unwrap()
    });
    file.allocate(CAPACITY).unwrap();
    let storage = DirStorage::new(dir.path().join("journal")).unwrap();
    volume::format(&storage, &*file, &options(), Epoch(0), Term(0)).unwrap();
    let v = Volume::open(&storage, file, &options(), Term(1), None).unwrap().0;
    let (mut rng, mut model) = (Rng::new(11), vec![0; CAPACITY as usize]);
    let (mut answered, mut declined) = (0, 0);
    for epoch in 1..=200 {
        for _ in 0..rng.below(8) {
            random_write(&v, &mut model, &mut rng);
        }
        if rng.one_in(2) {
            v.seal(Epoch(epoch), Term(1)).unwrap();
            v.wait_synced(Epoch(epoch), LONG).unwrap();
            v.commit(Epoch(epoch)).unwrap();
        } else {
            v.seal(Epoch(epoch), Term(1)).unwrap();
            v.commit(Epoch(epoch)).unwrap();
        }
        for _ in 0..20 {
            let len = (1 + rng.below(64)) * 512;
            let at = rng.below((CAPACITY - len) / 512) * 512;
            let mut buf = vec![0xee; len as usize];
            if v.read_cached(at, &mut buf) {
                assert!(
                    buf == model[at as usize..(at + len) as usize],
                    "at {at}, {len} bytes"
                );
                answered += 1;
            } else {
                declined += 1;
            }
        }
    }
    assert!(answered > 1000, "{answered} answered, {declined} declined");
    let mut over = [0; 1024];
    assert!(!v.read_cached(CAPACITY - 512, &mut over), "beyond the end");

    // A block that rots in the page cache is not taken from there.
    let mut block = vec![3; BLOCK as usize];
    v.write(0, &block).unwrap();
    v.seal(Epoch(201), Term(1)).unwrap();
    v.commit(Epoch(201)).unwrap();
    v.wait_applied(Epoch(201), LONG).unwrap();
    assert!(v.read_cached(0, &mut block));
    let image = OsFile::open(&path).unwrap();
    block[77] ^= 1;
    image.write_at(0, &block).unwrap();
    assert!(!v.read_cached(0, &mut block), "its sum does not match");
    assert!(matches!(
        v.read(0, &mut block),
        Err(VolumeError::NoGoodCopy { .. })
    ));
}

#[test]
fn the_old_primary_comes_back_with_a_delta() {
    let (a, b) = (laid_out(1), laid_out(2));
    let (p, s) = (primary(&a), standby(&b));
    let mut rng = Rng::new(8);
    let mut model = vec![0; CAPACITY as usize];
    for epoch in 1..=10 {
        (0..10).for_each(|_| write_below(CAPACITY / 8, &p, &mut model, &mut rng));
        p.flush().unwrap();
        replicate(&p, &s, Epoch(epoch));
    }
    // The old primary seals and syncs one more epoch that nobody else ever sees, then its host dies.
    let keep = model.clone();
    random_write(&p, &mut model, &mut rng);
    p.seal(Epoch(11), Term(1)).unwrap();
    p.wait_synced(Epoch(11), LONG).unwrap();
    a.cut_power();
    drop(p);
    model = keep;
    let q = s.promote(Term(2)).unwrap();
    for epoch in 11..=14 {
        (0..4).for_each(|_| write_below(CAPACITY / 8, &q, &mut model, &mut rng));
        q.seal(Epoch(epoch), Term(2)).unwrap();
        q.wait_synced(Epoch(epoch), LONG).unwrap();
        q.commit(Epoch(epoch)).unwrap();
    }
    a.reboot();
    let (old, found) = Replica::open(&a, image(&a), &options(), None).unwrap();
    assert_eq!((found.last_staged, found.staged_term), (Epoch(11), Term(1)));
    old.discard_after(Epoch(10)).unwrap();
    old.commit(Epoch(10)).unwrap();
    old.common().wait_applied(Epoch(10), LONG).unwrap();
    let mut epoch = 14;
    let bytes = copy(&q, &old, 1, &mut epoch, &mut |_| {}, &mut |_| false).unwrap();
    assert!(bytes <= CAPACITY / 8 + (64 << 10), "a delta, not {bytes} bytes");
    for _ in 0..3 {
        epoch += 1;
        random_write(&q, &mut model, &mut rng);
        replicate(&q, &old, Epoch(epoch));
    }
    old.common().wait_applied(Epoch(epoch), LONG).unwrap();
    q.wait_applied(Epoch(epoch), LONG).unwrap();
    assert!(all(&q) == model);
    assert!(
        a.contents("image") == model && b.contents("image") == model,
        "replicas equal after resync"
    );
}

#[test]
fn the_benchmark_measures() {
    let dir = tempfile::tempdir().unwrap();
    let rows = volume::bench::measure(dir.path(), 8 << 20).unwrap();
    for r in &rows {
        println!(
            "{:<22} {:<30} {:>10.1} {:<5} plain {:>10.1}",
            r.metric,
            r.case,
            r.value,
            r.unit,
            r.plain.unwrap_or(0.0)
        );
    }
    assert!(rows.len() == 8 && rows.iter().all(|r| r.value > 0.0));
}

#[test]
fn shared_volume_replays_what_was_committed_and_nothing_else() {
    use steadfast_disk::volume::SharedVolume;
    let disk = FaultStorage::new(1);
    let file = image(&disk);
    file.allocate(CAPACITY).unwrap();
    let mut p = SharedVolume::new(file.clone(), 64 * 1024, Epoch(0), true).unwrap();
    let mut s = SharedVolume::new(file.clone(), 64 * 1024, Epoch(0), false).unwrap();
    let write = |at: u64, fill: u8| EpochOp::Write {
        offset: at,
        data: Arc::new(vec![fill; 4096]),
    };
    for (epoch, fill) in [(1, 1_u8), (2, 2), (3, 3)] {
        p.write(write(0, fill)).unwrap();
        p.write(EpochOp::WriteZeroes {
            offset: 1024,
            len: 512,
        })
        .unwrap();
        let ops = p.seal(Epoch(epoch)).unwrap();
        s.stage(Epoch(epoch), ops).unwrap();
    }
    assert_eq!(
        disk.contents("image")[0],
        0,
        "nothing uncommitted reaches the storage"
    );
    let mut buf = [9_u8; 2048];
    p.read(0, &mut buf).unwrap();
    assert!(buf[..1024].iter().all(|&b| b == 3) && buf[1024..1536].iter().all(|&b| b == 0));
    p.commit(Epoch(1)).unwrap();
    s.commit(Epoch(1)).unwrap();
    // The primary dies in the middle of applying; the standby goes on from epoch 2.
    drop(p);
    assert!(matches!(s.promote(Epoch(0)), Err(VolumeError::Refused(_))), "I4");
    s.commit(Epoch(2)).unwrap();
    s.promote(Epoch(2)).unwrap();
    let got = disk.contents("image");
    assert!(got[0] == 2 && got[1024] == 0 && got[2048] == 2, "exactly epoch 2");
    let big = EpochOp::Write {
        offset: 0,
        data: Arc::new(vec![7; 60 * 1024]),
    };
    s.write(big.clone()).unwrap();
    assert!(
        matches!(s.write(big), Err(VolumeError::Throttled { .. })),
        "bounded"
    );
}

#[test]
fn a_dead_image_is_served_from_the_peer() {
    let (a, b) = (laid_out(1), laid_out(2));
    let (p, s) = (primary(&a), standby(&b));
    let mut rng = Rng::new(6);
    let mut model = vec![0; CAPACITY as usize];
    for epoch in 1..=10 {
        (0..10).for_each(|_| random_write(&p, &mut model, &mut rng));
        replicate(&p, &s, Epoch(epoch));
    }
    p.wait_applied(Epoch(10), LONG).unwrap();
    p.set_peer(peer(s.clone()));
    for kind in [Kind::Read, Kind::Write, Kind::Sync] {
        a.inject(Fault {
            file: Some("image".into()),
            kind,
            after: 0,
            count: u64::MAX,
            misdirect: None,
        });
    }
    for at in [0, 7 * BLOCK + 512, 100 * BLOCK] {
        let mut buf = vec![0; 3 * BLOCK as usize];
        p.read(at, &mut buf).unwrap();
        assert!(
            buf == model[at as usize..at as usize + buf.len()],
            "row 11: never shown to the guest"
        );
    }
    // Writes still go to the standby, and the owner is told to hand over.
    random_write(&p, &mut model, &mut rng);
    replicate(&p, &s, Epoch(11));
    let until = Instant::now() + LONG;
    while p.fault().is_none() {
        assert!(Instant::now() < until, "the fault must be reported");
        std::thread::yield_now();
    }
    drop(p);
    assert!(all(&s.promote(Term(2)).unwrap()) == model);
}
