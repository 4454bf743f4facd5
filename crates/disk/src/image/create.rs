//! Making and growing images, sparse.
//!
//! A new image grows under a temporary name beside its own and takes that when it is complete and on stable storage (I10).

use super::SECTOR;
use super::lock::{self, Mode};
use crate::error::DiskError;
use crate::guard::no_panic;
use imago::FormatCreateBuilder;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

fn error(what: &'static str, path: &Path) -> impl Fn(std::io::Error) -> DiskError {
    move |source| DiskError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

fn check_size(bytes: u64) -> Result<(), DiskError> {
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
    anew(path, |file| file.set_len(bytes))
}

/// Makes an empty qcow2 image of `bytes`. An existing file is not touched.
///
/// # Errors
/// As [`create_raw`].
pub fn create_qcow2(path: &Path, bytes: u64) -> Result<(), DiskError> {
    check_size(bytes)?;
    anew(path, |file| {
        let storage = imago::file::File::try_from(file.try_clone()?)?;
        let image = imago::qcow2::Qcow2CreateBuilder::<imago::file::File>::new(storage);
        let made = no_panic("making a qcow2 image", || Ok(image.size(bytes).create()));
        made.unwrap_or_else(|e| Err(std::io::Error::other(e)))
    })
}

fn anew(path: &Path, fill: impl FnOnce(&File) -> std::io::Result<()>) -> Result<(), DiskError> {
    let (file, partial) = begin(path)?;
    let filled = fill(&file).and_then(|()| file.sync_all());
    let made = filled
        .map_err(error("cannot size", path))
        .and_then(|()| publish(&partial, path));
    made.inspect_err(|_| {
        // As before: nothing.
        let _ = std::fs::remove_file(&partial);
    })
}

/// Begins an image that gets the name `target` with [`publish`]: an empty file, locked, and its name meanwhile. What a killed process left of
/// one is taken over.
///
/// # Errors
/// There is one of that name, or another process makes it.
pub(super) fn begin(target: &Path) -> Result<(File, PathBuf), DiskError> {
    let there = || match target.exists() {
        true => Err(error("cannot create", target)(
            std::io::ErrorKind::AlreadyExists.into(),
        )),
        false => Ok(()),
    };
    there()?;
    let mut name = target.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&partial)
        .map_err(error("cannot create", &partial))?;
    lock::set(&file, Mode::Exclusive, &partial)?;
    // Who had the lock may have published this very file since it was opened.
    there()?;
    file.set_len(0).map_err(error("cannot size", &partial))?;
    Ok((file, partial))
}

/// Gives what is complete and durable its name, durably. What has that name already stays.
pub(super) fn publish(partial: &Path, target: &Path) -> Result<(), DiskError> {
    // Not `rename`: it would replace a file that came into being meanwhile.
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let named = match renameat_with(CWD, partial, CWD, target, RenameFlags::NOREPLACE) {
        // A file system that cannot do that (NFS); that there was none has to do.
        Err(rustix::io::Errno::INVAL) => std::fs::rename(partial, target),
        other => other.map_err(Into::into),
    };
    named.map_err(error("cannot name", target))?;
    let dir = target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(error("cannot sync", dir))
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
