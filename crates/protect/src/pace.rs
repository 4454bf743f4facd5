//! Whether the engine keeps up: what took it so long that the other side may come to doubt this host is said, with what it was.

use std::time::{Duration, Instant};

/// It is said no more often than this.
const EVERY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Pace {
    limit: Duration,
    last: Instant,
    told: Option<Instant>,
}

impl Pace {
    /// For peers that suspect this host after `suspect` of silence.
    pub fn new(suspect: Duration) -> Self {
        Self {
            limit: suspect / 3,
            last: Instant::now(),
            told: None,
        }
    }

    /// Time counts from here.
    pub fn begin(&mut self, now: Instant) {
        self.last = now;
    }

    /// Whether something that takes so long is worth a word.
    pub fn is_slow(&self, took: Duration) -> bool {
        took >= self.limit
    }

    /// The time since the last mark went into `what`.
    pub fn mark(&mut self, what: &str, now: Instant) -> Option<String> {
        let took = now.saturating_duration_since(self.last);
        self.last = now;
        let due = self
            .told
            .is_none_or(|t| now.saturating_duration_since(t) >= EVERY);
        (self.is_slow(took) && due).then(|| {
            self.told = Some(now);
            format!("slow: {what} took {} ms", took.as_millis())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_said_now_and_then() {
        let mut pace = Pace::new(Duration::from_millis(300));
        let mut now = Instant::now();
        pace.begin(now);
        let mut after = |ms, what: &str| {
            now += Duration::from_millis(ms);
            pace.mark(what, now)
        };
        assert_eq!(after(99, "a cut"), None);
        assert_eq!(after(100, "a cut").as_deref(), Some("slow: a cut took 100 ms"));
        assert_eq!(after(999, "a tick"), None);
        assert_eq!(after(120, "a tick").as_deref(), Some("slow: a tick took 120 ms"));
    }
}
