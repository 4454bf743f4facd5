//! A VM that another process of this host leaves to this one: this one gets ready while the guest runs there.
//!
//! ```text
//! here                                            there
//! maps the memory, builds the machine, opens      runs
//! disks, links and the store, takes the term
//! says that it is ready (`taking` in the status)  stands still; lets go of disks and sockets; its state appears
//! takes disks, restores the state, renames it     (a rename by whoever wants the VM back ends this)
//! takes the sockets' names, runs                  ends
//! ```
//! What takes time, and what can fail, comes before the guest stands still: on a host whose CPUs are all taken, a process takes many seconds
//! to begin. Until the state is renamed nothing here writes to the memory or to the images, and no frame leaves.

use crate::config::TakeOver;
use crate::engine::Engine;
use crate::primary::{disk_failed, machine_failed};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
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

/// Puts this process's control socket in the place of the other's.
pub type TakeControl = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// A takeover that waits for the other process.
pub struct Taking {
    from: TakeOver,
    until: Instant,
}

impl Engine {
    /// All is ready: from here on the VM may be left to this process.
    pub(crate) fn wait_for_state(&mut self, from: TakeOver) {
        self.note("ready to take the VM over from a process of this host".into());
        self.taking = Some(Taking {
            from,
            until: Instant::now() + LEFT_BOUND,
        });
    }

    /// For the status: what is mapped here, so that whoever leaves the VM to this process can tell that it is the VM's memory still.
    pub(crate) fn taking_status(&self) -> Value {
        let ready = self.taking.as_ref();
        ready.map_or(Value::Null, |_| {
            let memory = self.vm.machine.ram().file().metadata();
            json!({"memory": memory.ok().map(|m| [m.dev(), m.ino()])})
        })
    }

    /// Takes the VM if it has been left.
    pub(crate) fn take_if_left(&mut self) -> Result<(), ProcessError> {
        let Some(taking) = self
            .taking
            .take_if(|t| t.from.state.exists() || Instant::now() > t.until)
        else {
            return Ok(());
        };
        if !taking.from.state.exists() {
            return Err(disk_failed(format!(
                "the VM that this process was to take over has not been left to it for {} s",
                LEFT_BOUND.as_secs()
            )));
        }
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
        self.vm.resources.take_images()?;
        let state = std::mem::take(&mut saved.state);
        self.vm.machine.restore(state).map_err(machine_failed)?;
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
