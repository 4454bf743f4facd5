//! [`SharedBlock`]: a disk that all hosts of a VM reach, as the block device sees it.
//!
//! Requests go through to the image, once it is this host's: until then, and while it is being let go, they wait at a gate. Invariants:
//! nothing of the guest reaches the image while the gate is shut; once it is closed nothing of the machine before reaches it any more.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use steadfast_disk::DiskError;
use steadfast_disk::image::{BlockIo, ImageInfo};

/// Places that the guest wrote last, which are remembered.
const WRITTEN_MAX: usize = 64;

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
}

/// See the module.
pub struct SharedBlock {
    image: Arc<dyn BlockIo>,
    info: ImageInfo,
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
            state: Mutex::new(State {
                gate: Gate::Shut,
                under_way: 0,
                written: VecDeque::new(),
            }),
            changed: Condvar::new(),
        }
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
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), within, |s| s.under_way > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.under_way == 0
    }

    /// Where the guest wrote last.
    pub fn written(&self) -> Vec<u64> {
        self.state().written.iter().copied().collect()
    }

    fn begin(&self, state: &mut State, wrote: Option<u64>) -> Way<'_> {
        state.under_way += 1;
        if let Some(offset) = wrote {
            if state.written.len() == WRITTEN_MAX {
                state.written.pop_front();
            }
            state.written.push_back(offset);
        }
        Way(self)
    }

    fn enter(&self, wrote: Option<u64>) -> Result<Way<'_>, DiskError> {
        let mut state = self
            .changed
            .wait_while(self.state(), |s| s.gate == Gate::Shut)
            .unwrap_or_else(PoisonError::into_inner);
        match state.gate {
            Gate::Open => Ok(self.begin(&mut state, wrote)),
            Gate::Shut | Gate::Closed => Err(DiskError::Closed),
        }
    }

    /// None: not without waiting.
    fn enter_at_once(&self, wrote: Option<u64>) -> Option<Way<'_>> {
        let mut state = self.state();
        (state.gate == Gate::Open).then(|| self.begin(&mut state, wrote))
    }
}

impl BlockIo for SharedBlock {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let _way = self.enter(None)?;
        self.image.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        let _way = self.enter(Some(offset))?;
        self.image.write_at(offset, buf)
    }

    fn flush(&self) -> Result<(), DiskError> {
        let _way = self.enter(None)?;
        self.image.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let _way = self.enter(None)?;
        self.image.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let _way = self.enter(Some(offset))?;
        self.image.write_zeroes(offset, len)
    }

    fn zero_and_free(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let _way = self.enter(Some(offset))?;
        self.image.zero_and_free(offset, len)
    }

    fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> bool {
        let way = self.enter_at_once(None);
        way.is_some_and(|_way| self.image.read_at_once(offset, buf))
    }

    fn write_at_once(&self, offset: u64, buf: &[u8]) -> Option<Result<(), DiskError>> {
        let _way = self.enter_at_once(Some(offset))?;
        self.image.write_at_once(offset, buf)
    }

    fn flush_at_once(&self) -> Option<Result<(), DiskError>> {
        let _way = self.enter_at_once(None)?;
        self.image.flush_at_once()
    }

    /// None: requests must pass the gate.
    fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }

    fn release(&self) -> Result<(), DiskError> {
        self.shut();
        self.image.release()
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        self.image.reacquire()?;
        self.open();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
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
    fn it_rests_when_the_last_request_has_ended() {
        let block = block();
        block.open();
        let way = block.enter(None).unwrap();
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
