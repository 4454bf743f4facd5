//! Partition tables: GPT (UEFI 2.10, 5.3), MBR with extended partitions, or none.
//!
//! A table is taken only as a whole: checksums must be right (the backup GPT serves when the primary is broken), and
//! entries must lie inside the disk and apart from each other. Work is bounded: at most [`GPT_ENTRIES_MAX`] entries
//! or [`LOGICAL_MAX`] logical partitions are looked at.

use super::error::BootError;
use crate::image::BlockIo;

/// Entries of a GPT that are read; the usual number is 128.
pub const GPT_ENTRIES_MAX: u32 = 1024;
/// Logical partitions in an extended one.
pub const LOGICAL_MAX: usize = 128;

const MBR_GPT_PROTECTIVE: u8 = 0xee;
const MBR_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// Kind of table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// The whole disk is one file system, or nothing that can be recognised.
    None,
    /// Master boot record.
    Mbr,
    /// GUID partition table.
    Gpt,
}

/// A stretch of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As the guest's kernel numbers it, from 1; 0 for the whole disk. For messages only.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// GPT: the name.
    pub name: String,
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// What it is.
    pub kind: TableKind,
    /// In the order of the table.
    pub partitions: Vec<Partition>,
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at + 4)) << 32 | u64::from(le32(bytes, at))
}

fn gpt_error(why: impl Into<String>) -> BootError {
    BootError::Table {
        table: "GPT",
        why: why.into(),
    }
}

fn mbr_error(why: impl Into<String>) -> BootError {
    BootError::Table {
        table: "MBR",
        why: why.into(),
    }
}

/// Reads the table of `io`.
///
/// # Errors
/// [`BootError::Table`] for a table that is there and wrong, [`BootError::Disk`] when the image cannot be read.
pub fn read(io: &dyn BlockIo) -> Result<Table, BootError> {
    let capacity = io.info().capacity_bytes;
    let whole = || Table {
        kind: TableKind::None,
        partitions: vec![Partition {
            number: 0,
            start: 0,
            len: capacity,
            name: String::new(),
        }],
    };
    if capacity < 512 {
        return Ok(whole());
    }
    let mut mbr = [0_u8; 512];
    io.read_at(0, &mut mbr)?;
    if mbr[510..] != [0x55, 0xaa] {
        return Ok(whole());
    }
    let types: Vec<u8> = (0..4).map(|n| mbr[446 + 16 * n + 4]).collect();
    if types.contains(&MBR_GPT_PROTECTIVE) {
        return read_gpt(io);
    }
    let flags_sane = (0..4).all(|n| matches!(mbr[446 + 16 * n], 0 | 0x80));
    if types.iter().all(|t| *t == 0) || !flags_sane {
        // A boot sector: of a file system on the whole disk, or of a loader without a table.
        return Ok(whole());
    }
    match read_mbr(io, &mbr) {
        // Boot code that only looks like a table, in front of a file system.
        Err(BootError::Table { .. }) if super::ext4::has_magic(io, 0, capacity) => Ok(whole()),
        other => other,
    }
}

fn read_mbr(io: &dyn BlockIo, mbr: &[u8; 512]) -> Result<Table, BootError> {
    let mut partitions = Vec::new();
    let mut extended = None;
    for n in 0..4_u32 {
        let entry = &mbr[446 + 16 * n as usize..][..16];
        let (start, len) = (u64::from(le32(entry, 8)), u64::from(le32(entry, 12)));
        if entry[4] == 0 || len == 0 {
            continue;
        }
        if MBR_EXTENDED.contains(&entry[4]) {
            if extended.replace((start, len)).is_some() {
                return Err(mbr_error("two extended partitions"));
            }
        } else {
            partitions.push(sectors(n + 1, start, len));
        }
    }
    let primaries = partitions.clone();
    if let Some((start, len)) = extended {
        let area = sectors(0, start, len);
        check_bounds("MBR", &area, io.info().capacity_bytes)?;
        for primary in &primaries {
            check_apart("MBR", &area, primary)?;
        }
        read_logical(io, start, len, &mut partitions)?;
    }
    check_all("MBR", &partitions, io.info().capacity_bytes)?;
    Ok(Table {
        kind: TableKind::Mbr,
        partitions,
    })
}

/// The chain of extended boot records: each describes one partition and points to the next record.
fn read_logical(io: &dyn BlockIo, base: u64, len: u64, out: &mut Vec<Partition>) -> Result<(), BootError> {
    let mut at = base;
    for n in 0..LOGICAL_MAX as u32 {
        let mut record = [0_u8; 512];
        io.read_at(at * 512, &mut record)?;
        if record[510..] != [0x55, 0xaa] {
            return Err(mbr_error(format!(
                "extended boot record at sector {at} has no signature"
            )));
        }
        let (data, link) = (&record[446..462], &record[462..478]);
        let (start, size) = (u64::from(le32(data, 8)), u64::from(le32(data, 12)));
        if data[4] != 0 && size != 0 {
            let first = at + start;
            if first < base || first + size > base + len {
                return Err(mbr_error(format!(
                    "logical partition {} lies outside the extended one",
                    n + 5
                )));
            }
            out.push(sectors(n + 5, first, size));
        }
        let next = u64::from(le32(link, 8));
        if link[4] == 0 || next == 0 {
            return Ok(());
        }
        // Records come in rising order from every known tool; asking for it rules out loops.
        if base + next <= at || next >= len {
            return Err(mbr_error(
                "extended boot records form a loop or leave the extended partition",
            ));
        }
        at = base + next;
    }
    Err(mbr_error(format!("more than {LOGICAL_MAX} logical partitions")))
}

fn sectors(number: u32, start: u64, len: u64) -> Partition {
    // Both are below 2^33 here.
    Partition {
        number,
        start: start * 512,
        len: len * 512,
        name: String::new(),
    }
}

fn check_bounds(table: &'static str, p: &Partition, capacity: u64) -> Result<(), BootError> {
    match p.start.checked_add(p.len) {
        Some(end) if end <= capacity && p.start > 0 && p.len > 0 => Ok(()),
        _ => Err(BootError::Table {
            table,
            why: format!(
                "partition {} lies outside the disk of {capacity} bytes: was the image cut short?",
                p.number
            ),
        }),
    }
}

fn check_apart(table: &'static str, a: &Partition, b: &Partition) -> Result<(), BootError> {
    if a.start < b.start + b.len && b.start < a.start + a.len {
        return Err(BootError::Table {
            table,
            why: format!("partitions {} and {} overlap", a.number, b.number),
        });
    }
    Ok(())
}

fn check_all(table: &'static str, partitions: &[Partition], capacity: u64) -> Result<(), BootError> {
    for p in partitions {
        check_bounds(table, p, capacity)?;
    }
    let mut sorted: Vec<&Partition> = partitions.iter().collect();
    sorted.sort_by_key(|p| p.start);
    sorted
        .windows(2)
        .try_for_each(|pair| check_apart(table, pair[0], pair[1]))
}

fn read_gpt(io: &dyn BlockIo) -> Result<Table, BootError> {
    let capacity = io.info().capacity_bytes;
    let mut first_error = None;
    // 512 first; 4096 for a disk that was written on a drive with large sectors.
    for sector in [512_u64, 4096] {
        let last = capacity / sector;
        for lba in [1, last.saturating_sub(1)] {
            if lba == 0 || lba >= last {
                continue;
            }
            match read_gpt_at(io, sector, lba) {
                Ok(table) => return Ok(table),
                Err(BootError::Table { why, .. }) => {
                    first_error.get_or_insert(why);
                }
                Err(other) => return Err(other),
            }
        }
    }
    Err(gpt_error(
        first_error.unwrap_or_else(|| "the disk is too small for one".to_owned()),
    ))
}

fn read_gpt_at(io: &dyn BlockIo, sector: u64, lba: u64) -> Result<Table, BootError> {
    let capacity = io.info().capacity_bytes;
    let mut header = vec![0_u8; 512];
    io.read_at(lba * sector, &mut header)?;
    if header[..8] != *b"EFI PART" {
        return Err(gpt_error("no header where the protective MBR says there is one"));
    }
    let header_len = le32(&header, 12) as usize;
    if !(92..=512).contains(&header_len) {
        return Err(gpt_error(format!("header of {header_len} bytes")));
    }
    let stored = le32(&header, 16);
    header[16..20].fill(0);
    if crc32fast::hash(&header[..header_len]) != stored {
        return Err(gpt_error("checksum of the header is wrong"));
    }
    if le64(&header, 24) != lba {
        return Err(gpt_error("the header says that it lies elsewhere"));
    }
    let (entries_lba, count, size) = (le64(&header, 72), le32(&header, 80), le32(&header, 84) as usize);
    if count > GPT_ENTRIES_MAX || !(128..=4096).contains(&size) || !size.is_multiple_of(8) {
        return Err(gpt_error(format!("{count} entries of {size} bytes")));
    }
    let bytes = count as usize * size;
    let at = entries_lba
        .checked_mul(sector)
        .filter(|at| at.checked_add(bytes as u64).is_some_and(|end| end <= capacity))
        .ok_or_else(|| gpt_error("the entries lie outside the disk"))?;
    let mut entries = vec![0_u8; bytes];
    io.read_at(at, &mut entries)?;
    if crc32fast::hash(&entries) != le32(&header, 88) {
        return Err(gpt_error("checksum of the entries is wrong"));
    }
    let mut partitions = Vec::new();
    for (n, entry) in (1_u32..).zip(entries.chunks_exact(size)) {
        if entry[..16].iter().all(|b| *b == 0) {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let range = last
            .checked_sub(first)
            .and_then(|n| n.checked_add(1))
            .and_then(|n| n.checked_mul(sector))
            .zip(first.checked_mul(sector));
        let Some((len, start)) = range else {
            return Err(gpt_error(format!("partition {n} ends before it begins")));
        };
        let name: Vec<u16> = entry[56..128]
            .chunks_exact(2)
            .map(|c| u16::from_le_bytes([c[0], c[1]]))
            .take_while(|c| *c != 0)
            .collect();
        let name: String = String::from_utf16_lossy(&name)
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        partitions.push(Partition {
            number: n,
            start,
            len,
            name,
        });
    }
    check_all("GPT", &partitions, capacity)?;
    Ok(Table {
        kind: TableKind::Gpt,
        partitions,
    })
}
