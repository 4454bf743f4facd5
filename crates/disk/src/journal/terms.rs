//! Which epochs are this replica's past: for each term the last epoch that was made in it.
//!
//! A term has one producer, whose epochs follow each other; so a replica whose past holds epoch E of term T holds all
//! epochs of T before E too, and another replica that stands at (E', T) with E' <= E stands on this past. That is what makes
//! a copy of changes right after a failover, a restart or a cold start: what is not found here is copied in full.

use super::record::{u32_at, u64_at};
use steadfast_types::{Epoch, Term};

/// Terms that are remembered; of more the oldest are forgotten, which costs a full copy.
const KEPT: usize = 96;
/// Where they stand in a copy of the superblock.
const AT: usize = 136;
const ENTRIES: usize = AT + 8;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    len: usize,
    list: [(Term, Epoch); KEPT],
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            len: 0,
            list: [(Term::ZERO, Epoch::ZERO); KEPT],
        }
    }
}

impl Terms {
    fn known(&self) -> &[(Term, Epoch)] {
        self.list.get(..self.len).unwrap_or_default()
    }

    /// The next epoch was made in this term.
    pub fn note(&mut self, term: Term, epoch: Epoch) {
        if let Some(last) = self.list[..self.len].last_mut()
            && last.0 == term
        {
            last.1 = last.1.max(epoch);
            return;
        }
        if self.len == KEPT {
            self.list.rotate_left(1);
            self.len -= 1;
        }
        self.list[self.len] = (term, epoch);
        self.len += 1;
    }

    /// Whether that epoch, made in that term, is part of this past for certain.
    #[must_use]
    pub fn contains(&self, epoch: Epoch, term: Term) -> bool {
        self.known().iter().any(|&(t, last)| t == term && epoch <= last)
    }

    /// Without the epochs after `epoch`, which was made in `term`.
    #[must_use]
    pub fn up_to(&self, epoch: Epoch, term: Term) -> Self {
        let mut kept = Self::default();
        for &(t, last) in self.known().iter().filter(|(t, _)| *t <= term) {
            kept.note(t, last.min(epoch));
        }
        kept
    }

    fn crc(b: &[u8], len: usize) -> u32 {
        // With the number of the state, so that a torn write does not pair one state with the past of another.
        let mut hash = crc32fast::Hasher::new();
        hash.update(&b[16..24]);
        hash.update(&b[AT..AT + 4]);
        hash.update(&b[ENTRIES..ENTRIES + len * 16]);
        hash.finalize()
    }

    /// Puts it into a superblock.
    pub(super) fn encode(&self, b: &mut [u8]) {
        b[AT..AT + 4].copy_from_slice(&(self.len as u32).to_le_bytes());
        for (i, (term, epoch)) in self.known().iter().enumerate() {
            let at = ENTRIES + i * 16;
            b[at..at + 8].copy_from_slice(&term.0.to_le_bytes());
            b[at + 8..at + 16].copy_from_slice(&epoch.0.to_le_bytes());
        }
        let crc = Self::crc(b, self.len);
        b[AT + 4..AT + 8].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads it from a superblock; nothing is known if it is damaged, or of a version that did not write it.
    pub(super) fn decode(b: &[u8]) -> Self {
        let mut terms = Self::default();
        let len = u32_at(b, AT) as usize;
        if len > KEPT || Self::crc(b, len) != u32_at(b, AT + 4) {
            return terms;
        }
        for i in 0..len {
            let at = ENTRIES + i * 16;
            terms.list[i] = (Term(u64_at(b, at)), Epoch(u64_at(b, at + 8)));
        }
        terms.len = len;
        terms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_past_is_what_was_noted_and_nothing_else() {
        let mut terms = Terms::default();
        for (term, epoch) in [(1, 5), (1, 6), (3, 7), (4, 9)] {
            terms.note(Term(term), Epoch(epoch));
        }
        assert!(terms.contains(Epoch(2), Term(1)) && terms.contains(Epoch(6), Term(1)));
        assert!(
            !terms.contains(Epoch(7), Term(1)),
            "made by somebody whose epoch 7 is not here"
        );
        assert!(!terms.contains(Epoch(1), Term(2)));
        let back = terms.up_to(Epoch(7), Term(3));
        assert!(back.contains(Epoch(7), Term(3)) && !back.contains(Epoch(8), Term(4)));
        assert!(!back.contains(Epoch(8), Term(3)));
        let mut b = [0_u8; 4096];
        b[16] = 9;
        terms.encode(&mut b);
        assert_eq!(Terms::decode(&b), terms);
        b[16] = 8;
        assert_eq!(Terms::decode(&b), Terms::default(), "of another state");
        for n in 0..300 {
            terms.note(Term(10 + n), Epoch(10 + n));
        }
        assert!(terms.contains(Epoch(309), Term(309)) && !terms.contains(Epoch(10), Term(10)));
        terms.encode(&mut b);
        assert_eq!(Terms::decode(&b), terms);
    }
}
