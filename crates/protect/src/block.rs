//! [`LateBlock`]: the image of a protected disk, as the block device sees it.
//!
//! A standby's machine is assembled long before anybody knows whether it will ever run; its disks get their volume when it
//! does. Invariant: nothing of the guest reaches a volume while the gate is shut, so that a cut is one instant for all disks.

use crate::input::Inputs;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, Instant};
use steadfast_disk::DiskError;
use steadfast_disk::image::{BlockIo, ImageInfo};
use steadfast_disk::volume::{EpochOp, Volume};

/// Bytes that the guest writes into one epoch before it waits for the cut: a standby must be able to take it whole.
const OPEN_BYTES_MAX: u64 = 8 << 20;
/// A request without room waits so long at most.
const WAIT_MAX: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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

    fn volume(&self) -> Result<&Volume, DiskError> {
        self.volume.get().ok_or(DiskError::Closed)
    }

    /// None: there is no room now; `late`: then that is an error.
    fn try_now(
        &self,
        volume: &Volume,
        op: &EpochOp,
        bytes: u64,
        late: bool,
    ) -> Option<Result<(), DiskError>> {
        let _open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let before = self.open_bytes.load(Ordering::Acquire);
        if before != 0 && before + bytes > OPEN_BYTES_MAX && !late {
            return None;
        }
        match volume.try_submit(op.clone()) {
            Ok(()) => {
                self.open_bytes.fetch_add(bytes, Ordering::AcqRel);
                Some(Ok(()))
            }
            Err(e) if late || !e.is_back_pressure() => Some(Err(e.into())),
            Err(_) => None,
        }
    }

    fn submit(&self, op: EpochOp) -> Result<(), DiskError> {
        let volume = self.volume()?;
        let bytes = match &op {
            EpochOp::Write { data, .. } => data.len() as u64,
            _ => 0,
        };
        let until = Instant::now() + WAIT_MAX;
        loop {
            if let Some(done) = self.try_now(volume, &op, bytes, Instant::now() >= until) {
                return done;
            }
            // Room comes with a cut and its commit.
            self.inputs.disk_flushed();
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
        Ok(self.volume()?.read(offset, buf)?)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        let data = Arc::new(buf.to_vec());
        self.submit(EpochOp::Write { offset, data })
    }

    /// Returns at once: the epoch commits, and what the guest says of it leaves, only when it is durable on all hosts.
    fn flush(&self) -> Result<(), DiskError> {
        self.volume()?.flush()?;
        self.inputs.disk_flushed();
        Ok(())
    }

    /// A write goes into the journal's memory: it waits only when there is no room.
    fn write_at_once(&self, offset: u64, buf: &[u8]) -> Option<Result<(), DiskError>> {
        let volume = self.volume.get()?;
        let data = Arc::new(buf.to_vec());
        self.try_now(volume, &EpochOp::Write { offset, data }, buf.len() as u64, false)
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
