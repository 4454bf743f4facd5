//! Virtio over PCI, modern only (virtio 1.2, section 4.1): one function, one BAR.
//!
//! ```text
//! BAR 0   0x0000  common configuration     0x3000  notification, 4 bytes per queue (ioeventfd)
//!         0x1000  ISR status               0x4000  MSI-X table
//!         0x2000  device configuration     0x5000  MSI-X pending bits
//! ```
//! The transport owns what every virtio device has: status, features, queues, vectors. The device owns the rest.
//! A notification never leaves the kernel: KVM signals an eventfd, on which the device's I/O thread waits.

use super::interrupt::Vectors;
use super::{Context, DeviceError, Interrupt, VirtioDevice};
use crate::devices::bus::BusDevice;
use crate::devices::io_thread::{IoKey, IoRegistrar, IoTarget};
use crate::devices::pci::config::Identity;
use crate::devices::pci::{Capability, ConfigSpace, Msix, PciFunction};
use crate::kvm::{KvmError, KvmVm};
use crate::memory::GuestMemory;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_config as vc;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

pub(super) const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION: u64 = 0x1000;
/// Size of BAR 0 in bytes.
pub const BAR_BYTES: u64 = 0x8000;
/// Most queues of a device: what fits the notification region, and far more than any has.
pub const QUEUES_MAX: usize = 255;

/// First token of queue notifications; a device's own tokens are smaller.
const QUEUE_TOKEN: u32 = 0x1_0000;

pub(super) const STATUS_DRIVER_OK: u8 = vc::VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const STATUS_FEATURES_OK: u8 = vc::VIRTIO_CONFIG_S_FEATURES_OK as u8;
pub(super) const STATUS_NEEDS_RESET: u8 = vc::VIRTIO_CONFIG_S_NEEDS_RESET as u8;

const TRANSPORT_FEATURES: u64 =
    1 << vc::VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the driver negotiated so far.
#[derive(Default)]
pub(super) struct Negotiation {
    pub status: u8,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub generation: u8,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    pub(super) slot: u8,
    pub(super) config: ConfigSpace,
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) memory: GuestMemory,
    pub(super) queues: Vec<Queue>,
    pub(super) n: Negotiation,
    pub(super) vectors: Arc<Vectors>,
    interrupt: Arc<dyn Interrupt>,
    notify: Vec<EventFd>,
    keys: Vec<IoKey>,
    io: Option<IoRegistrar>,
    /// Offset of the PCI configuration access capability.
    window: usize,
    msix_capability: usize,
    pub(super) active: bool,
    failures: u32,
}

impl VirtioPci {
    /// Builds the function at `slot`, its BAR at `bar`; registers vectors and notifications with KVM.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(vm: &KvmVm, slot: u8, bar: u64, device: Box<dyn VirtioDevice>) -> Result<Self, KvmError> {
        let bad = |why: &str| KvmError::Call {
            what: format!("{}: {why}", device.name()),
            source: std::io::Error::from_raw_os_error(libc::EINVAL),
        };
        let sizes = device.queue_sizes();
        if sizes.is_empty() || sizes.len() > QUEUES_MAX {
            return Err(bad("number of queues"));
        }
        let queues = sizes
            .iter()
            .map(|&s| Queue::new(s).map_err(|_| bad("queue size")))
            .collect::<Result<Vec<_>, _>>()?;
        let msix = Msix::new(Arc::clone(vm.irq()), queues.len() as u16 + 1)?;
        let mut notify = Vec::new();
        for q in 0..queues.len() as u64 {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(KvmError::io("create eventfd"))?;
            vm.add_ioeventfd(&event, bar + NOTIFY + q * 4)?;
            notify.push(event);
        }
        let (config, window, msix_capability) = config_space(device.kind() as u16, bar, msix.count())
            .ok_or_else(|| bad("configuration space is full"))?;
        let vectors = Arc::new(Vectors::new(msix, queues.len()));
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&vectors) as _;
        Ok(Self {
            slot,
            config,
            device,
            memory: vm.ram().memory().clone(),
            queues,
            n: Negotiation::default(),
            vectors,
            interrupt,
            notify,
            keys: Vec::new(),
            io: None,
            window,
            msix_capability,
            active: false,
            failures: 0,
        })
    }

    /// Puts the function on an I/O thread. Before the first vCPU runs.
    pub fn attach(&mut self, io: IoRegistrar) {
        self.io = Some(io);
    }

    /// The device behind the transport.
    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// True after `DRIVER_OK`, until a reset.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// Calls the device with its context; a failure is the guest's to see and never the monitor's end.
    pub(super) fn with_device(
        &mut self,
        f: impl FnOnce(&mut dyn VirtioDevice, &mut Context<'_>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(io) = &self.io else {
            return Err(DeviceError::Config {
                device: self.device.name().into(),
                why: "not attached".into(),
            });
        };
        let mut ctx = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            interrupt: &self.interrupt,
            io,
            features: self.n.driver_features,
        };
        f(self.device.as_mut(), &mut ctx)
    }

    /// As [`Self::with_device`] while active; turns an error into `DEVICE_NEEDS_RESET`.
    fn call(&mut self, f: impl FnOnce(&mut dyn VirtioDevice, &mut Context<'_>) -> Result<(), DeviceError>) {
        if !self.active {
            return;
        }
        if let Err(error) = self.with_device(f) {
            self.needs_reset(&error);
        }
    }

    pub(super) fn needs_reset(&mut self, error: &DeviceError) {
        // A hostile guest can do this in a loop: the log hears of the 1st, 2nd, 4th, 8th...
        self.failures = self.failures.saturating_add(1);
        if self.failures.is_power_of_two() {
            tracing::warn!(%error, count = self.failures, "virtio device needs a reset by its driver");
        }
        self.n.status |= STATUS_NEEDS_RESET;
        self.stop();
        self.interrupt.config();
    }

    /// The driver set `DRIVER_OK`.
    pub(super) fn activate(&mut self) {
        let event_idx = self.n.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for q in &mut self.queues {
            q.set_event_idx(event_idx);
        }
        if let Err(error) = self.start() {
            self.needs_reset(&error);
        }
    }

    pub(super) fn start(&mut self) -> Result<(), DeviceError> {
        if let Some(q) = self
            .queues
            .iter()
            .position(|q| q.ready() && !q.is_valid(&self.memory))
        {
            return Err(DeviceError::Driver {
                device: self.device.name().into(),
                why: format!("queue {q} lies outside guest memory"),
            });
        }
        let host = |name: &str, source| DeviceError::Host {
            device: name.to_owned(),
            what: "register queue notification".into(),
            source,
        };
        if let Some(io) = &self.io {
            for (q, event) in (0u32..).zip(&self.notify) {
                if self.queues[q as usize].ready() {
                    let key = io
                        .add(event.as_raw_fd(), QUEUE_TOKEN + q)
                        .map_err(|e| host(self.device.name(), e))?;
                    self.keys.push(key);
                }
            }
        }
        self.active = true;
        self.with_device(|d, ctx| d.activate(ctx))
    }

    /// Takes the device out of work: no more notifications, nothing in flight.
    pub(super) fn stop(&mut self) {
        if let Some(io) = &self.io {
            for key in self.keys.drain(..) {
                io.remove(key);
            }
        }
        self.device.reset();
        self.active = false;
    }

    /// The driver wrote 0 to the status register.
    pub(super) fn reset(&mut self) {
        self.stop();
        for q in &mut self.queues {
            q.reset();
        }
        self.vectors.reset();
        let generation = self.n.generation;
        self.n = Negotiation {
            generation,
            ..Negotiation::default()
        };
    }

    /// A machine reset: as after power-on, with configuration space as built.
    pub fn power_on_reset(&mut self) {
        self.reset();
        self.vectors.msix().reset();
    }

    /// Brings requests in flight to their end. vCPUs stand still.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn drain(&mut self, within: Duration) -> Result<(), DeviceError> {
        if self.active {
            self.with_device(|d, ctx| d.drain(Some(ctx), within))
        } else {
            self.device.drain(None, within)
        }
    }

    /// After a restore: an interrupt that was on its way may be lost, so each ready queue signals once, which a
    /// driver takes for a spurious one; and each queue is looked at for work that nobody will notify again.
    pub fn kick(&mut self) {
        if !self.active {
            return;
        }
        for q in 0..self.queues.len() {
            if self.queues[q].ready() {
                self.interrupt.queue(q);
                self.call(|d, ctx| d.queue_notified(ctx, q));
            }
        }
        self.interrupt.config();
    }

    fn queue_ready(&mut self, queue: usize) {
        if let Some(event) = self.notify.get(queue) {
            let _ = event.read();
            self.call(|d, ctx| d.queue_notified(ctx, queue));
        }
    }

    fn bar(&mut self, offset: u64, access: Access<'_>) {
        let (region, at) = (offset / REGION * REGION, offset % REGION);
        match (region, access) {
            (COMMON, Access::Read(d)) => self.read_common(at, d),
            (COMMON, Access::Write(d)) => self.write_common(at, d),
            (ISR, Access::Read(d)) => {
                d.fill(0);
                if at == 0 {
                    d[0] = self.vectors.take_isr();
                }
            }
            (DEVICE, Access::Read(d)) => self.device.read_config(at, d),
            (DEVICE, Access::Write(d)) => self.device.write_config(at, d),
            // Reached only where KVM could not take the notification itself (the configuration window).
            (NOTIFY, Access::Write(_)) => self.queue_ready((at / 4) as usize),
            (MSIX_TABLE, Access::Read(d)) => self.vectors.msix().read_table(at, d),
            (MSIX_TABLE, Access::Write(d)) => self.vectors.msix().write_table(at, d),
            (MSIX_PENDING, Access::Read(d)) => self.vectors.msix().read_pending(at, d),
            (_, Access::Read(d)) => d.fill(0),
            (_, Access::Write(_)) => {}
        }
    }

    /// Offset and length that the driver set in the configuration access capability.
    fn window_target(&self) -> Option<(u64, usize)> {
        let bar = self.config.byte(self.window + 4);
        let offset = u64::from(self.config.word(self.window + 8));
        let len = self.config.word(self.window + 12) as usize;
        let fits = bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len as u64)
            && offset + len as u64 <= BAR_BYTES;
        fits.then_some((offset, len))
    }

    fn in_window_data(&self, offset: u16) -> bool {
        let data = self.window + 16;
        (data..data + 4).contains(&usize::from(offset))
    }
}

enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

/// Configuration space with the five virtio capabilities and MSI-X; offsets of the access window and of MSI-X.
fn config_space(kind: u16, bar: u64, vectors: u16) -> Option<(ConfigSpace, usize, usize)> {
    let class = match kind {
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x80, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    };
    let id = Identity {
        vendor: 0x1af4,
        device: 0x1040 + kind,
        revision: 1,
        class,
        subsystem: [0x1af4, 0x40 + kind],
    };
    let mut config = ConfigSpace::new(id);
    config.set_bar0(u32::try_from(bar).ok()?, BAR_BYTES as u32);
    // struct virtio_pci_cap after id and next: cap_len, cfg_type, bar, id, padding[2], offset, length.
    let body = |len: u8, cfg_type: u8, offset: u64, length: u64| {
        let mut b = vec![len, cfg_type, 0, 0, 0, 0];
        b.extend((offset as u32).to_le_bytes());
        b.extend((length as u32).to_le_bytes());
        b
    };
    let mut add = |body: &[u8], writable: &[u8]| {
        config.add_capability(&Capability {
            id: 0x09,
            body,
            writable,
        })
    };
    add(&body(16, 1, COMMON, REGION), &[])?;
    let mut notify = body(20, 2, NOTIFY, REGION);
    notify.extend(4u32.to_le_bytes());
    add(&notify, &[])?;
    add(&body(16, 3, ISR, REGION), &[])?;
    add(&body(16, 4, DEVICE, REGION), &[])?;
    // The access window: bar, offset, length and data are the driver's to write.
    let mut window = body(20, 5, 0, 0);
    window.extend([0; 4]);
    let mut writable = [0u8; 18];
    writable[2] = 0xff;
    writable[6..18].fill(0xff);
    let window_at = add(&window, &writable)?;
    let mut msix = (vectors - 1).to_le_bytes().to_vec();
    msix.extend((MSIX_TABLE as u32).to_le_bytes());
    msix.extend((MSIX_PENDING as u32).to_le_bytes());
    let msix_at = config.add_capability(&Capability {
        id: 0x11,
        body: &msix,
        writable: &[0, 0xc0],
    })?;
    Some((config, window_at, msix_at))
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.in_window_data(offset)
            && let Some((at, len)) = self.window_target()
        {
            let mut value = [0; 4];
            self.bar(at, Access::Read(&mut value[..len]));
            let from = usize::from(offset) - self.window - 16;
            for (i, b) in data.iter_mut().enumerate() {
                *b = value.get(from + i).copied().unwrap_or(0);
            }
            return;
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.in_window_data(offset)
            && let Some((at, len)) = self.window_target()
        {
            let value = self.config.word(self.window + 16).to_le_bytes();
            self.bar(at, Access::Write(&value[..len]));
        }
        let control = self.msix_capability + 2;
        if (control..control + 2)
            .any(|c| (usize::from(offset)..usize::from(offset) + data.len()).contains(&c))
        {
            let value = u16::from_le_bytes([self.config.byte(control), self.config.byte(control + 1)]);
            self.vectors.msix().set_control(value);
        }
    }
}

impl BusDevice for VirtioPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bar(offset, Access::Read(data));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bar(offset, Access::Write(data));
    }
}

impl IoTarget for VirtioPci {
    fn io_ready(&mut self, token: u32) {
        match token.checked_sub(QUEUE_TOKEN) {
            Some(queue) => self.queue_ready(queue as usize),
            None => self.call(|d, ctx| d.io_ready(ctx, token)),
        }
    }
}
