//! [`Mark`]: what tells one disk from another. Before a VM goes to another host the two make sure that they mean the same shared disk: a path
//! that is a disk of each host's own would hand the guest another past.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use steadfast_types::PAGE_SIZE;

/// Blocks of a disk that are compared, beside those that the guest wrote last.
const SAMPLES: u64 = 16;
/// Most blocks of one disk.
pub const BLOCKS_MAX: usize = 128;
/// Most disks.
pub const DISKS_MAX: usize = 64;

/// Length of a file or block device, and what some of its blocks hold: the first, some over all of it, and those that were written last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// In bytes.
    pub bytes: u64,
    /// Offset in bytes, and CRC-32 of the block there.
    pub blocks: Vec<(u64, u32)>,
}

impl Mark {
    /// Of what is at `path`, with the blocks at `also`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of(path: &Path, also: &[u64]) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        let (whole, mut places) = (bytes / PAGE_SIZE, vec![0, bytes.saturating_sub(1)]);
        places.extend((0..SAMPLES).map(|n| whole / SAMPLES * n * PAGE_SIZE));
        places.extend_from_slice(also);
        let mut places: Vec<u64> = places
            .into_iter()
            .map(|at| at / PAGE_SIZE * PAGE_SIZE)
            .filter(|at| *at < bytes)
            .collect();
        places.sort_unstable();
        places.dedup();
        places.truncate(BLOCKS_MAX);
        let blocks = places.into_iter().map(|at| Ok((at, sum(&file, at, bytes)?)));
        Ok(Self {
            bytes,
            blocks: blocks.collect::<io::Result<_>>()?,
        })
    }

    /// Whether this is of what is at `path` now.
    ///
    /// # Errors
    /// It is not, or it cannot be read; and what to do.
    pub fn compare(&self, path: &Path) -> Result<(), String> {
        let other = |what: String| {
            format!(
                "{what}: it is not the disk that the VM has; let this path lead to the same storage on all hosts"
            )
        };
        let mut file = File::open(path).map_err(|e| e.to_string())?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
        if bytes != self.bytes {
            return Err(other(format!("it has {bytes} bytes here, {} there", self.bytes)));
        }
        for &(at, there) in self.blocks.iter().filter(|(at, _)| *at < bytes) {
            if sum(&file, at, bytes).map_err(|e| e.to_string())? != there {
                return Err(other(format!("it differs at byte {at}")));
            }
        }
        Ok(())
    }
}

fn sum(file: &File, at: u64, bytes: u64) -> io::Result<u32> {
    let mut block = vec![0; PAGE_SIZE.min(bytes - at) as usize];
    file.read_exact_at(&mut block, at)?;
    Ok(crc32fast::hash(&block))
}

/// What this host's kernel has cached of a file or block device that another host may have written since.
///
/// # Errors
/// It cannot be opened.
pub fn forget_cached(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // Nothing here is dirty: who wrote has flushed. A kernel that cannot forget says so, and then the comparison tells.
    if let Err(error) = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed) {
        tracing::warn!(path = %path.display(), %error, "what is cached of a shared disk is not forgotten");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn the_same_disk_is_known_and_another_is_not() {
        let mut content: Vec<u8> = (0..300_000_u32).map(|n| (n / 7) as u8).collect();
        let a = disk(&content);
        let mark = Mark::of(a.path(), &[70_000, 1 << 40]).unwrap();
        assert!(mark.blocks.len() <= BLOCKS_MAX);
        assert_eq!(mark.compare(disk(&content).path()), Ok(()));
        // Where the guest has written, in the last block, in the first.
        for at in [70_001, 299_999, 3] {
            content[at] ^= 1;
            let why = mark.compare(disk(&content).path()).unwrap_err();
            assert!(why.contains("differs at byte"), "{why}");
            content[at] ^= 1;
        }
        let why = mark.compare(disk(&content[..299_000]).path()).unwrap_err();
        assert!(why.contains("299000 bytes here, 300000 there"), "{why}");
        assert!(mark.compare(Path::new("/no/such/disk")).is_err());
    }

    #[test]
    fn an_empty_disk_and_one_smaller_than_a_block_have_a_mark() {
        for content in [&[][..], &[1, 2, 3]] {
            let a = disk(content);
            let mark = Mark::of(a.path(), &[0]).unwrap();
            assert_eq!(mark.compare(a.path()), Ok(()));
        }
    }
}
