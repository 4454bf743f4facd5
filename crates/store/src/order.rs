//! Which endpoint is asked first: the nearest one, which is listed first, as long as it answers. If all clients asked whichever member
//! answered last, they would end at one of them, and it would do the work of all.

use std::time::{Duration, Instant};

/// So many answers in a row came from another one before the first was through: it hangs.
const LATE_MAX: u32 = 3;
/// After so long away a read tries the nearest one again.
const HOME_AFTER: Duration = Duration::from_secs(30);
const HOME: usize = 0;

/// See the module.
#[derive(Debug)]
pub struct Order {
    first: usize,
    many: usize,
    late: u32,
    /// When the nearest one was given up, or tried last.
    away: Instant,
}

impl Order {
    /// Of so many endpoints.
    pub fn new(many: usize, now: Instant) -> Self {
        Self {
            first: HOME,
            many: many.max(1),
            late: 0,
            away: now,
        }
    }

    /// Where a change goes, which must not be sent to one that may hang.
    pub fn for_change(&self) -> usize {
        self.first
    }

    /// Where a read goes, which is asked of others too if this one is late.
    pub fn for_read(&mut self, now: Instant) -> usize {
        if self.first != HOME && now.saturating_duration_since(self.away) >= HOME_AFTER {
            self.away = now;
            return HOME;
        }
        self.first
    }

    /// This one answered first.
    pub fn answered(&mut self, index: usize, now: Instant) {
        if index == self.first || index == HOME {
            (self.first, self.late) = (index, 0);
            return;
        }
        self.late += 1;
        if self.late >= LATE_MAX {
            self.go(index, now);
        }
    }

    /// This one failed.
    pub fn failed(&mut self, index: usize, now: Instant) {
        if index == self.first {
            self.go((index + 1) % self.many, now);
        }
    }

    fn go(&mut self, index: usize, now: Instant) {
        (self.first, self.late, self.away) = (index, 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_is_asked_as_long_as_it_answers() {
        let t0 = Instant::now();
        let mut order = Order::new(3, t0);
        order.answered(1, t0);
        order.answered(2, t0);
        assert_eq!(order.for_read(t0), HOME, "it was late, no more");
        order.answered(HOME, t0);
        for _ in 0..LATE_MAX {
            assert_eq!(order.for_change(), HOME);
            order.answered(2, t0);
        }
        assert_eq!(order.for_change(), 2, "it hangs");
        order.failed(HOME, t0);
        assert_eq!(order.for_change(), 2, "who is not first may fail");
        // A read tries the nearest one now and then; changes stay where they are until it answers.
        let later = t0 + HOME_AFTER;
        assert_eq!((order.for_read(later), order.for_read(later)), (HOME, 2));
        assert_eq!(order.for_change(), 2);
        order.answered(HOME, later);
        assert_eq!(order.for_change(), HOME);
        order.failed(HOME, later);
        order.failed(1, later);
        order.failed(2, later);
        assert_eq!(order.for_change(), HOME, "round");
    }
}
