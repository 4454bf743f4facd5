//! Finding rot, and repairing it from the peer.
//!
//! A scrub walks the image at a limited rate and compares every block with its checksum. A bad block is fetched from
//! the peer as of the peer's committed epoch P and written if `image epoch <= P <= durable commit` here. Content as
//! of P is then right for an image that stands before P, because the epochs in between are still in the journal and
//! are applied over it: the last writer of each byte stays the same. Where no good copy exists the scrub refuses with
//! [`VolumeError::NoGoodCopy`] and the block stays marked: bytes that are known to be wrong are never given out.

use crate::checksum::{self, BAD, BLOCK, UNKNOWN};
use crate::journal::State;
use crate::resync::RateLimit;
use crate::volume::{Replica, Volume, VolumeError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use steadfast_types::Epoch;

use crate::volume::Shared;

/// Why a peer could not give a block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// There is no peer now.
    #[error("no peer is connected")]
    Absent,
    /// The peer's copy is bad, too.
    #[error("the peer's copy is bad, too")]
    BadThere,
    /// The two replicas did not come to stand close enough to each other in time.
    #[error("the replicas did not come to the same epoch in time")]
    Apart,
    /// The link or the peer failed.
    #[error("asking the peer failed: {0}")]
    Failed(String),
}

/// Another replica, asked for good copies.
pub trait PeerSource: Send + Sync {
    /// Fills `buf` with the bytes at `offset` as of the peer's last committed epoch, and returns that epoch. The peer
    /// checks its checksums first. Must return within a bounded time.
    ///
    /// # Errors
    /// [`PeerError`].
    fn read_committed(&self, offset: u64, buf: &mut [u8]) -> Result<Epoch, PeerError>;
}

impl PeerSource for Volume {
    fn read_committed(&self, offset: u64, buf: &mut [u8]) -> Result<Epoch, PeerError> {
        Self::read_committed(self, offset, buf).map_err(|e| match e {
            VolumeError::Damaged { .. } => PeerError::BadThere,
            other => PeerError::Failed(other.to_string()),
        })
    }
}

impl PeerSource for Replica {
    fn read_committed(&self, offset: u64, buf: &mut [u8]) -> Result<Epoch, PeerError> {
        PeerSource::read_committed(&self.common(), offset, buf)
    }
}

/// How often a repair waits for the two replicas to come to stand close enough.
const TRIES: u32 = 20;
const TRY_WAIT: Duration = Duration::from_millis(50);

/// How a repair went.
pub(crate) struct Repaired {
    /// The block was written anew; otherwise the disk does not take it.
    pub written: bool,
    /// The epoch of the content.
    pub epoch: Epoch,
    /// The block's bytes as of that epoch.
    pub bytes: Vec<u8>,
}

/// Repairs the block at byte `at` from the peer.
pub(crate) fn repair(shared: &Shared, at: u64) -> Result<Repaired, VolumeError> {
    let at = at / BLOCK * BLOCK;
    shared.watch.bad.fetch_add(1, Ordering::Relaxed);
    let no_copy = |why| VolumeError::NoGoodCopy { offset: at, why };
    let Some(peer) = shared.peer() else {
        mark_bad(shared, at)?;
        return Err(no_copy(PeerError::Absent));
    };
    let mut buf = vec![0; BLOCK.min(shared.files.capacity - at) as usize];
    for _ in 0..TRIES {
        let theirs = match peer.read_committed(at, &mut buf) {
            Ok(epoch) => epoch,
            Err(why) => {
                mark_bad(shared, at)?;
                return Err(no_copy(why));
            }
        };
        // Their epoch must be known durably here, or a crash would leave a block from the future.
        shared.core().request_sync_all();
        shared.wake();
        match shared.wait_until("the commit to be durable", TRY_WAIT, |core| {
            core.progress().durable_commit >= theirs
        }) {
            Ok(()) => {}
            Err(VolumeError::TimedOut(_)) => continue,
            Err(e) => return Err(e),
        }
        let still = shared.files.lock_image();
        let holds = shared.core().image_holds();
        if holds <= theirs {
            let written = match shared.files.write_blocks(at, &buf) {
                Ok(()) => {
                    shared.watch.repaired.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(offset = at, epoch = theirs.0, "bad block repaired from the peer");
                    true
                }
                Err(e) => {
                    tracing::error!(offset = at, error = %e, "bad block cannot be rewritten, served from the peer");
                    false
                }
            };
            return Ok(Repaired {
                written,
                epoch: theirs,
                bytes: buf,
            });
        }
        drop(still);
        // The peer is behind this image: give it time to be told of the commit.
        std::thread::sleep(TRY_WAIT / 10);
    }
    Err(no_copy(PeerError::Apart))
}

/// So that a partial overwrite does not give it a good sum.
fn mark_bad(shared: &Shared, at: u64) -> Result<(), VolumeError> {
    let _still = shared.files.lock_image();
    let block = at / BLOCK;
    let known = shared
        .files
        .sums
        .read(block, 1)?
        .first()
        .copied()
        .unwrap_or(UNKNOWN);
    let wrong = shared
        .files
        .read_block(block)
        .is_ok_and(|d| known != UNKNOWN && known != checksum::block_sum(block, &d));
    if wrong {
        shared.files.sums.write(block, &[BAD])
    } else {
        // A block that cannot be read now may be read later, and its sum is still right.
        Ok(())
    }
}

/// What a scrub found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Blocks looked at.
    pub blocks: u64,
    /// Blocks whose sum was not known and is now.
    pub learned: u64,
    /// Blocks that did not match.
    pub bad: u64,
    /// Of these, repaired.
    pub repaired: u64,
    /// Byte offsets of blocks that could not be repaired; at most [`Report::KEPT`] are listed.
    pub unrepaired: Vec<u64>,
    /// Blocks that differ from the peer though both checksums are right (only when comparing).
    pub diverged: Vec<u64>,
    /// Blocks that changed too fast to be compared.
    pub unsettled: u64,
}

impl Report {
    /// How many offsets are listed at most.
    pub const KEPT: usize = 1024;

    fn keep(list: &mut Vec<u64>, at: u64) {
        if list.len() < Self::KEPT {
            list.push(at);
        }
    }
}

/// A walk over the image.
pub struct Scrub {
    volume: Volume,
    rate: RateLimit,
    next: u64,
    compare: bool,
    report: Report,
}

/// Bytes per step.
const STEP: u64 = 1 << 20;

impl Scrub {
    /// Checks every block against its sum, at `bytes_per_s` (0: no limit).
    #[must_use]
    pub fn new(volume: &Volume, bytes_per_s: u64) -> Self {
        Self {
            volume: volume.clone(),
            rate: RateLimit::new(bytes_per_s),
            next: 0,
            compare: false,
            report: Report::default(),
        }
    }

    /// The same from byte `next` (a multiple of a MiB) on, without a limit of its own: the caller holds the pace.
    #[must_use]
    pub fn at(volume: &Volume, next: u64) -> Self {
        Self {
            next,
            ..Self::new(volume, 0)
        }
    }

    /// After a copy: also compares every block with the peer, from where an earlier walk got to. When it ends well the
    /// replica counts as verified.
    #[must_use]
    pub fn verify(replica: &Replica, bytes_per_s: u64) -> Self {
        let from = match replica.progress().state {
            State::Verifying { from } => from,
            _ => 0,
        };
        Self {
            next: from,
            compare: true,
            ..Self::new(&replica.common(), bytes_per_s)
        }
    }

    /// What was found so far.
    #[must_use]
    pub const fn report(&self) -> &Report {
        &self.report
    }

    /// Bytes done and bytes in all.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.next, self.volume.capacity())
    }

    /// Does the next MiB. Returns how many microseconds to wait before the next step, `None` when done.
    ///
    /// # Errors
    /// [`VolumeError::Io`] when the checksums cannot be read or written. Bad blocks are no error of the scrub.
    pub fn step(&mut self, now_us: u64) -> Result<Option<u64>, VolumeError> {
        let capacity = self.volume.capacity();
        if self.next >= capacity {
            return Ok(None);
        }
        let shared = self.volume.handle.shared.clone();
        let len = STEP.min(capacity - self.next);
        let (first, count) = (self.next / BLOCK, len.div_ceil(BLOCK));
        let bad = {
            let _still = shared.files.lock_image();
            let sums = shared.files.sums.read(first, count as usize)?;
            let mut bad = Vec::new();
            for (block, sum) in (first..).zip(sums) {
                match shared.files.read_block(block) {
                    Ok(data) if sum == UNKNOWN => {
                        shared
                            .files
                            .sums
                            .write(block, &[checksum::block_sum(block, &data)])?;
                        self.report.learned += 1;
                    }
                    Ok(data) if sum == checksum::block_sum(block, &data) => {}
                    _ => bad.push(block * BLOCK),
                }
            }
            bad
        };
        self.report.blocks += count;
        for at in bad {
            self.report.bad += 1;
            match repair(&shared, at) {
                Ok(good) if good.written => self.report.repaired += 1,
                Ok(_) => Report::keep(&mut self.report.unrepaired, at),
                Err(e) => {
                    tracing::error!(offset = at, error = %e, "bad block not repaired");
                    Report::keep(&mut self.report.unrepaired, at);
                }
            }
        }
        if self.compare {
            for block in first..first + count {
                self.compare_block(&shared, block * BLOCK);
            }
        }
        self.next += len;
        if self.compare && self.report.diverged.is_empty() && self.report.unrepaired.is_empty() {
            let done = self.next >= capacity;
            let state = if done {
                State::Consistent
            } else {
                State::Verifying { from: self.next }
            };
            if matches!(shared.core().progress().state, State::Verifying { .. }) {
                shared.core().set_state(state);
                shared.wake();
            }
        }
        Ok(Some(self.rate.spend(now_us, len)))
    }

    fn compare_block(&mut self, shared: &Shared, at: u64) {
        let Some(peer) = shared.peer() else {
            self.report.unsettled += 1;
            return;
        };
        let len = BLOCK.min(shared.files.capacity - at) as usize;
        let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
        for _ in 0..TRIES {
            let epochs = (
                self.volume.read_committed(at, &mut ours),
                peer.read_committed(at, &mut theirs),
            );
            match epochs {
                (Ok(_), Ok(_)) if ours == theirs => return,
                (Ok(a), Ok(b)) if a == b => {
                    Report::keep(&mut self.report.diverged, at);
                    return;
                }
                (Ok(_), Ok(_)) => std::thread::sleep(Duration::from_millis(1)),
                _ => break,
            }
        }
        self.report.unsettled += 1;
    }
}

/// A peer behind an `Arc`, for [`Volume::set_peer`].
#[must_use]
pub fn peer(source: impl PeerSource + 'static) -> Option<Arc<dyn PeerSource>> {
    Some(Arc::new(source))
}
