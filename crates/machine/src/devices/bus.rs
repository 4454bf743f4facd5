//! Port and memory-mapped I/O: which device answers at which address.
//!
//! A bus is built once, before the first vCPU runs, and never changes: look-ups take no lock. Each device has its
//! own lock, taken for one access. An address where nobody lives reads as all ones and swallows writes, as on a PC.

use crate::state::{StateError, StateKind, StateRecord};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A device on a bus. Offsets are relative to the range with which it was added.
pub trait BusDevice: Send {
    /// Reads 1, 2, 4 or 8 bytes. A device that does not know the register fills `data` as its hardware would.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes 1, 2, 4 or 8 bytes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A part of the machine with state of its own. No default: a device without state says so with an empty payload.
pub trait Stateful: Send {
    /// Kind and instance of the record.
    fn state_key(&self) -> (StateKind, u16);

    /// Takes the state. vCPUs and devices stand still.
    ///
    /// # Errors
    /// [`StateError`].
    fn save(&mut self) -> Result<StateRecord, StateError>;

    /// Gives the state back, before the first vCPU runs.
    ///
    /// # Errors
    /// [`StateError`] if the record is not this device's or does not fit it.
    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError>;
}

/// Ranges that overlap, or are empty.
#[derive(Debug, thiserror::Error)]
#[error("the bus range {start:#x}+{len:#x} is empty, wraps, or overlaps another")]
pub struct BusRangeError {
    start: u64,
    len: u64,
}

type Shared = Arc<Mutex<dyn BusDevice>>;

/// An address space of devices.
#[derive(Clone, Default)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Shared)>,
}

impl Bus {
    /// Puts a device at `start..start + len`.
    ///
    /// # Errors
    /// [`BusRangeError`].
    pub fn add(&mut self, start: u64, len: u64, device: Shared) -> Result<(), BusRangeError> {
        let bad = BusRangeError { start, len };
        let Some(end) = start.checked_add(len).filter(|_| len > 0) else {
            return Err(bad);
        };
        let below = self.ranges.range(..end).next_back();
        if below.is_some_and(|(s, (l, _))| s + l > start) {
            return Err(bad);
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Shared)> {
        let (start, (size, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        // An access that reaches past the device's end belongs to nobody.
        (offset.checked_add(len as u64)? <= *size).then_some((offset, device))
    }

    /// Reads from whoever lives at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            match device.lock() {
                Ok(mut d) => d.read(offset, data),
                Err(_) => tracing::error!(address, "device is poisoned; reads all ones"),
            }
        }
    }

    /// Writes to whoever lives at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            match device.lock() {
                Ok(mut d) => d.write(offset, data),
                Err(_) => tracing::error!(address, "device is poisoned; write dropped"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<u8>);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0.extend(data);
        }
    }

    #[test]
    fn ranges_answer_and_do_not_overlap() {
        let device = || Arc::new(Mutex::new(Echo(Vec::new())));
        let mut bus = Bus::default();
        bus.add(0x3f8, 8, device()).unwrap();
        assert!(bus.add(0x3ff, 1, device()).is_err());
        assert!(bus.add(0x3f0, 9, device()).is_err());
        assert!(bus.add(0x3f0, 0x100, device()).is_err());
        assert!(bus.add(u64::MAX, 2, device()).is_err());
        bus.add(0x3f0, 8, device()).unwrap();
        let mut b = [0u8; 1];
        bus.read(0x3fa, &mut b);
        assert_eq!(b, [2]);
        let mut wide = [0u8; 4];
        bus.read(0x3fd, &mut wide);
        assert_eq!(wide, [0xff; 4], "reaches past the end");
        bus.read(0x400, &mut b);
        assert_eq!(b, [0xff]);
    }
}
