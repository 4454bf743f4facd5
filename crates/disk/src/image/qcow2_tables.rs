//! Reference counts and second level tables of a qcow2 image, before the driver writes into it.
//!
//! The driver (imago 0.2) enters a new second level table into the first level table before the count of the table's cluster, and before the
//! table itself, is on stable storage; and it orders counts before the entries that need them in the page cache only. Who is killed, or loses
//! power, in between leaves clusters in use that count as free: they are given out again, and data is written over them. So what is in use
//! and not counted is counted here, and the tables that are missing are made, and made durable, before the guest writes: afterwards the
//! driver has none to make. What counts as used and is not is left: it is space, no harm.

use super::qcow2_check::{be32, be64};
use crate::error::DiskError;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Tables made ahead at most: those of 1 TiB with the usual clusters of 64 KiB, which take 128 MiB.
const AHEAD_MAX: usize = 2048;
/// Bits of an entry of a table that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// An entry of a compressed cluster. Only other programs write them.
const COMPRESSED: u64 = 1 << 62;

/// Counts what is in use in `file`, whose header has been checked: second level tables, and with `all` everything else that the driver makes.
/// Says for which places of the disk there are no tables. Nobody else writes the file.
///
/// # Errors
/// [`DiskError::Damaged`] with the way out; [`DiskError::File`].
pub(crate) fn count(file: &File, path: &Path, all: bool) -> Result<Vec<u64>, DiskError> {
    let io = |source: io::Error| DiskError::File {
        what: "cannot look through the tables of",
        path: path.to_owned(),
        source,
    };
    let head = read(file, 0, 104).map_err(io)?;
    let cluster = 1_u64 << be32(&head, 20).clamp(9, 21);
    let order = if be32(&head, 4) >= 3 {
        be32(&head, 96).min(6)
    } else {
        4
    };
    let (l1_at, l1_len) = (be64(&head, 40), u64::from(be32(&head, 36)).min(4 << 20) * 8);
    let (counts_at, counts_len) = (
        be64(&head, 48),
        (u64::from(be32(&head, 56)) * cluster).min(8 << 20),
    );
    let table = read(file, counts_at, counts_len).map_err(io)?;
    let mut counts = Counts {
        file,
        cluster,
        blocks: words(&table).map(|w| w & !0x1ff).collect(),
        bits: 1 << order,
        block: (0, Vec::new()),
        counted: 0,
    };
    let l1 = read(file, l1_at, l1_len).map_err(io)?;
    let mut used = Vec::new();
    if all {
        for (at, len) in [(counts_at, counts_len), (l1_at, l1_len)] {
            used.extend((at..at + len).step_by(cluster as usize));
        }
        used.extend(counts.blocks.iter().copied().filter(|b| *b != 0));
    }
    let (capacity, covers) = (be64(&head, 24), cluster * (cluster / 8));
    let mut missing = Vec::new();
    for (i, entry) in words(&l1).enumerate() {
        let at = i as u64 * covers;
        if at >= capacity {
            break;
        }
        match entry & OFFSET {
            0 if missing.len() < AHEAD_MAX => missing.push(at),
            0 => {}
            table => used.push(table),
        }
    }
    let tables = words(&l1).map(|e| e & OFFSET).filter(|t| *t != 0);
    let mut result = used.into_iter().try_for_each(|at| counts.make_used(at));
    if all {
        for table in tables {
            result = result.and_then(|()| {
                let entries = read(file, table, cluster)?;
                let data = words(&entries)
                    .filter(|e| e & COMPRESSED == 0)
                    .map(|e| e & OFFSET);
                data.filter(|d| *d != 0).try_for_each(|d| counts.make_used(d))
            });
        }
    }
    result.map_err(|e| match e.kind() {
        io::ErrorKind::InvalidData => DiskError::Damaged {
            path: path.to_owned(),
            why: format!("{e}; repair it with `qemu-img check -r all`"),
        },
        _ => io(e),
    })?;
    if counts.counted > 0 {
        file.sync_all().map_err(io)?;
        tracing::warn!(image = %path.display(), clusters = counts.counted, "what a process that was killed left in use is counted now");
    }
    Ok(missing)
}

/// Bytes of the file; behind its end are zeroes: its last cluster may be short.
fn read(file: &File, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(bytes)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|w| u64::from_be_bytes(*w))
}

/// Reference counts.
struct Counts<'a> {
    file: &'a File,
    cluster: u64,
    /// Where their blocks are; 0: there is none.
    blocks: Vec<u64>,
    /// Width of a count.
    bits: u64,
    /// The block that was looked at last.
    block: (u64, Vec<u8>),
    /// Counts that were 0.
    counted: u64,
}

impl Counts<'_> {
    /// Makes the count of the cluster at `offset` 1 if it is 0.
    fn make_used(&mut self, offset: u64) -> io::Result<()> {
        let none = || {
            let why = format!("its reference counts do not reach what is in use at {offset}");
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        let number = offset / self.cluster;
        let per_block = self.cluster * 8 / self.bits;
        let block = usize::try_from(number / per_block)
            .ok()
            .and_then(|b| self.blocks.get(b).copied());
        let block = block
            .filter(|b| *b != 0 && offset.is_multiple_of(self.cluster))
            .ok_or_else(none)?;
        if self.block.0 != block {
            self.block = (block, read(self.file, block, self.cluster)?);
        }
        let bit = number % per_block * self.bits;
        let (first, bytes) = ((bit / 8) as usize, (self.bits / 8).max(1) as usize);
        let Some(count) = self.block.1.get_mut(first..first + bytes) else {
            return Err(none());
        };
        let (shift, mask) = match self.bits {
            // The lowest bits of a byte come first.
            1..8 => (bit % 8, ((1_u16 << self.bits) - 1) as u8),
            _ => (0, u8::MAX),
        };
        if count.iter().any(|b| b >> shift & mask != 0) {
            return Ok(());
        }
        if let Some(last) = count.last_mut() {
            *last |= 1 << shift;
        }
        self.counted += 1;
        self.file.write_all_at(count, block + first as u64)
    }
}
