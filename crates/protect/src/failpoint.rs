//! For tests: a step at which this process kills itself, as if its host had lost power there.
//!
//! Off unless the protection's specification names a step, `STEP` or `STEP:N` for the N-th time it is reached.

use steadfast_epoch::Status;

/// Every step there is, in the order in which an epoch, then a primary that hands over, and then a promotion, goes through them.
pub const STEPS: [&str; 19] = [
    "pause", "capture", "seal", "send", "receive", "stage", "fsync", "ack", "commit", "release", "apply",
    "freeze", "give", "handed", "suspect", "grant", "load", "resume", "announce",
];

/// See the module.
#[derive(Default)]
pub struct Failpoint {
    step: Option<&'static str>,
    left: u32,
}

impl Failpoint {
    /// From its text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(text: Option<&str>) -> Result<Self, String> {
        let Some(text) = text else {
            return Ok(Self::default());
        };
        let (name, count) = text.split_once(':').unwrap_or((text, "1"));
        let step = STEPS
            .into_iter()
            .find(|s| *s == name)
            .ok_or_else(|| format!("{name:?} is no step; known: {}", STEPS.join(", ")))?;
        let left = count.parse().map_err(|_| format!("{count:?} is no number"))?;
        Ok(Self {
            step: Some(step),
            left,
        })
    }

    /// This step is reached. Steps of an epoch count only once the VM is mirrored: before that there is nothing to break.
    pub fn at(&mut self, step: &str, status: impl FnOnce() -> Status) {
        if self.step != Some(step) {
            return;
        }
        let mirrored = match status() {
            Status::Primary(p) => p.members.iter().any(|m| m.in_sync),
            Status::Standby(s) => s.staged.is_some(),
        };
        // A host that is being promoted mirrors to nobody.
        let promotion = STEPS.iter().position(|s| *s == step) >= STEPS.iter().position(|s| *s == "suspect");
        if !mirrored && !promotion {
            return;
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_known_by_name() {
        assert!(Failpoint::new(None).is_ok());
        assert!(Failpoint::new(Some("seal:12")).is_ok());
        assert!(Failpoint::new(Some("lunch")).is_err_and(|e| e.contains("pause, capture")));
        assert!(Failpoint::new(Some("seal:many")).is_err());
    }
}
