//! Interrupts of one virtio function: which vector each queue and the configuration use, and the ISR register.

use super::Interrupt;
use crate::devices::pci::{Msix, NO_VECTOR};
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

/// ISR bit: used buffers in some queue.
pub const ISR_QUEUE: u8 = 1;
/// ISR bit: device configuration changed.
pub const ISR_CONFIG: u8 = 2;

/// Vectors as the driver chose them.
pub struct Vectors {
    msix: Msix,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
}

impl Vectors {
    /// For `queues` queues, all without a vector.
    #[must_use]
    pub fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
        }
    }

    /// The MSI-X table.
    #[must_use]
    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Vector for configuration changes.
    #[must_use]
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Acquire)
    }

    /// Vector of a queue; [`NO_VECTOR`] for a queue that does not exist.
    #[must_use]
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
    }

    fn checked(&self, vector: u16) -> u16 {
        // A vector that the table does not have cannot be mapped: the driver reads NO_VECTOR back and knows.
        if vector < self.msix.count() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// The driver maps configuration changes to a vector.
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.checked(vector), Ordering::Release);
    }

    /// The driver maps a queue to a vector.
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(v) = self.queues.get(usize::from(queue)) {
            v.store(self.checked(vector), Ordering::Release);
        }
    }

    /// Reads the ISR register, which clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The ISR register as it stands.
    #[must_use]
    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    /// Gives the ISR register its value back.
    pub fn set_isr(&self, isr: u8) {
        self.isr.store(isr, Ordering::Release);
    }

    /// Back to the state after reset: no vectors, nothing pending.
    pub fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::Release);
        for q in &self.queues {
            q.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
    }

    fn signal(&self, vector: u16, isr: u8) {
        self.isr.fetch_or(isr, Ordering::AcqRel);
        if vector != NO_VECTOR {
            self.msix.signal(vector);
        }
    }
}

impl Interrupt for Vectors {
    fn queue(&self, queue: usize) {
        let vector = self
            .queues
            .get(queue)
            .map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        self.signal(vector, ISR_QUEUE);
    }

    fn config(&self) {
        self.signal(self.config_vector(), ISR_CONFIG);
    }
}
