//! Which operation holds the latest bytes of each range that is not in the image yet.
//!
//! An interval map: disjoint ranges, each pointing at the operation that wrote it last. An operation that was
//! overwritten in full is no longer pointed at; one that was overwritten in part has several ranges.

use super::op::JournaledOp;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Clone, Debug)]
struct Range {
    end: u64,
    op: Arc<JournaledOp>,
}

/// The interval map.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    ranges: BTreeMap<u64, Range>,
}

/// A part of a looked-up range.
#[derive(Clone, Debug)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    /// Who wrote it; `None`: the image.
    pub op: Option<Arc<JournaledOp>>,
}

impl Overlay {
    /// Number of ranges.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether everything is in the image.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Makes `op` the latest for its range.
    pub fn insert(&mut self, op: &Arc<JournaledOp>) {
        let (start, end) = (op.offset, op.offset + op.len);
        if start == end {
            return;
        }
        self.cut(start, end, |_| true);
        self.ranges.insert(start, Range { end, op: op.clone() });
    }

    /// Takes out what still points at `op`: it is in the image now.
    pub fn remove(&mut self, op: &Arc<JournaledOp>) {
        self.cut(op.offset, op.offset + op.len, |o| Arc::ptr_eq(o, op));
    }

    /// Cuts `start..end` out of all ranges that `which` accepts.
    fn cut(&mut self, start: u64, end: u64, which: impl Fn(&Arc<JournaledOp>) -> bool) {
        let before = self
            .ranges
            .range(..start)
            .next_back()
            .filter(|(_, r)| r.end > start)
            .map(|(&s, _)| s);
        let inside = self.ranges.range(start..end).map(|(&s, _)| s);
        let touched: Vec<u64> = before.into_iter().chain(inside).collect();
        for s in touched {
            let Some(r) = self.ranges.get(&s).filter(|r| which(&r.op)).cloned() else {
                continue;
            };
            self.ranges.remove(&s);
            if s < start {
                self.ranges.insert(
                    s,
                    Range {
                        end: start,
                        op: r.op.clone(),
                    },
                );
            }
            if r.end > end {
                self.ranges.insert(end, Range { end: r.end, op: r.op });
            }
        }
    }

    /// The range `start..end` without gaps, in order.
    #[must_use]
    pub fn look_up(&self, start: u64, end: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if start >= end {
            return pieces;
        }
        let mut at = start;
        let before = self
            .ranges
            .range(..start)
            .next_back()
            .filter(|(_, r)| r.end > start);
        for (&s, r) in before.into_iter().chain(self.ranges.range(start..end)) {
            if s > at {
                pieces.push(Piece {
                    start: at,
                    end: s,
                    op: None,
                });
                at = s;
            }
            let upto = r.end.min(end);
            pieces.push(Piece {
                start: at,
                end: upto,
                op: Some(r.op.clone()),
            });
            at = upto;
        }
        if at < end {
            pieces.push(Piece {
                start: at,
                end,
                op: None,
            });
        }
        pieces
    }

    /// All ranges in order of their place.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.ranges.iter().map(|(&start, r)| Piece {
            start,
            end: r.end,
            op: Some(r.op.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Kind, Position};
    use proptest::prelude::*;

    fn op(offset: u64, len: u64) -> Arc<JournaledOp> {
        Arc::new(JournaledOp::new(
            Kind::Discard,
            offset,
            len,
            Position(0),
            Position(0),
            None,
        ))
    }

    proptest! {
        /// Against an array that names the last writer of each byte.
        #[test]
        fn agrees_with_a_flat_model(
            steps in prop::collection::vec((0_u64..64, 0_u64..24, any::<bool>()), 1..60),
            look in (0_u64..64, 0_u64..24),
        ) {
            let mut overlay = Overlay::default();
            let mut flat: Vec<Option<usize>> = vec![None; 88];
            let mut ops = Vec::new();
            for (i, (offset, len, remove)) in steps.into_iter().enumerate() {
                if remove && !ops.is_empty() {
                    let j = offset as usize % ops.len();
                    overlay.remove(&ops[j]);
                    flat.iter_mut().filter(|f| **f == Some(j)).for_each(|f| *f = None);
                }
                ops.push(op(offset, len));
                overlay.insert(&ops[i]);
                flat[offset as usize..(offset + len) as usize].fill(Some(i));
            }
            let (start, end) = (look.0, look.0 + look.1);
            let mut at = start;
            for p in overlay.look_up(start, end) {
                prop_assert_eq!(p.start, at);
                prop_assert!(p.end > p.start && p.end <= end);
                for b in p.start..p.end {
                    let want = flat[b as usize].map(|j| Arc::as_ptr(&ops[j]));
                    prop_assert_eq!(p.op.as_ref().map(Arc::as_ptr), want);
                }
                at = p.end;
            }
            prop_assert_eq!(at, end);
            let covered: u64 = overlay.pieces().map(|p| p.end - p.start).sum();
            prop_assert_eq!(covered as usize, flat.iter().flatten().count());
        }
    }
}
