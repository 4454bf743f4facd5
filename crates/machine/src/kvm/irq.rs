//! Interrupt routes: which GSI reaches which pin of a chip, or is an MSI.
//!
//! GSIs 0 to 23 are the pins of the I/O APIC (0 to 15 also of the PICs); the rest are MSI vectors of devices, each with
//! an irqfd. KVM takes the table as a whole, so the router keeps it and sends it on every change.

use super::KvmError;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

const IOAPIC_PINS: u32 = 24;
/// KVM's table limit is 4096; what is left after the chips' pins.
const MSI_MAX: usize = 4096 - 40;

/// Address and data that a device writes to raise its message-signalled interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiRoute {
    /// Low half of the message address.
    pub address_lo: u32,
    /// High half of the message address.
    pub address_hi: u32,
    /// Message data.
    pub data: u32,
}

/// Owner of the table of one VM.
pub struct IrqRouter {
    vm: Arc<VmFd>,
    msi: Mutex<Vec<Option<MsiRoute>>>,
}

impl IrqRouter {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            msi: Mutex::default(),
        }
    }

    /// Sends the chips' own routes; once, after the chips exist.
    pub(super) fn install(&self) -> Result<(), KvmError> {
        self.send(&[])
    }

    fn send(&self, msi: &[Option<MsiRoute>]) -> Result<(), KvmError> {
        let mut entries = Vec::with_capacity(40 + msi.len());
        let pin = |gsi: u32, chip: u32, pin: u32| {
            let mut e = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            e.u.irqchip.irqchip = chip;
            e.u.irqchip.pin = pin;
            e
        };
        for gsi in 0..IOAPIC_PINS {
            if gsi < 8 {
                entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
            } else if gsi < 16 {
                entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
            }
            // The PIT's interrupt 0 arrives at pin 2 of the I/O APIC, as the MADT's override says.
            match gsi {
                0 => entries.push(pin(0, KVM_IRQCHIP_IOAPIC, 2)),
                2 => {}
                n => entries.push(pin(n, KVM_IRQCHIP_IOAPIC, n)),
            }
        }
        for (route, gsi) in msi.iter().zip(IOAPIC_PINS..) {
            let Some(route) = route else { continue };
            let mut e = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            e.u.msi.address_lo = route.address_lo;
            e.u.msi.address_hi = route.address_hi;
            e.u.msi.data = route.data;
            entries.push(e);
        }
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| KvmError::Call {
            what: "interrupt routes".into(),
            source: io::Error::other(format!("{e:?}")),
        })?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(KvmError::call("set interrupt routes"))
    }

    /// A new MSI vector without a route yet: returns its GSI and an irqfd. Signalling it before a route is set
    /// does nothing.
    ///
    /// # Errors
    /// [`KvmError::Call`] when the table is full or KVM refuses.
    pub fn add_msi(&self) -> Result<(u32, EventFd), KvmError> {
        let mut msi = self.msi.lock().unwrap_or_else(PoisonError::into_inner);
        if msi.len() >= MSI_MAX {
            return Err(KvmError::Call {
                what: "allocate MSI vector".into(),
                source: io::Error::from_raw_os_error(libc::ENOSPC),
            });
        }
        let gsi = IOAPIC_PINS + msi.len() as u32;
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(KvmError::io("create irqfd"))?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(KvmError::call(format!("register irqfd for GSI {gsi}")))?;
        msi.push(None);
        Ok((gsi, event))
    }

    /// An edge-triggered line to a pin of the chips.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn add_line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(KvmError::io("create irqfd"))?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(KvmError::call(format!("register irqfd for GSI {gsi}")))?;
        Ok(event)
    }

    /// Sets where an MSI vector goes, or that it goes nowhere.
    ///
    /// # Errors
    /// [`KvmError::Call`]; the old route stays.
    pub fn set_msi(&self, gsi: u32, route: Option<MsiRoute>) -> Result<(), KvmError> {
        let mut msi = self.msi.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = gsi
            .checked_sub(IOAPIC_PINS)
            .map(|i| i as usize)
            .filter(|&i| i < msi.len())
        else {
            return Err(KvmError::Call {
                what: format!("route of GSI {gsi}"),
                source: io::Error::from_raw_os_error(libc::EINVAL),
            });
        };
        if msi[index] == route {
            return Ok(());
        }
        let old = std::mem::replace(&mut msi[index], route);
        self.send(&msi).inspect_err(|_| msi[index] = old)
    }
}
