//! MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages, one irqfd per vector, pending bits for masked ones.
//!
//! A device signals a vector without a lock of its own device; the table has its own lock, held for a moment.

use crate::kvm::KvmError;
use crate::kvm::irq::{IrqRouter, MsiRoute};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// A queue or event without an interrupt (virtio 1.2, 4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;

const ENTRY_BYTES: usize = 16;
const MASKED: u32 = 1;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address_lo: u32,
    address_hi: u32,
    data: u32,
    control: u32,
}

struct Table {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    control: u16,
}

/// State of the table. History: 1, the first.
#[derive(Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    control: u16,
}

struct Vector {
    gsi: u32,
    event: EventFd,
}

/// The table of one function, with its irqfds.
pub struct Msix {
    router: Arc<IrqRouter>,
    vectors: Vec<Vector>,
    table: Mutex<Table>,
}

impl Msix {
    /// A table of `count` vectors (1 to 2048), all masked.
    ///
    /// # Errors
    /// [`KvmError`] when KVM has no room for more vectors.
    pub fn new(router: Arc<IrqRouter>, count: u16) -> Result<Self, KvmError> {
        let vectors = (0..count)
            .map(|_| router.add_msi().map(|(gsi, event)| Vector { gsi, event }))
            .collect::<Result<Vec<_>, _>>()?;
        let entry = Entry {
            address_lo: 0,
            address_hi: 0,
            data: 0,
            control: MASKED,
        };
        let table = Table {
            entries: vec![entry; vectors.len()],
            pending: vec![false; vectors.len()],
            control: count.saturating_sub(1) & 0x7ff,
        };
        Ok(Self {
            router,
            vectors,
            table: Mutex::new(table),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// The message control word of the capability.
    #[must_use]
    pub fn control(&self) -> u16 {
        self.table().control
    }

    /// The guest wrote message control: enable, or mask all.
    pub fn set_control(&self, value: u16) {
        let mut t = self.table();
        t.control = (t.control & 0x7ff) | (value & (CONTROL_ENABLE | CONTROL_MASK_ALL));
        self.update(&mut t, 0..self.vectors.len());
    }

    /// Raises a vector, or notes it as pending while it is masked. Unknown vectors are ignored.
    pub fn signal(&self, vector: u16) {
        let mut t = self.table();
        let i = usize::from(vector);
        let (Some(v), Some(entry)) = (self.vectors.get(i), t.entries.get(i).copied()) else {
            return;
        };
        if t.control & CONTROL_ENABLE == 0 {
            return;
        }
        if t.control & CONTROL_MASK_ALL != 0 || entry.control & MASKED != 0 {
            t.pending[i] = true;
        } else {
            // The counter of an eventfd saturates at 2^64 - 2; KVM empties it at every signal.
            let _ = v.event.write(1);
        }
    }

    /// Sends routes of the vectors in `range` to KVM and raises what was pending and is no longer masked.
    fn update(&self, t: &mut Table, range: std::ops::Range<usize>) {
        let live = t.control & CONTROL_ENABLE != 0 && t.control & CONTROL_MASK_ALL == 0;
        for i in range {
            let (Some(v), Some(e)) = (self.vectors.get(i), t.entries.get(i)) else {
                continue;
            };
            if !live || e.control & MASKED != 0 {
                continue;
            }
            let route = MsiRoute {
                address_lo: e.address_lo,
                address_hi: e.address_hi,
                data: e.data,
            };
            if let Err(error) = self.router.set_msi(v.gsi, Some(route)) {
                // KVM refuses messages that no APIC could take: a guest's mistake, heard by no one but the guest.
                tracing::warn!(%error, vector = i, "interrupt route refused");
                continue;
            }
            if std::mem::take(&mut t.pending[i]) {
                let _ = v.event.write(1);
            }
        }
    }

    /// Reads the table: 4 or 8 aligned bytes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let t = self.table();
        let mut raw = [0; ENTRY_BYTES];
        let at = (offset % ENTRY_BYTES as u64) as usize;
        data.fill(0);
        if let Some(e) = t.entries.get((offset / ENTRY_BYTES as u64) as usize) {
            for (i, w) in [e.address_lo, e.address_hi, e.data, e.control]
                .into_iter()
                .enumerate()
            {
                raw[i * 4..i * 4 + 4].copy_from_slice(&w.to_le_bytes());
            }
            if let Some(part) = raw.get(at..at + data.len()) {
                data.copy_from_slice(part);
            }
        }
    }

    /// Writes the table: 4 or 8 aligned bytes; other widths are ignored, as the specification allows.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let i = (offset / ENTRY_BYTES as u64) as usize;
        let at = (offset % ENTRY_BYTES as u64) as usize;
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len()) {
            return;
        }
        let mut t = self.table();
        let Some(mut e) = t.entries.get(i).copied() else {
            return;
        };
        for (n, word) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            match at / 4 + n {
                0 => e.address_lo = value & !3,
                1 => e.address_hi = value,
                2 => e.data = value,
                _ => e.control = value & MASKED,
            }
        }
        t.entries[i] = e;
        self.update(&mut t, i..i + 1);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let t = self.table();
        for (i, b) in data.iter_mut().enumerate() {
            let first = (offset as usize + i).saturating_mul(8);
            *b = (0..8)
                .filter(|&n| t.pending.get(first + n).copied().unwrap_or(false))
                .fold(0, |a, n| a | (1 << n));
        }
    }

    /// Takes the state.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let t = self.table();
        MsixState {
            entries: t.entries.clone(),
            pending: t.pending.clone(),
            control: t.control,
        }
    }

    /// Gives the state back and sends the routes to KVM. False when the state has another number of vectors.
    pub fn restore(&self, state: MsixState) -> bool {
        let n = self.vectors.len();
        if state.entries.len() != n || state.pending.len() != n {
            return false;
        }
        let mut t = self.table();
        let control = (t.control & 0x7ff) | (state.control & (CONTROL_ENABLE | CONTROL_MASK_ALL));
        *t = Table {
            entries: state.entries,
            pending: state.pending,
            control,
        };
        self.update(&mut t, 0..n);
        true
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut t = self.table();
        t.control &= 0x7ff;
        t.pending.fill(false);
        t.entries.fill(Entry {
            address_lo: 0,
            address_hi: 0,
            data: 0,
            control: MASKED,
        });
    }
}
