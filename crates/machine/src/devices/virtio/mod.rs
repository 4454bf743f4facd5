//! Virtio devices (virtio 1.2): the contract between a device and its PCI transport.
//!
//! The transport owns features, status, queues and interrupts; a device sees them through a [`Context`] that is
//! valid for one call. Every call is made with the lock of the device held: from a vCPU (configuration), from an
//! I/O thread (queue notification, descriptor ready), or from `quiesce` and `state` (all vCPUs still).
//!
//! No method has a default that succeeds: a device that forgets its state or its quiesce does not compile.

pub mod balloon;
pub mod block;
pub mod common;
pub mod console;
pub mod interrupt;
pub mod net;
pub mod pci;
mod pci_common;
mod pci_state;
pub mod rng;
pub mod vsock;

use crate::devices::io_thread::IoRegistrar;
use crate::memory::GuestMemory;
use crate::state::{StateError, StateRecord};
use std::sync::Arc;
use std::time::Duration;
use virtio_queue::Queue;

/// Virtio device type numbers (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum VirtioKind {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Vsock = 19,
}

/// How a device interrupts its guest. Implemented by the transport; a recorder in tests.
pub trait Interrupt: Send + Sync {
    /// Used buffers in queue `queue`.
    fn queue(&self, queue: usize);
    /// The device configuration changed.
    fn config(&self);
}

/// What a device may use during one call.
pub struct Context<'a> {
    /// Guest RAM; writes through it are marked dirty by themselves. Memory handed to the kernel must be marked
    /// with [`crate::memory::mark_dirty`] after the kernel wrote it.
    pub memory: &'a GuestMemory,
    /// The queues as negotiated. Queues that the driver did not enable have `ready() == false`.
    pub queues: &'a mut [Queue],
    /// Interrupts to the guest; the device asks `Queue::needs_notification` first.
    pub interrupt: &'a Arc<dyn Interrupt>,
    /// Registers further descriptors (tap, io_uring eventfd, timer).
    pub io: &'a IoRegistrar,
    /// Feature bits that device and driver agreed on.
    pub features: u64,
}

/// A device failed in a way that the guest must see as `DEVICE_NEEDS_RESET`, or that stops its start.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the protocol (descriptor out of bounds, loop, index jump).
    #[error("{device}: the guest's driver broke the virtio protocol: {why}")]
    Driver {
        /// Which device.
        device: String,
        /// What it did.
        why: String,
    },
    /// The host side failed.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Which device.
        device: String,
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A setting that cannot work.
    #[error("{device}: {why}")]
    Config {
        /// Which device.
        device: String,
        /// What is wrong and what would be right.
        why: String,
    },
}

/// A virtio device behind a transport.
pub trait VirtioDevice: Send {
    /// Device type.
    fn kind(&self) -> VirtioKind;

    /// Name for messages, e.g. `block0`.
    fn name(&self) -> &str;

    /// Feature bits that the device offers, without `VIRTIO_F_VERSION_1`, `VIRTIO_F_RING_EVENT_IDX` and
    /// `VIRTIO_F_RING_INDIRECT_DESC`, which the transport adds.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device configuration space. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space. Writes to read-only or unknown bytes are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver set `DRIVER_OK`: start. Also called on the new instance after [`VirtioDevice::restore`].
    ///
    /// # Errors
    /// The transport sets `DEVICE_NEEDS_RESET`; nothing may be left running.
    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError>;

    /// The driver notified `queue`, or the machine goes on after a pause or restore and asks every ready queue
    /// to be looked at.
    ///
    /// # Errors
    /// The transport logs it (rate-limited) and sets `DEVICE_NEEDS_RESET`.
    fn queue_notified(&mut self, ctx: &mut Context<'_>, queue: usize) -> Result<(), DeviceError>;

    /// A descriptor that the device registered with [`IoRegistrar::add`] is ready. Tokens are the device's own,
    /// below `0x1_0000`.
    ///
    /// # Errors
    /// As for [`VirtioDevice::queue_notified`].
    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError>;

    /// The driver reset the device: end work in flight, take registrations back, forget the negotiation.
    fn reset(&mut self);

    /// Waits until no request is in flight in the host, no longer than `within`, and completes all in the used rings. Called with
    /// vCPUs still; needed where another process will go on with the same disk. `ctx` is `None` when inactive.
    ///
    /// # Errors
    /// The device could not come to rest by then; it may be asked again.
    fn drain(&mut self, ctx: Option<&mut Context<'_>>, within: Duration) -> Result<(), DeviceError>;

    /// Takes the device's own state (not queues, features or status: the transport saves those). Requests in
    /// flight are part of it, by descriptor head, and are issued again after a restore.
    ///
    /// # Errors
    /// [`StateError`].
    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError>;

    /// Gives the device its state back; [`VirtioDevice::activate`] follows if it was active.
    ///
    /// # Errors
    /// [`StateError`] if it is not this device's, or does not fit this device.
    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError>;
}
