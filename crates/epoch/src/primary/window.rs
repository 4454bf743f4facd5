//! The sealed epochs that some standby may still have to be sent, oldest first.
//!
//! The window also knows the reference of the epoch just before its first: so it can say what each epoch follows, and
//! find the last epoch that it and a standby have in common.

use crate::Micros;
use crate::message::EpochRef;
use std::collections::VecDeque;
use steadfast_types::Epoch;

/// One sealed epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    pub epoch: EpochRef,
    pub flush: bool,
    pub bytes: u64,
    pub sealed_at: Micros,
    /// Its record is at hand and can be sent.
    pub whole: bool,
}

/// Epochs after `base`, without a gap.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    base: EpochRef,
    flights: VecDeque<Flight>,
    bytes: u64,
}

impl Window {
    pub fn new(base: EpochRef, flights: Vec<Flight>) -> Self {
        let bytes = flights.iter().map(|f| f.bytes).sum();
        Self {
            base,
            flights: flights.into(),
            bytes,
        }
    }

    pub fn base(&self) -> EpochRef {
        self.base
    }

    pub fn tip(&self) -> EpochRef {
        self.flights.back().map_or(self.base, |f| f.epoch)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Flight> {
        self.flights.iter()
    }

    pub fn len(&self) -> usize {
        self.flights.len()
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn push(&mut self, f: Flight) {
        self.bytes = self.bytes.saturating_add(f.bytes);
        self.flights.push_back(f);
    }

    pub fn get(&self, e: Epoch) -> Option<&Flight> {
        let first = self.base.epoch.next();
        let i = e.0.checked_sub(first.0)?;
        self.flights.get(usize::try_from(i).ok()?)
    }

    /// The first epoch in the window after `e`.
    pub fn after(&self, e: Epoch) -> Option<&Flight> {
        if e <= self.base.epoch {
            self.flights.front()
        } else {
            self.get(e.next())
        }
    }

    /// The epoch before `e`, if `e` is in the window.
    pub fn prev(&self, e: Epoch) -> Option<EpochRef> {
        if e == self.base.epoch.next() {
            Some(self.base)
        } else {
            self.get(e.prev()).map(|f| f.epoch)
        }
    }

    /// The last epoch in common with a replica whose newest one is `tip`. Each term has one producer, so two replicas
    /// that both have epochs of a term share that term's epochs up to the lower of their last. Only one from which on
    /// every epoch can be sent.
    pub fn common(&self, tip: EpochRef) -> Option<EpochRef> {
        let whole = self.flights.iter().rev().take_while(|f| f.whole).count();
        let first = self.flights.len() - whole;
        let before = match first.checked_sub(1) {
            Some(last) => self.flights.get(last).map_or(self.base, |f| f.epoch),
            None => self.base,
        };
        let refs = self
            .flights
            .iter()
            .skip(first)
            .map(|f| f.epoch)
            .chain(std::iter::once(before));
        refs.filter(|r| r.term == tip.term && r.epoch <= tip.epoch).max()
    }

    /// Drops epochs up to `e`; whether any was dropped.
    pub fn forget(&mut self, e: Epoch) -> bool {
        let mut any = false;
        while let Some(f) = self.flights.front().filter(|f| f.epoch.epoch <= e) {
            self.base = f.epoch;
            self.bytes = self.bytes.saturating_sub(f.bytes);
            self.flights.pop_front();
            any = true;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flight(e: u64, t: u64) -> Flight {
        Flight {
            epoch: EpochRef::new(e, t),
            flush: false,
            bytes: 10,
            sealed_at: 0,
            whole: true,
        }
    }

    #[test]
    fn what_cannot_be_sent_is_no_common_ground() {
        let mut flights = vec![flight(5, 1), flight(6, 1), flight(7, 1)];
        flights[1].whole = false;
        let w = Window::new(EpochRef::new(4, 1), flights);
        assert_eq!(w.common(EpochRef::new(5, 1)), None, "6 cannot be sent");
        assert_eq!(w.common(EpochRef::new(6, 1)), Some(EpochRef::new(6, 1)));
        assert_eq!(w.common(EpochRef::new(9, 1)), Some(EpochRef::new(7, 1)));
    }

    #[test]
    fn finds_what_is_in_common() {
        let w = Window::new(
            EpochRef::new(4, 1),
            vec![flight(5, 1), flight(6, 2), flight(7, 2)],
        );
        assert_eq!(w.common(EpochRef::new(7, 2)), Some(EpochRef::new(7, 2)));
        assert_eq!(w.common(EpochRef::new(9, 2)), Some(EpochRef::new(7, 2)));
        assert_eq!(w.common(EpochRef::new(9, 1)), Some(EpochRef::new(5, 1)));
        assert_eq!(w.common(EpochRef::new(4, 1)), Some(EpochRef::new(4, 1)));
        assert_eq!(w.common(EpochRef::new(3, 1)), None);
        assert_eq!(w.common(EpochRef::new(7, 3)), None);
        assert_eq!(w.prev(Epoch(5)), Some(EpochRef::new(4, 1)));
        assert_eq!(w.prev(Epoch(4)), None);
    }

    #[test]
    fn forgets_from_the_front() {
        let mut w = Window::new(EpochRef::new(4, 1), vec![flight(5, 1), flight(6, 2)]);
        assert!(w.forget(Epoch(5)));
        assert!(!w.forget(Epoch(5)));
        assert_eq!((w.base(), w.len(), w.bytes()), (EpochRef::new(5, 1), 1, 10));
        assert!(w.get(Epoch(5)).is_none());
        assert!(w.get(Epoch(6)).is_some());
    }
}
