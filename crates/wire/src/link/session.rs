//! Session state without I/O: numbers, what waits for acknowledgement, what arrived ahead of its turn.
//!
//! Invariant W4: a numbered frame is kept until the peer has acknowledged it, and is delivered when, and only when, all
//! before it were.

use crate::frame::Frame;
use std::collections::{BTreeMap, VecDeque};

/// Frames that may arrive ahead of a missing one.
const AHEAD_FRAMES_MAX: u64 = 1 << 16;

/// A frame that waits for acknowledgement.
pub struct Unacked {
    /// Its number.
    pub seq: u64,
    /// The frame.
    pub frame: Frame,
    /// Bit per path that it was given to and that has not gone down since.
    pub paths: u8,
}

/// The sending half.
pub struct SendState {
    queue: VecDeque<Unacked>,
    next: u64,
    unacked_bytes: usize,
    enqueued_bytes: u64,
    consumed_by_peer: u64,
}

impl Default for SendState {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            next: 1,
            unacked_bytes: 0,
            enqueued_bytes: 0,
            consumed_by_peer: 0,
        }
    }
}

impl SendState {
    /// Number of the next frame.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Bytes that wait for acknowledgement.
    pub fn unacked_bytes(&self) -> usize {
        self.unacked_bytes
    }

    /// Bytes that the peer has not yet used.
    pub fn outstanding_bytes(&self) -> u64 {
        self.enqueued_bytes
            .saturating_sub(self.consumed_by_peer)
            .max(self.unacked_bytes as u64)
    }

    /// Gives a frame its number and keeps it. The caller has checked the bounds.
    pub fn push(&mut self, frame: Frame, paths: u8) -> u64 {
        let seq = self.next;
        self.next += 1;
        self.unacked_bytes += frame.wire_bytes();
        self.enqueued_bytes += frame.wire_bytes() as u64;
        self.queue.push_back(Unacked { seq, frame, paths });
        seq
    }

    /// Takes the peer's word that all before `ack` arrived; `gone` sees each frame that is done with. False if the peer
    /// acknowledges what was never sent.
    pub fn acknowledge(&mut self, ack: u64, mut gone: impl FnMut(&Unacked)) -> bool {
        if ack > self.next {
            return false;
        }
        while let Some(front) = self.queue.front() {
            if front.seq >= ack {
                break;
            }
            gone(front);
            self.unacked_bytes -= front.frame.wire_bytes();
            self.queue.pop_front();
        }
        true
    }

    /// Takes the peer's count of used bytes. False if it claims more than was sent.
    pub fn consumed(&mut self, total: u64) -> bool {
        if total > self.enqueued_bytes {
            return false;
        }
        self.consumed_by_peer = self.consumed_by_peer.max(total);
        true
    }

    /// All that waits, oldest first.
    pub fn unacked(&mut self) -> impl Iterator<Item = &mut Unacked> {
        self.queue.iter_mut()
    }
}

/// What came of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Accepted {
    /// New: take what is ready.
    New,
    /// Had it already.
    Duplicate,
    /// Further ahead than a correct peer can be.
    TooFarAhead,
}

/// The receiving half.
pub struct RecvState {
    next: u64,
    ahead: BTreeMap<u64, Frame>,
    ahead_bytes: usize,
    consumed_bytes: u64,
}

impl Default for RecvState {
    fn default() -> Self {
        Self {
            next: 1,
            ahead: BTreeMap::new(),
            ahead_bytes: 0,
            consumed_bytes: 0,
        }
    }
}

impl RecvState {
    /// All before this number were delivered.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Bytes of delivered frames that were used.
    pub fn consumed_bytes(&self) -> u64 {
        self.consumed_bytes
    }

    /// Delivered frames of this size were used.
    pub fn add_consumed(&mut self, bytes: u64) {
        self.consumed_bytes += bytes;
    }

    /// Takes a frame; `ready` gets it and those behind it if it is its turn. `bytes_max` bounds what waits.
    pub fn accept(&mut self, seq: u64, frame: Frame, bytes_max: usize, ready: &mut Vec<Frame>) -> Accepted {
        if seq < self.next || self.ahead.contains_key(&seq) {
            return Accepted::Duplicate;
        }
        if seq == self.next {
            ready.push(frame);
            self.next += 1;
            while let Some(f) = self.ahead.remove(&self.next) {
                self.ahead_bytes -= f.wire_bytes();
                ready.push(f);
                self.next += 1;
            }
            return Accepted::New;
        }
        if seq - self.next > AHEAD_FRAMES_MAX || self.ahead_bytes + frame.wire_bytes() > bytes_max {
            return Accepted::TooFarAhead;
        }
        self.ahead_bytes += frame.wire_bytes();
        self.ahead.insert(seq, frame);
        Accepted::New
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use steadfast_types::Term;

    fn frame(n: u64) -> Frame {
        Frame::control(1, Term(1), n.to_le_bytes().to_vec())
    }

    fn number(f: &Frame) -> u64 {
        f.payload().first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }

    proptest! {
        #[test]
        fn any_order_with_duplicates_is_delivered_once_in_order(order in proptest::collection::vec(1u64..30, 0..400)) {
            let mut r = RecvState::default();
            let mut ready = Vec::new();
            let all = order.iter().copied().chain(1..30);
            for seq in all {
                r.accept(seq, frame(seq), 1 << 20, &mut ready);
            }
            let got: Vec<u64> = ready.iter().map(number).collect();
            prop_assert_eq!(got, (1..30).collect::<Vec<_>>());
            prop_assert_eq!((r.next(), r.ahead_bytes), (30, 0));
        }
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut r = RecvState::default();
        let mut ready = Vec::new();
        assert_eq!(r.accept(3, frame(3), 72, &mut ready), Accepted::New);
        assert_eq!(r.accept(2, frame(2), 72, &mut ready), Accepted::TooFarAhead);
        assert_eq!(
            r.accept(u64::MAX, frame(1), 1 << 20, &mut ready),
            Accepted::TooFarAhead
        );
        assert!(ready.is_empty());
    }

    #[test]
    fn acknowledgement_and_credit_are_checked() {
        let mut s = SendState::default();
        for n in 1..=3 {
            assert_eq!(s.push(frame(n), 1), n);
        }
        assert!(!s.acknowledge(5, |_| {}), "never sent");
        let mut gone = Vec::new();
        assert!(s.acknowledge(3, |u| gone.push(u.seq)));
        assert_eq!((gone, s.unacked_bytes()), (vec![1, 2], 72));
        assert!(!s.consumed(217));
        assert!(s.consumed(144));
        assert_eq!(s.outstanding_bytes(), 72);
        assert!(s.acknowledge(1, |_| {}), "old news");
    }
}
