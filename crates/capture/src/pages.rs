//! The arena: page buffers that are allocated and touched before the first cut, and used again.
//!
//! First touch is dear (FACTS: 1.3 s against 80 ms for 128 MiB), so a pause must not pay for it. Buffers are slabs of one
//! size, so that any fits any set of pages and none is ever grown or moved.

use std::sync::{Arc, Mutex, PoisonError};
use steadfast_types::{Gfn, PAGE_SIZE};

/// One page of guest memory.
pub type Page = [u8; PAGE_SIZE as usize];

/// Pages of a slab: 1 MiB.
const SLAB_PAGES: usize = 256;

type Slab = Box<[Page]>;

#[derive(Default)]
struct Slabs {
    free: Vec<Slab>,
    /// Free and in use.
    all: usize,
}

/// Buffers of sealed pages. Cloning shares them.
#[derive(Clone)]
pub struct PageArena {
    slabs: Arc<Mutex<Slabs>>,
    keep: usize,
}

fn new_slab() -> Slab {
    // Not zeroes, which the allocator would leave untouched.
    vec![[1; PAGE_SIZE as usize]; SLAB_PAGES].into_boxed_slice()
}

impl PageArena {
    /// An arena that keeps up to `keep_bytes` of buffers for reuse, with buffers for `first_pages` touched already.
    #[must_use]
    pub fn new(first_pages: usize, keep_bytes: usize) -> Self {
        let all = first_pages.div_ceil(SLAB_PAGES);
        Self {
            slabs: Arc::new(Mutex::new(Slabs {
                free: std::iter::repeat_with(new_slab).take(all).collect(),
                all,
            })),
            keep: keep_bytes / (SLAB_PAGES * PAGE_SIZE as usize),
        }
    }

    /// Bytes of all buffers, free or in use.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        (slabs.all * SLAB_PAGES) as u64 * PAGE_SIZE
    }

    fn take(&self) -> Slab {
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slab) = slabs.free.pop() {
            return slab;
        }
        slabs.all += 1;
        drop(slabs);
        new_slab()
    }

    fn give(&self, back: Vec<Slab>) {
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        for slab in back {
            if slabs.all > self.keep {
                slabs.all -= 1;
            } else {
                slabs.free.push(slab);
            }
        }
    }

    /// Takes the content of `gfns` (rising): `copy` fills one slab after the other, from the pages that it is given.
    ///
    /// # Errors
    /// Those of `copy`.
    pub fn seal<E>(
        &self,
        gfns: &[Gfn],
        mut copy: impl FnMut(&[Gfn], &mut [Page]) -> Result<(), E>,
    ) -> Result<SealedPages, E> {
        debug_assert!(gfns.is_sorted_by(|a, b| a < b));
        let mut sealed = SealedPages {
            gfns: gfns.to_vec(),
            places: None,
            slabs: Vec::with_capacity(gfns.len().div_ceil(SLAB_PAGES)),
            arena: self.clone(),
        };
        sealed.fill(gfns, &mut copy)?;
        Ok(sealed)
    }

    /// No page.
    #[must_use]
    pub fn nothing(&self) -> SealedPages {
        SealedPages {
            gfns: Vec::new(),
            places: None,
            slabs: Vec::new(),
            arena: self.clone(),
        }
    }

    /// As [`PageArena::seal`], for pages most of which are zero: `copy` is only asked for those that `filled` says yes to, and
    /// only they take room.
    ///
    /// # Errors
    /// Those of `copy`.
    pub fn seal_sparse<E>(
        &self,
        gfns: &[Gfn],
        mut filled: impl FnMut(Gfn) -> bool,
        mut copy: impl FnMut(&[Gfn], &mut [Page]) -> Result<(), E>,
    ) -> Result<SealedPages, E> {
        debug_assert!(gfns.is_sorted_by(|a, b| a < b));
        let mut content = Vec::new();
        let mut place = |gfn: &Gfn| {
            filled(*gfn).then(|| {
                content.push(*gfn);
                content.len() - 1
            })
        };
        let mut sealed = SealedPages {
            places: Some(gfns.iter().map(&mut place).collect()),
            gfns: gfns.to_vec(),
            slabs: Vec::with_capacity(content.len().div_ceil(SLAB_PAGES)),
            arena: self.clone(),
        };
        sealed.fill(&content, &mut copy)?;
        Ok(sealed)
    }
}

/// What a page without a place holds.
static ZEROES: Page = [0; PAGE_SIZE as usize];

/// Pages of one epoch, in rising order, owned until dropped.
pub struct SealedPages {
    gfns: Vec<Gfn>,
    /// Where in the slabs each page is, and none for one that is zero; without it, each page is at its own rank.
    places: Option<Vec<Option<usize>>>,
    slabs: Vec<Slab>,
    arena: PageArena,
}

impl SealedPages {
    /// Page numbers, rising.
    #[must_use]
    pub fn gfns(&self) -> &[Gfn] {
        &self.gfns
    }

    /// Whether a page is among them.
    #[must_use]
    pub fn has(&self, gfn: Gfn) -> bool {
        self.gfns.binary_search(&gfn).is_ok()
    }

    /// Content of a page.
    #[must_use]
    pub fn get(&self, gfn: Gfn) -> Option<&Page> {
        let rank = self.gfns.binary_search(&gfn).ok()?;
        Some(self.at(rank))
    }

    /// Pages with their numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Gfn, &Page)> {
        self.iter_from(0)
    }

    /// Pages with their numbers, in order, from the `first`th on.
    pub fn iter_from(&self, first: usize) -> impl Iterator<Item = (Gfn, &Page)> {
        let numbered = self.gfns.iter().enumerate().skip(first);
        numbered.map(|(rank, gfn)| (*gfn, self.at(rank)))
    }

    /// The page of this rank, which is below the number of pages.
    fn at(&self, rank: usize) -> &Page {
        let place = match &self.places {
            None => Some(rank),
            Some(places) => places[rank],
        };
        place.map_or(&ZEROES, |p| &self.slabs[p / SLAB_PAGES][p % SLAB_PAGES])
    }

    fn fill<E>(
        &mut self,
        content: &[Gfn],
        copy: &mut impl FnMut(&[Gfn], &mut [Page]) -> Result<(), E>,
    ) -> Result<(), E> {
        for part in content.chunks(SLAB_PAGES) {
            let mut slab = self.arena.take();
            let done = copy(part, slab.get_mut(..part.len()).unwrap_or_default());
            self.slabs.push(slab);
            done?;
        }
        Ok(())
    }

    /// Bytes of content held; pages known to be zero hold none.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let held = match &self.places {
            None => self.gfns.len(),
            Some(places) => places.iter().flatten().count(),
        };
        held as u64 * PAGE_SIZE
    }
}

impl Drop for SealedPages {
    fn drop(&mut self) {
        self.arena.give(std::mem::take(&mut self.slabs));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(pages: &[Gfn], into: &mut [Page]) -> Result<(), ()> {
        assert_eq!(pages.len(), into.len());
        pages
            .iter()
            .zip(into)
            .for_each(|(g, p)| *p = [g.0 as u8; PAGE_SIZE as usize]);
        Ok(())
    }

    #[test]
    fn slabs_are_used_again_and_the_arena_is_bounded() {
        let arena = PageArena::new(SLAB_PAGES, 3 << 20);
        let gfns: Vec<Gfn> = (0..600).map(|n| Gfn(n * 3)).collect();
        let a = arena.seal(&gfns, numbers).unwrap();
        assert_eq!((a.get(Gfn(3)).map(|p| p[0]), a.bytes()), (Some(3), 600 * 4096));
        assert_eq!(a.get(Gfn(599 * 3)).map(|p| p[4095]), Some((599 * 3 % 256) as u8));
        assert!(a.get(Gfn(4)).is_none());
        assert!(
            a.iter()
                .zip(&gfns)
                .all(|((g, p), w)| g == *w && p[9] == g.0 as u8)
        );
        assert_eq!((a.iter().count(), arena.bytes()), (600, 3 << 20));
        for first in [0, 1, 255, 256, 257, 599, 600, 700] {
            assert!(a.iter().skip(first).eq(a.iter_from(first)), "from {first} on");
        }
        let b = arena.seal(&gfns[..300], numbers).unwrap();
        assert_eq!(arena.bytes(), 5 << 20);
        let place = b.slabs[0].as_ptr();
        drop(a);
        drop(b);
        assert_eq!(arena.bytes(), 3 << 20, "no more is kept than was allowed");
        let held: Vec<_> = (0..3).map(|_| arena.seal(&gfns[..1], numbers).unwrap()).collect();
        assert!(held.iter().any(|s| s.slabs[0].as_ptr() == place) && arena.bytes() == 3 << 20);
    }

    #[test]
    fn pages_known_to_be_zero_take_no_room() {
        let arena = PageArena::new(0, 0);
        let gfns: Vec<Gfn> = (0..2000).map(Gfn).collect();
        let third = |g: Gfn| g.0.is_multiple_of(3);
        let sealed = arena.seal_sparse(&gfns, third, numbers).unwrap();
        assert_eq!(sealed.bytes(), 667 * 4096);
        assert_eq!(arena.bytes(), 3 << 20);
        let expected = |g: Gfn| if third(g) { g.0 as u8 } else { 0 };
        for first in [0, 1, 3, 700, 1999, 2000] {
            let pages = sealed.iter_from(first);
            assert!(
                pages
                    .map(|(g, p)| (g, p[7]))
                    .eq(gfns[first..].iter().map(|g| (*g, expected(*g))))
            );
        }
        assert_eq!(sealed.get(Gfn(1998)).map(|p| p[0]), Some(expected(Gfn(1998))));
        assert_eq!(sealed.get(Gfn(1999)).map(|p| p[0]), Some(0));
        assert!(arena.seal_sparse(&gfns, third, |_, _| Err(())).is_err());
    }

    #[test]
    fn a_copy_that_fails_gives_its_buffers_back() {
        let arena = PageArena::new(0, 8 << 20);
        assert!(arena.seal(&[Gfn(1)], |_, _| Err(())).is_err());
        assert_eq!(arena.slabs.lock().unwrap().free.len(), 1);
    }
}
