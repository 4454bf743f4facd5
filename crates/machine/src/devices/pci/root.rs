//! The PCI root: configuration access by port (mechanism #1: 0xcf8, 0xcfc) and by memory (ECAM, MCFG table).

use super::PciFunction;
use super::config::{ConfigSpace, Identity};
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use std::sync::{Arc, Mutex};

/// Functions on bus 0, by device number.
pub const SLOTS: usize = 32;

const STATE_VERSION: u16 = 1;

/// The root of the only bus. Device 0 is the host bridge itself.
pub struct PciRoot {
    bridge: ConfigSpace,
    slots: [Option<Arc<Mutex<dyn PciFunction>>>; SLOTS],
    /// What was written to port 0xcf8. State, history: version 1 is this word alone.
    address: u32,
}

impl Default for PciRoot {
    fn default() -> Self {
        // Intel's virtual host bridge number; drivers do not bind to it.
        let id = Identity {
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: [6, 0, 0],
            subsystem: [0, 0],
        };
        Self {
            bridge: ConfigSpace::new(id),
            slots: [const { None }; SLOTS],
            address: 0,
        }
    }
}

impl PciRoot {
    /// Puts a function at device number `slot` (1 to 31).
    ///
    /// Returns false when the number is taken or out of range.
    pub fn add(&mut self, slot: u8, function: Arc<Mutex<dyn PciFunction>>) -> bool {
        match self.slots.get_mut(usize::from(slot)) {
            Some(place @ None) if slot != 0 => {
                *place = Some(function);
                true
            }
            _ => false,
        }
    }

    /// Access to configuration space; what is not there reads as all ones.
    fn config(&mut self, bus: u32, device: u32, function: u32, offset: u16, access: Access<'_>) {
        if bus != 0 || function != 0 {
            return access.nobody();
        }
        if device == 0 {
            return match access {
                Access::Read(data) => self.bridge.read(offset, data),
                Access::Write(data) => self.bridge.write(offset, data),
            };
        }
        let Some(Some(found)) = self.slots.get(device as usize) else {
            return access.nobody();
        };
        match (found.lock(), access) {
            (Ok(mut f), Access::Read(data)) => f.config_read(offset, data),
            (Ok(mut f), Access::Write(data)) => f.config_write(offset, data),
            (Err(_), access) => access.nobody(),
        }
    }

    fn port(&mut self, offset: u64, access: Access<'_>) {
        let in_word = (offset & 3) as usize;
        if in_word + access.len() > 4 {
            return access.nobody();
        }
        if offset < 4 {
            match access {
                // Only a whole word sets the address; smaller writes at 0xcf9 and up belong to other chips.
                Access::Write(&[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc,
                Access::Write(_) => {}
                Access::Read(data) => {
                    let word = self.address.to_le_bytes();
                    data.copy_from_slice(&word[in_word..in_word + data.len()]);
                }
            }
            return;
        }
        let a = self.address;
        if a & (1 << 31) == 0 {
            return access.nobody();
        }
        let register = (a & 0xfc) as u16 + in_word as u16;
        self.config((a >> 16) & 0xff, (a >> 11) & 0x1f, (a >> 8) & 7, register, access);
    }

    fn ecam(&mut self, offset: u64, access: Access<'_>) {
        let register = (offset & 0xfff) as u16;
        if usize::from(register & 3) + access.len() > 4 {
            return access.nobody();
        }
        let (bus, device, function) = (offset >> 20, (offset >> 15) & 0x1f, (offset >> 12) & 7);
        self.config(bus as u32, device as u32, function as u32, register, access);
    }
}

enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Access<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Read(d) => d.len(),
            Self::Write(d) => d.len(),
        }
    }

    fn nobody(self) {
        if let Self::Read(d) = self {
            d.fill(0xff);
        }
    }
}

/// The root on the port bus, at 0xcf8.
pub struct ConfigPorts(pub Arc<Mutex<PciRoot>>);
/// The root on the MMIO bus, at the ECAM window.
pub struct Ecam(pub Arc<Mutex<PciRoot>>);

fn with(root: &Mutex<PciRoot>, f: impl FnOnce(&mut PciRoot)) {
    // The root itself cannot be left half-changed: its state is one word.
    f(&mut root.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        with(&self.0, |r| r.port(offset, Access::Read(data)));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        with(&self.0, |r| r.port(offset, Access::Write(data)));
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        with(&self.0, |r| r.ecam(offset, Access::Read(data)));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        with(&self.0, |r| r.ecam(offset, Access::Write(data)));
    }
}

impl Stateful for PciRoot {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::PciRoot, 0)
    }
    fn save(&mut self) -> Result<StateRecord, StateError> {
        StateRecord::encode(StateKind::PciRoot, 0, STATE_VERSION, &self.address)
    }
    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        self.address = record.decode::<u32>(STATE_VERSION)? & 0x80ff_fffc;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanism_one_and_ecam_find_the_bridge_only() {
        let root = Arc::new(Mutex::new(PciRoot::default()));
        let (mut ports, mut ecam) = (ConfigPorts(Arc::clone(&root)), Ecam(root));
        let mut w = [0; 4];
        ports.read(4, &mut w);
        assert_eq!(w, [0xff; 4], "not enabled");
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        ports.read(4, &mut w);
        assert_eq!(w, [0x86, 0x80, 0x57, 0x0d]);
        let mut h = [0; 2];
        ports.read(6, &mut h);
        assert_eq!(h, [0x57, 0x0d]);
        ecam.read(0, &mut w);
        assert_eq!(w, [0x86, 0x80, 0x57, 0x0d]);
        for nobody in [1 << 15, 1 << 12, 1 << 20, 0xffd] {
            ecam.read(nobody, &mut w);
            assert_eq!(w, [0xff; 4], "{nobody:#x}");
        }
        ports.write(0, &0x8000_0800u32.to_le_bytes());
        ports.read(4, &mut w);
        assert_eq!(w, [0xff; 4]);
    }
}
