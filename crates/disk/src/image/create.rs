//! Making and growing raw images, sparse.

use super::SECTOR;
use super::lock::{self, Mode};
use crate::error::DiskError;
use std::fs::{File, OpenOptions};
use std::path::Path;

fn error(what: &'static str, path: &Path) -> impl Fn(std::io::Error) -> DiskError {
    move |source| DiskError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

pub(super) fn check_size(bytes: u64) -> Result<(), DiskError> {
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) || bytes > i64::MAX as u64 {
        return Err(DiskError::Invalid(format!(
            "a disk of {bytes} bytes is not possible: use a multiple of {SECTOR}, for example 1 GiB"
        )));
    }
    Ok(())
}

/// Makes a raw image of `bytes` zeroes that takes no space yet. An existing file is not touched.
///
/// # Errors
/// [`DiskError::Invalid`] for a size that is not a whole number of sectors; [`DiskError::File`].
pub fn create_raw(path: &Path, bytes: u64) -> Result<(), DiskError> {
    check_size(bytes)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(error("cannot create", path))?;
    let filled = file.set_len(bytes).and_then(|()| file.sync_all());
    filled.map_err(error("cannot size", path)).inspect_err(|_| {
        // As before: nothing.
        let _ = std::fs::remove_file(path);
    })
}

/// Grows the raw image at `path` to `bytes`, with zeroes behind its present end. Growing to its present size is fine.
///
/// # Errors
/// [`DiskError::InUse`] while a VM has it, [`DiskError::Invalid`] for a smaller size or a file that is qcow2,
/// [`DiskError::File`].
pub fn grow_raw(path: &Path, bytes: u64) -> Result<(), DiskError> {
    check_size(bytes)?;
    if super::detect(path)? != super::ImageFormat::Raw {
        return Err(DiskError::Invalid(format!(
            "{} is a qcow2 image: grow it with `qemu-img resize`, or convert it to raw",
            path.display()
        )));
    }
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(error("cannot open", path))?;
    lock::set(&file, Mode::Exclusive, path)?;
    let meta = file.metadata().map_err(error("cannot size", path))?;
    if !meta.is_file() {
        return Err(DiskError::Invalid(format!(
            "{} is a device: grow it where it comes from",
            path.display()
        )));
    }
    if bytes < meta.len() {
        return Err(DiskError::Invalid(format!(
            "{} has {} bytes: shrinking it to {bytes} would cut the guest's data off",
            path.display(),
            meta.len()
        )));
    }
    file.set_len(bytes)
        .and_then(|()| file.sync_all())
        .map_err(error("cannot grow", path))
}
