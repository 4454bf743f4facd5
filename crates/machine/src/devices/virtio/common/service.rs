//! Serving a queue: take chains, give them back, interrupt; and the descriptors that call a device again.
//!
//! The loop every device follows, so that no notification is lost with or without `VIRTIO_F_RING_EVENT_IDX`:
//!
//! ```text
//! disable ─> next_chain ... used ─> enable ── true (more came meanwhile) ─> again
//!                                     └─ false ─> signal
//! ```

use super::chain::{Chain, chain_at};
use super::driver_error;
use crate::devices::io_thread::{IoKey, IoRegistrar};
use crate::devices::virtio::{DeviceError, Interrupt};
use crate::memory::GuestMemory;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// Takes the next available chain.
///
/// # Errors
/// [`DeviceError::Driver`]: the available index jumped by more than the queue, or the chain is not valid.
pub fn next_chain(
    device: &str,
    memory: &GuestMemory,
    queue: &mut Queue,
) -> Result<Option<Chain>, DeviceError> {
    if !queue.ready() || queue.size() == 0 {
        return Ok(None);
    }
    let index = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(|e| driver_error(device, format_args!("available ring: {e}")))?
        .0;
    let next = queue.next_avail();
    let waiting = index.wrapping_sub(next);
    if waiting == 0 {
        return Ok(None);
    }
    if waiting > queue.size() {
        return Err(driver_error(
            device,
            format_args!(
                "available index jumped from {next} to {index} in a queue of {}",
                queue.size()
            ),
        ));
    }
    let offset = 4 + 2 * u64::from(next % queue.size());
    let head = queue
        .avail_ring()
        .checked_add(offset)
        .and_then(|at| memory.load::<u16>(GuestAddress(at), Ordering::Acquire).ok())
        .map(u16::from_le)
        .ok_or_else(|| driver_error(device, "available ring is not RAM"))?;
    let chain = chain_at(device, memory, queue, head)?;
    queue.set_next_avail(next.wrapping_add(1));
    Ok(Some(chain))
}

/// Gives a chain back with `len` bytes written.
///
/// # Errors
/// [`DeviceError::Driver`]: the used ring is not RAM.
pub fn used(
    device: &str,
    memory: &GuestMemory,
    queue: &mut Queue,
    head: u16,
    len: u32,
) -> Result<(), DeviceError> {
    queue
        .add_used(memory, head, len)
        .map_err(|e| driver_error(device, format_args!("used ring: {e}")))
}

/// Interrupts for `queue` unless the driver asked not to be.
///
/// # Errors
/// [`DeviceError::Driver`]: the rings are not RAM.
pub fn signal(
    device: &str,
    memory: &GuestMemory,
    queue: &mut Queue,
    index: usize,
    interrupt: &Arc<dyn Interrupt>,
) -> Result<(), DeviceError> {
    let wanted = queue
        .needs_notification(memory)
        .map_err(|e| driver_error(device, format_args!("rings: {e}")))?;
    let suppressed = !queue.event_idx_enabled()
        && memory
            .load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
            .is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT != 0);
    if wanted && !suppressed {
        interrupt.queue(index);
    }
    Ok(())
}

/// Asks the driver not to notify while the device is at work.
///
/// # Errors
/// [`DeviceError::Driver`]: the used ring is not RAM.
pub fn disable(device: &str, memory: &GuestMemory, queue: &mut Queue) -> Result<(), DeviceError> {
    queue
        .disable_notification(memory)
        .map_err(|e| driver_error(device, format_args!("used ring: {e}")))
}

/// Asks for notifications again. `true`: chains came meanwhile, go on.
///
/// # Errors
/// [`DeviceError::Driver`]: the rings are not RAM.
pub fn enable(device: &str, memory: &GuestMemory, queue: &mut Queue) -> Result<bool, DeviceError> {
    queue
        .enable_notification(memory)
        .map_err(|e| driver_error(device, format_args!("rings: {e}")))
}

/// A registration that is taken back on drop. Must be dropped before its descriptor is closed.
pub struct Registration {
    io: IoRegistrar,
    key: IoKey,
}

impl Registration {
    /// Registers `fd` for reading.
    ///
    /// # Errors
    /// What epoll said.
    pub fn new(io: &IoRegistrar, fd: RawFd, token: u32) -> io::Result<Self> {
        Ok(Self {
            io: io.clone(),
            key: io.add(fd, token)?,
        })
    }

    /// Registers `fd` with chosen readiness.
    ///
    /// # Errors
    /// What epoll said.
    pub fn with(
        io: &IoRegistrar,
        fd: RawFd,
        token: u32,
        flags: rustix::event::epoll::EventFlags,
    ) -> io::Result<Self> {
        Ok(Self {
            io: io.clone(),
            key: io.add_with(fd, token, flags)?,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.io.remove(self.key);
    }
}

/// An eventfd with which a device (or a handle outside) has the device called again.
pub struct Kick {
    registration: Option<Registration>,
    fd: EventFd,
}

impl Kick {
    /// A new one, not registered.
    ///
    /// # Errors
    /// What eventfd said.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            registration: None,
            fd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Starts calling the device with `token`.
    ///
    /// # Errors
    /// What epoll said.
    pub fn register(&mut self, io: &IoRegistrar, token: u32) -> io::Result<()> {
        self.registration = None;
        self.registration = Some(Registration::new(io, self.fd.as_raw_fd(), token)?);
        Ok(())
    }

    /// Stops calling the device.
    pub fn unregister(&mut self) {
        self.registration = None;
        self.clear();
    }

    /// Has the device called. An eventfd that is already full is already ready.
    pub fn arm(&self) {
        let _ = self.fd.write(1);
    }

    /// Takes the call back; the first thing to do when called.
    pub fn clear(&self) {
        let _ = self.fd.read();
    }

    /// A second handle on the same eventfd, for other threads.
    ///
    /// # Errors
    /// What dup said.
    pub fn handle(&self) -> io::Result<EventFd> {
        self.fd.try_clone()
    }
}

/// A timer that calls a device once after a delay.
pub struct Timer {
    registration: Option<Registration>,
    fd: OwnedFd,
}

impl Timer {
    /// A timer, not armed, not registered.
    ///
    /// # Errors
    /// What timerfd said.
    pub fn new() -> io::Result<Self> {
        let fd = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        Ok(Self {
            registration: None,
            fd,
        })
    }

    /// Starts calling the device with `token`.
    ///
    /// # Errors
    /// What epoll said.
    pub fn register(&mut self, io: &IoRegistrar, token: u32) -> io::Result<()> {
        self.registration = None;
        self.registration = Some(Registration::new(io, self.fd.as_raw_fd(), token)?);
        Ok(())
    }

    /// Stops calling the device.
    pub fn unregister(&mut self) {
        self.registration = None;
        self.clear();
    }

    /// Fires after `delay`, at least a microsecond.
    ///
    /// # Errors
    /// What timerfd said.
    pub fn arm(&self, delay: Duration) -> io::Result<()> {
        let delay = delay.max(Duration::from_micros(1));
        let value = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: delay.subsec_nanos().into(),
            },
        };
        rustix::time::timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &value)?;
        Ok(())
    }

    /// Takes the call back.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
    }
}

/// Gives several chains back in one step: the driver sees all of them or none. For a queue on which [`used`] and
/// [`signal`] are never called.
///
/// # Errors
/// [`DeviceError::Driver`]: the used ring is not RAM, or there are more chains than places.
pub fn used_together(
    device: &str,
    memory: &GuestMemory,
    queue: &mut Queue,
    chains: &[(u16, u32)],
) -> Result<(), DeviceError> {
    let fail = || driver_error(device, "used ring is not RAM");
    let size = queue.size();
    if size == 0 || chains.len() > usize::from(size) {
        return Err(driver_error(device, "more buffers than the queue has places"));
    }
    let mut next = queue.next_used();
    for (head, len) in chains {
        let at = queue
            .used_ring()
            .checked_add(4 + 8 * u64::from(next % size))
            .ok_or_else(fail)?;
        let element = (u64::from(*len) << 32) | u64::from(*head);
        memory
            .write_slice(&element.to_le_bytes(), GuestAddress(at))
            .map_err(|e| driver_error(device, e))?;
        next = next.wrapping_add(1);
    }
    let index = queue.used_ring().checked_add(2).ok_or_else(fail)?;
    memory
        .store(next.to_le(), GuestAddress(index), Ordering::Release)
        .map_err(|e| driver_error(device, e))?;
    queue.set_next_used(next);
    Ok(())
}

/// Interrupts for `queue` unless the driver asked not to be; `since` is the used index at the last time this was
/// asked. For queues served with [`used_together`].
///
/// # Errors
/// [`DeviceError::Driver`]: the rings are not RAM.
pub fn signal_since(
    device: &str,
    memory: &GuestMemory,
    queue: &Queue,
    since: u16,
    index: usize,
    interrupt: &Arc<dyn Interrupt>,
) -> Result<(), DeviceError> {
    let new = queue.next_used();
    if new == since {
        return Ok(());
    }
    // What is written to the used ring must be visible before the driver's wish is read (virtio 1.2, 2.7.7).
    std::sync::atomic::fence(Ordering::SeqCst);
    let read = |offset: u64| {
        queue
            .avail_ring()
            .checked_add(offset)
            .and_then(|at| memory.load::<u16>(GuestAddress(at), Ordering::Relaxed).ok())
            .map(u16::from_le)
            .ok_or_else(|| driver_error(device, "available ring is not RAM"))
    };
    let wanted = if queue.event_idx_enabled() {
        let event = read(4 + 2 * u64::from(queue.size()))?;
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(since)
    } else {
        read(0)? & NO_INTERRUPT == 0
    };
    if wanted {
        interrupt.queue(index);
    }
    Ok(())
}
