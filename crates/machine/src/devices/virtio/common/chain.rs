//! Descriptor chains, read once and checked (virtio 1.2, 2.7).
//!
//! A [`Chain`] is a plain list of guest ranges. It was bounds-checked when it was read, holds no reference into
//! guest memory, and can be read again from its head after a restore ([`chain_at`]). The guest may rewrite its
//! descriptors at any time; that changes nothing for a chain already read.

use super::driver_error;
use crate::devices::virtio::DeviceError;
use crate::memory::GuestMemory;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

/// Most buffers in one chain. A driver may not make a chain longer than its queue, except through an indirect
/// table, where Linux does; this bounds both.
pub const CHAIN_MAX: usize = 1024;

const DESC_BYTES: u64 = 16;

/// A range of guest memory, checked to be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes, never zero.
    pub len: u32,
}

/// One descriptor chain: readable buffers, then writable ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Index of the first descriptor; names the chain in the used ring.
    pub head: u16,
    buffers: Vec<Buffer>,
    split: usize,
    readable: u32,
    writable: u32,
}

impl Chain {
    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable
    }

    /// The readable buffers.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        &self.buffers[..self.split]
    }

    /// The writable buffers.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        &self.buffers[self.split..]
    }

    /// Copies from the readable part, from byte `offset` on. Returns how many bytes there were.
    ///
    /// # Errors
    /// Guest memory could not be read (it was checked; so only if the mapping changed).
    pub fn read_at(
        &self,
        memory: &GuestMemory,
        offset: u32,
        into: &mut [u8],
    ) -> Result<usize, vm_memory::GuestMemoryError> {
        let mut done = 0;
        walk(self.readable(), offset, into.len(), |addr, len| {
            memory.read_slice(&mut into[done..done + len], addr)?;
            done += len;
            Ok(())
        })?;
        Ok(done)
    }

    /// Copies into the writable part, from byte `offset` on. Returns how many bytes fitted.
    ///
    /// # Errors
    /// As [`Chain::read_at`].
    pub fn write_at(
        &self,
        memory: &GuestMemory,
        offset: u32,
        from: &[u8],
    ) -> Result<usize, vm_memory::GuestMemoryError> {
        let mut done = 0;
        walk(self.writable(), offset, from.len(), |addr, len| {
            memory.write_slice(&from[done..done + len], addr)?;
            done += len;
            Ok(())
        })?;
        Ok(done)
    }
}

fn walk(
    buffers: &[Buffer],
    offset: u32,
    len: usize,
    mut each: impl FnMut(GuestAddress, usize) -> Result<(), vm_memory::GuestMemoryError>,
) -> Result<(), vm_memory::GuestMemoryError> {
    let mut skip = offset;
    let mut left = len;
    for b in buffers {
        if left == 0 {
            break;
        }
        if skip >= b.len {
            skip -= b.len;
            continue;
        }
        let take = left.min((b.len - skip) as usize);
        // The range was checked to be RAM, so its end does not overflow.
        each(GuestAddress(b.addr + u64::from(skip)), take)?;
        left -= take;
        skip = 0;
    }
    Ok(())
}

/// Reads the chain that starts at descriptor `head`.
///
/// # Errors
/// [`DeviceError::Driver`] for whatever virtio 1.2 does not allow: a table outside RAM, an index out of range, a
/// loop, nested indirect tables, a buffer outside RAM or empty, readable after writable, more than
/// [`CHAIN_MAX`] buffers or 4 GiB.
pub fn chain_at(device: &str, memory: &GuestMemory, queue: &Queue, head: u16) -> Result<Chain, DeviceError> {
    let fail = |why: String| {
        Err(driver_error(
            device,
            format_args!("descriptor chain {head}: {why}"),
        ))
    };
    let mut table = GuestAddress(queue.desc_table());
    let mut entries = u32::from(queue.size());
    let mut indirect = false;
    let mut index = u32::from(head);
    let mut steps = 0u32;
    let mut chain = Chain {
        head,
        buffers: Vec::with_capacity(4),
        split: 0,
        readable: 0,
        writable: 0,
    };
    loop {
        if index >= entries {
            return fail(format!("index {index} in a table of {entries}"));
        }
        if steps >= entries {
            return fail("the chain loops".to_owned());
        }
        steps += 1;
        let Some(at) = table.checked_add(u64::from(index) * DESC_BYTES) else {
            return fail("table address overflows".to_owned());
        };
        let Ok(d) = memory.read_obj::<Descriptor>(at) else {
            return fail(format!("table at {:#x} is not RAM", table.0));
        };
        if d.refers_to_indirect_table() {
            if indirect || d.has_next() {
                return fail("indirect table inside or before other descriptors".to_owned());
            }
            let bytes = d.len();
            entries = bytes / DESC_BYTES as u32;
            if bytes == 0 || !bytes.is_multiple_of(DESC_BYTES as u32) || entries > u32::from(u16::MAX) {
                return fail(format!("indirect table of {bytes} bytes"));
            }
            (table, index, steps, indirect) = (d.addr(), 0, 0, true);
            continue;
        }
        if d.len() == 0 {
            return fail("empty buffer".to_owned());
        }
        if !memory.check_range(d.addr(), d.len() as usize) {
            return fail(format!("buffer {:#x}+{:#x} is not RAM", d.addr().0, d.len()));
        }
        if chain.buffers.len() >= CHAIN_MAX {
            return fail(format!("more than {CHAIN_MAX} buffers"));
        }
        let total = if d.is_write_only() {
            &mut chain.writable
        } else {
            if chain.buffers.len() > chain.split {
                return fail("readable buffer after a writable one".to_owned());
            }
            chain.split += 1;
            &mut chain.readable
        };
        match total.checked_add(d.len()) {
            Some(sum) => *total = sum,
            None => return fail("more than 4 GiB".to_owned()),
        }
        chain.buffers.push(Buffer {
            addr: d.addr().0,
            len: d.len(),
        });
        if !d.has_next() {
            break;
        }
        index = u32::from(d.next());
    }
    match chain.readable.checked_add(chain.writable) {
        Some(_) => Ok(chain),
        None => fail("more than 4 GiB".to_owned()),
    }
}
