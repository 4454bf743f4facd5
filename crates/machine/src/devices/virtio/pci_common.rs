//! The common configuration structure (virtio 1.2, 4.1.4.3): negotiation, register by register.

use super::pci::{STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET, VirtioPci};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;

const LOW: u64 = 0xffff_ffff;

impl VirtioPci {
    /// Reads a register of any width; the 64-bit ones also as halves.
    pub(super) fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.n.queue_select));
        let half = |bits: u64, select: u32| match select {
            0 => bits & LOW,
            1 => bits >> 32,
            _ => 0,
        };
        let value: u64 = match offset & !3 {
            0x00 => u64::from(self.n.device_feature_select),
            0x04 => half(self.offered(), self.n.device_feature_select),
            0x08 => u64::from(self.n.driver_feature_select),
            0x0c => half(self.n.driver_features, self.n.driver_feature_select),
            // config_msix_vector, num_queues
            0x10 => u64::from(self.vectors.config_vector()) | (self.queues.len() as u64) << 16,
            // device_status, config_generation, queue_select
            0x14 => {
                u64::from(self.n.status)
                    | u64::from(self.n.generation) << 8
                    | u64::from(self.n.queue_select) << 16
            }
            // queue_size, queue_msix_vector
            0x18 => match queue {
                Some(q) => {
                    // A queue that is not enabled shows what it could be.
                    let size = if q.ready() || q.size() != 0 {
                        q.size()
                    } else {
                        q.max_size()
                    };
                    u64::from(size) | u64::from(self.vectors.queue_vector(self.n.queue_select)) << 16
                }
                None => 0xffff << 16,
            },
            // queue_enable, queue_notify_off
            0x1c => queue.map_or(0, |q| u64::from(q.ready()) | u64::from(self.n.queue_select) << 16),
            0x20 => queue.map_or(0, |q| q.desc_table() & LOW),
            0x24 => queue.map_or(0, |q| q.desc_table() >> 32),
            0x28 => queue.map_or(0, |q| q.avail_ring() & LOW),
            0x2c => queue.map_or(0, |q| q.avail_ring() >> 32),
            0x30 => queue.map_or(0, |q| q.used_ring() & LOW),
            0x34 => queue.map_or(0, |q| q.used_ring() >> 32),
            _ => 0,
        };
        // Registers are little-endian and at most 32 bits wide here; 8-byte reads take the next word along.
        let bytes = (value & LOW).to_le_bytes();
        let from = (offset & 3) as usize;
        for (i, b) in data.iter_mut().enumerate() {
            *b = if from + i < 4 { bytes[from + i] } else { 0 };
        }
        if data.len() == 8 && from == 0 {
            let (_, high) = data.split_at_mut(4);
            self.read_common(offset + 4, high);
        }
    }

    /// Writes a register; a width that the register does not have is ignored.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [v] if offset == 0x14 => self.write_status(v),
            [a, b] => self.write_common_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_common_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_common_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_common_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common_u16(&mut self, offset: u64, v: u16) {
        let select = self.n.queue_select;
        let frozen = self.n.status & STATUS_DRIVER_OK != 0;
        match offset {
            0x10 => self.vectors.set_config_vector(v),
            0x16 => self.n.queue_select = v,
            0x1a => self.vectors.set_queue_vector(select, v),
            0x18 if !frozen => {
                if let Some(q) = self.queues.get_mut(usize::from(select)) {
                    // Sizes that are no power of two or too large are not taken; the driver reads that back.
                    let _ = q.try_set_size(v);
                }
            }
            0x1c => {
                if let Some(q) = self
                    .queues
                    .get_mut(usize::from(select))
                    .filter(|_| v == 1 && !frozen)
                {
                    q.set_ready(true);
                }
            }
            _ => {}
        }
    }

    fn write_common_u32(&mut self, offset: u64, v: u32) {
        let select = usize::from(self.n.queue_select);
        let frozen = self.n.status & STATUS_DRIVER_OK != 0;
        match offset {
            0x00 => self.n.device_feature_select = v,
            0x08 => self.n.driver_feature_select = v,
            0x0c if self.n.status & STATUS_FEATURES_OK == 0 => {
                let (keep, shift) = match self.n.driver_feature_select {
                    0 => (!LOW, 0),
                    1 => (LOW, 32),
                    _ => return,
                };
                self.n.driver_features = (self.n.driver_features & keep) | u64::from(v) << shift;
            }
            0x20..0x38 if !frozen => {
                if let Some(q) = self.queues.get_mut(select).filter(|q| !q.ready()) {
                    match offset {
                        0x20 => q.set_desc_table_address(Some(v), None),
                        0x24 => q.set_desc_table_address(None, Some(v)),
                        0x28 => q.set_avail_ring_address(Some(v), None),
                        0x2c => q.set_avail_ring_address(None, Some(v)),
                        0x30 => q.set_used_ring_address(Some(v), None),
                        0x34 => q.set_used_ring_address(None, Some(v)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    fn write_status(&mut self, v: u8) {
        if v == 0 {
            return self.reset();
        }
        let gained = v & !self.n.status;
        // A driver cannot clear bits but by reset, nor set what is the device's to set.
        self.n.status |= v & !STATUS_NEEDS_RESET;
        if gained & STATUS_FEATURES_OK != 0 {
            let version_1 = 1 << VIRTIO_F_VERSION_1;
            let acceptable =
                self.n.driver_features & !self.offered() == 0 && self.n.driver_features & version_1 != 0;
            if !acceptable {
                self.n.status &= !STATUS_FEATURES_OK;
            }
        }
        let ready = self.n.status & STATUS_FEATURES_OK != 0 && self.n.status & STATUS_NEEDS_RESET == 0;
        if gained & STATUS_DRIVER_OK != 0 && ready && !self.active {
            self.activate();
        }
    }
}
