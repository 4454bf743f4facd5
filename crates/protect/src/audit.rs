//! For tests: every cut leaves a digest of all RAM that was ever touched, and every standby compares what it has applied.
//!
//! A page that is missed at a cut, lost on the way or applied twice is found at the very epoch in which it happens, not
//! when a guest some day stumbles over it (I3). The digest is taken while the machine stands still, so it lengthens the
//! pause; it is off unless the protection's specification names a folder.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use steadfast_machine::memory::Ram;
use steadfast_types::{Gfn, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

/// Digests of this many epochs are kept.
const KEEP: u64 = 512;

/// See the module.
pub struct Audit {
    dir: PathBuf,
    /// Pages that were ever touched.
    known: Option<Vec<Gfn>>,
}

/// A page that is not what the primary had at the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// Which.
    pub gfn: Gfn,
    /// CRC-32 at the cut.
    pub expected: u32,
    /// CRC-32 here.
    pub found: u32,
}

impl Audit {
    /// Digests go to, and are read from, this folder, which all hosts of the VM share.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            known: None,
        })
    }

    fn path(&self, epoch: u64, term: u64) -> PathBuf {
        self.dir.join(format!("{epoch}-{term}"))
    }

    /// What was touched meanwhile is not known: all of RAM is looked at again.
    pub fn begin_anew(&mut self) {
        self.known = None;
    }

    /// Leaves the digest of RAM at a cut; `dirty` are the pages that the cut found changed.
    pub fn cut(&mut self, ram: &Ram, epoch: u64, term: u64, dirty: &[Gfn]) {
        let known = self.known.get_or_insert_with(|| touched(ram));
        let before = known.len();
        known.extend(
            dirty
                .iter()
                .filter(|g| known[..before].binary_search(g).is_err())
                .copied()
                .collect::<Vec<_>>(),
        );
        known.sort_unstable();
        known.dedup();
        let mut bytes = Vec::with_capacity(known.len() * 12);
        for &gfn in known.iter() {
            bytes.extend_from_slice(&gfn.0.to_le_bytes());
            bytes.extend_from_slice(&digest(ram, gfn).to_le_bytes());
        }
        let temp = self.dir.join(format!("new-{}", std::process::id()));
        let done =
            std::fs::write(&temp, &bytes).and_then(|()| std::fs::rename(&temp, self.path(epoch, term)));
        if let Err(error) = done {
            tracing::warn!(%error, "audit: the digest of epoch {epoch} cannot be written");
        }
        if let Some(old) = epoch.checked_sub(KEEP) {
            let _ = std::fs::remove_file(self.path(old, term));
        }
    }

    /// Compares RAM with the digest of an epoch; `None` if there is no such digest.
    pub fn compare(&self, ram: &Ram, epoch: u64, term: u64) -> Option<Vec<Stale>> {
        let bytes = std::fs::read(self.path(epoch, term)).ok()?;
        let (entries, _) = bytes.as_chunks::<12>();
        let entries: BTreeMap<Gfn, u32> = entries
            .iter()
            .map(|e| {
                let gfn = u64::from_le_bytes([e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]]);
                (Gfn(gfn), u32::from_le_bytes([e[8], e[9], e[10], e[11]]))
            })
            .collect();
        let stale = entries.into_iter().filter_map(|(gfn, expected)| {
            let found = digest(ram, gfn);
            (found != expected).then_some(Stale { gfn, expected, found })
        });
        Some(stale.collect())
    }
}

fn digest(ram: &Ram, gfn: Gfn) -> u32 {
    let mut page = [0u8; PAGE_SIZE as usize];
    match ram.memory().read_slice(&mut page, GuestAddress(gfn.address())) {
        Ok(()) => crc32fast::hash(&page),
        Err(_) => 0,
    }
}

/// All pages that are not zero.
fn touched(ram: &Ram) -> Vec<Gfn> {
    let zero = crc32fast::hash(&[0; PAGE_SIZE as usize]);
    let pages = ram
        .regions()
        .into_iter()
        .flat_map(|r| r.start / PAGE_SIZE..(r.start + r.len) / PAGE_SIZE);
    pages.map(Gfn).filter(|g| digest(ram, *g) != zero).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use steadfast_machine::memory::RamBacking;

    #[test]
    fn a_stale_page_is_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::new(64 << 20, &RamBacking::Memfd).unwrap();
        let write = |gfn: u64, value: u8| {
            ram.memory()
                .write_slice(&[value; 16], GuestAddress(gfn * PAGE_SIZE))
                .unwrap();
        };
        write(3, 1);
        let mut audit = Audit::new(dir.path()).unwrap();
        audit.cut(&ram, 7, 1, &[]);
        write(5, 1);
        audit.cut(&ram, 8, 1, &[Gfn(5)]);
        assert_eq!(audit.compare(&ram, 8, 1), Some(vec![]));
        let stale = audit.compare(&ram, 7, 1).unwrap();
        assert!(stale.is_empty(), "page 5 was not known at epoch 7: {stale:?}");
        write(3, 2);
        let stale = audit.compare(&ram, 8, 1).unwrap();
        assert_eq!((stale.len(), stale[0].gfn), (1, Gfn(3)));
        assert_eq!(audit.compare(&ram, 9, 1), None);
    }
}
