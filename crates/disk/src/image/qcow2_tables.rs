//! Second level tables of a qcow2 image, before the driver writes into it.
//!
//! The driver (imago 0.2) enters a new second level table into the first level table before the count of the table's cluster, and before the
//! table itself, is on stable storage. Who is killed then, or loses power, leaves a table that counts as free space: its cluster is given
//! out again, and data is written over it. So what an earlier process left uncounted is counted here, and the tables that are missing are
//! made, and made durable, before the guest writes: afterwards the driver has none to make.

use super::qcow2_check::{be32, be64};
use crate::error::DiskError;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Tables made ahead at most: those of 1 TiB at the usual cluster size, which take 128 MiB.
const AHEAD_MAX: usize = 2048;
/// Bits of a table entry that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Counts the second level tables of `file`, whose header has been checked, and says for which places of the disk there are none. Nobody
/// else writes the file.
///
/// # Errors
/// [`DiskError::Damaged`] with the way out; [`DiskError::File`].
pub(crate) fn count(file: &File, path: &Path) -> Result<Vec<u64>, DiskError> {
    let io = |source: io::Error| DiskError::File {
        what: "cannot look through the tables of",
        path: path.to_owned(),
        source,
    };
    let damaged = |why: String| DiskError::Damaged {
        path: path.to_owned(),
        why: format!("{why}; repair it with `qemu-img check -r all`"),
    };
    let mut head = [0; 104];
    file.read_exact_at(&mut head[..72], 0).map_err(io)?;
    let version = be32(&head, 4);
    if version >= 3 {
        file.read_exact_at(&mut head, 0).map_err(io)?;
    }
    let cluster = 1_u64 << be32(&head, 20);
    let counts = Counts {
        file,
        cluster,
        table: be64(&head, 48),
        blocks: u64::from(be32(&head, 56)) * cluster / 8,
        bits: if version >= 3 {
            1 << be32(&head, 96).min(6)
        } else {
            16
        },
    };
    let mut l1 = vec![0; be32(&head, 36) as usize * 8];
    file.read_exact_at(&mut l1, be64(&head, 40)).map_err(io)?;
    let (capacity, covers) = (be64(&head, 24), cluster * (cluster / 8));
    let (mut missing, mut counted) = (Vec::new(), 0);
    for (i, entry) in l1.as_chunks::<8>().0.iter().enumerate() {
        let (at, table) = (i as u64 * covers, u64::from_be_bytes(*entry) & OFFSET);
        if at >= capacity {
            break;
        }
        if table == 0 {
            missing.push(at);
        } else if counts
            .make_used(table)
            .map_err(io)?
            .ok_or_else(|| damaged(format!("its reference counts do not reach the table at {table}")))?
        {
            counted += 1;
        }
    }
    if counted > 0 {
        file.sync_all().map_err(io)?;
        tracing::warn!(image = %path.display(), counted, "tables of a process that was killed are counted now");
    }
    missing.truncate(AHEAD_MAX);
    Ok(missing)
}

/// Reference counts.
struct Counts<'a> {
    file: &'a File,
    cluster: u64,
    table: u64,
    /// Entries of the table.
    blocks: u64,
    /// Width of a count.
    bits: u64,
}

impl Counts<'_> {
    /// Makes the count of the cluster at `offset` 1 if it is 0; whether it was. `None`: there is no count for it.
    fn make_used(&self, offset: u64) -> io::Result<Option<bool>> {
        let number = offset / self.cluster;
        let per_block = self.cluster * 8 / self.bits;
        let block = number / per_block;
        if !offset.is_multiple_of(self.cluster) || block >= self.blocks {
            return Ok(None);
        }
        let mut entry = [0; 8];
        self.file.read_exact_at(&mut entry, self.table + block * 8)?;
        let block = u64::from_be_bytes(entry) & !0x1ff;
        if block == 0 {
            return Ok(None);
        }
        let bit = number % per_block * self.bits;
        let at = block + bit / 8;
        if self.bits < 8 {
            // The lowest bits of a byte come first.
            let (mut byte, shift) = ([0], bit % 8);
            self.file.read_exact_at(&mut byte, at)?;
            let mask = ((1_u16 << self.bits) - 1) as u8;
            let free = byte[0] >> shift & mask == 0;
            if free {
                self.file.write_all_at(&[byte[0] | 1 << shift], at)?;
            }
            return Ok(Some(free));
        }
        let mut count = vec![0; (self.bits / 8) as usize];
        self.file.read_exact_at(&mut count, at)?;
        let free = count.iter().all(|b| *b == 0);
        if free && let Some(last) = count.last_mut() {
            *last = 1;
            self.file.write_all_at(&count, at)?;
        }
        Ok(Some(free))
    }
}
