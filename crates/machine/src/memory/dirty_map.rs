//! Dirty map of the monitor's own writes to guest memory.
//!
//! KVM logs what vCPUs write; what the monitor writes (virtqueue used rings, disk reads, received frames) goes
//! through vm-memory, which marks it here. Two levels: one bit per page, and one summary bit per 64 pages-words,
//! so that a harvest costs what is dirty and not what is mapped.
//!
//! Order: a writer stores the data, then sets the page bit, then the summary bit. A harvest takes the summary bit
//! first, then the page word. It runs with vCPUs and devices still, so no writer races it; the order only makes a
//! misuse lose nothing (a page may be reported twice, never not at all).

use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const PAGE_SHIFT: usize = 12;

/// Two-level bitmap over one region; offsets are bytes from the region's start.
#[derive(Debug, Default)]
pub struct DirtyMap {
    pages: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
    len_bytes: usize,
}

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

impl DirtyMap {
    /// Takes every dirty page since the last harvest, in rising order, as page index within the region.
    pub fn harvest(&self, mut visit: impl FnMut(u64)) {
        for (s, summary) in self.summary.iter().enumerate() {
            let mut groups = summary.swap(0, Ordering::AcqRel);
            while groups != 0 {
                let word = s * 64 + groups.trailing_zeros() as usize;
                groups &= groups - 1;
                let Some(cell) = self.pages.get(word) else {
                    continue;
                };
                let mut bits = cell.swap(0, Ordering::AcqRel);
                while bits != 0 {
                    visit(word as u64 * 64 + u64::from(bits.trailing_zeros()));
                    bits &= bits - 1;
                }
            }
        }
    }

    /// Forgets all marks.
    pub fn clear(&self) {
        self.harvest(|_| {});
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyMap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyMap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || offset >= self.len_bytes {
            return;
        }
        let last = offset.saturating_add(len - 1).min(self.len_bytes - 1) >> PAGE_SHIFT;
        for page in (offset >> PAGE_SHIFT)..=last {
            let word = page / 64;
            self.pages[word].fetch_or(1 << (page % 64), Ordering::AcqRel);
            self.summary[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        self.pages
            .get(page / 64)
            .is_some_and(|w| w.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyMap {
    fn with_len(len: usize) -> Self {
        let words = len.div_ceil(1 << PAGE_SHIFT).div_ceil(64);
        Self {
            pages: zeroed(words),
            summary: zeroed(words.div_ceil(64)),
            len_bytes: len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(map: &DirtyMap) -> Vec<u64> {
        let mut v = Vec::new();
        map.harvest(|p| v.push(p));
        v
    }

    #[test]
    fn harvest_reports_each_dirty_page_once() {
        let map = DirtyMap::with_len(1 << 30);
        map.mark_dirty(4095, 2);
        map.mark_dirty(5 << 24, 1);
        map.mark_dirty((1 << 30) - 1, 100);
        assert!(map.dirty_at(4096));
        assert_eq!(dirty(&map), vec![0, 1, 5 << 12, (1 << 18) - 1]);
        assert!(dirty(&map).is_empty());
        assert!(!map.dirty_at(4096));
    }

    #[test]
    fn marks_outside_are_ignored() {
        let map = DirtyMap::with_len(8192);
        map.mark_dirty(8192, 1);
        map.mark_dirty(usize::MAX, usize::MAX);
        map.mark_dirty(0, 0);
        assert!(dirty(&map).is_empty());
        map.mark_dirty(4096, usize::MAX);
        assert_eq!(dirty(&map), vec![1]);
    }
}
