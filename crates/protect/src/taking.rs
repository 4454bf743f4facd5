//! A VM that another process of this host leaves to this one: this one gets ready while the guest runs there.
//!
//! ```text
//! here                                            there
//! maps the memory, builds the machine, opens      runs
//! disks, links and the store, takes the term
//! says what it has mapped (`.ready`)              stands still; lets go of disks and sockets; its state appears
//! takes disks, restores the state, renames it     (a rename by whoever wants the VM back ends this)
//! takes the sockets' names, runs                  ends
//! ```
//! What takes time, and what can fail, comes before the guest stands still: on a host whose CPUs are all taken, a process takes many seconds
//! to begin. Until the state is renamed nothing here writes to the memory or to the images, no frame leaves, and nothing that another host
//! says is heard.

use crate::config::{Mapped, TakeOver};
use crate::engine::Engine;
use crate::primary::{disk_failed, machine_failed};
use std::time::{Duration, Instant};
use steadfast_epoch::io::Event;
use steadfast_machine::devices::virtio::net::NetHandle;
use steadfast_machine::state::SaveReader;
use steadfast_vmm::process::ProcessError;
use steadfast_vmm::spec::VmSpec;

/// A VM that is not left to this process for so long will not be.
const LEFT_BOUND: Duration = Duration::from_secs(300);
/// The state is looked for so often.
pub const LOOK: Duration = Duration::from_millis(2);

/// A daemon that ended while it started this process has given the change up, and does not know of it.
///
/// # Errors
/// The VM is not to be taken over any more.
pub(crate) fn still_wanted(from: &TakeOver) -> Result<(), String> {
    match TakeOver::wanted(&from.state).exists() {
        true => Ok(()),
        false => Err("the VM is not to be taken over any more".into()),
    }
}

/// Puts this process's control socket in the place of the other's.
pub type TakeControl = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// A takeover that waits for the other process.
pub struct Taking {
    from: TakeOver,
    until: Instant,
}

impl Engine {
    /// All is ready: from here on the VM may be left to this process. Says what is mapped here, so that whoever leaves it can tell that it
    /// is the VM's memory still.
    pub(crate) fn wait_for_state(&mut self, from: TakeOver) -> Result<(), ProcessError> {
        let failed = |e: &dyn std::fmt::Display| disk_failed(format!("not ready to take the VM over: {e}"));
        let memory = self.vm.machine.ram().file().metadata().map_err(|e| failed(&e))?;
        let text = serde_json::to_vec(&Mapped::of(&memory)).map_err(|e| failed(&e))?;
        let (path, draft) = (TakeOver::ready(&from.state), TakeOver::draft(&from.state));
        let written = std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, path));
        written.map_err(|e| failed(&e))?;
        self.note("ready to take the VM over from a process of this host".into());
        self.taking = Some(Taking {
            from,
            until: Instant::now() + LEFT_BOUND,
        });
        Ok(())
    }

    /// The guest still runs in another process, or may do so.
    pub(crate) fn takes_over(&self) -> bool {
        self.taking.is_some() || self.spec.takes_over.is_some()
    }

    /// Takes the VM if it has been left. A process that is not wanted any more ends, ready or not.
    pub(crate) fn take_if_left(&mut self) -> Result<(), ProcessError> {
        if let Some(from) = &self.spec.takes_over {
            return still_wanted(from).map_err(disk_failed);
        }
        let Some(taking) = &self.taking else { return Ok(()) };
        if !taking.from.state.exists() {
            still_wanted(&taking.from).map_err(disk_failed)?;
            return match Instant::now() > taking.until {
                false => Ok(()),
                true => Err(disk_failed(format!(
                    "the VM that this process was to take over has not been left to it for {} s",
                    LEFT_BOUND.as_secs()
                ))),
            };
        }
        let Some(taking) = self.taking.take() else {
            return Ok(());
        };
        self.take_over(&taking.from)?;
        self.go_live()?;
        // It is at another TAP now.
        self.vm.nics.iter().for_each(NetHandle::announce);
        self.step(Event::Tick)
    }

    /// The machine becomes that of a process which stands still, whose memory this one has mapped already.
    fn take_over(&mut self, from: &TakeOver) -> Result<(), ProcessError> {
        let mut saved = SaveReader::open(&from.state)?;
        let spec: VmSpec = serde_json::from_slice(&saved.spec).map_err(ProcessError::Spec)?;
        if (spec.vcpus, spec.memory_bytes) != (self.vm.spec.vcpus, self.vm.spec.memory_bytes) {
            return Err(disk_failed(format!(
                "the VM that is taken over has {} vCPUs and {} bytes of memory, this one {} and {}",
                spec.vcpus, spec.memory_bytes, self.vm.spec.vcpus, self.vm.spec.memory_bytes
            )));
        }
        self.disks.lock_images().map_err(disk_failed)?;
        self.take_shared(false)?;
        self.vm.resources.take_images()?;
        let state = std::mem::take(&mut saved.state);
        self.vm.machine.restore(state).map_err(machine_failed)?;
        // It may fail for want of memory.
        if self.whole {
            self.vm.machine.start_dirty_tracking()?;
        }
        // From here on it is ours; before, it can be had back.
        std::fs::rename(&from.state, TakeOver::taken(&from.state)).map_err(|e| {
            disk_failed(format!(
                "the VM is not left to this process: {}: {e}",
                from.state.display()
            ))
        })?;
        if let Err(error) = self.vm.resources.take_names() {
            self.note(format!("a socket of the VM has not got its name: {error}"));
        }
        if let Some(Err(error)) = self.take_control.take().map(|take| take()) {
            self.note(format!("the control socket has not got its name: {error}"));
        }
        self.note("taken over from a process of this host".into());
        Ok(())
    }
}
