//! Output commit (I1): frames that a guest sends wait here until the epoch that produced them has committed.
//!
//! ```text
//! device --send--> [ released | epoch 7 | epoch 8 | open epoch ) --release(7)--> TAP
//!                             ^ boundary 7  ^ boundary 8
//! ```
//! A frame belongs to the epoch that was open when the device sent it. A cut, made while the machine stands still,
//! marks the boundary. Frames leave in order, and never past the boundary of a committed epoch: asserted, always.
//! The queue is bounded: when it is full the device is told to wait, which holds the guest back in its own queue.

use crate::{NetBackend, Offloads, Sent};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What becomes of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldMode {
    /// They leave at once: the VM is not protected, or its class does not hold.
    Pass,
    /// They wait for their epoch.
    Hold,
    /// They are dropped: this instance has no right to speak.
    Mute,
}

struct Queue {
    backend: Box<dyn NetBackend>,
    mode: HoldMode,
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    bytes_max: usize,
    /// Frames taken from the device since the start.
    emitted: u64,
    /// Frames that left, or were dropped, since the start.
    gone: u64,
    /// `(epoch, emitted at its cut)`, rising.
    boundaries: VecDeque<(u64, u64)>,
    spare: Vec<Vec<u8>>,
    offloads: Offloads,
}

/// Buffers kept for reuse.
const SPARE_MAX: usize = 256;
/// Most incoming frames dropped when an instance begins to speak: more than a TAP's queue (1000) or a socket's holds.
const STALE_MAX: usize = 4096;

/// The queue of one NIC, as the epoch engine sees it.
pub struct Hold {
    queue: Mutex<Queue>,
    fd: RawFd,
    can_offload: bool,
    /// Set when a frame came in and taken by the engine, so that a burst wakes it once.
    pending: AtomicBool,
    on_output: Box<dyn Fn() + Send + Sync>,
}

impl Hold {
    /// Wraps a backend. `on_output` is called, on the device's thread, when the first frame waits since
    /// [`Hold::take_pending`]; it must not block.
    pub fn new(
        backend: Box<dyn NetBackend>,
        mode: HoldMode,
        bytes_max: usize,
        on_output: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self {
            fd: backend.fd(),
            can_offload: backend.can_offload(),
            queue: Mutex::new(Queue {
                backend,
                mode,
                frames: VecDeque::new(),
                bytes: 0,
                bytes_max,
                emitted: 0,
                gone: 0,
                boundaries: VecDeque::new(),
                spare: Vec::new(),
                offloads: Offloads::default(),
            }),
            pending: AtomicBool::new(false),
            on_output,
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Every change is whole before anything can panic.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine has heard of output.
    pub fn take_pending(&self) -> bool {
        self.pending.swap(false, Ordering::AcqRel)
    }

    /// Changes what becomes of frames. From `Hold` to `Pass` all that waits leaves; to `Mute` it is dropped.
    ///
    /// From `Mute` on, what has come in until now is dropped too: it was for the instance that spoke then. The guest
    /// that goes on here has seen it, or its sender sends it again; hearing it now would be hearing it late, and twice.
    pub fn set_mode(&self, mode: HoldMode) {
        let mut q = self.queue();
        if q.mode == HoldMode::Mute && mode != HoldMode::Mute {
            q.drop_incoming();
        }
        q.mode = mode;
        match mode {
            HoldMode::Hold => {}
            HoldMode::Pass => {
                let all = q.emitted;
                q.let_go(all, true);
                q.boundaries.clear();
            }
            HoldMode::Mute => {
                let all = q.emitted;
                q.let_go(all, false);
                q.boundaries.clear();
            }
        }
    }

    /// Marks the boundary of an epoch; the machine stands still.
    pub fn cut(&self, epoch: u64) {
        let mut q = self.queue();
        let emitted = q.emitted;
        if let Some(&(last, _)) = q.boundaries.back() {
            assert!(last < epoch, "I6: epoch {epoch} is cut after {last}");
        }
        q.boundaries.push_back((epoch, emitted));
    }

    /// Frames that the guest sent up to now, since this NIC was made.
    #[must_use]
    pub fn emitted(&self) -> u64 {
        self.queue().emitted
    }

    /// Lets the frames of all epochs up to `through` out, in order; returns how many left.
    pub fn release(&self, through: u64) -> u64 {
        let mut q = self.queue();
        let mut until = q.gone;
        while let Some(&(epoch, boundary)) = q.boundaries.front().filter(|(e, _)| *e <= through) {
            assert!(
                epoch <= through,
                "I1: a frame of epoch {epoch} would leave at the release of {through}"
            );
            until = until.max(boundary);
            q.boundaries.pop_front();
        }
        q.let_go(until, true)
    }

    /// Sends one frame of the monitor's own at once (announce after a failover).
    pub fn inject(&self, frame: &[u8]) -> Sent {
        self.queue().backend.send(frame)
    }

    /// Bytes that wait.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.queue().bytes
    }
}

impl Queue {
    fn drop_incoming(&mut self) {
        let mut frame = vec![0; 1 << 16];
        for _ in 0..STALE_MAX {
            // A frame that cannot be used is gone as well.
            if let Ok(None) = self.backend.receive(&mut frame) {
                return;
            }
        }
    }

    fn let_go(&mut self, until: u64, send: bool) -> u64 {
        let mut left = 0;
        while self.gone < until {
            let Some(mut frame) = self.frames.pop_front() else {
                break;
            };
            self.gone += 1;
            self.bytes -= frame.len();
            if send {
                // A full TAP loses the frame, as a full switch would.
                let _ = self.backend.send(&frame);
                left += 1;
            }
            if self.spare.len() < SPARE_MAX {
                frame.clear();
                self.spare.push(frame);
            }
        }
        left
    }
}

/// The device's side of a [`Hold`].
pub struct HoldBackend(pub Arc<Hold>);

impl NetBackend for HoldBackend {
    fn fd(&self) -> RawFd {
        self.0.fd
    }

    fn can_offload(&self) -> bool {
        self.0.can_offload
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut q = self.0.queue();
        q.offloads = offloads;
        q.backend.set_offloads(offloads)
    }

    fn send(&mut self, frame: &[u8]) -> Sent {
        let mut q = self.0.queue();
        match q.mode {
            HoldMode::Pass => return q.backend.send(frame),
            HoldMode::Mute => return Sent::Dropped,
            HoldMode::Hold => {}
        }
        if q.bytes + frame.len() > q.bytes_max {
            return Sent::WouldBlock;
        }
        let mut copy = q.spare.pop().unwrap_or_default();
        copy.extend_from_slice(frame);
        q.bytes += copy.len();
        q.frames.push_back(copy);
        q.emitted += 1;
        drop(q);
        if !self.0.pending.swap(true, Ordering::AcqRel) {
            (self.0.on_output)();
        }
        Sent::Done
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.0.queue().backend.receive(buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    struct Wire(Sender<Vec<u8>>);
    impl NetBackend for Wire {
        fn fd(&self) -> RawFd {
            0
        }
        fn can_offload(&self) -> bool {
            false
        }
        fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
            Ok(())
        }
        fn send(&mut self, frame: &[u8]) -> Sent {
            self.0.send(frame.to_vec()).unwrap();
            Sent::Done
        }
        fn receive(&mut self, _: &mut [u8]) -> io::Result<Option<usize>> {
            Ok(None)
        }
    }

    #[test]
    fn a_frame_leaves_with_its_epoch_and_in_order() {
        let (out, seen) = channel();
        let hold = Hold::new(Box::new(Wire(out)), HoldMode::Hold, 100, Box::new(|| {}));
        let mut nic = HoldBackend(Arc::clone(&hold));
        assert_eq!(nic.send(b"a"), Sent::Done);
        assert!(hold.take_pending() && !hold.take_pending());
        hold.cut(7);
        nic.send(b"b");
        nic.send(b"c");
        hold.cut(8);
        nic.send(b"d");
        assert_eq!(hold.release(6), 0);
        assert_eq!(hold.release(7), 1);
        assert_eq!(hold.release(9), 2);
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [b"a", b"b", b"c"]);
        assert_eq!(nic.send(&[0; 100]), Sent::WouldBlock, "the queue is bounded");
        hold.set_mode(HoldMode::Mute);
        assert_eq!((hold.held_bytes(), seen.try_iter().count()), (0, 0));
        assert_eq!(nic.send(b"e"), Sent::Dropped);
        hold.set_mode(HoldMode::Pass);
        nic.send(b"f");
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [b"f"]);
    }
}
