//! virtio 1.2 over PCI: the handshake (section 3.1.1) and split virtqueues (section 2.7), polled.
//!
//! A queue does not allocate descriptors: each user has a fixed layout in which it finds its buffer by the head's number.

use crate::cpu::barrier;
use crate::serial;
use crate::shared::error;
use crate::state::{fail, shared};
use crate::{get, set};

/// Most entries of a queue.
pub const QUEUE_MAX: usize = 256;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
const VERSION_1: u64 = 1 << 32;

/// Where the structures of a virtio device lie.
#[derive(Clone, Copy)]
pub struct Device {
    pub typ: u16,
    pub common: u64,
    pub notify: u64,
    pub notify_mult: u64,
    pub config: u64,
}

fn r8(a: u64) -> u8 {
    // SAFETY: `a` lies in a device's BAR, found through its capabilities and identity-mapped.
    unsafe { (a as *const u8).read_volatile() }
}
fn r16(a: u64) -> u16 {
    // SAFETY: as r8.
    unsafe { (a as *const u16).read_volatile() }
}
fn r32(a: u64) -> u32 {
    // SAFETY: as r8.
    unsafe { (a as *const u32).read_volatile() }
}
fn w8(a: u64, v: u8) {
    // SAFETY: as r8.
    unsafe { (a as *mut u8).write_volatile(v) }
}
fn w16(a: u64, v: u16) {
    // SAFETY: as r8.
    unsafe { (a as *mut u16).write_volatile(v) }
}
fn w32(a: u64, v: u32) {
    // SAFETY: as r8.
    unsafe { (a as *mut u32).write_volatile(v) }
}

impl Device {
    /// Reset to FEATURES_OK. Takes of `wanted` what the device offers; returns what was agreed.
    pub fn begin(&self, wanted: u64) -> Option<u64> {
        w8(self.common + 20, 0);
        for _ in 0..1_000_000 {
            if r8(self.common + 20) == 0 {
                break;
            }
        }
        w8(self.common + 20, 1);
        w8(self.common + 20, 3);
        w32(self.common, 0);
        let lo = r32(self.common + 4);
        w32(self.common, 1);
        let offered = u64::from(r32(self.common + 4)) << 32 | u64::from(lo);
        let agreed = offered & (wanted | VERSION_1);
        w32(self.common + 8, 0);
        w32(self.common + 12, agreed as u32);
        w32(self.common + 8, 1);
        w32(self.common + 12, (agreed >> 32) as u32);
        w8(self.common + 20, 11);
        if agreed & VERSION_1 == 0 || r8(self.common + 20) & 8 == 0 {
            w8(self.common + 20, 0x80);
            serial::text("PULSE ERROR a virtio device refused VERSION_1 or the features, type ");
            serial::number(u64::from(self.typ));
            serial::text("\n");
            return None;
        }
        w16(self.common + 16, 0xffff);
        Some(agreed)
    }

    /// DRIVER_OK.
    pub fn finish(&self) {
        w8(self.common + 20, 15);
        let s = shared();
        set!(s, devices, get!(s, devices) | 1 << (self.typ & 63));
    }

    /// Sets up queue `index` in the static memory number `slot` (each used once).
    pub fn queue(&self, index: u16, slot: usize) -> Option<Queue> {
        w16(self.common + 22, index);
        let mut size = r16(self.common + 24);
        if size == 0 || slot >= QUEUES {
            return None;
        }
        while usize::from(size) > QUEUE_MAX {
            size /= 2;
        }
        w16(self.common + 24, size);
        w16(self.common + 26, 0xffff);
        // SAFETY: address only.
        let mem = unsafe { core::ptr::addr_of_mut!(MEMORY[slot]) };
        // SAFETY: this slot's memory, not yet known to the device.
        unsafe {
            mem.cast::<u8>().write_bytes(0, size_of::<QueueMem>());
            (*mem).avail_flags = 1; // no interrupts, please
        }
        let parts = [
            mem as u64,
            mem as u64 + core::mem::offset_of!(QueueMem, avail_flags) as u64,
            mem as u64 + core::mem::offset_of!(QueueMem, used_flags) as u64,
        ];
        for (i, p) in parts.iter().enumerate() {
            w32(self.common + 32 + i as u64 * 8, *p as u32);
            w32(self.common + 36 + i as u64 * 8, (*p >> 32) as u32);
        }
        let notify = self.notify + u64::from(r16(self.common + 30)) * self.notify_mult;
        w16(self.common + 28, 1);
        Some(Queue {
            mem,
            size,
            avail: 0,
            used: 0,
            kicked: 0,
            notify,
            index,
        })
    }

    pub fn config8(&self, off: u64) -> u8 {
        if self.config == 0 {
            0
        } else {
            r8(self.config + off)
        }
    }
    pub fn config32(&self, off: u64) -> u32 {
        if self.config == 0 {
            0
        } else {
            r32(self.config + off)
        }
    }
    pub fn set_config32(&self, off: u64, v: u32) {
        if self.config != 0 {
            w32(self.config + off, v);
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Used {
    id: u32,
    len: u32,
}

#[repr(C, align(4096))]
struct QueueMem {
    desc: [Desc; QUEUE_MAX],
    avail_flags: u16,
    avail_idx: u16,
    avail: [u16; QUEUE_MAX],
    used_event: u16,
    pad: u16,
    used_flags: u16,
    used_idx: u16,
    used: [Used; QUEUE_MAX],
    avail_event: u16,
}

const QUEUES: usize = 12;
static mut MEMORY: [QueueMem; QUEUES] = {
    const EMPTY: QueueMem = QueueMem {
        desc: [Desc {
            addr: 0,
            len: 0,
            flags: 0,
            next: 0,
        }; QUEUE_MAX],
        avail_flags: 0,
        avail_idx: 0,
        avail: [0; QUEUE_MAX],
        used_event: 0,
        pad: 0,
        used_flags: 0,
        used_idx: 0,
        used: [Used { id: 0, len: 0 }; QUEUE_MAX],
        avail_event: 0,
    };
    [EMPTY; QUEUES]
};

/// A split virtqueue in static memory.
pub struct Queue {
    mem: *mut QueueMem,
    size: u16,
    avail: u16,
    used: u16,
    kicked: u16,
    notify: u64,
    index: u16,
}

macro_rules! field {
    ($q:expr, $($f:tt)+) => { core::ptr::addr_of_mut!((*$q.mem).$($f)+) };
}

impl Queue {
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Fills descriptor `i`.
    pub fn desc(&mut self, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let i = usize::from(i) % QUEUE_MAX;
        // SAFETY: in bounds; the device does not own this descriptor now.
        unsafe {
            field!(self, desc[i]).write_volatile(Desc {
                addr,
                len,
                flags,
                next,
            })
        }
    }

    /// Offers the chain that starts at descriptor `head`.
    pub fn push(&mut self, head: u16) {
        let i = usize::from(self.avail & (self.size - 1));
        self.avail = self.avail.wrapping_add(1);
        // SAFETY: in bounds. x86 keeps stores in order, so the entry is visible before the index.
        unsafe {
            field!(self, avail[i]).write_volatile(head);
            field!(self, avail_idx).write_volatile(self.avail);
        }
    }

    /// Tells the device, if something was pushed since the last time and it wants to know.
    pub fn kick(&mut self) {
        if self.kicked == self.avail {
            return;
        }
        self.kicked = self.avail;
        barrier();
        // SAFETY: within our queue.
        if unsafe { field!(self, used_flags).read_volatile() } & 1 == 0 {
            w16(self.notify, self.index);
        }
    }

    /// The next finished chain: its head and the bytes written.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        // SAFETY: within our queue; x86 keeps loads in order.
        unsafe {
            if field!(self, used_idx).read_volatile() == self.used {
                return None;
            }
            let i = usize::from(self.used & (self.size - 1));
            self.used = self.used.wrapping_add(1);
            let u = field!(self, used[i]).read_volatile();
            if u.id >= u32::from(self.size) {
                fail(
                    error::DEVICE,
                    u64::from(self.index),
                    u64::from(self.size),
                    u64::from(u.id),
                );
                return None;
            }
            Some((u.id as u16, u.len))
        }
    }
}
