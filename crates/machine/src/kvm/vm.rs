//! One virtual machine: memory slots, interrupt controllers, timer, clock.

use super::irq::IrqRouter;
use super::{DirtyMethod, DirtyTracker, Hypervisor, KvmError};
use crate::memory::{Ram, layout};
use crate::state::{MachineState, StateError, StateKind, StateRecord};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// A KVM virtual machine with its RAM, interrupt routes and dirty tracking. RAM outlives the memory slots.
pub struct KvmVm {
    fd: Arc<VmFd>,
    irq: Arc<IrqRouter>,
    dirty: DirtyTracker,
    ram: Ram,
    msr_indices: Arc<Vec<u32>>,
    vcpu_mmap_bytes: usize,
}

const STATE_VERSION: u16 = 1;

impl KvmVm {
    /// Creates the VM in the order that KVM wants: chips before vCPUs, memory before they run.
    ///
    /// # Errors
    /// [`KvmError::Call`] names the call.
    pub fn new(hypervisor: &Hypervisor, ram: Ram, vcpus: u32, dirty: DirtyMethod) -> Result<Self, KvmError> {
        let max = hypervisor.vcpus_max();
        if vcpus == 0 || vcpus > max {
            return Err(KvmError::Vcpus { asked: vcpus, max });
        }
        let fd = Arc::new(
            hypervisor
                .kvm()
                .create_vm()
                .map_err(KvmError::call("create VM"))?,
        );
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::call("set identity map address"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(KvmError::call("set TSS address"))?;
        fd.create_irq_chip()
            .map_err(KvmError::call("create interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(KvmError::call("create timer"))?;
        let dirty = DirtyTracker::new(&fd, &ram, dirty)?;
        let msr_indices = hypervisor
            .kvm()
            .get_msr_index_list()
            .map_err(KvmError::call("list MSRs"))?
            .as_slice()
            .to_vec();
        let vm = Self {
            irq: Arc::new(IrqRouter::new(Arc::clone(&fd))),
            fd,
            dirty,
            ram,
            msr_indices: Arc::new(msr_indices),
            vcpu_mmap_bytes: hypervisor
                .kvm()
                .get_vcpu_mmap_size()
                .map_err(KvmError::call("vCPU mapping size"))?,
        };
        vm.map_memory(false)?;
        vm.irq.install()?;
        Ok(vm)
    }

    /// Sets every memory slot, with dirty logging on or off.
    fn map_memory(&self, log: bool) -> Result<(), KvmError> {
        for r in self.ram.regions() {
            let region = kvm_userspace_memory_region {
                slot: r.slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: r.start,
                memory_size: r.len,
                userspace_addr: r.host,
            };
            // SAFETY: the range is one live shared mapping of `self.ram`, which this struct keeps for as long as
            // the VM exists; slots do not overlap because `ram_regions` does not.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(KvmError::call(format!(
                "map {} bytes of RAM at {:#x}",
                r.len, r.start
            )))?;
        }
        Ok(())
    }

    /// Starts to track which pages vCPUs write. From here on [`KvmVm::harvest_dirty`] reports them.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn start_dirty_tracking(&mut self) -> Result<(), KvmError> {
        self.map_memory(true)?;
        // What the monitor wrote before now is nobody's business: whoever needs RAM copies all of it first.
        self.ram.harvest_own_writes(|_| {});
        self.dirty.start(&self.fd)
    }

    /// Stops tracking, which gives the guest its full speed back.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn stop_dirty_tracking(&mut self) -> Result<(), KvmError> {
        self.dirty.stop();
        self.map_memory(false)
    }

    /// Takes the pages written by vCPUs and by the monitor since the last harvest: rising, each once.
    /// vCPUs and devices must stand still.
    ///
    /// # Errors
    /// [`KvmError::Call`]; pages already taken stay marked and come again with the next harvest.
    pub fn harvest_dirty(&mut self, pages: &mut Vec<steadfast_types::Gfn>) -> Result<(), KvmError> {
        self.dirty.harvest(&self.fd, &self.ram, pages)
    }

    /// The dirty tracker, to register vCPU rings and to merge failed harvests back.
    pub fn dirty(&mut self) -> &mut DirtyTracker {
        &mut self.dirty
    }

    /// How dirty pages are found.
    #[must_use]
    pub fn dirty_method(&self) -> DirtyMethod {
        self.dirty.method()
    }

    /// What a vCPU thread calls after it emptied its full ring.
    #[must_use]
    pub fn ring_reset(&self) -> Arc<dyn Fn() + Send + Sync> {
        let fd = Arc::clone(&self.fd);
        Arc::new(move || {
            if let Err(error) = super::DirtyRing::reset(&fd) {
                tracing::error!(%error, "the dirty rings cannot be reset");
            }
        })
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Interrupt routes.
    #[must_use]
    pub fn irq(&self) -> &Arc<IrqRouter> {
        &self.irq
    }

    /// MSR indices that KVM saves on this host.
    #[must_use]
    pub fn msr_indices(&self) -> &Arc<Vec<u32>> {
        &self.msr_indices
    }

    /// Size of the mapping of a vCPU descriptor in bytes.
    #[must_use]
    pub fn vcpu_mmap_bytes(&self) -> usize {
        self.vcpu_mmap_bytes
    }

    /// Creates vCPU `index`.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn create_vcpu(&self, index: u32) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(KvmError::call(format!("create vCPU {index}")))
    }

    /// Makes a guest's write to `address` signal `event` without an exit to the monitor.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn add_ioeventfd(&self, event: &EventFd, address: u64) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(KvmError::call(format!("register ioeventfd at {address:#x}")))
    }

    /// Takes the state of the interrupt controllers, the timer and the clock.
    ///
    /// # Errors
    /// [`StateError::Kvm`].
    pub fn save_chips(&self, out: &mut MachineState) -> Result<(), StateError> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(StateError::kvm("get interrupt controller"))?;
            out.push(StateRecord::encode(
                StateKind::Irqchip,
                chip_id as u16,
                STATE_VERSION,
                &chip,
            )?);
        }
        let pit = self.fd.get_pit2().map_err(StateError::kvm("get timer"))?;
        out.push(StateRecord::encode(StateKind::Pit, 0, STATE_VERSION, &pit)?);
        let clock = self.fd.get_clock().map_err(StateError::kvm("get clock"))?;
        out.push(StateRecord::encode(
            StateKind::Clock,
            0,
            STATE_VERSION,
            &clock.clock,
        )?);
        Ok(())
    }

    /// Gives timer, interrupt controllers and clock their state back; after the vCPUs have theirs.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore_chips(&self, state: &mut MachineState) -> Result<(), StateError> {
        let pit: kvm_pit_state2 = state.take(StateKind::Pit, 0)?.decode(STATE_VERSION)?;
        self.fd.set_pit2(&pit).map_err(StateError::kvm("set timer"))?;
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip: kvm_irqchip = state
                .take(StateKind::Irqchip, chip_id as u16)?
                .decode(STATE_VERSION)?;
            // A chip id from a file must not choose another chip.
            chip.chip_id = chip_id;
            self.fd
                .set_irqchip(&chip)
                .map_err(StateError::kvm("set interrupt controller"))?;
        }
        let clock: u64 = state.take(StateKind::Clock, 0)?.decode(STATE_VERSION)?;
        // Flags stay 0: with KVM_CLOCK_REALTIME the guest would jump by the length of the outage.
        let clock = kvm_clock_data {
            clock,
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(StateError::kvm("set clock"))
    }
}
