//! [`LateBlock`]: the image of a protected disk, as the block device sees it.
//!
//! A standby's machine is assembled long before anybody knows whether it will ever run; its disks get their volume when it
//! does. Invariants: nothing of the guest reaches a volume while the gate is shut, so that a cut is one instant for all disks;
//! no error of a disk reaches the guest: its request waits (and is issued again wherever the VM goes on), and the engine
//! hears for how long and why; nothing of the machine before reaches a volume once its block is closed.

use crate::input::Inputs;
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, Instant};
use steadfast_disk::DiskError;
use steadfast_disk::image::{BlockIo, ImageInfo};
use steadfast_disk::volume::{EpochOp, Volume, VolumeError};

/// Bytes that the guest writes into one epoch before it waits for the cut: a standby must be able to take it whole.
const OPEN_BYTES_MAX: u64 = 8 << 20;
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// What no replica could give is asked for again after this.
const READ_AGAIN: Duration = Duration::from_millis(100);

/// The blocks of the present machine, by number of the disk.
pub type Blocks = Arc<Mutex<BTreeMap<usize, Arc<LateBlock>>>>;

/// Requests that are under way, by number: since when, and what stands against them.
#[derive(Default)]
struct UnderWay {
    last: u64,
    list: BTreeMap<u64, (Instant, Option<String>)>,
}

/// A request that is under way.
struct Way<'a>(&'a Mutex<UnderWay>, u64);

impl<'a> Way<'a> {
    fn new(all: &'a Mutex<UnderWay>) -> Self {
        let mut way = all.lock().unwrap_or_else(PoisonError::into_inner);
        way.last += 1;
        let id = way.last;
        way.list.insert(id, (Instant::now(), None));
        Self(all, id)
    }

    fn held_up(&self, why: &dyn std::fmt::Display) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, reason)) = all.list.get_mut(&self.1) {
            *reason = Some(why.to_string());
        }
    }
}

impl Drop for Way<'_> {
    fn drop(&mut self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .list
            .remove(&self.1);
    }
}

/// See the module.
pub struct LateBlock {
    /// Number of the disk in the VM's specification.
    pub index: usize,
    info: ImageInfo,
    volume: OnceLock<Volume>,
    gate: RwLock<()>,
    /// Written into the open epoch.
    open_bytes: AtomicU64,
    room: (Mutex<()>, Condvar),
    reads: Mutex<UnderWay>,
    writes: Mutex<UnderWay>,
    /// The machine ends: nothing waits any more.
    closed: AtomicBool,
    inputs: Inputs,
}

impl LateBlock {
    /// Without a volume yet.
    pub fn new(index: usize, image: &ImageInfo, inputs: Inputs) -> Self {
        Self {
            index,
            info: ImageInfo {
                discard: true,
                write_zeroes: true,
                ..image.clone()
            },
            volume: OnceLock::new(),
            gate: RwLock::new(()),
            open_bytes: AtomicU64::new(0),
            room: (Mutex::new(()), Condvar::new()),
            reads: Mutex::default(),
            writes: Mutex::default(),
            closed: AtomicBool::new(false),
            inputs,
        }
    }

    /// The guest's requests go to this volume from now on.
    pub fn bind(&self, volume: Volume) {
        if self.volume.set(volume).is_err() {
            tracing::error!(disk = self.index, "a disk was bound twice");
        }
    }

    /// Holds the guest's requests up while the guard lives.
    pub fn shut(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// An epoch was cut: the next one is empty.
    pub fn cut(&self) {
        self.open_bytes.store(0, Ordering::Release);
        self.room();
    }

    /// There may be room for requests that wait.
    pub fn room(&self) {
        self.room.1.notify_all();
    }

    /// The machine ends: what waits gives up, so that its threads can end.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.room();
    }

    /// The same, and when this returns nothing of that machine reaches the volume any more, however late it comes (I2).
    pub fn close_for_good(&self) {
        let shut = self.shut();
        self.close();
        drop(shut);
    }

    /// How long the oldest read runs that no replica has answered yet, and why one waits.
    pub fn reads(&self) -> (Duration, Option<String>) {
        Self::oldest(&self.reads)
    }

    /// The same of requests that write.
    pub fn writes(&self) -> (Duration, Option<String>) {
        Self::oldest(&self.writes)
    }

    fn oldest(all: &Mutex<UnderWay>) -> (Duration, Option<String>) {
        let all = all.lock().unwrap_or_else(PoisonError::into_inner);
        let since = all
            .list
            .values()
            .next()
            .map_or(Duration::ZERO, |(s, _)| s.elapsed());
        (since, all.list.values().find_map(|(_, why)| why.clone()))
    }

    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn volume(&self) -> Result<&Volume, DiskError> {
        self.volume.get().ok_or(DiskError::Closed)
    }

    /// None: there is no room now; who waits for it (`way`) is told why.
    fn try_now(
        &self,
        volume: &Volume,
        op: &EpochOp,
        bytes: u64,
        way: Option<&Way<'_>>,
    ) -> Option<Result<(), DiskError>> {
        let _open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        if self.closed() {
            return Some(Err(DiskError::Closed));
        }
        let before = self.open_bytes.load(Ordering::Acquire);
        if before != 0 && before + bytes > OPEN_BYTES_MAX {
            return None;
        }
        match volume.try_submit(op.clone()) {
            Ok(()) => {
                self.open_bytes.fetch_add(bytes, Ordering::AcqRel);
                Some(Ok(()))
            }
            Err(e) if !e.is_back_pressure() => Some(Err(e.into())),
            Err(e) => {
                if let Some(way) = way {
                    way.held_up(&e);
                }
                None
            }
        }
    }

    fn submit(&self, op: EpochOp) -> Result<(), DiskError> {
        let volume = self.volume()?;
        let bytes = match &op {
            EpochOp::Write { data, .. } => data.len() as u64,
            _ => 0,
        };
        let way = Way::new(&self.writes);
        loop {
            if let Some(done) = self.try_now(volume, &op, bytes, Some(&way)) {
                return done;
            }
            // Room comes with a cut and its commit.
            self.inputs.disk_full();
            let held = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
            drop(
                self.room
                    .1
                    .wait_timeout(held, LOOK_AGAIN)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }
}

impl BlockIo for LateBlock {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let volume = self.volume()?;
        let way = Way::new(&self.reads);
        loop {
            match volume.read(offset, buf) {
                Ok(()) => return Ok(()),
                // The guest's own mistake, or no guest any more.
                Err(e @ (VolumeError::OutOfRange { .. } | VolumeError::Closed)) => return Err(e.into()),
                Err(e) if self.closed() => return Err(e.into()),
                Err(e) => way.held_up(&e),
            }
            let held = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
            drop(
                self.room
                    .1
                    .wait_timeout(held, READ_AGAIN)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> bool {
        !self.closed() && self.volume.get().is_some_and(|v| v.read_cached(offset, buf))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        let data = Arc::new(buf.to_vec());
        self.submit(EpochOp::Write { offset, data })
    }

    /// Returns at once: the epoch commits, and what the guest says of it leaves, only when it is durable on all hosts.
    fn flush(&self) -> Result<(), DiskError> {
        let volume = self.volume()?;
        let _open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        if self.closed() {
            return Err(DiskError::Closed);
        }
        volume.flush()?;
        self.inputs.disk_flushed();
        Ok(())
    }

    /// A write goes into the journal's memory: it waits only when there is no room.
    fn write_at_once(&self, offset: u64, buf: &[u8]) -> Option<Result<(), DiskError>> {
        let volume = self.volume.get()?;
        let data = Arc::new(buf.to_vec());
        self.try_now(volume, &EpochOp::Write { offset, data }, buf.len() as u64, None)
    }

    fn flush_at_once(&self) -> Option<Result<(), DiskError>> {
        Some(self.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.submit(EpochOp::Discard { offset, len })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.submit(EpochOp::WriteZeroes { offset, len })
    }

    /// None: the bytes are spread over image and journal.
    fn raw_fd(&self) -> Option<RawFd> {
        None
    }

    fn release(&self) -> Result<(), DiskError> {
        Err(DiskError::Invalid(
            "a replicated disk changes hands by its epochs, not by its files".into(),
        ))
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        Ok(())
    }
}
