//! What changed in a page, in words of eight bytes, and its encoding as runs.

use super::{PAGE_BYTES, Page};
use crate::varint;

const LINE_BYTES: usize = 64;
const WORDS: usize = PAGE_BYTES / 8;

/// One bit per changed word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Diff {
    words: [u64; WORDS / 64],
}

/// Compares two pages. A line of 64 bytes is compared as a whole, which the compiler turns into vector instructions;
/// only lines that differ are looked at by word.
#[must_use]
pub fn diff(new: &Page, old: &Page) -> Diff {
    let mut words = [0u64; WORDS / 64];
    let (new, _) = new.as_chunks::<LINE_BYTES>();
    let (old, _) = old.as_chunks::<LINE_BYTES>();
    for (i, (n, o)) in new.iter().zip(old).enumerate() {
        let (n, _) = n.as_chunks::<8>();
        let (o, _) = o.as_chunks::<8>();
        let mut xor = [0u64; 8];
        for k in 0..8 {
            xor[k] = u64::from_ne_bytes(n[k]) ^ u64::from_ne_bytes(o[k]);
        }
        if xor.iter().fold(0, |a, x| a | x) != 0 {
            let mask = xor
                .iter()
                .enumerate()
                .fold(0u64, |m, (k, x)| m | (u64::from(*x != 0) << k));
            words[i / 8] |= mask << (i % 8 * 8);
        }
    }
    Diff { words }
}

impl Diff {
    /// Nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words == [0; WORDS / 64]
    }

    /// Number of changed words.
    #[must_use]
    pub fn changed_words(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Number of runs of changed words.
    #[must_use]
    pub fn runs(&self) -> usize {
        let mut before = 0u64;
        let mut runs = 0;
        for &w in &self.words {
            runs += (w & !((w << 1) | before)).count_ones() as usize;
            before = w >> 63;
        }
        runs
    }

    /// Most bytes that [`Diff::encode`] writes.
    #[must_use]
    pub fn encoded_bytes_max(&self) -> usize {
        // A varint below 512 takes at most two bytes; two varints a run.
        self.changed_words() * 8 + self.runs() * 4
    }

    /// First word from `from` on whose bit is `set`.
    fn next(&self, from: usize, set: bool) -> Option<usize> {
        let mut at = from / 64;
        let mut mask = u64::MAX.checked_shl((from % 64) as u32).unwrap_or(0);
        while at < self.words.len() {
            let w = (if set { self.words[at] } else { !self.words[at] }) & mask;
            if w != 0 {
                return Some(at * 64 + w.trailing_zeros() as usize);
            }
            mask = u64::MAX;
            at += 1;
        }
        None
    }

    /// Writes the runs of `new` at `out[at..]`, brings `old` up to them, and returns the position behind.
    pub fn encode(&self, new: &Page, old: &mut Page, out: &mut [u8], mut at: usize) -> usize {
        let mut pos = 0;
        while let Some(start) = self.next(pos, true) {
            let end = self.next(start, false).unwrap_or(WORDS);
            at = varint::put(out, at, (start - pos) as u64);
            at = varint::put(out, at, (end - start) as u64);
            let bytes = &new[start * 8..end * 8];
            out[at..at + bytes.len()].copy_from_slice(bytes);
            old[start * 8..end * 8].copy_from_slice(bytes);
            at += bytes.len();
            pos = end;
            if pos == WORDS {
                break;
            }
        }
        at
    }
}

/// Walks over runs: `visit(byte offset, bytes)`. `None` if they are malformed or leave the page; then `visit` may have
/// been called for the first of them.
pub fn walk_runs(mut runs: &[u8], mut visit: impl FnMut(usize, &[u8])) -> Option<()> {
    let mut word = 0u64;
    while !runs.is_empty() {
        let skip = varint::get(&mut runs)?;
        let count = varint::get(&mut runs)?;
        let start = word.checked_add(skip)?;
        let end = start.checked_add(count)?;
        if count == 0 || end > WORDS as u64 {
            return None;
        }
        let (bytes, rest) = runs.split_at_checked(count as usize * 8)?;
        visit(start as usize * 8, bytes);
        runs = rest;
        word = end;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(new: &Page, old: &Page) -> usize {
        let d = diff(new, old);
        let mut shadow = *old;
        let mut out = [0u8; 8192];
        let n = d.encode(new, &mut shadow, &mut out, 0);
        assert!(n <= d.encoded_bytes_max());
        assert_eq!(&shadow, new);
        let mut applied = *old;
        walk_runs(&out[..n], |at, b| applied[at..at + b.len()].copy_from_slice(b)).expect("valid runs");
        assert_eq!(&applied, new);
        n
    }

    #[test]
    fn edges() {
        let old = [0u8; PAGE_BYTES];
        assert!(diff(&old, &old).is_empty());
        let mut new = old;
        new[4095] = 1;
        assert_eq!(round_trip(&new, &old), 2 + 1 + 8);
        new[0] = 1;
        assert_eq!(diff(&new, &old).runs(), 2);
        round_trip(&new, &old);
        assert_eq!(round_trip(&[7; PAGE_BYTES], &old), 1 + 2 + PAGE_BYTES);
        for word in 0..WORDS {
            let mut new = old;
            new[word * 8 + 3] = 9;
            assert_eq!(
                (diff(&new, &old).runs(), diff(&new, &old).changed_words()),
                (1, 1)
            );
            round_trip(&new, &old);
        }
    }

    #[test]
    fn malformed_runs_are_refused() {
        let walk = |b: &[u8]| walk_runs(b, |_, _| {});
        assert!(walk(&[0, 0]).is_none(), "an empty run");
        assert!(walk(&[0, 1, 1, 2]).is_none(), "cut short");
        let mut beyond = vec![0xff, 0x03, 2];
        beyond.extend([0; 16]);
        assert!(walk(&beyond).is_none(), "leaves the page");
        let mut huge = vec![0xff; 9];
        huge.extend([1, 1]);
        huge.extend([0; 8]);
        assert!(walk(&huge).is_none(), "overflow");
    }

    proptest! {
        #[test]
        fn any_change_round_trips(
            base in any::<u8>(),
            changes in proptest::collection::vec((0usize..PAGE_BYTES, 1usize..300, any::<u8>()), 0..40),
        ) {
            let old = [base; PAGE_BYTES];
            let mut new = old;
            for (at, len, v) in changes {
                let end = (at + len).min(PAGE_BYTES);
                new[at..end].fill(v);
            }
            round_trip(&new, &old);
        }

        #[test]
        fn any_runs_stay_inside_the_page(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut page = [0u8; PAGE_BYTES];
            walk_runs(&bytes, |at, b| page[at..at + b.len()].copy_from_slice(b));
        }
    }
}
