//! [`Volume`]: the core on two threads, and the primary's calls.
//!
//! Locks, in the order in which they may be taken: `trims`, image lock, core. No I/O happens under the core's lock
//! except where a copy begins or ends.

use super::apply::Files;
use super::core::Core;
use super::health::{Health, Part, Watch};
use super::op::{EpochOp, Sealed};
use super::read::ReadFault;
use super::{Mode, Options, Progress, Recovered, Replica, VolumeError};
use crate::checksum::BLOCK;
use crate::journal::Position;
use crate::scrub::{self, PeerSource};
use crate::storage::{Storage, StorageFile};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use steadfast_types::{Epoch, Term};

/// Called from a thread of the volume, without a lock, whenever a cursor moved. It must not block for long.
pub type Notify = Arc<dyn Fn(Progress) + Send + Sync>;

/// What both threads and all callers share.
pub(crate) struct Shared {
    core: Mutex<Core>,
    pub(crate) files: Arc<Files>,
    pub(crate) options: Options,
    /// Held for reading while a read plan runs, for writing while the journal is trimmed.
    trims: RwLock<()>,
    /// Work for the journal thread, for the apply thread.
    journal_work: Condvar,
    apply_work: Condvar,
    /// A cursor moved.
    changed: Condvar,
    stop: AtomicBool,
    mode: AtomicU8,
    pub(crate) watch: Watch,
    notify: Option<Notify>,
    event: OwnedFd,
    peer: Mutex<Option<Arc<dyn PeerSource>>>,
}

impl Shared {
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wake_journal(&self) {
        self.journal_work.notify_one();
    }

    pub(crate) fn wake(&self) {
        self.journal_work.notify_one();
        self.apply_work.notify_one();
        self.changed.notify_all();
    }

    pub(crate) fn hold_trims(&self) -> std::sync::RwLockReadGuard<'_, ()> {
        self.trims.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peer(&self) -> Option<Arc<dyn PeerSource>> {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wait<'a>(&self, on: &Condvar, core: MutexGuard<'a, Core>, how_long: Duration) -> MutexGuard<'a, Core> {
        on.wait_timeout(core, how_long)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Repeats `f` while it answers with back-pressure, for at most `wait_ms`.
    pub(crate) fn with_room<T>(
        &self,
        mut f: impl FnMut(&mut Core) -> Result<T, VolumeError>,
    ) -> Result<T, VolumeError> {
        let mut until = None;
        let mut core = self.core();
        loop {
            match f(&mut core) {
                Err(e) if e.is_back_pressure() => {
                    if self.stop.load(Ordering::Acquire) {
                        return Err(VolumeError::Closed);
                    }
                    let now = Instant::now();
                    let until = *until.get_or_insert(now + Duration::from_millis(self.options.wait_ms));
                    if now >= until {
                        return Err(e);
                    }
                    self.wake();
                    core = self.wait(&self.changed, core, (until - now).min(Duration::from_millis(100)));
                }
                other => {
                    self.wake_journal();
                    return other;
                }
            }
        }
    }

    /// Waits until `done`, for at most `timeout`.
    pub(crate) fn wait_until(
        &self,
        what: &'static str,
        timeout: Duration,
        mut done: impl FnMut(&Core) -> bool,
    ) -> Result<(), VolumeError> {
        let until = Instant::now() + timeout;
        let mut core = self.core();
        while !done(&core) {
            let now = Instant::now();
            if let Some(fault) = self.fault() {
                return Err(VolumeError::Faulted(fault));
            }
            if now >= until {
                return Err(VolumeError::TimedOut(what));
            }
            core = self.wait(&self.changed, core, (until - now).min(Duration::from_millis(200)));
        }
        Ok(())
    }

    fn fault(&self) -> Option<String> {
        self.watch.fault()
    }

    fn tell(&self, core: MutexGuard<'_, Core>) {
        let progress = core.progress();
        drop(core);
        self.wake();
        // The counter cannot overflow into blocking: it is opened non-blocking, and full means "signalled" too.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        if let Some(notify) = &self.notify {
            notify(progress);
        }
    }

    fn pause(&self, how_long: Option<Duration>) {
        if let Some(d) = how_long {
            let until = Instant::now() + d;
            let mut core = self.core();
            while !self.stop.load(Ordering::Acquire) && Instant::now() < until {
                core = self.wait(
                    &self.changed,
                    core,
                    until.saturating_duration_since(Instant::now()),
                );
            }
        }
    }

    fn journal_thread(&self) {
        loop {
            let mut core = self.core();
            let batch = loop {
                if let Some(batch) = core.take_journal() {
                    break batch;
                }
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                core = self.wait(&self.journal_work, core, Duration::from_secs(5));
            };
            drop(core);
            self.watch.begin(Part::Journal);
            let result = self.files.run(&batch);
            let delay = self.watch.end(Part::Journal, &result);
            let mut core = self.core();
            core.complete_journal(&batch, result.is_ok());
            if result.is_ok() && !batch.syncs() {
                continue;
            }
            self.tell(core);
            if delay.is_some() && self.stop.load(Ordering::Acquire) {
                return;
            }
            self.pause(delay);
        }
    }

    fn apply_thread(&self) {
        let delay = Duration::from_millis(self.options.apply_delay_ms);
        let checkpoint_after = Duration::from_millis(self.options.checkpoint_ms);
        // Since when something waits to be applied, to be checkpointed.
        let (mut waiting, mut applied): (Option<Instant>, Option<Instant>) = (None, None);
        loop {
            let mut core = self.core();
            // Looked at under the lock, under which it is set: so the wake-up cannot fall between look and wait.
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let now = Instant::now();
            let pressed = core.pressed();
            if core.wants_apply() {
                let since = *waiting.get_or_insert(now);
                if pressed || now >= since + delay {
                    if let Some(job) = core.take_apply() {
                        drop(core);
                        self.watch.begin(Part::Image);
                        let result = job.run(&self.files);
                        let again = self.watch.end(Part::Image, &result);
                        let mut core = self.core();
                        core.complete_apply(&job, result.is_ok());
                        if !core.wants_apply() {
                            waiting = None;
                        }
                        self.tell(core);
                        self.pause(again);
                        continue;
                    }
                    if core.wants_durable_commit() {
                        core.request_sync_all();
                        self.wake();
                    }
                }
            }
            if core.wants_checkpoint() {
                let since = *applied.get_or_insert(now);
                if (pressed || now >= since + checkpoint_after)
                    && let Some(job) = core.take_checkpoint()
                {
                    drop(core);
                    self.watch.begin(Part::Image);
                    let result = job.run(&self.files);
                    let again = self.watch.end(Part::Image, &result);
                    let no_reads = self.trims.write().unwrap_or_else(PoisonError::into_inner);
                    let mut core = self.core();
                    core.complete_checkpoint(&job, result.is_ok());
                    self.tell(core);
                    drop(no_reads);
                    self.pause(again);
                    applied = None;
                    continue;
                }
            }
            let next = [waiting.map(|w| w + delay), applied.map(|a| a + checkpoint_after)];
            let idle = now + Duration::from_secs(5);
            let until = next
                .into_iter()
                .flatten()
                .filter(|t| *t > now)
                .min()
                .unwrap_or(idle);
            drop(self.wait(&self.apply_work, core, until.saturating_duration_since(now)));
        }
    }
}

/// Owns the threads; they end with it.
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        {
            let mut core = self.shared.core();
            core.request_sync_all();
            self.shared.stop.store(true, Ordering::Release);
        }
        self.shared.wake();
        for t in self.threads.drain(..) {
            if t.join().is_err() {
                tracing::error!("a thread of a volume panicked");
            }
        }
    }
}

impl Handle {
    pub(crate) fn start(core: Core, notify: Option<Notify>) -> Result<Arc<Self>, VolumeError> {
        let event =
            eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|e| VolumeError::Io {
                op: "create",
                file: "eventfd",
                offset: 0,
                source: e.into(),
            })?;
        let shared = Arc::new(Shared {
            files: core.files().clone(),
            options: core.options.clone(),
            core: Mutex::new(core),
            trims: RwLock::new(()),
            journal_work: Condvar::new(),
            apply_work: Condvar::new(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            mode: AtomicU8::new(0),
            watch: Watch::default(),
            notify,
            event,
            peer: Mutex::new(None),
        });
        let mut handle = Self {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        type Job = (&'static str, fn(&Shared));
        let jobs: [Job; 2] = [
            ("disk-journal", Shared::journal_thread),
            ("disk-apply", Shared::apply_thread),
        ];
        for (name, job) in jobs {
            let shared = shared.clone();
            let thread = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || job(&shared))
                .map_err(VolumeError::io("start", "thread", 0))?;
            handle.threads.push(thread);
        }
        Ok(Arc::new(handle))
    }
}

/// The primary's side of a volume. Clones share it; the threads end with the last one.
#[derive(Clone)]
pub struct Volume {
    pub(crate) handle: Arc<Handle>,
}

impl Volume {
    /// Opens a volume and takes guest writes under `term` at once. To look at what recovery found and decide on staged
    /// epochs first, open a [`Replica`] and promote it.
    ///
    /// # Errors
    /// As [`super::open`]; [`VolumeError::Copying`].
    pub fn open(
        storage: &dyn Storage,
        image: Arc<dyn StorageFile>,
        options: &Options,
        term: Term,
        notify: Option<Notify>,
    ) -> Result<(Self, Recovered), VolumeError> {
        let (mut core, recovered) = super::open(storage, image, options)?;
        core.promote(term)?;
        Ok((
            Self {
                handle: Handle::start(core, notify)?,
            },
            recovered,
        ))
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    /// Size in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.shared().files.capacity
    }

    /// Where everything stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared().core().progress()
    }

    /// Why the disk below counts as failed, if it does: time to hand over.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.shared().fault()
    }

    /// How the disk below does.
    #[must_use]
    pub fn health(&self) -> Health {
        self.shared().watch.health()
    }

    /// Whether that epoch, made in that term, is part of what this replica stands on for certain: only then can a copy of
    /// changes begin from it.
    #[must_use]
    pub fn holds(&self, epoch: Epoch, term: Term) -> bool {
        self.shared().core().holds(epoch, term)
    }

    /// The last committed epoch, and the last that this host will know as committed after power loss; with their terms.
    #[must_use]
    pub fn committed(&self) -> [(Epoch, Term); 2] {
        let core = self.shared().core();
        let p = core.progress();
        [p.committed, p.durable_commit].map(|e| (e, core.term_of(e)))
    }

    /// Whether [`Volume::seal`] has room now.
    #[must_use]
    pub fn can_seal(&self) -> bool {
        self.shared().core().can_seal()
    }

    /// Readable (8 bytes, a counter) when a cursor moved since it was last read.
    #[must_use]
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared().event.as_fd()
    }

    /// Sets when guest flushes complete. Starts as [`Mode::Protected`].
    pub fn set_mode(&self, mode: Mode) {
        self.shared()
            .mode
            .store(u8::from(mode == Mode::Alone), Ordering::Release);
    }

    /// Where good copies of bad blocks come from.
    pub fn set_peer(&self, peer: Option<Arc<dyn PeerSource>>) {
        *self.shared().peer.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }

    /// A guest request that changes the volume, into the open epoch. Waits for room, at most `wait_ms`.
    ///
    /// # Errors
    /// [`VolumeError::JournalFull`] or [`VolumeError::Throttled`] after that; [`VolumeError::OutOfRange`].
    pub fn submit(&self, op: EpochOp) -> Result<(), VolumeError> {
        self.shared().with_room(|core| core.write(op.clone()))
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// As [`Volume::submit`], at once.
    pub fn try_submit(&self, op: EpochOp) -> Result<(), VolumeError> {
        let result = self.shared().core().write(op);
        self.shared().wake_journal();
        result
    }

    /// A guest write.
    ///
    /// # Errors
    /// As [`Volume::submit`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.submit(EpochOp::Write {
            offset,
            data: Arc::new(data.to_vec()),
        })
    }

    /// Reads the latest bytes out of memory. `false`: that is not possible without waiting, or they are not good; use [`Volume::read`].
    #[must_use]
    pub fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        let shared = self.shared();
        let Ok(_no_trims) = shared.trims.try_read() else {
            return false;
        };
        let Ok(plan) = shared.core().plan_read(offset, buf.len() as u64) else {
            return false;
        };
        plan.run_cached(&shared.files, buf, shared.options.verify_reads)
    }

    /// Reads the latest bytes. A bad or unreadable block is repaired from the peer on the way.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`]; [`VolumeError::NoGoodCopy`] when the peer cannot help.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        let shared = self.shared();
        let blocks = buf.len() as u64 / BLOCK + 2;
        // Blocks that the disk does not give, or no more, with the epoch of their content; and what was repaired once.
        let (mut served, mut repaired) = (BTreeMap::new(), BTreeSet::new());
        for _ in 0..=2 * blocks {
            let fault = {
                let _no_trims = shared.hold_trims();
                let core = shared.core();
                let plan = core.plan_read(offset, buf.len() as u64)?;
                let holds = core.image_holds();
                drop(core);
                // What was applied since is not in them, and not in the plan.
                served.retain(|_, (epoch, _): &mut (Epoch, Vec<u8>)| *epoch >= holds);
                match plan.run_with(&shared.files, buf, shared.options.verify_reads, &served) {
                    Ok(()) => return Ok(()),
                    Err(fault) => fault,
                }
            };
            match fault {
                ReadFault::Other(e) => return Err(e),
                ReadFault::Block(at) => {
                    let at = at / BLOCK * BLOCK;
                    let good = scrub::repair(shared, at)?;
                    // Written, and still not to be read: the disk lies.
                    if !good.written || !repaired.insert(at) {
                        shared.watch.served.fetch_add(1, Ordering::Relaxed);
                        served.insert(at, (good.epoch, good.bytes));
                    }
                }
            }
        }
        Err(VolumeError::Damaged {
            what: "image",
            at: offset,
        })
    }

    /// A guest flush. [`Mode::Protected`]: marks the open epoch and returns at once. [`Mode::Alone`]: returns when
    /// everything before is durable here.
    ///
    /// # Errors
    /// [`VolumeError::Faulted`] or [`VolumeError::TimedOut`] without a standby.
    pub fn flush(&self) -> Result<(), VolumeError> {
        let shared = self.shared();
        if shared.mode.load(Ordering::Acquire) == 0 {
            return shared.core().flush_with_epoch();
        }
        let at: Position = shared.with_room(Core::flush_alone)?;
        shared.wait_until(
            "the journal to be durable",
            Duration::from_millis(shared.options.wait_ms),
            |core| core.ring.synced() >= at,
        )
    }

    /// Closes the open epoch: call it while the guest stands still. Costs one record in memory, no I/O.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`]; [`VolumeError::JournalFull`]: the epoch is still open, cut later.
    pub fn seal(&self, epoch: Epoch, term: Term) -> Result<Sealed, VolumeError> {
        let sealed = self.shared().core().seal(epoch, term);
        self.shared().wake_journal();
        sealed
    }

    /// Asks for the journal to be durable up to this epoch; [`Progress::synced`] and the notification tell.
    pub fn request_sync(&self, through: Epoch) {
        self.shared().core().request_sync(through);
        self.shared().wake_journal();
    }

    /// Waits for that, at most `timeout`.
    ///
    /// # Errors
    /// [`VolumeError::TimedOut`], [`VolumeError::Faulted`].
    pub fn wait_synced(&self, epoch: Epoch, timeout: Duration) -> Result<(), VolumeError> {
        self.request_sync(epoch);
        self.shared()
            .wait_until("the journal to be durable", timeout, |core| core.synced >= epoch)
    }

    /// Waits until the image holds this epoch, which was committed before.
    ///
    /// # Errors
    /// [`VolumeError::TimedOut`], [`VolumeError::Faulted`].
    pub fn wait_applied(&self, epoch: Epoch, timeout: Duration) -> Result<(), VolumeError> {
        self.shared()
            .wait_until("the image to be written", timeout, |core| core.applied >= epoch)
    }

    /// These epochs are committed: they go to the image in the background.
    ///
    /// # Errors
    /// As [`Core::commit`].
    pub fn commit(&self, through: Epoch) -> Result<(), VolumeError> {
        let result = self.shared().core().commit(through);
        self.shared().wake();
        result
    }

    /// This host is the primary no more: drops the open epoch and all after `after`.
    ///
    /// # Errors
    /// As [`Core::discard_after`].
    pub fn demote(self, after: Epoch) -> Result<Replica, VolumeError> {
        self.shared().core().discard_after(after)?;
        self.shared().wake();
        Ok(Replica { handle: self.handle })
    }
}
