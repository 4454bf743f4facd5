//! The first content of a machine that follows another in the same instance: what its memory changes of the former one's.

use crate::pages::{PageArena, SealedPages};
use crate::seal::{CaptureError, copy};
use std::ops::Range;
use steadfast_machine::memory::Ram;
use steadfast_types::{Gfn, PAGE_SIZE};

/// Pages compared in one go.
const PART: u64 = 64;
const PART_BYTES: usize = (PART * PAGE_SIZE) as usize;

/// Seals, of a machine that does not run yet, all pages in which its memory `new` differs from `old`, and the pages `also`. Most of
/// them are zero in a machine that was just built: they are not read, so the host gives no memory for them, and take no room.
///
/// # Errors
/// [`CaptureError::Page`].
pub fn seal_anew(
    arena: &PageArena,
    old: &Ram,
    new: &Ram,
    also: impl IntoIterator<Item = Gfn>,
) -> Result<SealedPages, CaptureError> {
    let filled = Filled(new.filled());
    let mut pages = differing(old, new, &filled)?;
    pages.extend(also);
    pages.sort_unstable();
    pages.dedup();
    arena.seal_sparse(&pages, |g| filled.has(g), |part, into| copy(new, part, into))
}

/// Ranges of pages that are not known to be zero.
struct Filled(Vec<Range<u64>>);

impl Filled {
    fn has(&self, gfn: Gfn) -> bool {
        let next = self.0.partition_point(|r| r.end <= gfn.0);
        self.0.get(next).is_some_and(|r| r.contains(&gfn.0))
    }
}

fn differing(old: &Ram, new: &Ram, filled: &Filled) -> Result<Vec<Gfn>, CaptureError> {
    let before = Filled(old.filled());
    let mut differ = Vec::new();
    let (mut a, mut b) = (vec![0; PART_BYTES], vec![0; PART_BYTES]);
    for region in new.regions() {
        let (first, end) = (region.start / PAGE_SIZE, (region.start + region.len) / PAGE_SIZE);
        for at in (first..end).step_by(PART as usize) {
            let part: Vec<Gfn> = (at..end.min(at + PART)).map(Gfn).collect();
            read(old, &before, &part, &mut a)?;
            read(new, filled, &part, &mut b)?;
            let page = PAGE_SIZE as usize;
            let both = a.chunks_exact(page).zip(b.chunks_exact(page));
            differ.extend(
                part.iter()
                    .zip(both)
                    .filter(|(_, (a, b))| a != b)
                    .map(|(g, _)| *g),
            );
        }
    }
    Ok(differ)
}

/// Reads pages, those that were never touched as zeroes.
fn read(ram: &Ram, filled: &Filled, part: &[Gfn], into: &mut [u8]) -> Result<(), CaptureError> {
    for (gfn, page) in part.iter().zip(into.as_chunks_mut().0) {
        if filled.has(*gfn) {
            copy(ram, std::slice::from_ref(gfn), std::slice::from_mut(page))?;
        } else {
            page.fill(0);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use steadfast_machine::memory::RamBacking;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 1 << 20;

    fn write(ram: &Ram, page: u64, byte: u8) {
        let at = GuestAddress(page * PAGE_SIZE + 9);
        ram.memory().write_slice(&[byte], at).unwrap();
    }

    #[test]
    fn pages_that_differ_are_sealed_and_zeroes_are_not_touched() {
        let ram = || Ram::new(64 * MIB, &RamBacking::Memfd).unwrap();
        let (old, new) = (ram(), ram());
        for (page, was, is) in [(5, 1, 0), (7, 0, 1), (9, 3, 3), (100, 4, 5), (16383, 6, 0)] {
            [(&old, was), (&new, is)]
                .iter()
                .filter(|(_, byte)| *byte != 0)
                .for_each(|(ram, byte)| write(ram, page, *byte));
        }
        // Touched, and zero all the same.
        write(&old, 200, 0);
        write(&new, 201, 0);
        let touched = new.filled();
        let arena = PageArena::new(0, 0);
        let sealed = seal_anew(&arena, &old, &new, [Gfn(9), Gfn(300), Gfn(7)]).unwrap();
        let got: Vec<_> = sealed.iter().map(|(g, p)| (g.0, p[9])).collect();
        assert_eq!(got, [(5, 0), (7, 1), (9, 3), (100, 5), (300, 0), (16383, 0)]);
        assert_eq!(sealed.bytes(), 3 * PAGE_SIZE);
        assert_eq!(new.filled(), touched, "what was zero was not touched");
    }
}
