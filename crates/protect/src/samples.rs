//! The last so many of a kind of duration, for percentiles in the status.

/// How many are kept.
const KEEP: usize = 2048;

/// Durations in microseconds; the newest replace the oldest.
#[derive(Default)]
pub struct Samples {
    kept: Vec<u32>,
    next: usize,
}

impl Samples {
    /// Adds one.
    pub fn add(&mut self, us: u64) {
        let us = u32::try_from(us).unwrap_or(u32::MAX);
        match self.kept.get_mut(self.next) {
            Some(old) => *old = us,
            None => self.kept.push(us),
        }
        self.next = (self.next + 1) % KEEP;
    }

    /// The values at these percentiles, in microseconds; zeroes if there is none.
    pub fn percentiles<const N: usize>(&self, at: [usize; N]) -> [u32; N] {
        let mut all = self.kept.clone();
        all.sort_unstable();
        let last = all.len().saturating_sub(1);
        at.map(|p| all.get((all.len() * p / 100).min(last)).copied().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_count() {
        let mut s = Samples::default();
        assert_eq!(s.percentiles([50, 99]), [0, 0]);
        (0..3000).for_each(|n| s.add(n));
        assert_eq!(s.kept.len(), KEEP);
        assert_eq!(s.percentiles([0, 50, 100]), [952, 1976, 2999]);
    }
}
