//! The inside of a vCPU thread: `KVM_RUN`, and what each exit means.

use super::Control;
use crate::devices::bus::Bus;
use crate::kvm::DirtyRing;
use crate::state::StateError;
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use steadfast_types::Gfn;

/// Something that ended a vCPU's run, or that the machine's owner must hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest shut down by a triple fault or an unrecoverable exception.
    TripleFault(u32),
    /// KVM could not go on with this vCPU.
    Broken(u32),
    /// The guest asked the firmware for a reset.
    Reset,
    /// The guest asked the firmware for a shutdown.
    Shutdown,
}

/// Who hears of [`VcpuEvent`]s. Called on vCPU threads; must not block.
pub trait VcpuEvents: Send + Sync {
    /// Takes one event.
    fn vcpu_event(&self, event: VcpuEvent);
}

/// Turns a dirty entry into a page number and keeps it until the next harvest.
pub type RingSink = Arc<dyn Fn(u32, u64) -> Option<Gfn> + Send + Sync>;

/// What a vCPU can reach.
#[derive(Clone)]
pub struct VcpuPeripherals {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Events of the whole machine.
    pub events: Arc<dyn VcpuEvents>,
    /// Where pages of a full dirty ring go.
    pub overflow: Arc<Mutex<Vec<Gfn>>>,
    /// Maps `(slot, page)` of a ring entry to a page number.
    pub page_of: RingSink,
    /// Resets the rings after an overflow.
    pub reset_rings: Arc<dyn Fn() + Send + Sync>,
}

pub(super) struct Runner {
    pub index: u32,
    pub fd: Arc<Mutex<VcpuFd>>,
    pub control: Arc<Control>,
    pub peripherals: VcpuPeripherals,
    pub ring: Option<Arc<Mutex<DirtyRing>>>,
    pub exits: Arc<AtomicU64>,
}

enum Next {
    /// Enter the guest again.
    Go,
    /// KVM has nothing pending: the thread may park.
    Parked,
    /// This vCPU will not run again.
    Ended,
}

impl Runner {
    /// Takes `immediate_exit` back. Called with the control lock held and the order `Run` given.
    pub fn arm(&mut self) {
        super::lock(&self.fd).set_kvm_immediate_exit(0);
    }

    /// Runs the guest until the machine wants this vCPU to park (true) or it ended (false).
    pub fn run(&mut self) -> bool {
        let fd = Arc::clone(&self.fd);
        let mut vcpu = super::lock(&fd);
        loop {
            match self.step(&mut vcpu) {
                Next::Go => {}
                Next::Parked => return true,
                Next::Ended => return false,
            }
        }
    }

    fn step(&self, vcpu: &mut VcpuFd) -> Next {
        let exit = vcpu.run();
        let p = &self.peripherals;
        match exit {
            Ok(exit) => {
                self.exits.fetch_add(1, Ordering::Relaxed);
                match exit {
                    VcpuExit::IoOut(port, data) => p.pio.write(u64::from(port), data),
                    VcpuExit::IoIn(port, data) => p.pio.read(u64::from(port), data),
                    VcpuExit::MmioRead(address, data) => p.mmio.read(address, data),
                    VcpuExit::MmioWrite(address, data) => p.mmio.write(address, data),
                    VcpuExit::Shutdown => return self.ended(VcpuEvent::TripleFault(self.index)),
                    VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
                        p.events.vcpu_event(VcpuEvent::Shutdown)
                    }
                    VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => p.events.vcpu_event(VcpuEvent::Reset),
                    VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => {}
                    VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => self.drain_ring(),
                    VcpuExit::FailEntry(reason, cpu) => {
                        tracing::error!(vcpu = self.index, reason, cpu, "KVM cannot enter the guest");
                        return self.ended(VcpuEvent::Broken(self.index));
                    }
                    other => {
                        tracing::error!(vcpu = self.index, exit = ?other, "KVM cannot go on with this vCPU");
                        return self.ended(VcpuEvent::Broken(self.index));
                    }
                }
                Next::Go
            }
            Err(e) if e.errno() == libc::EINTR => {
                // With `immediate_exit` set KVM returns here only after pending I/O is complete.
                if self.control.should_run(vcpu) {
                    Next::Go
                } else {
                    Next::Parked
                }
            }
            Err(e) if e.errno() == libc::EAGAIN => {
                if self.control.should_run(vcpu) {
                    Next::Go
                } else {
                    Next::Parked
                }
            }
            Err(e) => {
                tracing::error!(vcpu = self.index, error = %e, "KVM_RUN failed");
                self.ended(VcpuEvent::Broken(self.index))
            }
        }
    }

    fn ended(&self, event: VcpuEvent) -> Next {
        self.peripherals.events.vcpu_event(event);
        Next::Ended
    }

    /// A full ring stops its vCPU: empty it into the overflow list, where the next harvest finds it.
    fn drain_ring(&self) {
        let Some(ring) = &self.ring else { return };
        let p = &self.peripherals;
        let mut pages = p.overflow.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.harvest(|slot, page| pages.extend((p.page_of)(slot, page)));
        // Bounded: the list never holds more than each page once.
        if pages.len() > 1 << 18 {
            pages.sort_unstable();
            pages.dedup();
        }
        drop(ring);
        drop(pages);
        (p.reset_rings)();
    }
}

impl From<VcpuEvent> for StateError {
    fn from(e: VcpuEvent) -> Self {
        Self::Refused(format!("a vCPU has ended: {e:?}"))
    }
}
