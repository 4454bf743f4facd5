//! Copying an image of any format into a raw one, sparse.
//!
//! The copy grows under a temporary name beside the target and takes the target's name when it is complete and on
//! stable storage (I10): a target that exists is complete. What a killed run left is overwritten by the next one.

use super::create::{begin, publish};
use super::{BlockIo, RawImage};
use crate::error::DiskError;
use std::ops::ControlFlow;
use std::path::Path;

const CHUNK: usize = 1 << 20;
/// Runs of zeroes of this length become holes.
const HOLE: usize = 64 << 10;

/// Copies all of `source` into a new raw file at `target`.
///
/// `progress(done_bytes, total_bytes)` is called after each MiB; `ControlFlow::Break` stops and leaves nothing.
///
/// # Errors
/// What reading `source` gives; [`DiskError::File`] if `target` exists or cannot be written; [`DiskError::Invalid`]
/// when stopped.
pub fn to_raw(
    source: &dyn BlockIo,
    target: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), DiskError> {
    let (file, partial) = begin(target)?;
    let total = source.info().capacity_bytes;
    file.set_len(total).map_err(|source| DiskError::File {
        what: "cannot size",
        path: partial.clone(),
        source,
    })?;
    let image = RawImage::from_file(file, &partial, false, false)?;
    let copied = copy(source, &image, total, progress)
        .and_then(|()| image.flush())
        .and_then(|()| publish(&partial, target));
    copied.inspect_err(|_| {
        let _ = std::fs::remove_file(&partial);
    })
}

fn copy(
    source: &dyn BlockIo,
    target: &RawImage,
    total: u64,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), DiskError> {
    let mut buffer = vec![0_u8; CHUNK];
    let mut at = 0;
    while at < total {
        let len = (total - at).min(CHUNK as u64) as usize;
        source.read_at(at, &mut buffer[..len])?;
        for (n, piece) in buffer[..len].chunks(HOLE).enumerate() {
            if piece.iter().any(|b| *b != 0) {
                target.write_at(at + (n * HOLE) as u64, piece)?;
            }
        }
        at += len as u64;
        if progress(at, total).is_break() {
            return Err(DiskError::Invalid("conversion was stopped".to_owned()));
        }
    }
    Ok(())
}
