//! What a takeover's time was spent on, for the status.
//!
//! All times are microseconds of one process's clock: the parts of a takeover are measured where they happen, so that no clocks
//! of two hosts have to agree.
//!
//! ```text
//! last frame of the primary --detect--> suspected --grant--> granted --resume--> running --first output--> released
//! ```

use serde_json::{Value, json};
use steadfast_epoch::io::Notice;
use steadfast_types::HostId;

/// See the module.
#[derive(Default)]
pub struct Timeline {
    heard: Vec<(HostId, u64)>,
    suspected: Option<HostId>,
    silent_since_us: Option<u64>,
    suspected_us: Option<u64>,
    granted_us: Option<u64>,
    running_us: Option<u64>,
    released_us: Option<u64>,
}

impl Timeline {
    /// Something arrived from a host.
    pub fn heard(&mut self, host: &HostId, now: u64) {
        if self.granted_us.is_none() && self.suspected.as_ref() == Some(host) {
            self.forget();
        }
        match self.heard.iter_mut().find(|(h, _)| h == host) {
            Some((_, at)) => *at = now,
            None => self.heard.push((host.clone(), now)),
        }
    }

    /// The suspicion came to nothing, or what follows has nothing to do with it.
    fn forget(&mut self) {
        *self = Self {
            heard: std::mem::take(&mut self.heard),
            ..Self::default()
        };
    }

    /// The protocol has news.
    pub fn notice(&mut self, notice: &Notice, now: u64) {
        match notice {
            Notice::Suspected(host) => {
                self.silent_since_us = self.heard.iter().find(|(h, _)| h == host).map(|(_, at)| *at);
                self.suspected_us = Some(now);
                self.suspected = Some(host.clone());
                (self.granted_us, self.running_us, self.released_us) = (None, None, None);
            }
            Notice::Granted(_) if self.granted_us.is_none() => self.granted_us = Some(now),
            _ => {}
        }
    }

    /// A standby's guest runs.
    pub fn running(&mut self, now: u64) {
        if self.granted_us.is_none() || self.running_us.is_some() {
            // A planned promote, in a process that has taken over before.
            return self.forget();
        }
        self.running_us = Some(now);
    }

    /// Output left.
    pub fn released(&mut self, now: u64) {
        if self.running_us.is_some() && self.released_us.is_none() {
            self.released_us = Some(now);
        }
    }

    /// For the status: `now`, and the last takeover of this process.
    pub fn status(&self, now: u64) -> Value {
        let between = |from: Option<u64>, to: Option<u64>| Some(to?.saturating_sub(from?));
        json!({
            "at_us": now,
            "takeover": self.suspected_us.map(|_| json!({
                "detect_us": between(self.silent_since_us, self.suspected_us),
                "grant_us": between(self.suspected_us, self.granted_us),
                "resume_us": between(self.granted_us, self.running_us),
                "first_output_us": between(self.running_us, self.released_us),
                "since_running_us": self.running_us.map(|at| now.saturating_sub(at)),
            })),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use steadfast_types::Term;

    #[test]
    fn a_takeover_in_parts() {
        let mut t = Timeline::default();
        let (a, b) = (HostId::new("a").unwrap(), HostId::new("b").unwrap());
        t.notice(&Notice::Granted(Term(1)), 5);
        t.heard(&a, 100);
        t.heard(&b, 900);
        t.notice(&Notice::Suspected(a.clone()), 260);
        assert_eq!(t.status(270)["takeover"]["detect_us"], 160);
        assert!(t.status(270)["takeover"]["grant_us"].is_null());
        t.notice(&Notice::Granted(Term(2)), 300);
        t.released(305);
        t.running(310);
        t.released(330);
        t.released(350);
        let takeover = &t.status(400)["takeover"];
        assert_eq!(takeover["grant_us"], 40);
        assert_eq!(takeover["resume_us"], 10);
        assert_eq!(takeover["first_output_us"], 20);
        // It was handed over since, and is handed back: no takeover.
        t.running(9000);
        assert!(t.status(9100)["takeover"].is_null());
    }

    #[test]
    fn a_suspicion_that_comes_to_nothing_is_forgotten() {
        let mut t = Timeline::default();
        let a = HostId::new("a").unwrap();
        t.heard(&a, 100);
        t.notice(&Notice::Suspected(a.clone()), 260);
        t.heard(&a, 280);
        assert!(t.status(290)["takeover"].is_null());
        t.notice(&Notice::Granted(Term(2)), 9000);
        t.running(9001);
        assert!(
            t.status(9002)["takeover"]["detect_us"].is_null(),
            "a planned promote has no part of it"
        );
    }
}
