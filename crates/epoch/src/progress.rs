//! The four cursors of a VM on its primary, ordered and monotone (I6).
//!
//! `released <= committed <= sent <= sealed`: asserted wherever one moves, in release builds too.

use crate::invariants;
use steadfast_types::Epoch;

/// The cursors. Only the methods here move them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    sealed: Epoch,
    sent: Epoch,
    committed: Epoch,
    released: Epoch,
}

impl Progress {
    /// A primary that begins at `sealed`, of which `committed` and `released` are known so far.
    #[must_use]
    pub fn starting(sealed: Epoch, committed: Epoch, released: Epoch) -> Self {
        let p = Self {
            sealed,
            sent: sealed,
            committed,
            released,
        };
        invariants::i6_order(&p);
        p
    }

    /// Newest sealed epoch.
    #[must_use]
    pub const fn sealed(&self) -> Epoch {
        self.sealed
    }
    /// Newest epoch handed to the standbys (or sealed, when there is none).
    #[must_use]
    pub const fn sent(&self) -> Epoch {
        self.sent
    }
    /// Newest committed epoch.
    #[must_use]
    pub const fn committed(&self) -> Epoch {
        self.committed
    }
    /// Newest epoch whose outputs may have left.
    #[must_use]
    pub const fn released(&self) -> Epoch {
        self.released
    }

    /// An epoch was sealed: exactly the next one.
    pub(crate) fn seal(&mut self, to: Epoch) {
        invariants::i6_next(self.sealed, to);
        self.sealed = to;
        invariants::i6_order(self);
    }
    /// Epochs up to `to` were sent; lower values (a resend) change nothing.
    pub(crate) fn send(&mut self, to: Epoch) {
        self.sent = self.sent.max(to);
        invariants::i6_order(self);
    }
    /// Epochs up to `to` are committed.
    pub(crate) fn commit(&mut self, to: Epoch) {
        invariants::i6_monotone("committed", self.committed, to);
        self.committed = to;
        invariants::i6_order(self);
    }
    /// Outputs up to `to` are released.
    pub(crate) fn release(&mut self, to: Epoch) {
        invariants::i6_monotone("released", self.released, to);
        self.released = to;
        invariants::i6_order(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_move_in_order() {
        let mut p = Progress::default();
        p.seal(Epoch(1));
        p.send(Epoch(1));
        p.send(Epoch(0));
        assert_eq!(p.sent(), Epoch(1));
        p.commit(Epoch(1));
        p.release(Epoch(1));
    }

    #[test]
    #[should_panic(expected = "I6")]
    fn commit_before_send_is_caught() {
        let mut p = Progress::default();
        p.seal(Epoch(1));
        p.commit(Epoch(1));
    }

    #[test]
    #[should_panic(expected = "I6")]
    fn release_before_commit_is_caught() {
        let mut p = Progress::starting(Epoch(3), Epoch(2), Epoch(1));
        p.release(Epoch(3));
    }

    #[test]
    #[should_panic(expected = "I6")]
    fn going_back_is_caught() {
        Progress::starting(Epoch(3), Epoch(2), Epoch(1)).commit(Epoch(1));
    }

    #[test]
    #[should_panic(expected = "I6")]
    fn a_sealed_gap_is_caught() {
        Progress::default().seal(Epoch(2));
    }
}
