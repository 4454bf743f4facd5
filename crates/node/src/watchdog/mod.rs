//! The host's watchdog device, in the hands of the guard: a host that can no longer end its `restart` VMs is reset by its hardware.
//!
//! ```text
//!            lease runs                          lease over
//!   ── armed, kept alive ──────────────────────┤ VMs are killed ──> none left: kept alive, let go
//!                                              │ a VM's process does not end, or the guard itself does not run
//!                                              └──> nobody keeps it alive ──> reset, before the pool's margin is over
//! ```
//! The device counts in whole seconds, from the last time that it was kept alive. That may be late by as much as the guard may stand
//! still without being noticed, which is one such time: so the time is at most half of the margin that the pool waits after a lease.

mod device;

use device::Device;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A device that could not be used is tried again so often.
const AGAIN: Duration = Duration::from_secs(5);

/// What a device can do.
trait Keeps {
    /// It begins to count anew.
    fn keep_alive(&mut self) -> io::Result<()>;
    /// It counts no more.
    fn let_go(&mut self) -> io::Result<()>;
}

type Open = fn(&Path, u32) -> io::Result<Box<dyn Keeps>>;

/// Which device, and how long it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Such as `/dev/watchdog0`.
    pub device: PathBuf,
    /// Seconds from the last sign of life to the reset.
    pub seconds: u32,
}

impl Choice {
    /// For a pool that waits `margin_ms` after a lease.
    #[must_use]
    pub fn new(device: &Path, margin_ms: u64) -> Self {
        Self {
            device: device.into(),
            seconds: u32::try_from(margin_ms / 2000).unwrap_or(60).clamp(1, 60),
        }
    }
}

/// See the module.
pub struct Watchdog {
    choice: Choice,
    open: Open,
    armed: Option<Box<dyn Keeps>>,
    tried: Option<Instant>,
    /// What is wrong with it.
    failed: Option<String>,
}

impl Watchdog {
    /// Not armed yet.
    #[must_use]
    pub fn new(choice: Choice) -> Self {
        let open = |path: &Path, seconds: u32| {
            let device = Device::open(path, seconds)?;
            Ok(Box::new(device) as Box<dyn Keeps>)
        };
        Self::with(choice, open)
    }

    fn with(choice: Choice, open: Open) -> Self {
        Self {
            choice,
            open,
            armed: None,
            tried: None,
            failed: None,
        }
    }

    /// Called in each round of the guard. `guarded`: an instance is here that must not outlive the lease. `safe`: the lease holds.
    pub fn turn(&mut self, guarded: bool, safe: bool, now: Instant) {
        let due = self
            .tried
            .is_none_or(|at| now.saturating_duration_since(at) >= AGAIN);
        // Armed while the lease holds only: what is armed counts from then.
        if guarded && safe && self.armed.is_none() && due {
            self.tried = Some(now);
            match (self.open)(&self.choice.device, self.choice.seconds) {
                Ok(device) => (self.armed, self.failed) = (Some(device), None),
                Err(error) => self.failed = Some(error.to_string()),
            }
        }
        let Some(device) = &mut self.armed else {
            if !guarded {
                (self.failed, self.tried) = (None, None);
            }
            return;
        };
        if guarded && !safe {
            return;
        }
        let kept = if guarded {
            device.keep_alive()
        } else {
            device.let_go()
        };
        self.failed = kept.as_ref().err().map(ToString::to_string);
        if !guarded && kept.is_ok() {
            self.armed = None;
        }
    }

    /// For people: empty where nothing is to be said.
    #[must_use]
    pub fn words(&self) -> String {
        let device = self.choice.device.display();
        match (&self.failed, &self.armed) {
            (Some(why), _) => format!(
                "{FAILED}{device}: {why}; until it works, only the guard's process ends `restart` VMs of a host without a lease"
            ),
            (None, Some(_)) => format!(
                "{device} resets this host {} s after the guard fell silent",
                self.choice.seconds
            ),
            (None, None) => String::new(),
        }
    }
}

/// How the words begin that say that it cannot be used.
pub const FAILED: &str = "cannot use ";

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    thread_local! {
        static SEEN: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
    }

    struct Fake;

    impl Keeps for Fake {
        fn keep_alive(&mut self) -> io::Result<()> {
            SEEN.with_borrow_mut(|s| s.push("keep"));
            Ok(())
        }
        fn let_go(&mut self) -> io::Result<()> {
            SEEN.with_borrow_mut(|s| s.push("let go"));
            Ok(())
        }
    }

    fn seen() -> Vec<&'static str> {
        SEEN.take()
    }

    fn watchdog(open: Open) -> Watchdog {
        Watchdog::with(Choice::new(Path::new("/dev/dog"), 4000), open)
    }

    #[test]
    fn it_is_kept_alive_only_while_all_is_as_it_must_be() {
        let mut dog = watchdog(|path, seconds| {
            assert_eq!((path, seconds), (Path::new("/dev/dog"), 2));
            SEEN.with_borrow_mut(|s| s.push("open"));
            Ok(Box::new(Fake))
        });
        let now = Instant::now();
        dog.turn(false, true, now);
        assert_eq!(seen(), [""; 0], "nothing to guard: the device is not touched");
        dog.turn(true, true, now);
        dog.turn(true, true, now);
        assert_eq!(seen(), ["open", "keep", "keep"]);
        assert!(dog.words().contains("2 s after"));
        // The lease is over, and something of a guest still runs.
        dog.turn(true, false, now);
        assert_eq!(seen(), [""; 0]);
        // It has ended in time.
        dog.turn(false, false, now);
        dog.turn(false, false, now);
        assert_eq!(seen(), ["let go"]);
        assert_eq!(dog.words(), "");
        // Without a lease nothing is armed.
        dog.turn(true, false, now);
        assert_eq!(seen(), [""; 0]);
    }

    #[test]
    fn a_device_that_cannot_be_used_is_said_and_tried_again() {
        let mut dog = watchdog(|_, _| {
            SEEN.with_borrow_mut(|s| s.push("open"));
            Err(io::Error::from(io::ErrorKind::ResourceBusy))
        });
        let now = Instant::now();
        for ms in (0..10_000).step_by(200) {
            dog.turn(true, true, now + Duration::from_millis(ms));
        }
        assert_eq!(seen(), ["open"; 2]);
        assert!(dog.words().starts_with(FAILED), "{}", dog.words());
        dog.turn(false, true, now);
        assert_eq!(dog.words(), "");
    }

    #[test]
    fn two_times_of_the_device_are_no_more_than_the_margin() {
        for (margin_ms, seconds) in [(2000, 1), (4000, 2), (5900, 2), (8000, 4), (1_000_000, 60)] {
            assert_eq!(Choice::new(Path::new("/dev/dog"), margin_ms).seconds, seconds);
        }
    }
}
