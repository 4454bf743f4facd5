//! Devices of the machine: buses, PCI, virtio, and the few legacy parts that a PC needs.

pub mod bus;
pub mod io_thread;
pub mod legacy;
pub mod pci;
pub mod virtio;
