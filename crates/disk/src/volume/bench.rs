//! How fast a volume takes, journals and applies writes, beside the same writes straight to a file with `fdatasync`.
//! Run by the benchmark runner; the numbers are of the disk under `dir` in one run, so the ratios are what counts.

use super::{Mode, Options, Volume, VolumeError};
use crate::storage::{DirStorage, OsFile, StorageFile};
use crate::testing::rng::Rng;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_types::{Epoch, Term};

/// One measured figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was measured.
    pub metric: &'static str,
    /// Under which load.
    pub case: &'static str,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// The same figure for plain writes to a file on the same disk, where there is one.
    pub plain: Option<f64>,
}

const LONG: Duration = Duration::from_secs(120);

fn plain_file(path: &Path, capacity: u64) -> Result<Arc<dyn StorageFile>, VolumeError> {
    let create = || {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let file = OsFile::new(file);
        file.allocate(capacity)?;
        file.sync()?;
        Ok(file)
    };
    create()
        .map(|f| Arc::new(f) as Arc<dyn StorageFile>)
        .map_err(VolumeError::io("create", "benchmark file", 0))
}

fn places(case: &str, size: u64, capacity: u64) -> impl Iterator<Item = u64> {
    let random = case.starts_with("random");
    let mut rng = Rng::new(1);
    let slots = capacity / size;
    (0_u64..).map(move |i| if random { rng.below(slots) } else { i % slots } * size)
}

/// Measures in `dir`, writing about `bytes` per case; takes three times that on disk.
///
/// # Errors
/// [`VolumeError`] of the volume or of the plain file.
pub fn measure(dir: &Path, bytes: u64) -> Result<Vec<Row>, VolumeError> {
    let capacity = bytes.next_multiple_of(1 << 20).clamp(16 << 20, 1 << 30);
    let plain = plain_file(&dir.join("plain.raw"), capacity)?;
    let image = plain_file(&dir.join("image.raw"), capacity)?;
    let storage =
        DirStorage::new(dir.join("volume")).map_err(VolumeError::io("create", "volume directory", 0))?;
    let options = Options {
        journal_bytes: capacity,
        ..Options::new(1)
    };
    super::format(&storage, &*image, &options, Epoch::ZERO, Term::ZERO)?;
    let (volume, _) = Volume::open(&storage, image, &options, Term(1), None)?;
    let mut epoch = Epoch::ZERO;
    let mut rows = Vec::new();
    for (case, size) in [("random 4 KiB", 4096_usize), ("sequential 1 MiB", 1 << 20)] {
        let data: Vec<u8> = (0..size).map(|i| (i / 7) as u8).collect();
        let count = (bytes / size as u64).max(1);
        let started = Instant::now();
        for at in places(case, size as u64, capacity).take(count as usize) {
            plain
                .write_at(at, &data)
                .map_err(VolumeError::io("write", "benchmark file", at))?;
        }
        plain
            .sync()
            .map_err(VolumeError::io("sync", "benchmark file", 0))?;
        let plain_rate = rate(bytes, started);

        let started = Instant::now();
        let mut in_epoch = 0;
        for at in places(case, size as u64, capacity).take(count as usize) {
            volume.write(at, &data)?;
            in_epoch += size;
            if in_epoch >= 4 << 20 {
                in_epoch = 0;
                epoch = epoch.next();
                volume.seal(epoch, Term(1))?;
                volume.commit(epoch)?;
            }
        }
        epoch = epoch.next();
        volume.seal(epoch, Term(1))?;
        let taken = rate(bytes, started);
        volume.wait_synced(epoch, LONG)?;
        let durable = rate(bytes, started);
        volume.commit(epoch)?;
        volume.wait_applied(epoch, LONG)?;
        let applied = rate(bytes, started);
        for (metric, value) in [
            ("guest writes taken", taken),
            ("journal durable", durable),
            ("image applied", applied),
        ] {
            rows.push(Row {
                metric,
                case,
                value,
                unit: "MB/s",
                plain: Some(plain_rate),
            });
        }
    }
    let data = [7_u8; 4096];
    let loops = 200;
    let started = Instant::now();
    for at in places("random", 4096, capacity).take(loops) {
        plain
            .write_at(at, &data)
            .map_err(VolumeError::io("write", "benchmark file", at))?;
        plain
            .sync()
            .map_err(VolumeError::io("sync", "benchmark file", 0))?;
    }
    let plain_rate = per_second(loops, started);
    for (case, mode) in [
        ("write and flush, protected", Mode::Protected),
        ("write and flush, alone", Mode::Alone),
    ] {
        volume.set_mode(mode);
        let started = Instant::now();
        for at in places("random", 4096, capacity).take(loops) {
            volume.write(at, &data)?;
            volume.flush()?;
        }
        rows.push(Row {
            metric: "guest flushes",
            case,
            value: per_second(loops, started),
            unit: "1/s",
            plain: Some(plain_rate),
        });
        epoch = epoch.next();
        volume.seal(epoch, Term(1))?;
        volume.wait_synced(epoch, LONG)?;
        volume.commit(epoch)?;
    }
    Ok(rows)
}

fn rate(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / 1e6 / since.elapsed().as_secs_f64().max(1e-9)
}

fn per_second(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64().max(1e-9)
}
