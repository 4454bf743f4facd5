//! A copy of what a standby holds, for a drill: one committed epoch as a saved VM and images of its disks.
//!
//! ```text
//! request -> nothing more is applied (it is received, staged and acknowledged as ever)
//!         -> a thread writes RAM, device state and disks of the applied epoch into a folder
//!         -> what waited is applied; the answer goes out
//! ```
//! The running VM does not notice: what it waits for is the acknowledgement of what is staged. A takeover does not wait for the copy
//! either, it only makes it worthless. What waits to be applied is bounded in time and bytes: beyond that the copy is given up.
//!
//! The copy may run beside the VM that it is of: its disks are the copies, and NICs that are sockets of this host are others,
//! which lead nowhere. A NIC on a bridge stays on a bridge of that name: who runs the copy gives it one of its own
//! (a network namespace).

use crate::engine::Engine;
use crate::input::Input;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};
use steadfast_disk::image::{BlockIo, ImageFormat, convert};
use steadfast_disk::volume::Volume;
use steadfast_epoch::io::Event;
use steadfast_machine::memory::Ram;
use steadfast_machine::state::{MachineState, SaveWriter};
use steadfast_types::Epoch;
use steadfast_vmm::control::failure;
use steadfast_vmm::process::ProcessError;
use steadfast_vmm::spec::{NicTarget, VmSpec};

/// The copy is given up after so long.
const TIME_MAX: Duration = Duration::from_secs(60);
/// The copy is given up when so much waits to be applied.
const WAITING_MAX: usize = 256 << 20;
/// How long a disk's image may take to be what is committed.
const DISK_BOUND: Duration = Duration::from_secs(20);
/// The saved VM in the folder.
pub const STATE_FILE: &str = "state";
/// The host's side of the copy's vsock device, in the same folder.
pub const VSOCK_FILE: &str = "vsock";

/// A copy under way.
pub(crate) struct CopyOut {
    until: Instant,
    /// Why it is worth nothing.
    void: Option<String>,
    /// What was to be applied meanwhile.
    waits: Option<Epoch>,
    answer: SyncSender<Value>,
}

/// What the thread needs.
struct Source {
    folder: PathBuf,
    spec: VmSpec,
    state: Vec<u8>,
    ram: Ram,
    volumes: Vec<Volume>,
    images: Vec<Arc<dyn BlockIo>>,
    epoch: Epoch,
}

impl Engine {
    /// Begins a copy; what cannot be is answered at once.
    pub(crate) fn copy_state(&mut self, folder: &Path, answer: &SyncSender<Value>) {
        if let Err(why) = self.begin_copy_out(folder, answer) {
            let _ = answer.send(failure(&why));
        }
    }

    fn begin_copy_out(&mut self, folder: &Path, answer: &SyncSender<Value>) -> Result<(), String> {
        if self.replica.primary().is_some() {
            return Err("this host runs the VM; a copy is made of a standby".into());
        }
        if !self.shared.is_empty() {
            return Err("this VM has a disk that all hosts reach: there is no copy of it to try".into());
        }
        if self.stands_by_with_disks() {
            return Err("this standby has the VM's disks only: there is no running guest to copy".into());
        }
        // Of a whole epoch.
        self.apply_piece(None);
        let epoch = self.memory.filter(|_| !self.state.is_empty());
        let epoch = epoch.ok_or("this standby is not filled yet")?;
        if self.copy_out.is_some() {
            return Err("a copy is under way already".into());
        }
        let source = Source {
            folder: folder.to_owned(),
            spec: self.vm.spec.clone(),
            state: self.state.clone(),
            ram: self.vm.machine.ram().clone(),
            volumes: self.disks.volumes().collect(),
            images: self.disks.list.iter().map(|d| Arc::clone(&d.image)).collect(),
            epoch,
        };
        let inputs = self.inputs.clone();
        let work = move || {
            crate::priority::give_way();
            inputs.send(Input::CopiedOut(source.write()))
        };
        let thread = std::thread::Builder::new().name("copy-out".into()).spawn(work);
        thread.map_err(|e| format!("a thread for the copy: {e}"))?;
        self.note(format!("a copy of epoch {epoch} is made"));
        self.copy_out = Some(CopyOut {
            until: Instant::now() + TIME_MAX,
            void: None,
            waits: None,
            answer: answer.clone(),
        });
        Ok(())
    }

    /// Whether this has to wait until the copy is made.
    pub(crate) fn apply_waits(&mut self, through: Epoch) -> bool {
        match &mut self.copy_out {
            Some(copy) if copy.void.is_none() => {
                copy.waits = copy.waits.max(Some(through));
                true
            }
            _ => false,
        }
    }

    /// Memory is about to change under the copy.
    pub(crate) fn spoil_copy(&mut self, why: &str) {
        if let Some(copy) = self.copy_out.as_mut().filter(|c| c.void.is_none()) {
            copy.void = Some(why.to_owned());
            copy.waits = None;
        }
    }

    /// Gives up a copy that takes too long. Call it now and then.
    pub(crate) fn bound_copy(&mut self) -> Result<(), ProcessError> {
        let Some(copy) = self.copy_out.as_mut().filter(|c| c.void.is_none()) else {
            return Ok(());
        };
        let staged: usize = self
            .staged
            .values()
            .map(steadfast_wire::StagedRecord::held_bytes)
            .sum();
        if Instant::now() < copy.until && staged < WAITING_MAX {
            return Ok(());
        }
        copy.void = Some("it took too long beside what the VM changes".into());
        self.apply_what_waited()
    }

    /// The thread is done.
    pub(crate) fn copied_out(&mut self, done: Result<Value, String>) -> Result<(), ProcessError> {
        self.apply_what_waited()?;
        let Some(copy) = self.copy_out.take() else {
            return Ok(());
        };
        let done = match copy.void {
            Some(why) => Err(why),
            None => done,
        };
        self.note(match &done {
            Ok(_) => "the copy is made".into(),
            Err(why) => format!("the copy is worth nothing: {why}"),
        });
        let _ = copy.answer.send(done.unwrap_or_else(|why| failure(&why)));
        Ok(())
    }

    fn apply_what_waited(&mut self) -> Result<(), ProcessError> {
        let Some(through) = self.copy_out.as_mut().and_then(|c| c.waits.take()) else {
            return Ok(());
        };
        self.apply(through);
        // What that brought about is handled now.
        self.step(Event::Tick)
    }
}

impl Source {
    fn write(mut self) -> Result<Value, String> {
        let began = Instant::now();
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut volumes = self.volumes.iter().zip(&self.images);
        for (index, disk) in self
            .spec
            .disks
            .iter_mut()
            .enumerate()
            .filter(|(_, d)| !d.read_only)
        {
            let (volume, image) = volumes.next().ok_or("a disk has no replica here")?;
            volume
                .wait_applied(self.epoch, DISK_BOUND)
                .map_err(|e| text(&e))?;
            let to = self.folder.join(format!("disk{index}"));
            let copied = match image.info().format {
                ImageFormat::Raw => copy_sparse(&disk.path, &to).map_err(|e| e.to_string()),
                // What its file says is not all there is, and it may name others.
                _ => convert::to_raw(image.as_ref(), &to, &mut |_, _| ControlFlow::Continue(()))
                    .map_err(|e| e.to_string()),
            };
            copied.map_err(|e| format!("copy {}: {e}", disk.path.display()))?;
            (disk.path, disk.format) = (to, Some("raw".into()));
        }
        for (index, nic) in self.spec.nics.iter_mut().enumerate() {
            // Its address was made from the VM's name, which stays.
            if let NicTarget::Socket { .. } = nic.to {
                nic.to = NicTarget::Socket {
                    own: self.folder.join(format!("nic{index}")),
                    peer: self.folder.join("nobody"),
                };
            }
        }
        if let Some(vsock) = &mut self.spec.vsock {
            vsock.path = self.folder.join(VSOCK_FILE);
        }
        let state: MachineState = postcard::from_bytes(&self.state).map_err(|e| text(&e))?;
        let spec = serde_json::to_vec(&self.spec).map_err(|e| text(&e))?;
        let file = self.folder.join(STATE_FILE);
        SaveWriter::create(&file, &spec, &state, self.ram.bytes())
            .and_then(|w| w.finish(&self.ram))
            .map_err(|e| text(&e))?;
        Ok(json!({"ok": true, "epoch": self.epoch, "took_ms": began.elapsed().as_millis() as u64}))
    }
}

/// Copies a file, its holes as holes; where the file system can share blocks, it shares them.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let source = File::open(from)?;
    let meta = source.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other(
            "it is no file; a drill copies images that are files only",
        ));
    }
    let target = File::options().write(true).create_new(true).open(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    target.set_len(meta.len())?;
    let mut at = 0;
    loop {
        let start = match seek(&source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = seek(&source, SeekFrom::Hole(start))?;
        // Not copy_file_range() by hand: between two kinds of file systems that fails, and the library goes another way.
        seek(&source, SeekFrom::Start(start))?;
        seek(&target, SeekFrom::Start(start))?;
        if io::copy(&mut (&source).take(end - start), &mut &target)? < end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn holes_stay_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&a).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 9000], 5 << 20).unwrap();
        file.write_all_at(&[9; 100], (64 << 20) - 100).unwrap();
        copy_sparse(&a, &b).unwrap();
        assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
        assert!(std::fs::metadata(&b).unwrap().blocks() < 2048, "it became whole");
        assert!(copy_sparse(&a, &b).is_err(), "nothing is written over");
        assert!(copy_sparse(Path::new("/dev/null"), &folder.path().join("c")).is_err());
    }
}
