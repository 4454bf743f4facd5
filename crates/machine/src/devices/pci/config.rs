//! Type 0 configuration space (PCI Local Bus 3.0, chapter 6): bytes, and a mask of what the guest may write.

use serde::{Deserialize, Serialize};

/// Bytes of configuration space that a function has; the rest of the 4 KiB of ECAM reads as zero.
pub const CONFIG_BYTES: usize = 256;

const CAPABILITY_START: usize = 0x40;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;

/// Numbers that identify a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: [u16; 2],
}

/// One capability: its ID and body (what follows the `next` pointer), with a mask of writable bits of the body.
pub struct Capability<'a> {
    /// Capability ID.
    pub id: u8,
    /// Bytes after ID and next pointer.
    pub body: &'a [u8],
    /// Writable bits of `body`; shorter means read-only from there on.
    pub writable: &'a [u8],
}

/// Configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bar: Option<(u32, u32)>,
    /// The guest wrote all ones to BAR 0 and reads back the size next.
    sizing: bool,
    last_capability: usize,
    next_free: usize,
}

/// What changes in configuration space after the machine is built. History: 1, the first.
#[derive(Serialize, Deserialize)]
pub struct ConfigState {
    bytes: Vec<u8>,
    sizing: bool,
}

impl ConfigSpace {
    /// A function with no BAR and no capability.
    #[must_use]
    pub fn new(id: Identity) -> Self {
        let mut bytes = [0; CONFIG_BYTES];
        let mut put = |at: usize, v: &[u8]| bytes[at..at + v.len()].copy_from_slice(v);
        put(0x00, &id.vendor.to_le_bytes());
        put(0x02, &id.device.to_le_bytes());
        put(0x04, &[COMMAND_MEMORY | COMMAND_BUS_MASTER, 0]);
        put(0x08, &[id.revision, id.class[2], id.class[1], id.class[0]]);
        put(0x2c, &id.subsystem[0].to_le_bytes());
        put(0x2e, &id.subsystem[1].to_le_bytes());
        let mut writable = [0; CONFIG_BYTES];
        // Command: memory, bus master, parity, SERR, INTx disable. Cache line size, latency timer, interrupt line.
        writable[0x04] = 0x46;
        writable[0x05] = 0x05;
        writable[0x0c] = 0xff;
        writable[0x0d] = 0xff;
        writable[0x3c] = 0xff;
        Self {
            bytes,
            writable,
            bar: None,
            sizing: false,
            last_capability: 0,
            next_free: CAPABILITY_START,
        }
    }

    /// Gives BAR 0 a 32-bit memory range. `size` is a power of two of at least 16, `address` a multiple of it.
    pub fn set_bar0(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        self.bar = Some((address, size));
        self.bytes[0x10..0x14].copy_from_slice(&address.to_le_bytes());
    }

    /// Appends a capability; returns the offset of its ID. `None` when configuration space is full.
    pub fn add_capability(&mut self, cap: &Capability<'_>) -> Option<usize> {
        let at = self.next_free;
        let end = at + 2 + cap.body.len();
        if end > CONFIG_BYTES {
            return None;
        }
        self.bytes[at] = cap.id;
        self.bytes[at + 2..end].copy_from_slice(cap.body);
        for (i, &w) in cap.writable.iter().take(cap.body.len()).enumerate() {
            self.writable[at + 2 + i] = w;
        }
        // Link from the capability before, or from the header, whose status then says that there is a list.
        let link = if self.last_capability == 0 {
            0x34
        } else {
            self.last_capability + 1
        };
        self.bytes[link] = at as u8;
        self.bytes[0x06] |= 1 << 4;
        self.last_capability = at;
        self.next_free = end.next_multiple_of(4);
        Some(at)
    }

    /// Reads; bytes past the end are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let bar_mask = self
            .bar
            .filter(|_| self.sizing)
            .map(|(_, size)| (!(size - 1)).to_le_bytes());
        for (i, b) in data.iter_mut().enumerate() {
            let at = usize::from(offset) + i;
            *b = match (bar_mask, at) {
                (Some(mask), 0x10..0x14) => mask[at - 0x10],
                _ => self.bytes.get(at).copied().unwrap_or(0),
            };
        }
    }

    /// Writes the bits that may be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if (0x10..0x14).contains(&offset) {
            self.sizing = data.len() == 4 && data.iter().all(|&b| b == 0xff);
            return;
        }
        for (i, &b) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(old), Some(&mask)) = (self.bytes.get(at).copied(), self.writable.get(at)) {
                self.bytes[at] = (old & !mask) | (b & mask);
            }
        }
    }

    /// A byte as it stands.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// Four bytes as they stand, little-endian.
    #[must_use]
    pub fn word(&self, offset: usize) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|i| self.byte(offset + i)))
    }

    /// Takes the state.
    #[must_use]
    pub fn save(&self) -> ConfigState {
        ConfigState {
            bytes: self.bytes.to_vec(),
            sizing: self.sizing,
        }
    }

    /// Gives the state back; whatever the guest cannot write must be the same, or it is another device.
    ///
    /// # Errors
    /// The offset of the first byte that differs.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), usize> {
        if state.bytes.len() != CONFIG_BYTES {
            return Err(state.bytes.len());
        }
        let fixed = |at: &usize| (state.bytes[*at] ^ self.bytes[*at]) & !self.writable[*at] != 0;
        if let Some(at) = (0..CONFIG_BYTES).find(fixed) {
            return Err(at);
        }
        self.bytes.copy_from_slice(&state.bytes);
        self.sizing = state.sizing;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let id = Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: [2, 0, 0],
            subsystem: [0x1af4, 1],
        };
        let mut c = ConfigSpace::new(id);
        c.set_bar0(0xc000_0000, 0x8000);
        c
    }

    #[test]
    fn bar_reports_its_size_and_stays() {
        let mut c = space();
        let mut w = [0; 4];
        c.write(0x10, &[0xff; 4]);
        c.read(0x10, &mut w);
        assert_eq!(u32::from_le_bytes(w), 0xffff_8000);
        c.write(0x10, &0xd000_0000u32.to_le_bytes());
        c.read(0x10, &mut w);
        assert_eq!(u32::from_le_bytes(w), 0xc000_0000);
    }

    #[test]
    fn capabilities_are_linked_and_guarded() {
        let mut c = space();
        assert_eq!(
            c.add_capability(&Capability {
                id: 9,
                body: &[1, 2],
                writable: &[]
            }),
            Some(0x40)
        );
        assert_eq!(
            c.add_capability(&Capability {
                id: 0x11,
                body: &[0; 10],
                writable: &[0, 0xc0]
            }),
            Some(0x44)
        );
        assert_eq!((c.byte(0x34), c.byte(0x41), c.byte(0x45)), (0x40, 0x44, 0));
        c.write(0x46, &[0xff, 0xff]);
        assert_eq!((c.byte(0x46), c.byte(0x47)), (0, 0xc0));
        assert_eq!(
            c.add_capability(&Capability {
                id: 9,
                body: &[0; 200],
                writable: &[]
            }),
            None
        );
    }

    #[test]
    fn state_of_another_device_is_refused() {
        let a = space();
        let mut state = a.save();
        state.bytes[0x02] ^= 1;
        assert_eq!(space().restore(&state), Err(2));
        state.bytes.pop();
        assert!(space().restore(&state).is_err());
        let mut c = space();
        c.write(0x04, &[0, 0]);
        let state = c.save();
        let mut d = space();
        d.restore(&state).unwrap();
        assert_eq!(d.byte(4), 0);
    }
}
