//! How short of CPU this host is: a full copy, for which nobody waits, gives way to what else the host has to do.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// What the kernel knows of waits for a CPU, since Linux 4.20 and where it is switched on.
const PRESSURE: &str = "/proc/pressure/cpu";
/// Times are taken over no less than this.
const OVER: Duration = Duration::from_millis(250);

/// See the module.
pub struct Crowd {
    file: Option<File>,
    last: Option<(Instant, u64)>,
    percent: u64,
}

impl Crowd {
    /// Of this host. One that tells nothing is never short.
    pub fn new() -> Self {
        Self {
            file: File::open(PRESSURE).ok(),
            last: None,
            percent: 0,
        }
    }

    /// In how much of the time somebody waited for a CPU lately, in percent.
    pub fn percent(&mut self, now: Instant) -> u64 {
        if self
            .last
            .is_some_and(|(at, _)| now.saturating_duration_since(at) < OVER)
        {
            return self.percent;
        }
        let mut text = [0; 256];
        let read = self.file.as_ref().and_then(|f| f.read_at(&mut text, 0).ok());
        let Some(total) = read.and_then(|len| waited_us(text.get(..len)?)) else {
            return 0;
        };
        if let Some((at, before)) = self.last {
            let over = now.saturating_duration_since(at).as_micros() as u64;
            self.percent = (total.saturating_sub(before) * 100 / over.max(1)).min(100);
        }
        self.last = Some((now, total));
        self.percent
    }

    /// What [`Crowd::percent`] said last.
    pub fn last_percent(&self) -> u64 {
        self.percent
    }

    /// How long to leave the CPU to others after a piece of work that took one time.
    pub fn rests(percent: u64) -> u32 {
        match percent {
            0..40 => 0,
            40..70 => 1,
            _ => 3,
        }
    }
}

/// The total of the line `some avg10=0.00 avg60=0.00 avg300=0.00 total=12345`.
fn waited_us(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let some = text.lines().find(|l| l.starts_with("some "))?;
    some.rsplit_once("total=")?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        let text = b"some avg10=1.53 avg60=0.87 avg300=0.19 total=4242\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(waited_us(text), Some(4242));
        assert_eq!(waited_us(b""), None);
        assert_eq!(waited_us(b"some avg10=0"), None);
    }

    #[test]
    fn a_host_that_tells_nothing_is_never_short() {
        let mut crowd = Crowd {
            file: None,
            ..Crowd::new()
        };
        assert_eq!(crowd.percent(Instant::now()), 0);
        let mut here = Crowd::new();
        let now = Instant::now();
        assert!(here.percent(now) == 0 && here.percent(now + OVER) <= 100);
    }
}
