//! The arena: page buffers that are allocated and touched before the first cut, and used again.
//!
//! First touch is dear (FACTS: 1.3 s against 80 ms for 128 MiB), so a pause must not pay for it.

use std::sync::{Arc, Mutex, PoisonError};
use steadfast_types::{Gfn, PAGE_SIZE};

/// One page of guest memory.
pub type Page = [u8; PAGE_SIZE as usize];

#[derive(Default)]
struct Free {
    slabs: Vec<Vec<Page>>,
    bytes: usize,
}

/// Buffers of sealed pages. Cloning shares them.
#[derive(Clone)]
pub struct PageArena {
    free: Arc<Mutex<Free>>,
    keep_bytes: usize,
}

impl PageArena {
    /// An arena that keeps up to `keep_bytes` of buffers for reuse, with one slab of `first_pages` touched already.
    #[must_use]
    pub fn new(first_pages: usize, keep_bytes: usize) -> Self {
        let slab = vec![[1u8; PAGE_SIZE as usize]; first_pages];
        let bytes = slab.capacity() * PAGE_SIZE as usize;
        Self { free: Arc::new(Mutex::new(Free { slabs: vec![slab], bytes })), keep_bytes }
    }

    /// An empty slab with room for `pages` if one is at hand: the largest.
    fn take(&self, pages: usize) -> Vec<Page> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let best = (0..free.slabs.len()).max_by_key(|&i| free.slabs[i].capacity());
        let mut slab = match best {
            Some(i) => free.slabs.swap_remove(i),
            None => Vec::new(),
        };
        free.bytes = free.bytes.saturating_sub(slab.capacity() * PAGE_SIZE as usize);
        drop(free);
        slab.clear();
        slab.reserve(pages);
        slab
    }

    fn give(&self, slab: Vec<Page>) {
        let bytes = slab.capacity() * PAGE_SIZE as usize;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + bytes <= self.keep_bytes {
            free.bytes += bytes;
            free.slabs.push(slab);
        }
    }

    /// Starts a set of pages for about `pages` pages.
    #[must_use]
    pub fn begin(&self, pages: usize) -> SealedPages {
        SealedPages { gfns: Vec::with_capacity(pages), slab: self.take(pages), arena: self.clone() }
    }
}

/// Pages of one epoch, in rising order, owned until dropped.
pub struct SealedPages {
    gfns: Vec<Gfn>,
    slab: Vec<Page>,
    arena: PageArena,
}

impl SealedPages {
    /// Appends a page; `gfn` is above all before it.
    pub fn push(&mut self, gfn: Gfn, page: &Page) {
        debug_assert!(self.gfns.last().is_none_or(|last| *last < gfn));
        self.gfns.push(gfn);
        self.slab.push(*page);
    }

    /// Page numbers, rising.
    #[must_use]
    pub fn gfns(&self) -> &[Gfn] {
        &self.gfns
    }

    /// Content of a page.
    #[must_use]
    pub fn get(&self, gfn: Gfn) -> Option<&Page> {
        self.gfns.binary_search(&gfn).ok().and_then(|i| self.slab.get(i))
    }

    /// Pages with their numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Gfn, &Page)> {
        self.gfns.iter().copied().zip(&self.slab)
    }

    /// Bytes of pages held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slab.len() as u64 * PAGE_SIZE
    }
}

impl Drop for SealedPages {
    fn drop(&mut self) {
        self.arena.give(std::mem::take(&mut self.slab));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_are_used_again_and_the_arena_is_bounded() {
        let arena = PageArena::new(16, 64 << 10);
        let mut a = arena.begin(16);
        for n in 0..16 {
            a.push(Gfn(n), &[n as u8; 4096]);
        }
        assert_eq!(a.get(Gfn(3)).map(|p| p[0]), Some(3));
        assert!(a.get(Gfn(16)).is_none());
        let place = a.slab.as_ptr();
        drop(a);
        let b = arena.begin(4);
        assert_eq!(b.slab.as_ptr(), place);
        let big = arena.begin(100);
        drop(big);
        drop(b);
        assert!(arena.free.lock().unwrap().bytes <= 64 << 10);
    }
}
