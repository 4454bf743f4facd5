//! [`SharedBlock`]: a disk that all hosts of a VM reach, as the block device sees it.
//!
//! Requests go through to the image, once it is this host's: until then, and while it is being let go, they wait at a gate. Invariants:
//! nothing of the guest reaches the image while the gate is shut; once it is closed nothing of the machine before reaches it any more; a flush
//! that failed while nobody asked for one is told to the next who asks (I5).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use steadfast_disk::DiskError;
use steadfast_disk::image::{BlockIo, ImageInfo};

/// Places that the guest wrote last, which are remembered.
const WRITTEN_MAX: usize = 64;
/// A machine before that has not come to rest is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Shut,
    Open,
    Closed,
}

struct State {
    gate: Gate,
    /// Requests of the guest at the image.
    under_way: usize,
    /// Where the guest wrote last.
    written: VecDeque<u64>,
    /// What was written may be lost, and the guest has not been told.
    unsaid: bool,
}

/// See the module.
pub struct SharedBlock {
    image: Arc<dyn BlockIo>,
    info: ImageInfo,
    /// Of the machine before this one: what is at the image still comes first.
    before: Option<Arc<SharedBlock>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// A request of the guest at the image.
struct Way<'a>(&'a SharedBlock);

impl Drop for Way<'_> {
    fn drop(&mut self) {
        self.0.state().under_way -= 1;
        self.0.changed.notify_all();
    }
}

impl SharedBlock {
    /// Shut.
    pub fn new(image: Arc<dyn BlockIo>) -> Self {
        Self {
            info: image.info().clone(),
            image,
            before: None,
            state: Mutex::new(State {
                gate: Gate::Shut,
                under_way: 0,
                written: VecDeque::new(),
                unsaid: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// The block of the machine that follows one which did not come to rest: none of its requests passes before those of that one have ended.
    pub fn after(before: &Arc<Self>) -> Self {
        let next = Self {
            before: Some(Arc::clone(before)).filter(|b| !b.is_idle()),
            ..Self::new(Arc::clone(&before.image))
        };
        let (mut state, old) = (next.state(), before.state());
        (state.written, state.unsaid) = (old.written.clone(), old.unsaid);
        drop((state, old));
        next
    }

    /// A flush failed that the guest did not ask for. A file says so once only: its next flush is to fail.
    pub fn flush_failed(&self) {
        self.state().unsaid = true;
    }

    /// Nothing of this machine, nor of one before it, is at the image.
    fn is_idle(&self) -> bool {
        self.state().under_way == 0 && self.is_next()
    }

    /// Nothing of a machine before this one is.
    fn is_next(&self) -> bool {
        self.before.as_ref().is_none_or(|b| b.is_idle())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image is this host's: the guest's requests go there.
    pub fn open(&self) {
        self.turn(Gate::Open);
    }

    /// The guest's requests wait from now on; those that are at the image already go on.
    pub fn shut(&self) {
        self.turn(Gate::Shut);
    }

    /// What waits gives up, and nothing reaches the image any more but what is there already ([`SharedBlock::rest`]).
    pub fn close(&self) {
        self.turn(Gate::Closed);
    }

    fn turn(&self, gate: Gate) {
        let mut state = self.state();
        if state.gate != Gate::Closed {
            state.gate = gate;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until none of the guest's requests is at the image, while the gate is not open; whether that is so.
    #[must_use]
    pub fn rest(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        while !self.is_idle() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // Those of a machine before are another block's.
            let waited = self.changed.wait_timeout(self.state(), left.min(LOOK_AGAIN));
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        true
    }

    /// Where the guest wrote last.
    pub fn written(&self) -> Vec<u64> {
        self.state().written.iter().copied().collect()
    }

    fn wrote(&self, offset: u64) {
        let written = &mut self.state().written;
        if written.len() == WRITTEN_MAX {
            written.pop_front();
        }
        written.push_back(offset);
    }

    fn begin(&self, state: &mut State) -> Way<'_> {
        state.under_way += 1;
        Way(self)
    }

    fn enter(&self) -> Result<Way<'_>, DiskError> {
        loop {
            let mut state = self
                .changed
                .wait_while(self.state(), |s| s.gate == Gate::Shut)
                .unwrap_or_else(PoisonError::into_inner);
            if state.gate != Gate::Open {
                return Err(DiskError::Closed);
            }
            if self.is_next() {
                return Ok(self.begin(&mut state));
            }
            let waited = self.changed.wait_timeout(state, LOOK_AGAIN);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// None: not without waiting.
    fn enter_at_once(&self) -> Option<Way<'_>> {
        let mut state = self.state();
        (state.gate == Gate::Open && self.is_next()).then(|| self.begin(&mut state))
    }

    /// Whether the guest is to be told that what it wrote may be lost.
    fn is_unsaid(&self) -> Result<(), DiskError> {
        match std::mem::take(&mut self.state().unsaid) {
            true => Err(DiskError::Invalid("an earlier flush has failed".into())),
            false => Ok(()),
        }
    }
}

impl BlockIo for SharedBlock {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let _way = self.enter()?;
        self.image.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        let _way = self.enter()?;
        self.wrote(offset);
        self.image.write_at(offset, buf)
    }

    fn flush(&self) -> Result<(), DiskError> {
        let _way = self.enter()?;
        self.is_unsaid()?;
        self.image.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let _way = self.enter()?;
        self.image.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let _way = self.enter()?;
        self.wrote(offset);
        self.image.write_zeroes(offset, len)
    }

    fn zero_and_free(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let _way = self.enter()?;
        self.wrote(offset);
        self.image.zero_and_free(offset, len)
    }

    fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> bool {
        let way = self.enter_at_once();
        way.is_some_and(|_way| self.image.read_at_once(offset, buf))
    }

    fn write_at_once(&self, offset: u64, buf: &[u8]) -> Option<Result<(), DiskError>> {
        let _way = self.enter_at_once()?;
        self.image
            .write_at_once(offset, buf)
            .inspect(|_| self.wrote(offset))
    }

    fn flush_at_once(&self) -> Option<Result<(), DiskError>> {
        let _way = self.enter_at_once()?;
        let done = self.image.flush_at_once()?;
        Some(self.is_unsaid().and(done))
    }

    /// None: requests must pass the gate.
    fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }

    fn release(&self) -> Result<(), DiskError> {
        Err(DiskError::Invalid(
            "a shared disk changes hands with its VM, not with its process's images".into(),
        ))
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use steadfast_disk::image::MemImage;

    fn block() -> Arc<SharedBlock> {
        Arc::new(SharedBlock::new(Arc::new(MemImage::new(vec![0; 8192], false))))
    }

    /// A write on a thread; whether it has ended, and how.
    fn write(block: &Arc<SharedBlock>) -> std::thread::JoinHandle<Result<(), DiskError>> {
        let block = Arc::clone(block);
        std::thread::spawn(move || block.write_at(512, &[7; 512]))
    }

    fn read(block: &SharedBlock) -> u8 {
        let mut b = [0; 1];
        block.image.read_at(512, &mut b).unwrap();
        b[0]
    }

    #[test]
    fn requests_wait_until_the_image_is_ours() {
        let block = block();
        assert!(block.write_at_once(0, &[1; 512]).is_none());
        let writes = write(&block);
        assert_eq!(read(&block), 0);
        assert!(!writes.is_finished());
        block.open();
        writes.join().unwrap().unwrap();
        assert_eq!((read(&block), block.written()), (7, vec![512]));
    }

    #[test]
    fn what_waits_when_the_machine_is_left_never_arrives() {
        let block = block();
        let writes = write(&block);
        block.close();
        assert!(matches!(writes.join().unwrap(), Err(DiskError::Closed)));
        block.open();
        assert!(matches!(block.write_at(512, &[7; 512]), Err(DiskError::Closed)));
        assert_eq!(read(&block), 0);
    }

    #[test]
    fn the_next_machine_waits_for_what_the_one_before_has_at_the_image() {
        let old = block();
        old.open();
        let way = old.enter().unwrap();
        let late = write(&old);
        late.join().unwrap().unwrap();
        old.close();
        let new = Arc::new(SharedBlock::after(&old));
        new.open();
        assert!(new.enter_at_once().is_none());
        let writes = write(&new);
        std::thread::sleep(5 * LOOK_AGAIN);
        assert!(!writes.is_finished());
        // It does not rest either, nor does one after it.
        let newer = Arc::new(SharedBlock::after(&new));
        assert!(!new.rest(LOOK_AGAIN) && !newer.rest(LOOK_AGAIN));
        newer.open();
        assert!(newer.enter_at_once().is_none());
        drop(way);
        writes.join().unwrap().unwrap();
        assert!(new.rest(Duration::from_secs(20)) && newer.rest(Duration::from_secs(20)));
        assert!(newer.enter_at_once().is_some());
    }

    #[test]
    fn a_flush_that_failed_is_told_to_the_next_who_asks_and_once() {
        let block = block();
        block.open();
        block.flush_failed();
        assert!(block.flush().is_err());
        block.flush().unwrap();
    }

    #[test]
    fn it_rests_when_the_last_request_has_ended() {
        let block = block();
        block.open();
        let way = block.enter().unwrap();
        block.shut();
        assert!(!block.rest(Duration::from_millis(1)));
        let rests = {
            let block = Arc::clone(&block);
            std::thread::spawn(move || block.rest(Duration::from_secs(20)))
        };
        let began = Instant::now();
        drop(way);
        assert!(rests.join().unwrap());
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
