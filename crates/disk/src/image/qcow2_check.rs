//! Checks a qcow2 header before the format driver sees it (QEMU's `docs/interop/qcow2.rst`, versions 2 and 3).
//!
//! The driver allocates what the header says and knows nothing of encryption; so every size is held against limits
//! and against the file here, and features that would be misread are refused with their name.

use crate::error::DiskError;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// QEMU's limit for the first level table: 32 MiB of 8-byte entries.
const L1_ENTRIES_MAX: u64 = 4 << 20;
/// QEMU's limit for the reference count table.
const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// Far above any real disk, and low enough that offsets cannot overflow.
const CAPACITY_MAX: u64 = 1 << 60;
const BACKING_NAME_MAX: u32 = 1023;

const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_LUKS: u32 = 0x0537_be77;

/// What the header says, as far as opening needs it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    /// Size of the disk in bytes.
    pub(crate) capacity: u64,
    /// Cluster size in bytes.
    pub(crate) cluster: u64,
    /// The backing file as written in the header, and its format if the header names one.
    pub(crate) backing: Option<(String, Option<String>)>,
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Reads up to one cluster of header.
fn read_head(file: &File, path: &Path, want: usize) -> Result<Vec<u8>, DiskError> {
    let mut head = vec![0_u8; want];
    let mut filled = 0;
    while filled < want {
        match file.read_at(&mut head[filled..], filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(DiskError::Open {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    }
    head.truncate(filled);
    Ok(head)
}

/// Checks the header of `file`.
pub(crate) fn check(file: &File, path: &Path, writable: bool) -> Result<Checked, DiskError> {
    let damaged = |why: String| DiskError::Damaged {
        path: path.to_owned(),
        why,
    };
    let unsupported = |feature: &str, way_out: &str| DiskError::Unsupported {
        path: path.to_owned(),
        feature: feature.to_owned(),
        way_out: way_out.to_owned(),
    };
    let file_len = file
        .metadata()
        .map_err(|source| DiskError::Open {
            path: path.to_owned(),
            source,
        })?
        .len();
    let head = read_head(file, path, 104)?;
    if head.len() < 72 {
        return Err(damaged(format!(
            "the file has {} bytes, less than a qcow2 header",
            head.len()
        )));
    }
    if head[..4] != *b"QFI\xfb" {
        return Err(damaged(
            "no qcow2 magic; if it is a raw image, say format=raw".to_owned(),
        ));
    }
    let version = be32(&head, 4);
    if !(2..=3).contains(&version) {
        return Err(unsupported(
            &format!("qcow2 version {version}"),
            "convert it with `qemu-img convert -O qcow2` of a current QEMU",
        ));
    }
    match be32(&head, 32) {
        0 => {}
        method => {
            let name = match method {
                1 => "AES",
                2 => "LUKS",
                _ => "unknown",
            };
            return Err(unsupported(
                &format!("encryption ({name})"),
                "decrypt it with `qemu-img convert`, and encrypt the storage below or the file system inside instead",
            ));
        }
    }
    let cluster_bits = be32(&head, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(damaged(format!(
            "cluster size 2^{cluster_bits} is outside 2^9 to 2^21"
        )));
    }
    let cluster = 1_u64 << cluster_bits;
    let capacity = be64(&head, 24);
    if capacity == 0 {
        return Err(DiskError::Unsuitable {
            path: path.to_owned(),
            why: "the disk has no bytes; resize it first".to_owned(),
        });
    }
    if capacity > CAPACITY_MAX {
        return Err(damaged(format!("a disk of {capacity} bytes is beyond any limit")));
    }
    let l1_entries = u64::from(be32(&head, 36));
    let per_l1_entry = cluster * (cluster / 8);
    if l1_entries > L1_ENTRIES_MAX {
        return Err(damaged(format!(
            "first level table of {l1_entries} entries is too large"
        )));
    }
    if l1_entries < capacity.div_ceil(per_l1_entry) {
        return Err(damaged(format!(
            "first level table of {l1_entries} entries is too small for the disk"
        )));
    }
    let reftable_bytes = u64::from(be32(&head, 56)) * cluster;
    if reftable_bytes == 0 || reftable_bytes > REFTABLE_BYTES_MAX {
        return Err(damaged(format!(
            "reference count table of {reftable_bytes} bytes"
        )));
    }
    for (what, at, bytes) in [
        ("first level table", be64(&head, 40), l1_entries * 8),
        ("reference count table", be64(&head, 48), reftable_bytes),
    ] {
        if at == 0 || at % cluster != 0 {
            return Err(damaged(format!(
                "{what} at {at}, which is not on a cluster boundary"
            )));
        }
        match at.checked_add(bytes) {
            Some(end) if end <= file_len.next_multiple_of(cluster) => {}
            _ => {
                return Err(damaged(format!(
                    "{what} lies behind the end of the file: it was cut short"
                )));
            }
        }
    }
    if writable {
        check_header_is_counted(
            file,
            path,
            be64(&head, 48),
            if version == 3 { be32(&head, 96) } else { 4 },
        )?;
    }
    let mut backing_format = None;
    if version == 3 {
        if head.len() < 104 {
            return Err(damaged("the file ends inside the header".to_owned()));
        }
        check_features(be64(&head, 72), writable, path)?;
        if be32(&head, 96) > 6 {
            return Err(damaged("reference count width".to_owned()));
        }
        let header_len = be32(&head, 100);
        if header_len < 104 || u64::from(header_len) > cluster {
            return Err(damaged(format!("header length {header_len}")));
        }
        let first = read_head(file, path, cluster as usize)?;
        backing_format = walk_extensions(&first, header_len as usize, path)?;
    }
    let backing_offset = be64(&head, 8);
    let backing = if backing_offset == 0 {
        None
    } else {
        let len = be32(&head, 16);
        if len == 0 || len > BACKING_NAME_MAX || backing_offset.saturating_add(u64::from(len)) >= cluster {
            return Err(damaged(
                "the name of the backing file lies outside the header".to_owned(),
            ));
        }
        let first = read_head(file, path, cluster as usize)?;
        let name = first
            .get(backing_offset as usize..backing_offset as usize + len as usize)
            .and_then(|b| std::str::from_utf8(b).ok())
            .filter(|name| !name.contains('\0'))
            .ok_or_else(|| damaged("the name of the backing file cannot be read".to_owned()))?;
        Some((name.to_owned(), backing_format))
    };
    Ok(Checked {
        capacity,
        cluster,
        backing,
    })
}

/// The cluster of the header must be counted as used. Otherwise the driver would give it out for data; and if not even
/// its block of reference counts exists, the driver makes one, at the header, whose offset 0 means that there is none,
/// and so on until the stack ends.
fn check_header_is_counted(file: &File, path: &Path, reftable: u64, order: u32) -> Result<(), DiskError> {
    let mut entry = [0; 8];
    let mut counts = [0; 8];
    let read = |into: &mut [u8], at: u64| file.read_exact_at(into, at).is_ok();
    // Bits 0 to 8 of the entry are reserved.
    let found = read(&mut entry, reftable) && {
        let block = u64::from_be_bytes(entry) & !0x1ff;
        block != 0 && read(&mut counts, block)
    };
    let width = 1_u32 << order.min(6);
    // Counts of a byte and more are big-endian; smaller ones begin at the lowest bit of their byte.
    let first = if width >= 8 {
        u64::from_be_bytes(counts) >> (64 - width)
    } else {
        u64::from(counts[0]) & ((1 << width) - 1)
    };
    if found && first != 0 {
        return Ok(());
    }
    Err(DiskError::Damaged {
        path: path.to_owned(),
        why: "its reference counts say that the header is free space; repair it with `qemu-img check -r all`"
            .to_owned(),
    })
}

fn check_features(incompatible: u64, writable: bool, path: &Path) -> Result<(), DiskError> {
    let unsupported = |feature: &str, way_out: &str| DiskError::Unsupported {
        path: path.to_owned(),
        feature: feature.to_owned(),
        way_out: way_out.to_owned(),
    };
    if incompatible & 2 != 0 {
        return Err(DiskError::Damaged {
            path: path.to_owned(),
            why: format!(
                "it is marked corrupt{}",
                if writable { "" } else { ", even for reading" }
            ),
        });
    }
    if incompatible & 1 != 0 {
        return Err(unsupported(
            "an image that was not closed cleanly (dirty reference counts)",
            "repair it with `qemu-img check -r all`",
        ));
    }
    let convert = "convert it with `qemu-img convert -O qcow2`";
    if incompatible & 4 != 0 {
        return Err(unsupported("an external data file", convert));
    }
    if incompatible & 8 != 0 {
        return Err(unsupported("compression other than zlib", convert));
    }
    if incompatible & 16 != 0 {
        return Err(unsupported("extended L2 entries (subclusters)", convert));
    }
    if incompatible != 0 {
        return Err(unsupported(
            &format!("incompatible feature bits {incompatible:#x}"),
            convert,
        ));
    }
    Ok(())
}

/// Walks the header extensions and returns the format of the backing file.
fn walk_extensions(first: &[u8], start: usize, path: &Path) -> Result<Option<String>, DiskError> {
    let damaged = |why: &str| DiskError::Damaged {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    let mut at = start;
    let mut format = None;
    // Each step moves on by at least 8 bytes of at most one cluster.
    while at + 8 <= first.len() {
        let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
        let data = first
            .get(at + 8..)
            .and_then(|rest| rest.get(..len))
            .ok_or_else(|| damaged("a header extension reaches out of the header"))?;
        match kind {
            0 => return Ok(format),
            EXT_BACKING_FORMAT => {
                let name = std::str::from_utf8(data).map_err(|_| damaged("format of the backing file"))?;
                format = Some(name.to_owned());
            }
            EXT_LUKS => {
                return Err(DiskError::Unsupported {
                    path: path.to_owned(),
                    feature: "encryption (LUKS)".to_owned(),
                    way_out: "decrypt it with `qemu-img convert`".to_owned(),
                });
            }
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok(format)
}
