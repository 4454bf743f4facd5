//! Images of every format, made by us and by qemu-img, read, written, locked, broken.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{have, pattern, run, s};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};
use steadfast_disk::DiskError;
use steadfast_disk::image::{self, BlockIo, ImageFormat, ImageOptions, MemImage, RawImage, convert, create};

const MIB: u64 = 1 << 20;

fn read(image: &dyn BlockIo, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    image.read_at(offset, &mut buf).unwrap();
    buf
}

/// Everything a block device does, at aligned and odd places.
fn exercise(image: &dyn BlockIo) {
    let cap = image.info().capacity_bytes;
    for (n, (offset, len)) in [
        (0, 512),
        (4096, 4096),
        (123, 7),
        (MIB - 3, 70_001),
        (cap - 512, 512),
    ]
    .into_iter()
    .enumerate()
    {
        let data = pattern(n as u64 + 1, len);
        image.write_at(offset, &data).unwrap();
        assert_eq!(read(image, offset, len), data, "at {offset}");
    }
    // What lies around an odd write stays.
    image.write_at(2 * MIB, &[1; 4096]).unwrap();
    image.write_at(2 * MIB + 5, &[2; 3]).unwrap();
    let mut expected = vec![1; 4096];
    expected[5..8].fill(2);
    assert_eq!(read(image, 2 * MIB, 4096), expected);
    image.write_at(MIB, &pattern(9, 300_000)).unwrap();
    image.write_zeroes(MIB + 100, 200_000).unwrap();
    assert_eq!(read(image, MIB, 100), pattern(9, 100));
    assert!(read(image, MIB + 100, 200_000).iter().all(|b| *b == 0));
    assert_eq!(read(image, MIB + 200_100, 99_900), pattern(9, 300_000)[200_100..]);
    image.discard(2 * MIB, 65_536).unwrap();
    image.flush().unwrap();
    for (offset, len) in [(cap, 1), (cap - 1, 2), (u64::MAX, 2), (u64::MAX - 1, 1)] {
        let mut buf = vec![0; len];
        assert!(matches!(
            image.read_at(offset, &mut buf),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(
            image.write_at(offset, &buf),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(
            image.discard(offset, len as u64),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(
            image.write_zeroes(offset, len as u64),
            Err(DiskError::OutOfRange { .. })
        ));
    }
}

fn qemu_img(args: &[&str]) {
    run("qemu-img", args);
}

#[test]
fn raw_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    create::create_raw(&path, 16 * MIB).unwrap();
    let image = image::open(&path, &ImageOptions::default()).unwrap();
    assert_eq!(image.info().format, ImageFormat::Raw);
    assert_eq!(image.info().capacity_bytes, 16 * MIB);
    assert!(image.raw_fd().is_some());
    exercise(image.as_ref());
}

#[test]
fn raw_direct() {
    // Not on tmpfs, which has O_DIRECT only on new kernels: the target directory is on a disk.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("disk.raw");
    create::create_raw(&path, 16 * MIB + 512).unwrap();
    match image::open(
        &path,
        &ImageOptions {
            direct: true,
            ..ImageOptions::default()
        },
    ) {
        Ok(image) => {
            exercise(image.as_ref());
            assert_eq!(
                std::fs::metadata(&path).unwrap().len(),
                16 * MIB + 512,
                "bouncing must not grow the file"
            );
        }
        Err(DiskError::Unsupported { .. }) => {
            println!("SKIPPED: raw_direct: no O_DIRECT on this file system")
        }
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn memory() {
    exercise(&MemImage::new(vec![0; 4 << 20], false));
    assert!(matches!(
        MemImage::new(vec![1], true).write_at(0, &[1]),
        Err(DiskError::ReadOnly)
    ));
}

#[test]
fn one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    create::create_raw(&path, MIB).unwrap();
    let writer = RawImage::open(&path, &ImageOptions::default()).unwrap();
    let error = image::open(&path, &ImageOptions::default())
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(error, DiskError::InUse { .. }), "{error}");
    assert!(
        error.to_string().contains("disk.raw") && error.to_string().contains("stop that VM"),
        "{error}"
    );
    assert!(image::open(&path, &ImageOptions::read_only()).is_err());
    assert!(create::grow_raw(&path, 2 * MIB).is_err());
    image::open(
        &path,
        &ImageOptions {
            lock: false,
            ..ImageOptions::read_only()
        },
    )
    .unwrap();
    writer.unlock().unwrap();
    let reader = image::open(&path, &ImageOptions::read_only()).unwrap();
    let second = image::open(&path, &ImageOptions::read_only()).unwrap();
    assert!(writer.lock().is_err());
    drop((reader, second));
    writer.lock().unwrap();
    drop(writer);
    create::grow_raw(&path, 2 * MIB).unwrap();
    assert!(create::grow_raw(&path, MIB).is_err());
    assert!(create::create_raw(&path, MIB).is_err());
    assert_eq!(
        image::open(&path, &ImageOptions::default())
            .unwrap()
            .info()
            .capacity_bytes,
        2 * MIB
    );
}

#[test]
fn declared_format_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut bytes = vec![0; MIB as usize];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    std::fs::write(&path, &bytes).unwrap();
    let error = image::open(&path, &ImageOptions::default())
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("qcow2 version 0"), "{error}");
    assert!(
        create::grow_raw(&path, 2 * MIB)
            .unwrap_err()
            .to_string()
            .contains("qemu-img resize")
    );
    let raw = ImageOptions {
        format: Some(ImageFormat::Raw),
        ..ImageOptions::default()
    };
    assert_eq!(read(image::open(&path, &raw).unwrap().as_ref(), 0, 4), b"QFI\xfb");
    bytes[..4].copy_from_slice(b"KDMV");
    std::fs::write(&path, &bytes).unwrap();
    let error = image::open(&path, &ImageOptions::default())
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("VMDK"), "{error}");
}

#[test]
fn not_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    for path in [
        dir.path().join("missing"),
        dir.path().to_owned(),
        Path::new("/dev/null").to_owned(),
    ] {
        let error = image::open(&path, &ImageOptions::default())
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(s(&path)), "{error}");
    }
    let empty = dir.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    assert!(image::open(&empty, &ImageOptions::default()).is_err());
}

#[test]
fn qcow2_read_write_and_check() {
    if !have("qemu-img", "qcow2_read_write_and_check") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "refcount_bits=1",
    ] {
        let path = dir.path().join("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "16M"]);
        let image = image::open(&path, &ImageOptions::default()).unwrap();
        assert_eq!(image.info().format, ImageFormat::Qcow2);
        exercise(image.as_ref());
        drop(image);
        qemu_img(&["check", "-q", s(&path)]);
        // What QEMU reads is what we wrote.
        let raw = dir.path().join("disk.raw");
        qemu_img(&["convert", "-O", "raw", s(&path), s(&raw)]);
        let ours = image::open(&path, &ImageOptions::read_only()).unwrap();
        let theirs = std::fs::read(&raw).unwrap();
        assert!(read(ours.as_ref(), 0, 16 << 20) == theirs, "{options}");
        std::fs::remove_file(&path).unwrap();
    }
}

/// A range that is zeroed for good gives its space back on raw images, and what is beside it stays.
#[test]
fn zeroes_give_their_space_back() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    for name in ["disk.raw", "disk.qcow2"] {
        let path = dir.path().join(name);
        match name {
            "disk.raw" => create::create_raw(&path, 16 * MIB).unwrap(),
            _ => create::create_qcow2(&path, 16 * MIB).unwrap(),
        }
        let image = image::open(&path, &ImageOptions::default()).unwrap();
        let blocks = || {
            image.flush().unwrap();
            std::fs::metadata(&path).unwrap().blocks() * 512
        };
        image.write_at(0, &pattern(1, 8 * MIB as usize)).unwrap();
        let full = blocks();
        image.zero_and_free(MIB + 512, 6 * MIB).unwrap();
        let all = read(image.as_ref(), 0, 8 * MIB as usize);
        let mut want = pattern(1, 8 * MIB as usize);
        want[(MIB + 512) as usize..(7 * MIB + 512) as usize].fill(0);
        assert!(all == want, "{name}");
        // Clusters of a qcow2 image are kept: one that is given out again could be needed still after a loss of power.
        if name == "disk.raw" && image.info().discard {
            assert!(full >= 8 * MIB && blocks() < 4 * MIB, "{full}, then {}", blocks());
        } else if name == "disk.raw" {
            println!("SKIPPED: this file system cannot give space back");
        }
    }
}

/// Not a test: writes into an image and dies in the middle of it.
#[test]
#[ignore = "helper process of qcow2_whose_process_is_killed"]
fn qcow2_victim() {
    let Some(path) = std::env::var_os("QCOW2_VICTIM") else {
        return;
    };
    let seed: u64 = std::env::var("QCOW2_SEED").unwrap().parse().unwrap();
    let image = image::open(Path::new(&path), &ImageOptions::default()).unwrap();
    scribble(image.as_ref(), seed, 1 + seed % 40);
    if seed.is_multiple_of(3) {
        image.flush().unwrap();
        scribble(image.as_ref(), seed + 1000, 1 + seed % 7);
    }
    std::process::abort();
}

/// Where they are written.
fn scribbled(seed: u64, times: u64) -> Vec<u64> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::new();
    for _ in 0..times {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        all.push(x % 4096 * 4096);
    }
    all
}

fn scribble(image: &dyn BlockIo, seed: u64, times: u64) {
    for at in scribbled(seed, times) {
        image.write_at(at, &pattern(at, 4096)).unwrap();
    }
}

/// Whoever writes an image is killed, again and again: its tables stay whole, and what was flushed is there. (The driver alone gives the
/// clusters of its tables out again.)
#[test]
fn qcow2_whose_process_is_killed() {
    if !have("qemu-img", "qcow2_whose_process_is_killed") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in [
        "cluster_size=65536",
        "cluster_size=512",
        "compat=0.10",
        "refcount_bits=1",
    ] {
        let path = dir.path().join("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, s(&path), "16M"]);
        let mut flushed: BTreeSet<u64> = BTreeSet::new();
        for seed in 0..12 {
            let victim = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "qcow2_victim", "--ignored"])
                .env("QCOW2_VICTIM", &path)
                .env("QCOW2_SEED", seed.to_string())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap();
            assert!(victim.code().is_none(), "it died: {victim:?}");
            let image = image::open(&path, &ImageOptions::default()).unwrap();
            scribble(image.as_ref(), seed + 500, 20);
            image.flush().unwrap();
            drop(image);
            let check = Command::new("qemu-img")
                .args(["check", s(&path)])
                .output()
                .unwrap();
            // 3: space that nothing refers to, which is no harm.
            assert!(
                matches!(check.status.code(), Some(0 | 3)),
                "{options}, seed {seed}: {}{}",
                String::from_utf8_lossy(&check.stdout),
                String::from_utf8_lossy(&check.stderr)
            );
            let image = image::open(&path, &ImageOptions::read_only()).unwrap();
            // What was flushed, by the victim and here.
            flushed.extend(scribbled(seed + 500, 20));
            if seed % 3 == 0 {
                flushed.extend(scribbled(seed, 1 + seed % 40));
            }
            for at in (0..4096).map(|block| block * 4096) {
                let found = read(image.as_ref(), at, 4096);
                let empty = found.iter().all(|b| *b == 0) && !flushed.contains(&at);
                assert!(
                    empty || found == pattern(at, 4096),
                    "{options}, seed {seed}: byte {at}"
                );
            }
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn qcow2_chain_and_compression() {
    if !have("qemu-img", "qcow2_chain_and_compression") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, base, mid, top) = (
        dir.path().join("a.raw"),
        dir.path().join("b.qcow2"),
        dir.path().join("m.qcow2"),
        dir.path().join("t.qcow2"),
    );
    let mut data = pattern(1, 3 << 20);
    data.resize(8 << 20, 0);
    std::fs::write(&raw, &data).unwrap();
    qemu_img(&["convert", "-c", "-O", "qcow2", s(&raw), s(&base)]);
    assert!(
        std::fs::metadata(&base).unwrap().len() < 3 << 20,
        "the base is compressed"
    );
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "b.qcow2",
        "-F",
        "qcow2",
        s(&mid),
    ]);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        s(&mid),
        "-F",
        "qcow2",
        s(&top),
        "12M",
    ]);
    {
        let image = image::open(&mid, &ImageOptions::default()).unwrap();
        image.write_at(MIB + 7, &[7; 1000]).unwrap();
        image.flush().unwrap();
    }
    data[MIB as usize + 7..MIB as usize + 1007].fill(7);
    data.resize(12 << 20, 0);
    let before = std::fs::read(&base).unwrap();
    let image = image::open(&top, &ImageOptions::default()).unwrap();
    assert_eq!(image.info().capacity_bytes, 12 << 20);
    assert!(read(image.as_ref(), 0, 12 << 20) == data);
    image.write_at(2 * MIB, &[9; 10]).unwrap();
    image.discard(0, MIB).unwrap();
    data[2 * MIB as usize..2 * MIB as usize + 10].fill(9);
    data[..MIB as usize].fill(0);
    assert!(
        read(image.as_ref(), 0, 12 << 20) == data,
        "discard must not bring the backing file back"
    );
    // The layers below are held for reading.
    assert!(image::open(&base, &ImageOptions::default()).is_err());
    image.flush().unwrap();

    let out = dir.path().join("out.raw");
    let mut last = 0;
    convert::to_raw(image.as_ref(), &out, &mut |done, total| {
        assert!(done > last && done <= total);
        last = done;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(std::fs::read(&out).unwrap() == data);
    use std::os::unix::fs::MetadataExt;
    assert!(
        std::fs::metadata(&out).unwrap().blocks() * 512 < 4 << 20,
        "sparse"
    );
    assert!(
        convert::to_raw(image.as_ref(), &out, &mut |_, _| ControlFlow::Continue(())).is_err(),
        "exists"
    );
    let stopped = dir.path().join("stopped.raw");
    assert!(convert::to_raw(image.as_ref(), &stopped, &mut |_, _| ControlFlow::Break(())).is_err());
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        5,
        "nothing left behind"
    );
    drop(image);
    qemu_img(&["check", "-q", s(&top)]);
    assert!(std::fs::read(&base).unwrap() == before);
}

#[test]
fn qcow2_refusals() {
    if !have("qemu-img", "qcow2_refusals") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qcow2");
    let refused = |what: &str| {
        let error = image::open(&path, &ImageOptions::default())
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(what) && error.contains("x.qcow2"),
            "{what}: {error}"
        );
    };
    // By hand: making a LUKS header takes qemu-img a benchmark of the CPU, which fails on a busy machine.
    qemu_img(&["create", "-q", "-f", "qcow2", s(&path), "4M"]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[35] = 2;
    std::fs::write(&path, bytes).unwrap();
    refused("encryption (LUKS)");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on",
        s(&path),
        "4M",
    ]);
    refused("extended L2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={}/d", s(dir.path())),
        s(&path),
        "4M",
    ]);
    refused("external data file");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "nbd://host/x",
        "-F",
        "raw",
        s(&path),
        "4M",
    ]);
    refused("not a plain file");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "x.qcow2",
        "-F",
        "qcow2",
        s(&path),
        "4M",
    ]);
    let error = image::open(&path, &ImageOptions::read_only())
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("its own backing file"), "{error}");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "/dev/zero",
        "-F",
        "raw",
        s(&path),
        "4M",
    ]);
    let error = image::open(&path, &ImageOptions::read_only())
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("/dev/zero"), "{error}");
}

/// Every cut and many flipped bits: an error or the right number of bytes, never a panic, and no zeroes in place of
/// data that was cut off.
#[test]
fn qcow2_broken() {
    if !have("qemu-img", "qcow2_broken") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("a.raw"), dir.path().join("x.qcow2"));
    let data = pattern(3, MIB as usize);
    std::fs::write(&raw, &data).unwrap();
    qemu_img(&[
        "convert",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=4096",
        s(&raw),
        s(&path),
    ]);
    let good = std::fs::read(&path).unwrap();
    let bad = dir.path().join("bad.qcow2");
    let try_it = |bytes: &[u8]| -> Result<Vec<u8>, DiskError> {
        std::fs::write(&bad, bytes).unwrap();
        let open = ImageOptions {
            format: Some(ImageFormat::Qcow2),
            ..ImageOptions::default()
        };
        let image = image::open(&bad, &open)?;
        let mut buf = vec![0; (image.info().capacity_bytes as usize).min(MIB as usize)];
        image.read_at(0, &mut buf)?;
        let _ = image.write_at(5000, &[1; 9000]);
        let _ = image.discard(0, 40_960);
        let _ = image.flush();
        Ok(buf)
    };
    assert_eq!(try_it(&good).unwrap(), data);
    for cut in [
        0,
        1,
        50,
        71,
        72,
        100,
        104,
        200,
        4096,
        8192,
        12_288,
        20_000,
        good.len() / 2,
        good.len() - 8192,
    ] {
        if let Ok(read) = try_it(&good[..cut]) {
            assert_eq!(read, data, "cut at {cut} gave other bytes");
        }
    }
    let mut opened = 0;
    for n in 0..1500_u64 {
        let mut bytes = good.clone();
        // Mostly in the header, else in the tables at the start of the file.
        let span = if n % 3 == 0 { 20_480 } else { 112 };
        let at = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize % span;
        bytes[at] = if n % 2 == 0 {
            0xff
        } else {
            bytes[at] ^ (1 << (n % 8))
        };
        opened += usize::from(try_it(&bytes).is_ok());
    }
    assert!(opened > 100, "the mutations must get past the header: {opened}");
}
