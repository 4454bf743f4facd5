//! What the receiver has: the content of each page as it was last sent, for as many pages as memory was granted for.
//! A page that is not here is sent whole. Eviction is CLOCK: a page used since the hand last passed gets another turn.

use super::{GFN_MAX, PAGE_BYTES, Page};

/// Pages per lazily allocated piece of storage, and entries per piece of the index.
const PIECE: usize = 512;
const NONE: u32 = u32::MAX;

/// Bounded cache from page number to last-sent content.
pub struct Shadow {
    index: Vec<Option<Box<[u32; PIECE]>>>,
    pieces: Vec<Box<[Page]>>,
    owner: Vec<u64>,
    used: Vec<bool>,
    hand: usize,
    capacity: usize,
    index_pieces_max: usize,
}

/// Where a page was put.
pub enum Place<'a> {
    /// The content that was last sent, to be compared with and brought up to date.
    Known(&'a mut Page),
    /// A fresh place, content unspecified; `true` if another page was pushed out.
    Fresh(&'a mut Page, bool),
    /// No room for it.
    Nowhere,
}

impl Shadow {
    /// A cache of at most `bytes_max` bytes of content; memory is taken as it fills.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        let capacity = (bytes_max / PAGE_BYTES).min(NONE as usize - 1);
        Self {
            index: Vec::new(),
            pieces: Vec::new(),
            owner: Vec::new(),
            used: Vec::new(),
            hand: 0,
            capacity,
            // Pages beyond this number are not cached, so that a stray one cannot make the index huge: 2^28 pages
            // (1 TiB) cost 4 MiB of top level at most.
            index_pieces_max: (GFN_MAX.min(1 << 28) as usize) / PIECE,
        }
    }

    /// Forgets everything; keeps the memory.
    pub fn clear(&mut self) {
        self.index.clear();
        self.owner.clear();
        self.used.clear();
        self.hand = 0;
    }

    /// Pages held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.owner.len()
    }

    /// Nothing held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.owner.is_empty()
    }

    fn slot_of(&self, gfn: u64) -> Option<usize> {
        let piece = self.index.get(usize::try_from(gfn).ok()? / PIECE)?.as_ref()?;
        let slot = piece[gfn as usize % PIECE];
        (slot != NONE).then_some(slot as usize)
    }

    fn set_index(&mut self, gfn: u64, slot: u32) {
        let at = gfn as usize / PIECE;
        if at >= self.index.len() {
            self.index.resize_with(at + 1, || None);
        }
        self.index[at].get_or_insert_with(|| Box::new([NONE; PIECE]))[gfn as usize % PIECE] = slot;
    }

    /// Finds the page or makes room for it.
    pub fn place(&mut self, gfn: u64) -> Place<'_> {
        if let Some(slot) = self.slot_of(gfn) {
            self.used[slot] = true;
            return Place::Known(&mut self.pieces[slot / PIECE][slot % PIECE]);
        }
        if self.capacity == 0 || gfn >= (self.index_pieces_max * PIECE) as u64 {
            return Place::Nowhere;
        }
        let (slot, evicted) = if self.owner.len() < self.capacity {
            let slot = self.owner.len();
            if slot / PIECE == self.pieces.len() {
                let pages = PIECE.min(self.capacity - slot);
                self.pieces.push(vec![[0; PAGE_BYTES]; pages].into_boxed_slice());
            }
            self.owner.push(gfn);
            self.used.push(false);
            (slot, false)
        } else {
            // Ends after at most one full round: the first pass clears what it skips.
            while std::mem::take(&mut self.used[self.hand]) {
                self.hand = (self.hand + 1) % self.capacity;
            }
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.capacity;
            let loser = std::mem::replace(&mut self.owner[slot], gfn);
            self.set_index(loser, NONE);
            (slot, true)
        };
        self.set_index(gfn, slot as u32);
        Place::Fresh(&mut self.pieces[slot / PIECE][slot % PIECE], evicted)
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::*;

    fn put(s: &mut Shadow, gfn: u64, v: u8) -> bool {
        match s.place(gfn) {
            Place::Known(p) => {
                p.fill(v);
                false
            }
            Place::Fresh(p, evicted) => {
                p.fill(v);
                evicted
            }
            Place::Nowhere => panic!("no room for {gfn}"),
        }
    }

    #[test]
    fn bounded_and_true_to_what_was_put() {
        let mut s = Shadow::new(600 * PAGE_BYTES);
        for gfn in 0..2000u64 {
            assert_eq!(put(&mut s, gfn * 3, (gfn % 251) as u8), gfn >= 600);
        }
        assert_eq!(s.len(), 600);
        let mut known = 0;
        for gfn in 0..2000u64 {
            if s.slot_of(gfn * 3).is_some() {
                let Place::Known(p) = s.place(gfn * 3) else {
                    panic!("must be known")
                };
                assert_eq!(p, &[(gfn % 251) as u8; PAGE_BYTES]);
                known += 1;
            }
        }
        assert_eq!(known, 600);
    }

    #[test]
    fn pages_in_use_stay() {
        let mut s = Shadow::new(8 * PAGE_BYTES);
        for round in 0..100u64 {
            put(&mut s, 1, 1);
            put(&mut s, 100 + round, 2);
        }
        assert!(s.slot_of(1).is_some());
        s.clear();
        assert!(s.is_empty() && s.slot_of(1).is_none());
        put(&mut s, 5, 5);
    }

    #[test]
    fn stray_page_numbers_take_no_memory() {
        let mut s = Shadow::new(8 * PAGE_BYTES);
        assert!(matches!(s.place(u64::MAX), Place::Nowhere));
        assert!(matches!(s.place(1 << 28), Place::Nowhere));
        assert!(matches!(Shadow::new(0).place(1), Place::Nowhere));
    }
}
