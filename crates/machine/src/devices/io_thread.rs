//! Device I/O threads: epoll loops that call devices when a file descriptor is ready.
//!
//! A device is always called with its own lock held, so whoever holds the lock of every device knows that no
//! device is at work: that is how `quiesce` stops them, without waking a thread. The loop itself holds no lock
//! while it waits, and never holds two.
//!
//! A machine that stays stopped holds its threads ([`IoThread::hold`]): then no device is called until
//! [`IoThread::release`], and what became ready meanwhile is handled after that. So nothing that a stopped guest had
//! left in a ring reaches a disk or a console which another process may have taken over.

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::thread::Pid;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// What is called when a descriptor is ready.
pub trait IoTarget: Send {
    /// Handles readiness of the descriptor that was registered with `token`.
    fn io_ready(&mut self, token: u32);
}

struct Entry {
    fd: RawFd,
    token: u32,
    target: Weak<Mutex<dyn IoTarget>>,
    generation: u32,
}

#[derive(Default)]
struct Table {
    slots: Vec<Option<Entry>>,
    generation: u32,
}

struct Inner {
    epoll: OwnedFd,
    table: Mutex<Table>,
    stop: AtomicBool,
    held: Mutex<bool>,
    changed: Condvar,
    wake: EventFd,
}

impl Inner {
    fn held(&self) -> std::sync::MutexGuard<'_, bool> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the thread is held; false if it must end.
    fn may_go_on(&self) -> bool {
        let mut held = self.held();
        while *held && !self.stop.load(Ordering::Acquire) {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        !self.stop.load(Ordering::Acquire)
    }

    fn set_held(&self, value: bool) {
        *self.held() = value;
        self.changed.notify_all();
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        // A panic while the table was held leaves it whole: every change to it is a single assignment.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running I/O thread; stops and joins on drop.
pub struct IoThread {
    inner: Arc<Inner>,
    join: Option<JoinHandle<()>>,
    id: Arc<OnceLock<Pid>>,
}

/// Identifies a registration, to take it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoKey {
    slot: usize,
    generation: u32,
}

/// Registers descriptors of one device on an I/O thread.
#[derive(Clone)]
pub struct IoRegistrar {
    inner: Arc<Inner>,
    target: Weak<Mutex<dyn IoTarget>>,
}

const WAKE: u64 = u64::MAX;
/// Registrations per thread; a machine has a few per queue.
const ENTRIES_MAX: usize = 4096;

impl IoThread {
    /// Starts a thread with this name (15 bytes are shown by the kernel). `on_start` runs first on the new
    /// thread, to set its seccomp filter and priority.
    ///
    /// # Errors
    /// What epoll, eventfd or thread creation said.
    pub fn start(name: &str, on_start: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let inner = Arc::new(Inner {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            table: Mutex::default(),
            stop: AtomicBool::new(false),
            held: Mutex::new(false),
            changed: Condvar::new(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        // SAFETY: `wake` lives in `inner`, which outlives the registration.
        let wake = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&inner.wake)) };
        epoll::add(&inner.epoll, wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let for_thread = Arc::clone(&inner);
        let id = Arc::new(OnceLock::new());
        let own = Arc::clone(&id);
        let join = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _ = own.set(rustix::thread::gettid());
            on_start();
            run(&for_thread);
        })?;
        Ok(Self {
            inner,
            join: Some(join),
            id,
        })
    }

    /// Its number, while it runs.
    pub(crate) fn id(&self) -> Option<Pid> {
        let running = self.join.as_ref().is_some_and(|j| !j.is_finished());
        self.id.get().copied().filter(|_| running)
    }

    /// Calls no device from now on, until [`IoThread::release`]. The caller holds the locks of the devices, so none
    /// is being called.
    pub fn hold(&self) {
        self.inner.set_held(true);
    }

    /// Devices are called again, first for what became ready meanwhile.
    pub fn release(&self) {
        self.inner.set_held(false);
    }

    /// A registrar for one device.
    #[must_use]
    pub fn registrar(&self, target: Weak<Mutex<dyn IoTarget>>) -> IoRegistrar {
        IoRegistrar {
            inner: Arc::clone(&self.inner),
            target,
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        {
            // Under the lock: a held thread is between its look at `stop` and its wait, or waits.
            let _held = self.inner.held();
            self.inner.stop.store(true, Ordering::Release);
            self.inner.changed.notify_all();
        }
        let _ = self.inner.wake.write(1);
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}

impl IoRegistrar {
    /// Calls the device with `token` whenever `fd` is readable (level-triggered).
    ///
    /// # Errors
    /// What epoll said; `ENOSPC` when a thread has 4096 registrations.
    pub fn add(&self, fd: RawFd, token: u32) -> io::Result<IoKey> {
        self.add_with(fd, token, EventFlags::IN)
    }

    /// As [`IoRegistrar::add`], with the readiness to wait for (e.g. `EventFlags::IN | EventFlags::ET`).
    ///
    /// # Errors
    /// What epoll said.
    pub fn add_with(&self, fd: RawFd, token: u32, flags: EventFlags) -> io::Result<IoKey> {
        let mut table = self.inner.table();
        let slot = match table.slots.iter().position(Option::is_none) {
            Some(free) => free,
            None if table.slots.len() < ENTRIES_MAX => {
                table.slots.push(None);
                table.slots.len() - 1
            }
            None => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        };
        table.generation = table.generation.wrapping_add(1);
        let generation = table.generation;
        // SAFETY: the caller keeps `fd` open until it removes the registration; epoll itself drops a closed
        // descriptor, and a stale event is recognised by its generation.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        epoll::add(
            &self.inner.epoll,
            borrowed,
            EventData::new_u64(pack(slot, generation)),
            flags,
        )?;
        table.slots[slot] = Some(Entry {
            fd,
            token,
            target: self.target.clone(),
            generation,
        });
        Ok(IoKey { slot, generation })
    }

    /// Takes a registration back; events that are already on their way are dropped.
    pub fn remove(&self, key: IoKey) {
        let mut table = self.inner.table();
        let Some(cell) = table.slots.get_mut(key.slot) else {
            return;
        };
        if cell.as_ref().is_some_and(|e| e.generation == key.generation)
            && let Some(entry) = cell.take()
        {
            // SAFETY: as in `add_with`.
            let borrowed = unsafe { BorrowedFd::borrow_raw(entry.fd) };
            let _ = epoll::delete(&self.inner.epoll, borrowed);
        }
    }
}

fn pack(slot: usize, generation: u32) -> u64 {
    (u64::from(generation) << 32) | slot as u64
}

fn run(inner: &Inner) {
    let mut events = Vec::with_capacity(64);
    while !inner.stop.load(Ordering::Acquire) {
        events.clear();
        match epoll::wait(&inner.epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => {
                tracing::error!(error = %e, "I/O thread cannot wait for events and stops");
                return;
            }
        }
        for event in &events {
            let data = event.data.u64();
            if data == WAKE {
                let _ = inner.wake.read();
                continue;
            }
            dispatch(inner, (data & 0xffff_ffff) as usize, (data >> 32) as u32);
        }
    }
}

/// Calls the device of an event, as soon as the thread is not held.
fn dispatch(inner: &Inner, slot: usize, generation: u32) {
    while inner.may_go_on() {
        // Looked up after each wait: the registration may have been taken back meanwhile.
        let found = inner.table().slots.get(slot).and_then(|e| {
            e.as_ref()
                .filter(|e| e.generation == generation)
                .map(|e| (e.target.clone(), e.token))
        });
        let Some((target, token)) = found else { return };
        let Some(target) = target.upgrade() else { return };
        // A device that panicked is not called again: its state cannot be trusted.
        let Ok(mut device) = target.lock() else {
            tracing::error!(token, "device is poisoned; event dropped");
            return;
        };
        // Held while this thread waited for the device: whoever had its lock has stopped the machine.
        if !*inner.held() {
            device.io_ready(token);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc;
    use std::time::Duration;

    struct Probe {
        fd: EventFd,
        seen: mpsc::Sender<u32>,
    }

    impl IoTarget for Probe {
        fn io_ready(&mut self, token: u32) {
            let _ = self.fd.read();
            let _ = self.seen.send(token);
        }
    }

    #[test]
    fn a_held_thread_calls_nothing_and_forgets_nothing() {
        let thread = IoThread::start("io-test", || {}).unwrap();
        let (seen, got) = mpsc::channel();
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let other = fd.try_clone().unwrap();
        let raw = fd.as_raw_fd();
        let probe = Arc::new(Mutex::new(Probe { fd, seen }));
        let target: Arc<Mutex<dyn IoTarget>> = Arc::clone(&probe) as _;
        let registrar = thread.registrar(Arc::downgrade(&target));
        registrar
            .add_with(raw, 7, EventFlags::IN | EventFlags::ET)
            .unwrap();
        for n in 0..100 {
            let device = probe.lock().unwrap();
            // The thread now waits for the device's lock, or will.
            other.write(1).unwrap();
            if n % 2 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            thread.hold();
            drop(device);
            assert!(got.recv_timeout(Duration::from_millis(1)).is_err());
            thread.release();
            assert_eq!(got.recv_timeout(Duration::from_secs(10)).unwrap(), 7);
        }
        thread.hold();
        other.write(1).unwrap();
        drop(thread);
        assert!(got.try_recv().is_err());
    }

    #[test]
    fn calls_with_token_and_stops_after_remove() {
        let thread = IoThread::start("io-test", || {}).unwrap();
        let (seen, got) = mpsc::channel();
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let other = fd.try_clone().unwrap();
        let raw = fd.as_raw_fd();
        let probe: Arc<Mutex<dyn IoTarget>> = Arc::new(Mutex::new(Probe { fd, seen }));
        let registrar = thread.registrar(Arc::downgrade(&probe));
        let key = registrar.add(raw, 42).unwrap();
        other.write(1).unwrap();
        assert_eq!(got.recv_timeout(Duration::from_secs(10)).unwrap(), 42);
        registrar.remove(key);
        other.write(1).unwrap();
        assert!(got.recv_timeout(Duration::from_millis(50)).is_err());
    }
}
