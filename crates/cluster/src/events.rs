//! Events: what was found, decided and done, why, and how long each step took. A log with bounds.
//!
//! Times are Unix time in ms, for people; durations are measured by whoever did the step, on a monotonic clock.

use crate::detector::FailureClass;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use steadfast_types::{HostId, VmId};

/// How a VM's service is, for availability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// It runs, with all the protection that its class promises.
    Up,
    /// It runs, with less (I8: it could not survive the loss of its host right now).
    Degraded,
    /// It should run and does not.
    Down,
    /// It is off, as wanted: counts for nothing.
    Off,
    /// Nobody looked: no host decided for the pool. Counts for nothing.
    Unknown,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Degraded => "degraded",
            Self::Down => "down",
            Self::Off => "off",
            Self::Unknown => "unknown",
        })
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub enum What {
    /// The detector concluded something.
    Detected {
        /// The class.
        class: FailureClass,
        /// From the first evidence to the conclusion, ms.
        took_ms: u64,
    },
    /// `decide` wants this done.
    Decided {
        /// The action, as text.
        action: String,
    },
    /// `decide` cannot do what is wanted.
    Refused {
        /// What was wanted, and why not.
        refusal: String,
    },
    /// An action ended.
    Done {
        /// The action, as text.
        action: String,
        /// From the decision to the end, ms.
        took_ms: u64,
        /// What went wrong, if it did.
        error: Option<String>,
    },
    /// A VM's service changed.
    Service {
        /// What it is now.
        now: Service,
    },
    /// A remedy of a health policy.
    Remedy {
        /// Which, as text.
        remedy: String,
    },
    /// Something else worth telling: a person's command, a drill's result.
    Note,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number in the pool's log; given by [`Log::push`].
    #[serde(default)]
    pub id: u64,
    /// When, Unix time in ms.
    pub at_ms: u64,
    /// Which VM, if one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Which host, if one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
    /// What.
    #[serde(flatten)]
    pub what: What,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The event that led to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<u64>,
}

impl Event {
    /// An event without a cause; its number comes with the log.
    #[must_use]
    pub fn new(
        at_ms: u64,
        vm: Option<VmId>,
        host: Option<HostId>,
        what: What,
        why: impl Into<String>,
    ) -> Self {
        Self {
            id: 0,
            at_ms,
            vm,
            host,
            what,
            why: why.into(),
            cause: None,
        }
    }

    /// Cuts its texts to what a log keeps.
    pub fn bound(&mut self) {
        cut(&mut self.why);
        match &mut self.what {
            What::Decided { action } => cut(action),
            What::Refused { refusal } => cut(refusal),
            What::Done { action, error, .. } => {
                cut(action);
                error.iter_mut().for_each(cut);
            }
            What::Remedy { remedy } => cut(remedy),
            What::Detected { .. } | What::Service { .. } | What::Note => {}
        }
    }
}

/// One line for people, without the time.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vm = self.vm.iter().map(ToString::to_string);
        let about: Vec<String> = vm.chain(self.host.iter().map(ToString::to_string)).collect();
        if !about.is_empty() {
            write!(f, "{}: ", about.join(" on "))?;
        }
        let why = |f: &mut fmt::Formatter<'_>| match self.why.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", self.why),
        };
        match &self.what {
            What::Detected { class, took_ms } => {
                write!(f, "detected after {took_ms} ms, {class}")?;
                why(f)
            }
            What::Decided { action } => {
                write!(f, "decided: {action}")?;
                why(f)
            }
            What::Refused { refusal } => write!(f, "not now: {refusal}"),
            What::Done {
                action,
                took_ms,
                error,
            } => {
                match error {
                    None => write!(f, "done in {took_ms} ms: {action}")?,
                    Some(e) => write!(f, "failed after {took_ms} ms: {action}: {e}")?,
                }
                why(f)
            }
            What::Service { now } => {
                write!(f, "is {now}")?;
                why(f)
            }
            What::Remedy { remedy } => {
                write!(f, "remedy: {remedy}")?;
                why(f)
            }
            What::Note => f.write_str(&self.why),
        }
    }
}

/// Longest text kept in an event, in bytes.
pub const TEXT_MAX: usize = 1024;

/// Cuts a text to [`TEXT_MAX`] bytes, at a character.
fn cut(text: &mut String) {
    if text.len() > TEXT_MAX {
        let mut end = TEXT_MAX - 3;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str("...");
    }
}

/// The newest events, at most so many and so many bytes of text.
#[derive(Clone, Debug)]
pub struct Log {
    events: VecDeque<Event>,
    next: u64,
    events_max: usize,
    bytes_max: usize,
    bytes: usize,
    dropped: u64,
}

impl Log {
    /// An empty log. Bounds of zero are taken as one event.
    #[must_use]
    pub fn new(events_max: usize, bytes_max: usize) -> Self {
        Self {
            events: VecDeque::new(),
            next: 1,
            events_max: events_max.max(1),
            bytes_max,
            bytes: 0,
            dropped: 0,
        }
    }

    /// Adds an event, gives it its number, and drops the oldest ones beyond the bounds.
    pub fn push(&mut self, mut e: Event) -> u64 {
        e.id = self.next;
        self.next = self.next.saturating_add(1);
        e.bound();
        self.bytes = self.bytes.saturating_add(weight(&e));
        let id = e.id;
        self.events.push_back(e);
        while self.events.len() > self.events_max || self.bytes > self.bytes_max && self.events.len() > 1 {
            if let Some(old) = self.events.pop_front() {
                self.bytes = self.bytes.saturating_sub(weight(&old));
                self.dropped = self.dropped.saturating_add(1);
            }
        }
        id
    }

    /// The events, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter()
    }

    /// How many were dropped for the bounds.
    #[must_use]
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// How many are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// None is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

/// About how many bytes an event takes.
fn weight(e: &Event) -> usize {
    let text = match &e.what {
        What::Decided { action: t } | What::Refused { refusal: t } | What::Remedy { remedy: t } => t.len(),
        What::Done { action, error, .. } => action.len() + error.as_ref().map_or(0, String::len),
        What::Detected { .. } | What::Service { .. } | What::Note => 0,
    };
    128 + e.why.len() + text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(why: &str) -> Event {
        Event {
            id: 0,
            at_ms: 5,
            vm: "db".parse().ok(),
            host: None,
            what: What::Note,
            why: why.into(),
            cause: None,
        }
    }

    #[test]
    fn the_log_keeps_its_bounds_and_counts_what_it_dropped() {
        let mut log = Log::new(10, 100_000);
        for i in 0..25 {
            assert_eq!(log.push(note("x")), i + 1);
        }
        assert_eq!((log.len(), log.dropped()), (10, 15));
        assert_eq!(log.iter().next().unwrap().id, 16);
        let mut log = Log::new(1_000, 10_000);
        for _ in 0..100 {
            log.push(note(&"ä".repeat(5_000)));
        }
        assert!(log.len() < 10 && log.iter().all(|e| e.why.len() <= TEXT_MAX));
        let mut tiny = Log::new(0, 0);
        tiny.push(note("x"));
        assert_eq!(tiny.len(), 1);
    }

    #[test]
    fn one_line_of_json_per_event_and_back() {
        let mut e = note("killed by the axe");
        e.what = What::Detected {
            class: FailureClass::HostDead,
            took_ms: 2700,
        };
        let json = serde_json::to_string(&e).unwrap();
        assert!(
            json.contains(r#""what":"detected""#) && json.contains(r#""class":"host-dead""#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), e);
    }
}
