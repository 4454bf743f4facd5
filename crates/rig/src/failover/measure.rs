//! What is measured: the stream of epochs while all is well, and the parts of a failover.

use super::ensure;
use crate::error::{Result, RigError};
use crate::load::Seen;
use crate::load::frames::Silence;
use serde_json::Value;
use std::time::Duration;

/// A standby that was made, and what protection cost then.
#[derive(Clone, Debug)]
pub struct Protection {
    /// The server that mirrors.
    pub standby: String,
    /// From the command to the moment at which the VM could survive.
    pub warm_up: Duration,
    /// Bytes of memory and disk that were copied at first.
    pub copied_bytes: u64,
    /// The stream of epochs, under load; none where it was not looked at.
    pub stream: Option<Stream>,
}

/// The stream of epochs over some seconds.
#[derive(Clone, Debug)]
pub struct Stream {
    /// Epochs a second.
    pub epochs_per_s: f64,
    /// Pages in an epoch, on average.
    pub pages_per_epoch: f64,
    /// How long an epoch's outputs were held, from its cut to its commit: median of the last.
    pub lag: Duration,
    /// How long the guest stood still for a cut: median of the last.
    pub pause: Duration,
    /// Bytes sent for each page of 4096 that changed.
    pub wire_bytes_per_page: f64,
    /// What the clients saw meanwhile.
    pub seen: Seen,
}

/// A failover in parts.
#[derive(Clone, Debug)]
pub struct Failover {
    /// The server that was killed, and the one that went on.
    pub killed: String,
    /// See `killed`.
    pub to: String,
    /// Last sign of life to suspicion.
    pub detect: Duration,
    /// Suspicion to the store's grant.
    pub grant: Duration,
    /// Grant to the guest running.
    pub resume: Duration,
    /// Guest running to its first packet leaving.
    pub first_packet: Duration,
    /// The guest's silence on the clients' cable.
    pub silence: Duration,
    /// Of that, from its first frame (its new place being announced) to the first that carries data.
    pub to_data: Option<Duration>,
    /// What the clients saw, from the kill until all had answers again.
    pub seen: Seen,
}

impl Failover {
    /// Last sign of life to first packet, on the new server's clock.
    pub fn total(&self) -> Duration {
        self.detect + self.grant + self.resume + self.first_packet
    }

    /// Reads the new primary's status.
    pub(super) fn of(
        killed: &str,
        to: &str,
        status: &Value,
        silence: Silence,
        seen: Seen,
    ) -> Result<Failover> {
        let takeover = &status["timeline"]["takeover"];
        let part = |name: &str| {
            takeover[name].as_u64().map(Duration::from_micros).ok_or_else(|| {
                RigError::malformed(format!("the takeover of {to}"), format!("no {name} in {status}"))
            })
        };
        Ok(Failover {
            killed: killed.to_string(),
            to: to.to_string(),
            detect: part("detect_us")?,
            grant: part("grant_us")?,
            resume: part("resume_us")?,
            first_packet: part("first_output_us")?,
            silence: silence.lasted,
            to_data: silence.to_data,
            seen,
        })
    }

    /// The parts are what the clients' cable saw, as far as that can be: the silence ends with the announcement, when the
    /// guest runs; what the guest itself sends first may come later, when its peers or its own timers retransmit. The new
    /// server cannot know of a silence longer than the real one, nor be done long before the cable is.
    pub(super) fn check(&self) -> Result<()> {
        let slack = Duration::from_millis(500);
        let until_it_runs = self.detect + self.grant + self.resume;
        ensure(
            until_it_runs < self.silence + slack && self.silence < self.total() + 2 * slack,
            || {
                format!(
                    "{} says that its takeover took {:.0?}; the clients' cable was silent for {:.0?}",
                    self.to,
                    self.total(),
                    self.silence
                )
            },
        )
    }
}

/// Two looks at a primary's status make a stream.
pub(super) fn stream(before: &Value, after: &Value, seen: Seen) -> Result<Stream> {
    let both = |path: &str| -> Result<f64> {
        let get = |status: &Value| status.pointer(path).and_then(Value::as_f64);
        match (get(before), get(after)) {
            (Some(b), Some(a)) => Ok(a - b),
            _ => Err(RigError::malformed("a status", format!("no {path} in {after}"))),
        }
    };
    let micros = |path: &str| -> Result<Duration> {
        let us = after.pointer(path).and_then(Value::as_u64);
        us.map(Duration::from_micros)
            .ok_or_else(|| RigError::malformed("a status", format!("no {path} in {after}")))
    };
    let seconds = both("/timeline/at_us")? / 1e6;
    let cuts = both("/cuts")?;
    ensure(cuts >= 1.0 && seconds > 0.0, || {
        format!("no epoch was cut within {seconds} s of load: {after}")
    })?;
    Ok(Stream {
        epochs_per_s: cuts / seconds,
        pages_per_epoch: both("/pages")? / cuts,
        lag: micros("/commit_p50_us")?,
        pause: micros("/pause_p50_us")?,
        wire_bytes_per_page: both("/wire_bytes_out")? / both("/pages")?.max(1.0),
        seen,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_stream_is_the_difference_of_two_looks() {
        let look = |at: u64, cuts: u64, pages: u64, bytes: u64| {
            json!({"cuts": cuts, "pages": pages, "pause_p50_us": 350, "commit_p50_us": 2800,
                "wire_bytes_out": bytes, "timeline": {"at_us": at}})
        };
        let (before, after) = (look(1_000_000, 10, 100, 0), look(3_000_000, 110, 2100, 800_000));
        let s = stream(&before, &after, Seen::default()).unwrap();
        assert!((s.epochs_per_s - 50.0).abs() < 0.1 && (s.pages_per_epoch - 20.0).abs() < 0.1);
        assert!((s.wire_bytes_per_page - 400.0).abs() < 0.1);
        assert_eq!(
            (s.pause, s.lag),
            (Duration::from_micros(350), Duration::from_micros(2800))
        );
        assert!(stream(&after, &after, Seen::default()).is_err());
    }
}
