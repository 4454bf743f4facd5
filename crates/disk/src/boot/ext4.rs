//! ext2, ext3 and ext4 through the `ext4-view` crate, which reads only and replays the journal in memory.
//!
//! What is added around it: sizes in the superblock are checked before the crate allocates by them; symbolic links
//! are followed here, so that a link with an absurd length is refused before it is read; reads are counted; panics
//! become errors.

use super::error::BootError;
use super::tree::{FileTree, LIST_MAX, normalize};
use crate::error::DiskError;
use crate::guard::no_panic;
use crate::image::BlockIo;
use ext4_view::{Ext4, Ext4Error, Ext4Read};
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Block groups of a 16 TiB file system with 4 KiB blocks, several times over; each costs a few dozen bytes.
const GROUPS_MAX: u64 = 1 << 19;
/// Requests to the image per file system. A kernel and an initrd at their limits take less, also in 1 KiB steps.
const READS_MAX: u64 = 2 << 20;
/// As Linux.
const SYMLINKS_MAX: usize = 40;
const SYMLINK_BYTES_MAX: u64 = 4096;
/// Path components walked per lookup, links included.
const COMPONENTS_MAX: usize = 1024;

/// Whether the ext superblock's magic is where it would be.
pub(crate) fn has_magic(io: &dyn BlockIo, start: u64, len: u64) -> bool {
    let mut magic = [0_u8; 2];
    len >= 2048 && io.read_at(start + 1024 + 56, &mut magic).is_ok() && magic == [0x53, 0xef]
}

/// A part of an image, with a count of the reads left.
struct Window {
    io: Arc<dyn BlockIo>,
    start: u64,
    len: u64,
    left: Rc<Cell<u64>>,
    cancel: Arc<AtomicBool>,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err("stopped".into());
        }
        let left = self
            .left
            .get()
            .checked_sub(1)
            .ok_or("too many reads: the file system leads in circles")?;
        self.left.set(left);
        let end = start_byte
            .checked_add(dst.len() as u64)
            .ok_or("beyond the file system")?;
        if end > self.len {
            return Err(format!("beyond the end of the file system ({end} > {})", self.len).into());
        }
        Ok(self.io.read_at(self.start + start_byte, dst)?)
    }
}

/// An opened file system.
pub(crate) struct ExtTree {
    fs: Ext4,
    uuid: String,
    label: String,
    place: String,
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Checks what the crate allocates by.
fn check_superblock(sb: &[u8], len: u64) -> Result<(), String> {
    let log_block = le32(sb, 24);
    if log_block > 6 {
        return Err(format!("block size 2^{}", u64::from(log_block) + 10));
    }
    let block = 1024_u64 << log_block;
    // The upper half counts only with the 64bit feature.
    let high = if le32(sb, 96) & 0x80 != 0 {
        le32(sb, 336)
    } else {
        0
    };
    let blocks = u64::from(high) << 32 | u64::from(le32(sb, 4));
    let per_group = u64::from(le32(sb, 32));
    if blocks == 0 || per_group == 0 {
        return Err("no blocks".to_owned());
    }
    match blocks.checked_mul(block) {
        Some(bytes) if bytes <= len => {}
        _ => {
            return Err(format!(
                "{blocks} blocks of {block} bytes do not fit into {len} bytes: was the image cut short?"
            ));
        }
    }
    if blocks.div_ceil(per_group) > GROUPS_MAX {
        return Err(format!("{} block groups", blocks.div_ceil(per_group)));
    }
    Ok(())
}

/// Opens the ext file system in `start..start + len` of `io`; `place` is for messages.
///
/// # Errors
/// [`BootError::FileSystem`].
pub(crate) fn open_window(
    io: &Arc<dyn BlockIo>,
    start: u64,
    len: u64,
    place: &str,
    cancel: &Arc<AtomicBool>,
) -> Result<ExtTree, BootError> {
    let bad = |why: String| BootError::FileSystem {
        place: place.to_owned(),
        why,
    };
    let mut superblock = [0_u8; 1024];
    if len < 2048 {
        return Err(bad("too small for a file system".to_owned()));
    }
    io.read_at(start + 1024, &mut superblock)?;
    check_superblock(&superblock, len).map_err(|why| bad(format!("ext4 superblock: {why}")))?;
    let window = Window {
        io: io.clone(),
        start,
        len,
        left: Rc::new(Cell::new(READS_MAX)),
        cancel: cancel.clone(),
    };
    let opened = no_panic("reading ext4", || Ok(Ext4::load(Box::new(window))));
    let fs = flatten(opened).map_err(bad)?;
    let uuid = fs.uuid().to_string();
    let label: String = fs
        .label()
        .display()
        .to_string()
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    let mut place = format!("{place}: ext4");
    if !label.is_empty() {
        place.push_str(&format!(" \"{label}\""));
    }
    place.push_str(&format!(" UUID={uuid}"));
    Ok(ExtTree {
        fs,
        uuid,
        label,
        place,
    })
}

fn flatten<T>(result: Result<Result<T, Ext4Error>, DiskError>) -> Result<T, String> {
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(format!("ext4: {e}; repair it with `fsck.ext4`, or give --kernel")),
        Err(e) => Err(format!("{e}; repair it with `fsck.ext4`, or give --kernel")),
    }
}

impl ExtTree {
    fn guarded<T>(
        &self,
        path: &str,
        f: impl FnOnce() -> Result<T, Ext4Error>,
    ) -> Result<Option<T>, BootError> {
        match no_panic("reading ext4", || Ok(f())) {
            // What is not there, and what cannot be looked into, is not an error of the file system.
            Ok(Err(Ext4Error::NotFound | Ext4Error::NotADirectory)) => Ok(None),
            other => flatten(other).map(Some).map_err(|why| BootError::FileSystem {
                place: format!("{}, {path}", self.place),
                why,
            }),
        }
    }

    /// The path with all links followed, and whether it is a directory; `None` if there is nothing.
    fn resolve(&self, path: &str) -> Result<Option<(String, ext4_view::Metadata)>, BootError> {
        let mut todo: VecDeque<String> = path
            .split('/')
            .filter(|p| !p.is_empty())
            .map(str::to_owned)
            .collect();
        let mut done: Vec<String> = Vec::new();
        let (mut links, mut steps) = (0, 0);
        let too_long = || BootError::FileSystem {
            place: format!("{}, {path}", self.place),
            why: "too many symbolic links, or too long a path".to_owned(),
        };
        while let Some(part) = todo.pop_front() {
            steps += 1;
            if steps > COMPONENTS_MAX {
                return Err(too_long());
            }
            match part.as_str() {
                "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(part),
            }
            let here = format!("/{}", done.join("/"));
            let Some(meta) = self.guarded(&here, || self.fs.symlink_metadata(here.as_str()))? else {
                return Ok(None);
            };
            if !meta.is_symlink() {
                continue;
            }
            links += 1;
            if links > SYMLINKS_MAX || meta.len() > SYMLINK_BYTES_MAX {
                return Err(too_long());
            }
            let Some(target) = self.guarded(&here, || self.fs.read_link(here.as_str()))? else {
                return Ok(None);
            };
            let Ok(target) = std::str::from_utf8(target.as_ref()) else {
                return Ok(None);
            };
            done.pop();
            if target.starts_with('/') {
                done.clear();
            }
            for part in target.split('/').filter(|p| !p.is_empty()).rev() {
                todo.push_front(part.to_owned());
            }
            if todo.len() > COMPONENTS_MAX {
                return Err(too_long());
            }
        }
        let here = format!("/{}", done.join("/"));
        let meta = self.guarded(&here, || self.fs.symlink_metadata(here.as_str()))?;
        Ok(meta.map(|meta| (here, meta)))
    }
}

impl FileTree for ExtTree {
    fn describe(&self) -> String {
        self.place.clone()
    }

    fn uuid(&self) -> &str {
        &self.uuid
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, BootError> {
        let Some((real, meta)) = self.resolve(&normalize_keeping_links(path))? else {
            return Ok(None);
        };
        if !meta.file_type().is_regular_file() {
            return Ok(None);
        }
        if meta.len() > limit {
            return Err(BootError::TooLarge {
                file: format!("{}, {path}", self.place),
                bytes: meta.len(),
                limit,
            });
        }
        self.guarded(path, || {
            let mut file = self.fs.open(real.as_str())?;
            // At most `limit`, checked above.
            let mut data = vec![0_u8; meta.len() as usize];
            let mut filled = 0;
            while filled < data.len() {
                match file.read_bytes(&mut data[filled..])? {
                    0 => break,
                    n => filled += n,
                }
            }
            data.truncate(filled);
            Ok(data)
        })
    }

    fn list(&self, path: &str) -> Result<Vec<String>, BootError> {
        let Some((real, meta)) = self.resolve(&normalize_keeping_links(path))? else {
            return Ok(Vec::new());
        };
        if !meta.is_dir() {
            return Ok(Vec::new());
        }
        let names = self.guarded(path, || {
            let mut names = Vec::new();
            for entry in self.fs.read_dir(real.as_str())?.take(LIST_MAX) {
                let entry = entry?;
                if let Ok(name) = entry.file_name().as_str()
                    && name != "."
                    && name != ".."
                {
                    names.push(name.to_owned());
                }
            }
            names.sort();
            Ok(names)
        })?;
        Ok(names.unwrap_or_default())
    }

    fn is_dir(&self, path: &str) -> Result<Option<bool>, BootError> {
        Ok(self
            .resolve(&normalize_keeping_links(path))?
            .and_then(|(_, meta)| {
                let kind = meta.file_type();
                if kind.is_dir() {
                    Some(true)
                } else if kind.is_regular_file() {
                    Some(false)
                } else {
                    None
                }
            }))
    }
}

/// `..` after a link means the target's parent, so only paths without `..` may be tidied by their text.
fn normalize_keeping_links(path: &str) -> String {
    if path.contains("..") {
        path.to_owned()
    } else {
        normalize(path)
    }
}
