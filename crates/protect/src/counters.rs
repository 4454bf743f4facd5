//! Numbers for the status.

use crate::samples::Samples;
use std::collections::VecDeque;
use std::time::Instant;
use steadfast_types::Epoch;

/// More cuts than this wait for their commit only when there is no standby; then their times say nothing.
const CUTS_TIMED_MAX: usize = 1024;

/// Numbers for the status.
#[derive(Default)]
pub struct Counters {
    /// Cuts made.
    pub cuts: u64,
    /// Pages sealed.
    pub pages: u64,
    /// Sum and maximum of pauses in microseconds.
    pub pause_us: (u64, u64),
    /// The last pause, by part: stop, harvest, copy, state.
    pub last: steadfast_capture::CutTimes,
    /// Frames released.
    pub released: u64,
    /// Times that the guest was started anew.
    pub resets: u64,
    /// Full copies of the VM that began to be taken here, as a standby.
    pub fills: u64,
    /// How long the last promotion took from grant to running, in microseconds.
    pub promote_us: Option<u64>,
    /// The last pauses.
    pub pauses: Samples,
    /// From the cut to the commit, the last ones; and when the epochs that are not committed yet were cut.
    pub commits: Samples,
    /// See `commits`.
    pub cut_at: VecDeque<(Epoch, Instant)>,
}

impl Counters {
    pub(crate) fn cut(&mut self, epoch: Epoch, pages: usize) {
        self.cuts += 1;
        self.pages += pages as u64;
        if self.cut_at.len() < CUTS_TIMED_MAX {
            self.cut_at.push_back((epoch, Instant::now()));
        }
    }

    pub(crate) fn committed(&mut self, through: Epoch) {
        while let Some((_, at)) = self.cut_at.front().filter(|(e, _)| *e <= through) {
            self.commits.add(at.elapsed().as_micros() as u64);
            self.cut_at.pop_front();
        }
    }
}
