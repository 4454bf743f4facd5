//! The machine: RAM, vCPUs and devices put together, started, stopped, saved and restored.
//!
//! ```text
//! Builder::new ---- add devices ----> build() ---> Machine (all still)
//!                                                   |  set first registers, or restore(state)
//!                                                   v
//!                                    resume() <--> quiesce()  (see `quiesce`)
//! ```
//! One owner: whoever holds the `Machine` decides when it runs. vCPU and I/O threads end when it is dropped.

use crate::cpuid::GuestCpu;
use crate::devices::bus::{Bus, BusDevice, BusRangeError, Stateful};
use crate::devices::io_thread::IoThread;
use crate::devices::pci::PciRoot;
use crate::devices::pci::root::{ConfigPorts, Ecam};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::pci::{BAR_BYTES, VirtioPci};
use crate::kvm::{DirtyMethod, DirtyRing, Hypervisor, KvmError, KvmVm, urgent};
use crate::memory::{Ram, layout};
use crate::state::{MachineState, StateError, StateKind};
use crate::vcpu::{self, VcpuEvents, VcpuPeripherals, Vcpus};
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_sregs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use steadfast_types::{Gfn, PAGE_SIZE};
use vmm_sys_util::eventfd::EventFd;

/// A machine that cannot be put together or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusRangeError),
    /// State could not be given to a part.
    #[error(transparent)]
    State(#[from] StateError),
    /// More devices than slots.
    #[error("a machine has room for 31 PCI devices")]
    Slots,
    /// A thread could not be started.
    #[error("cannot start I/O thread {name}: {source}")]
    Thread {
        /// Name of the thread.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What runs first on each thread of a kind: seccomp filters and priorities are set there.
#[derive(Clone)]
pub struct ThreadHooks {
    /// On each vCPU thread, with its index.
    pub vcpu: Arc<dyn Fn(u32) + Send + Sync>,
    /// On each device I/O thread, with its name.
    pub io: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Default for ThreadHooks {
    fn default() -> Self {
        Self {
            vcpu: Arc::new(|_| {}),
            io: Arc::new(|_| {}),
        }
    }
}

/// Puts a machine together.
pub struct Builder {
    vm: KvmVm,
    vcpus: u32,
    hooks: ThreadHooks,
    pio: Bus,
    mmio: Bus,
    root: Arc<Mutex<PciRoot>>,
    virtio: Vec<Arc<Mutex<VirtioPci>>>,
    parts: Vec<Arc<Mutex<dyn Stateful>>>,
    io_threads: Vec<(String, IoThread)>,
}

impl Builder {
    /// A machine with RAM, chips and an empty PCI bus.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn new(
        hypervisor: &Hypervisor,
        ram: Ram,
        vcpus: u32,
        dirty: DirtyMethod,
        hooks: ThreadHooks,
    ) -> Result<Self, MachineError> {
        let vm = KvmVm::new(hypervisor, ram, vcpus, dirty)?;
        let root = Arc::new(Mutex::new(PciRoot::default()));
        let mut builder = Self {
            vm,
            vcpus,
            hooks,
            pio: Bus::default(),
            mmio: Bus::default(),
            root: Arc::clone(&root),
            virtio: Vec::new(),
            parts: vec![Arc::clone(&root) as _],
            io_threads: Vec::new(),
        };
        builder
            .pio
            .add(0xcf8, 8, Arc::new(Mutex::new(ConfigPorts(Arc::clone(&root)))))?;
        builder.mmio.add(
            layout::PCI_ECAM_START,
            layout::PCI_ECAM_SIZE,
            Arc::new(Mutex::new(Ecam(root))),
        )?;
        Ok(builder)
    }

    /// Guest RAM, to load a kernel into.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    /// An edge-triggered interrupt line to a pin of the chips, for a legacy device.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn line(&self, gsi: u32) -> Result<EventFd, MachineError> {
        Ok(self.vm.irq().add_line(gsi)?)
    }

    /// Adds a legacy device on port ranges `(first port, count)`; the first range has offset 0 of the device.
    ///
    /// # Errors
    /// [`MachineError::Bus`] when a range is taken.
    pub fn add_ports<D>(&mut self, ranges: &[(u16, u64)], device: D) -> Result<Arc<Mutex<D>>, MachineError>
    where
        D: BusDevice + Stateful + 'static,
    {
        let device = Arc::new(Mutex::new(device));
        for &(start, len) in ranges {
            self.pio.add(u64::from(start), len, Arc::clone(&device) as _)?;
        }
        self.parts.push(Arc::clone(&device) as _);
        Ok(device)
    }

    /// Adds a port device without state of its own.
    ///
    /// # Errors
    /// [`MachineError::Bus`] when the range is taken.
    pub fn add_stateless_ports(
        &mut self,
        start: u16,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), MachineError> {
        Ok(self.pio.add(u64::from(start), len, device)?)
    }

    /// Adds a virtio device in the next PCI slot, served by the I/O thread `thread` (made on first use).
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>, thread: &str) -> Result<u8, MachineError> {
        let slot = self.virtio.len() + 1;
        let slot = u8::try_from(slot)
            .ok()
            .filter(|&s| s < 32)
            .ok_or(MachineError::Slots)?;
        let bar = layout::PCI_MMIO_START + u64::from(slot) * BAR_BYTES;
        let function = Arc::new(Mutex::new(VirtioPci::new(&self.vm, slot, bar, device)?));
        let as_target: Arc<Mutex<dyn crate::devices::io_thread::IoTarget>> = Arc::clone(&function) as _;
        let target: Weak<Mutex<dyn crate::devices::io_thread::IoTarget>> = Arc::downgrade(&as_target);
        let io = self.io_thread(thread)?.registrar(target);
        lock(&function).attach(io);
        self.mmio.add(bar, BAR_BYTES, Arc::clone(&function) as _)?;
        if !lock(&self.root).add(slot, Arc::clone(&function) as _) {
            return Err(MachineError::Slots);
        }
        self.virtio.push(function);
        Ok(slot)
    }

    fn io_thread(&mut self, name: &str) -> Result<&IoThread, MachineError> {
        let at = match self.io_threads.iter().position(|(n, _)| n == name) {
            Some(at) => at,
            None => {
                let hook = Arc::clone(&self.hooks.io);
                let own = name.to_owned();
                let thread =
                    IoThread::start(name, move || hook(&own)).map_err(|source| MachineError::Thread {
                        name: name.to_owned(),
                        source,
                    })?;
                // Still, like the rest of the machine, until it is resumed.
                thread.hold();
                self.io_threads.push((name.to_owned(), thread));
                self.io_threads.len() - 1
            }
        };
        Ok(&self.io_threads[at].1)
    }

    /// Creates the vCPUs with their CPUID and parks them. `cpuid` is asked for each vCPU's leaves.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn build(
        mut self,
        events: Arc<dyn VcpuEvents>,
        cpuid: impl Fn(u32) -> Vec<kvm_cpuid_entry2>,
    ) -> Result<Machine, MachineError> {
        let mut fds = Vec::new();
        let mut rings = Vec::new();
        let mut cpu = Vec::new();
        for index in 0..self.vcpus {
            let fd = self.vm.create_vcpu(index)?;
            let leaves = cpuid(index);
            vcpu::state::set_cpuid(&fd, &leaves)?;
            if index == 0 {
                cpu = leaves;
            }
            let ring_bytes = self.vm.dirty().ring_bytes();
            let ring = match ring_bytes {
                0 => None,
                bytes => Some(Arc::new(Mutex::new(DirtyRing::map(&fd, bytes)?))),
            };
            if let Some(ring) = &ring {
                self.vm.dirty().add_ring(Arc::clone(ring));
            }
            rings.push(ring);
            fds.push(fd);
        }
        let msrs = match fds.first() {
            Some(first) => Arc::new(vcpu::state::readable_msrs(first, self.vm.msr_indices())?),
            None => Arc::default(),
        };
        let slots: Vec<u64> = self
            .vm
            .ram()
            .regions()
            .iter()
            .map(|r| r.start / PAGE_SIZE)
            .collect();
        let peripherals = VcpuPeripherals {
            pio: Arc::new(self.pio),
            mmio: Arc::new(self.mmio),
            events,
            overflow: self.vm.dirty().overflow(),
            page_of: Arc::new(move |slot, page| slots.get(slot as usize).map(|first| Gfn(first + page))),
            reset_rings: self.vm.ring_reset(),
        };
        let vcpus = Vcpus::start(fds, rings, &peripherals, msrs, &self.hooks.vcpu)?;
        Ok(Machine {
            vcpus,
            io_threads: self.io_threads,
            virtio: self.virtio,
            parts: self.parts,
            ram: self.vm.ram().clone(),
            dirty_method: self.vm.dirty_method(),
            restored: AtomicBool::new(false),
            cpu: Mutex::new(GuestCpu::new(cpu)),
            vm: Mutex::new(self.vm),
        })
    }
}

/// A machine. It is still until [`Machine::resume`].
pub struct Machine {
    // Dropped in this order: vCPUs stop before I/O threads, both before the devices and the VM that they use.
    pub(crate) vcpus: Vcpus,
    io_threads: Vec<(String, IoThread)>,
    pub(crate) virtio: Vec<Arc<Mutex<VirtioPci>>>,
    pub(crate) parts: Vec<Arc<Mutex<dyn Stateful>>>,
    ram: Ram,
    dirty_method: DirtyMethod,
    /// Set by a restore: at the first resume every queue is looked at.
    restored: AtomicBool,
    /// What the guest sees.
    cpu: Mutex<GuestCpu>,
    pub(crate) vm: Mutex<KvmVm>,
}

pub(crate) fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// Makes stops come before other work of the host from now on, where it allows that: for a machine that is cut often.
    pub fn hurry_stops(&self) {
        self.vcpus.hurry_stops();
    }

    /// Gives the I/O threads precedence while the machine is being stopped: one of them may hold a device that a vCPU, or who stops
    /// it, waits for. Gives back whether it did.
    pub(crate) fn hurry_io(&self) -> bool {
        let threads = self.io_threads.iter().filter_map(|(_, t)| t.id());
        self.vcpus.is_urgent() && threads.filter(|id| urgent::raise(*id).is_ok()).count() > 0
    }

    /// Takes the precedence back.
    pub(crate) fn calm_io(&self) {
        let threads = self.io_threads.iter().filter_map(|(_, t)| t.id());
        threads.for_each(urgent::lower);
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        if self.restored.swap(false, Ordering::AcqRel) {
            for device in &self.virtio {
                lock(device).kick();
            }
        }
        for (_, thread) in &self.io_threads {
            thread.release();
        }
        self.vcpus.resume();
    }

    /// No device is called from now on, until [`Machine::resume`]. The caller holds their locks.
    pub(crate) fn hold_devices(&self) {
        for (_, thread) in &self.io_threads {
            thread.hold();
        }
    }

    /// Sets the first registers of a vCPU, from those after power-on.
    ///
    /// # Errors
    /// [`MachineError::State`].
    pub fn set_registers(
        &self,
        index: u32,
        f: impl FnOnce(kvm_sregs) -> (kvm_regs, kvm_sregs),
    ) -> Result<(), MachineError> {
        let set = |fd: &kvm_ioctls::VcpuFd| -> Result<(), StateError> {
            let (regs, sregs) = f(fd.get_sregs().map_err(StateError::kvm("get segment registers"))?);
            fd.set_sregs(&sregs)
                .map_err(StateError::kvm("set segment registers"))?;
            fd.set_regs(&regs).map_err(StateError::kvm("set registers"))
        };
        self.vcpus
            .with(index, set)
            .ok_or(StateError::Missing(StateKind::Vcpu, index as u16))??;
        Ok(())
    }

    /// Sets MSRs of a vCPU that has not run yet.
    ///
    /// # Errors
    /// [`MachineError::State`].
    pub fn set_msrs(&self, index: u32, msrs: &[kvm_bindings::kvm_msr_entry]) -> Result<(), MachineError> {
        self.vcpus
            .with(index, |fd| vcpu::state::set_msrs(fd, msrs))
            .ok_or(StateError::Missing(StateKind::Vcpu, index as u16))??;
        Ok(())
    }

    /// The CPU that the guest sees.
    #[must_use]
    pub fn cpu(&self) -> GuestCpu {
        lock(&self.cpu).clone()
    }

    /// Shows the guest this CPU instead, which it has seen on another host. No vCPU has run yet, or has been given a state.
    ///
    /// # Errors
    /// [`MachineError::State`].
    pub fn set_cpu(&self, cpu: &GuestCpu) -> Result<(), MachineError> {
        let mut now = lock(&self.cpu);
        if *now == *cpu {
            return Ok(());
        }
        let count = self.vcpus.count() as u32;
        for index in 0..count {
            let leaves = cpu.leaves(index, count);
            self.vcpus
                .with(index, |fd| vcpu::state::set_cpuid(fd, &leaves))
                .ok_or(StateError::Missing(StateKind::Vcpu, index as u16))??;
        }
        *now = cpu.clone();
        Ok(())
    }

    /// Starts a vCPU that would otherwise wait for another to wake it (flat guests run on all from the start).
    ///
    /// # Errors
    /// [`MachineError::State`].
    pub fn make_runnable(&self, index: u32) -> Result<(), MachineError> {
        let state = kvm_bindings::kvm_mp_state {
            mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
        };
        self.vcpus
            .with(index, |fd| {
                fd.set_mp_state(state)
                    .map_err(StateError::kvm("make vCPU runnable"))
            })
            .ok_or(StateError::Missing(StateKind::Vcpu, index as u16))??;
        Ok(())
    }

    /// Gives every part of a machine that has never run its saved state; RAM is already in place. After this
    /// [`Machine::resume`] goes on where the saved machine stood.
    ///
    /// # Errors
    /// [`MachineError::State`]; the machine must then be dropped.
    pub fn restore(&self, mut state: MachineState) -> Result<(), MachineError> {
        for index in 0..self.vcpus.count() as u32 {
            let record = state.take(StateKind::Vcpu, index as u16)?;
            self.vcpus.restore(index, &record)?;
        }
        lock(&self.vm).restore_chips(&mut state)?;
        for part in &self.parts {
            let mut part = lock(part);
            let (kind, instance) = part.state_key();
            part.restore(&state.take(kind, instance)?)?;
        }
        for device in &self.virtio {
            lock(device).restore(&mut state)?;
        }
        state.finish()?;
        // Not before the machine runs: until then another process may be the one that goes on.
        self.restored.store(true, Ordering::Release);
        Ok(())
    }

    /// Starts to track dirty pages, so that [`crate::quiesce::Quiesced::harvest`] finds them.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn start_dirty_tracking(&self) -> Result<(), MachineError> {
        Ok(lock(&self.vm).start_dirty_tracking()?)
    }

    /// Stops to track dirty pages.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn stop_dirty_tracking(&self) -> Result<(), MachineError> {
        Ok(lock(&self.vm).stop_dirty_tracking()?)
    }

    /// How dirty pages are found.
    #[must_use]
    pub fn dirty_method(&self) -> DirtyMethod {
        self.dirty_method
    }
}
