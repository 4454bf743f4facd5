//! Disks that all hosts of a VM reach as one (SAN, NFS, a cluster's file system): passed through to the image, not mirrored.
//!
//! ```text
//! handover asked   the primary's gate is shut; requests that are at the image end; it is flushed and unlocked      (a thread)
//!                  both hosts compare what is there: is it the same disk?                                          (threads)
//! frozen cut       with the requests that wait at the gate; they are issued again where the guest goes on
//! handed over      the other host takes the image: what it has cached is forgotten, the lock taken, the gate opened
//! cancelled        the primary takes it back
//! ```
//! Only who was handed the VM goes on with it (`Settings::planned_only`): nothing is known of a silent primary's last writes, nor that they
//! were the last. Invariants: I2 (one host's gate is open at a time, and what passed it has ended before another's opens), I3 (when memory is
//! cut for good nothing is under way to the image).

use crate::config::ProtectSpec;
use crate::input::{Input, Inputs};
use crate::shared_block::SharedBlock;
use crate::shared_mark::{DISKS_MAX, Mark, forget_cached};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_disk::image::{self, BlockIo, ImageFormat, ImageOptions};
use steadfast_types::HostId;
use steadfast_vmm::spec::VmSpec;

/// Requests that are under way end within this, or the VM stays. Less than a handover may take.
const REST_MAX: Duration = Duration::from_secs(4);
/// The same when the process ends.
const END_MAX: Duration = Duration::from_millis(500);

/// The blocks of the present machine, by number of the disk.
pub type SharedBlocks = Arc<Mutex<BTreeMap<usize, Arc<SharedBlock>>>>;

#[derive(Clone)]
struct SharedDisk {
    /// Number of the disk in the VM's specification.
    index: usize,
    path: PathBuf,
    image: Arc<dyn BlockIo>,
    block: Arc<SharedBlock>,
    /// Its lock is this process's.
    locked: Arc<AtomicBool>,
}

impl SharedDisk {
    fn named(&self, error: &dyn std::fmt::Display) -> String {
        format!("shared disk {}: {error}", self.path.display())
    }

    fn take(&self, from_another_host: bool) -> Result<(), String> {
        if self.locked.load(Ordering::Acquire) {
            return Ok(());
        }
        if from_another_host {
            forget_cached(&self.path).map_err(|e| self.named(&e))?;
        }
        self.image.reacquire().map_err(|e| self.named(&e))?;
        self.locked.store(true, Ordering::Release);
        Ok(())
    }

    fn flush(&self) -> Result<(), String> {
        self.image.flush().map_err(|e| {
            self.block.flush_failed();
            self.named(&e)
        })
    }

    fn let_go(&self) -> Result<(), String> {
        self.flush()?;
        self.image.release().map_err(|e| self.named(&e))?;
        self.locked.store(false, Ordering::Release);
        Ok(())
    }

    /// What its bytes are told by. Those of a raw disk are where the guest wrote them.
    fn mark(&self) -> Result<Mark, String> {
        let written = match self.image.info().format {
            ImageFormat::Raw => self.block.written(),
            _ => Vec::new(),
        };
        Mark::of(&self.path, &written).map_err(|e| self.named(&e))
    }
}

/// While this is there a thread is at work.
struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Whose the disks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Another host's, or nobody's.
    Not,
    /// This host's.
    Here,
    /// This host's, about to be let go.
    LettingGo,
    /// Nobody's: the VM is being handed over.
    LetGo,
}

/// See the module.
pub struct SharedDisks {
    list: Vec<SharedDisk>,
    blocks: SharedBlocks,
    held: Held,
    /// A thread is at work that was asked to flush, or to compare.
    busy: Arc<AtomicBool>,
    inputs: Inputs,
}

impl SharedDisks {
    /// Opens those that the protection names.
    ///
    /// # Errors
    /// Which cannot be used, why, and what to do.
    pub fn open(spec: &VmSpec, protect: &ProtectSpec, inputs: &Inputs) -> Result<Self, String> {
        let mut list = Vec::new();
        if protect.shared_disks.len() > DISKS_MAX {
            return Err(format!("a VM has at most {DISKS_MAX} shared disks"));
        }
        for &index in &protect.shared_disks {
            let disk = spec.disks.get(index).filter(|d| !d.read_only).ok_or_else(|| {
                format!(
                    "shared_disks: the VM has no writable disk {index}; name those that it has, from 0 on"
                )
            })?;
            let path = disk.path.display();
            let format = disk.format.as_deref().ok_or_else(|| {
                format!("disk {path}: say its format (`format=raw` or `format=qcow2`): all hosts must take it for the same")
            })?;
            let format: ImageFormat = format.parse().map_err(|e| format!("disk {path}: {e}"))?;
            // Who boots the VM takes it at once; others look at it only, until it is theirs.
            let lock = protect.start && protect.takes_over.is_none();
            let options = ImageOptions {
                format: Some(format),
                direct: disk.direct,
                lock,
                ..ImageOptions::default()
            };
            if lock {
                // It may have been another host's since this one had it.
                forget_cached(&disk.path).map_err(|e| format!("disk {path}: {e}"))?;
            }
            let image = image::open(&disk.path, &options).map_err(|e| format!("disk {path}: {e}"))?;
            list.push(SharedDisk {
                index,
                path: disk.path.clone(),
                block: Arc::new(SharedBlock::new(Arc::clone(&image))),
                image,
                locked: Arc::new(AtomicBool::new(lock)),
            });
        }
        let blocks = list.iter().map(|d| (d.index, Arc::clone(&d.block))).collect();
        Ok(Self {
            list,
            blocks: Arc::new(Mutex::new(blocks)),
            held: Held::Not,
            busy: Arc::default(),
            inputs: inputs.clone(),
        })
    }

    /// The VM has none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// What the devices of the present machine stand on.
    pub fn blocks(&self) -> SharedBlocks {
        Arc::clone(&self.blocks)
    }

    /// Whose they are.
    pub fn held(&self) -> Held {
        self.held
    }

    /// They are this host's from now on: its guest runs, or is about to. May be tried again.
    ///
    /// # Errors
    /// The one that cannot be had.
    pub fn take(&mut self, from_another_host: bool) -> Result<(), String> {
        self.list.iter().try_for_each(|d| d.take(from_another_host))?;
        self.list.iter().for_each(|d| d.block.open());
        self.held = Held::Here;
        Ok(())
    }

    /// Writes on a thread what the guest wrote, while it runs, so that it does not wait for that when they are let go; [`Input::SharedFlushed`]
    /// tells of the end. False: that is under way already, or there is no thread for it.
    #[must_use]
    pub fn flush_ahead(&self, to: HostId) -> bool {
        let (list, inputs) = (self.list.clone(), self.inputs.clone());
        self.on_a_thread("flush-ahead", move || {
            let done = list.iter().try_for_each(SharedDisk::flush);
            inputs.send(Input::SharedFlushed(to, done));
        })
    }

    /// One thing at a time: a peer or a storage that hangs makes no heap of threads.
    fn on_a_thread(&self, name: &str, work: impl FnOnce() + Send + 'static) -> bool {
        if self.busy.swap(true, Ordering::AcqRel) {
            return false;
        }
        let busy = Busy(Arc::clone(&self.busy));
        let work = move || {
            work();
            drop(busy);
        };
        let spawned = std::thread::Builder::new().name(name.into()).spawn(work);
        if let Err(error) = &spawned {
            tracing::error!(%error, name, "no thread for the shared disks");
        }
        spawned.is_ok()
    }

    /// Begins to let go of them; [`Input::LetGo`] tells of the end. The guest may run on, and waits for its disks.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn let_go(&mut self) -> std::io::Result<()> {
        let (list, inputs) = (self.list.clone(), self.inputs.clone());
        let work = move || {
            list.iter().for_each(|d| d.block.shut());
            let until = Instant::now() + REST_MAX;
            let done = list.iter().map(|d| {
                if !d.block.rest(until.saturating_duration_since(Instant::now())) {
                    return Err(d.named(&"a request of the guest does not come to its end"));
                }
                d.let_go()?;
                d.mark()
            });
            inputs.send(Input::LetGo(done.collect()));
        };
        std::thread::Builder::new().name("let-go".into()).spawn(work)?;
        self.held = Held::LettingGo;
        Ok(())
    }

    /// They have been let go, or not all of them.
    pub fn gone(&mut self) {
        self.held = Held::LetGo;
    }

    /// Looks, on a thread, whether the disks here are those that another host has let go; the answer is [`Input::SharedSeen`]'s.
    pub fn compare(
        &self,
        marks: Vec<Mark>,
        answer: impl FnOnce(Result<(), String>) -> Input + Clone + Send + 'static,
    ) {
        let (list, inputs, at_once) = (self.list.clone(), self.inputs.clone(), answer.clone());
        let work = move || {
            let same = match list.len() == marks.len() {
                true => list.iter().zip(&marks).try_for_each(|(d, mark)| {
                    forget_cached(&d.path).map_err(|e| d.named(&e))?;
                    mark.compare(&d.path).map_err(|why| d.named(&why))
                }),
                false => Err(format!("{} shared disks there, {} here", marks.len(), list.len())),
            };
            inputs.send(answer(same));
        };
        if !self.on_a_thread("compare", work) {
            let why = "the other host is busy with an earlier comparison; does its storage answer?";
            self.inputs.send(at_once(Err(why.into())));
        }
    }

    /// The machine here has stopped for good. The next one stands on other blocks.
    pub fn leave(&mut self) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        for d in &mut self.list {
            d.block.close();
            d.block = Arc::new(SharedBlock::new(Arc::clone(&d.image)));
            blocks.insert(d.index, Arc::clone(&d.block));
        }
        self.held = Held::Not;
    }

    /// The machine here did not come to rest, and another one follows it here.
    pub fn renew(&mut self) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        for d in &mut self.list {
            d.block.close();
            d.block = Arc::new(SharedBlock::after(&d.block));
            if self.held == Held::Here {
                d.block.open();
            }
            blocks.insert(d.index, Arc::clone(&d.block));
        }
    }

    /// Nothing of the guest waits for them any more: the process ends. Whether what is under way comes to its end.
    pub fn close(&self) -> bool {
        self.list.iter().for_each(|d| d.block.close());
        let until = Instant::now() + END_MAX;
        self.list
            .iter()
            .all(|d| d.block.rest(until.saturating_duration_since(Instant::now())))
    }

    /// For the status.
    pub fn status(&self) -> Value {
        let held = match self.held {
            Held::Not => "not here",
            Held::Here => "here",
            Held::LettingGo | Held::LetGo => "let go",
        };
        self.list
            .iter()
            .map(|d| json!({"path": d.path, "held": held}))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Inputs;
    use std::sync::Condvar;
    use std::sync::mpsc::{Receiver, channel};
    use steadfast_disk::DiskError;
    use steadfast_disk::image::{ImageInfo, MemImage};

    /// A disk whose writes end when they are let; it keeps what happened to it, in order.
    struct Slow {
        info: ImageInfo,
        /// Writes may end; what happened.
        state: Mutex<(bool, Vec<&'static str>)>,
        let_end: Condvar,
    }

    impl Slow {
        fn new() -> Arc<Self> {
            let info = MemImage::new(vec![0; 4096], false).info().clone();
            Arc::new(Self {
                info,
                state: Mutex::default(),
                let_end: Condvar::new(),
            })
        }

        fn happened(&self, what: &'static str) {
            self.state.lock().unwrap().1.push(what);
        }

        fn log(&self) -> Vec<&'static str> {
            self.state.lock().unwrap().1.clone()
        }

        fn end_writes(&self) {
            self.state.lock().unwrap().0 = true;
            self.let_end.notify_all();
        }
    }

    impl BlockIo for Slow {
        fn info(&self) -> &ImageInfo {
            &self.info
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), DiskError> {
            Ok(())
        }

        fn write_at(&self, _: u64, _: &[u8]) -> Result<(), DiskError> {
            self.happened("write begun");
            let state = self.state.lock().unwrap();
            let bound = Duration::from_secs(20);
            drop(self.let_end.wait_timeout_while(state, bound, |s| !s.0).unwrap());
            self.happened("write ended");
            Ok(())
        }

        fn flush(&self) -> Result<(), DiskError> {
            Ok(())
        }

        fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
            Ok(())
        }

        fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DiskError> {
            Ok(())
        }

        fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
            None
        }

        fn release(&self) -> Result<(), DiskError> {
            self.happened("let go");
            Ok(())
        }

        fn reacquire(&self) -> Result<(), DiskError> {
            self.happened("taken");
            Ok(())
        }
    }

    fn disks(slow: &Arc<Slow>, path: &std::path::Path) -> (SharedDisks, Receiver<Input>) {
        let (queue, incoming) = channel();
        let image: Arc<dyn BlockIo> = Arc::clone(slow) as _;
        let disk = SharedDisk {
            index: 0,
            path: path.to_owned(),
            block: Arc::new(SharedBlock::new(Arc::clone(&image))),
            image,
            locked: Arc::default(),
        };
        let disks = SharedDisks {
            list: vec![disk],
            blocks: Arc::default(),
            held: Held::Not,
            busy: Arc::default(),
            inputs: Inputs::new(queue),
        };
        (disks, incoming)
    }

    fn until(what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < end, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    type Writes = std::thread::JoinHandle<Result<(), DiskError>>;

    /// A write is at the disk, and the disk is to be let go.
    fn let_go_while_it_writes() -> (
        Arc<Slow>,
        SharedDisks,
        Receiver<Input>,
        Writes,
        tempfile::NamedTempFile,
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let slow = Slow::new();
        let (mut disks, incoming) = disks(&slow, file.path());
        disks.take(false).unwrap();
        let block = Arc::clone(&disks.list[0].block);
        let writes = std::thread::spawn(move || block.write_at(0, &[1; 512]));
        until("the write to be at the disk", || {
            slow.log().contains(&"write begun")
        });
        disks.let_go().unwrap();
        (slow, disks, incoming, writes, file)
    }

    #[test]
    fn a_disk_is_let_go_when_what_is_under_way_has_ended() {
        let (slow, mut disks, incoming, writes, _file) = let_go_while_it_writes();
        // Enough for a thread that does not wait.
        assert!(incoming.recv_timeout(Duration::from_millis(200)).is_err());
        assert_eq!(slow.log(), ["taken", "write begun"]);
        slow.end_writes();
        writes.join().unwrap().unwrap();
        let said = incoming.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(&said, Input::LetGo(Ok(marks)) if marks.len() == 1));
        assert_eq!(slow.log(), ["taken", "write begun", "write ended", "let go"]);
        disks.gone();
        disks.take(false).unwrap();
        assert_eq!(slow.log().last(), Some(&"taken"));
    }

    #[test]
    fn a_disk_that_hangs_is_not_let_go() {
        let (slow, mut disks, incoming, writes, _file) = let_go_while_it_writes();
        let said = incoming.recv_timeout(REST_MAX + Duration::from_secs(20)).unwrap();
        assert!(matches!(&said, Input::LetGo(Err(why)) if why.contains("does not come to its end")));
        disks.gone();
        // It is still this host's: nothing is taken a second time, and the guest goes on.
        disks.take(false).unwrap();
        slow.end_writes();
        writes.join().unwrap().unwrap();
        assert_eq!(slow.log(), ["taken", "write begun", "write ended"]);
    }
}
