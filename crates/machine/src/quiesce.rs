//! The one place that stops a machine: all vCPUs at one instant, then every device, as a guard.
//!
//! Order, and why: vCPUs first, all kicked before any is waited for, because a vCPU may be inside a device and holds
//! its lock; then the locks of all devices, after which no I/O thread can touch a queue or guest memory; then
//! interrupts that devices raised on the way have arrived in the local APICs, and state may be taken. Dropping the
//! guard lets all go on in the opposite order.
//!
//! Invariant: while a [`Quiesced`] lives, guest memory, device state and vCPU state do not change.

use crate::devices::bus::Stateful;
use crate::devices::virtio::pci::VirtioPci;
use crate::kvm::{KvmError, KvmVm};
use crate::machine::{Machine, lock};
use crate::state::{MachineState, StateError};
use crate::vcpu::VcpuStuck;
use std::cell::Cell;
use std::sync::{MutexGuard, TryLockError};
use std::time::{Duration, Instant};
use steadfast_types::Gfn;

/// A machine that could not be stopped; it runs on.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// vCPUs did not stop in time.
    #[error(transparent)]
    Vcpus(#[from] VcpuStuck),
    /// A device's code failed earlier, so its state cannot be trusted.
    #[error("device in PCI slot {0} has failed inside the monitor; its state cannot be taken")]
    Poisoned(u8),
}

/// How long the steps of a stop took.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuiesceTimes {
    /// From the kick to the last vCPU parked.
    pub vcpus: Duration,
    /// Until all devices stood still.
    pub devices: Duration,
}

/// A machine that stands still. It goes on when this is dropped, unless [`Quiesced::keep_stopped`].
pub struct Quiesced<'m> {
    machine: &'m Machine,
    // Taken and given back around the drop, so that devices are free before vCPUs run.
    held: Option<Held<'m>>,
    resume: bool,
    /// How long it took to stop.
    pub times: QuiesceTimes,
}

struct Held<'m> {
    virtio: Vec<MutexGuard<'m, VirtioPci>>,
    parts: Vec<MutexGuard<'m, dyn Stateful + 'static>>,
    vm: MutexGuard<'m, KvmVm>,
}

/// I/O threads that have precedence until this goes.
struct Hurried<'m> {
    machine: &'m Machine,
    done: Cell<bool>,
}

impl Hurried<'_> {
    fn hurry(&self) {
        if !self.done.get() {
            self.done.set(self.machine.hurry_io());
        }
    }
}

impl Drop for Hurried<'_> {
    fn drop(&mut self) {
        if self.done.get() {
            self.machine.calm_io();
        }
    }
}

impl Machine {
    /// Stops the machine at one instant.
    ///
    /// # Errors
    /// [`QuiesceError`]; the machine runs on.
    pub fn quiesce(&self) -> Result<Quiesced<'_>, QuiesceError> {
        let start = Instant::now();
        let hurried = Hurried {
            machine: self,
            done: Cell::new(false),
        };
        self.vcpus.pause(|| hurried.hurry())?;
        let vcpus = start.elapsed();
        let mut virtio = Vec::with_capacity(self.virtio.len());
        for (device, slot) in self.virtio.iter().zip(1u8..) {
            let locked = device.try_lock().or_else(|error| match error {
                TryLockError::Poisoned(poisoned) => Err(poisoned),
                TryLockError::WouldBlock => {
                    hurried.hurry();
                    device.lock()
                }
            });
            match locked {
                Ok(guard) => virtio.push(guard),
                Err(_) => {
                    drop(virtio);
                    self.vcpus.resume();
                    return Err(QuiesceError::Poisoned(slot));
                }
            }
        }
        let parts = self.parts.iter().map(|p| lock(p.as_ref())).collect();
        let held = Held {
            virtio,
            parts,
            vm: lock(&self.vm),
        };
        let times = QuiesceTimes {
            vcpus,
            devices: start.elapsed() - vcpus,
        };
        Ok(Quiesced {
            machine: self,
            held: Some(held),
            resume: true,
            times,
        })
    }
}

impl<'m> Quiesced<'m> {
    /// Takes the state of every part. Several vCPUs save in parallel, while this thread saves the devices.
    ///
    /// # Errors
    /// [`StateError`]; the machine is unharmed.
    pub fn save(&mut self) -> Result<MachineState, StateError> {
        let mut state = MachineState::default();
        let Some(held) = &mut self.held else {
            return Ok(state);
        };
        let vcpus = self.machine.vcpus.save_begin();
        let mut devices = MachineState::default();
        for part in &mut held.parts {
            devices.push(part.save()?);
        }
        for device in &mut held.virtio {
            device.save(&mut devices)?;
        }
        for record in vcpus.finish()? {
            state.push(record);
        }
        // After the vCPUs, as Linux's own order of dependence is: local APICs hold what the chips have delivered.
        held.vm.save_chips(&mut state)?;
        state.append(devices);
        Ok(state)
    }

    /// Brings device requests in flight to their end, so that another process may use the same disks. Each device is waited for
    /// no longer than `within`; with nothing, what has ended by itself is taken.
    ///
    /// # Errors
    /// The device that did not come to rest; it may be asked again.
    pub fn drain(&mut self, within: Duration) -> Result<(), crate::devices::virtio::DeviceError> {
        let Some(held) = &mut self.held else { return Ok(()) };
        held.virtio.iter_mut().try_for_each(|d| d.drain(within))
    }

    /// Takes the pages that changed since the last harvest, rising, each once.
    ///
    /// # Errors
    /// [`KvmError`]; nothing is forgotten.
    pub fn harvest(&mut self, pages: &mut Vec<Gfn>) -> Result<(), KvmError> {
        match &mut self.held {
            Some(held) => held.vm.harvest_dirty(pages),
            None => Ok(()),
        }
    }

    /// Gives pages back that could not be captured: they are dirty again.
    pub fn merge_back(&mut self, pages: &[Gfn]) {
        if let Some(held) = &mut self.held {
            held.vm.dirty().merge_back(pages);
        }
    }

    /// The virtio functions in slot order, for what must happen at the cut (cutting a disk's epoch, marking the
    /// boundary in the stream of frames).
    pub fn virtio(&mut self) -> &mut [MutexGuard<'m, VirtioPci>] {
        match &mut self.held {
            Some(held) => &mut held.virtio,
            None => &mut [],
        }
    }

    /// Leaves the machine stopped when this guard goes: the vCPUs parked, and no device called by its I/O thread, until
    /// [`Machine::resume`]. Device locks are free again, so that state can be looked at.
    pub fn keep_stopped(mut self) {
        self.machine.hold_devices();
        self.resume = false;
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        self.held = None;
        if self.resume {
            self.machine.resume();
        }
    }
}
