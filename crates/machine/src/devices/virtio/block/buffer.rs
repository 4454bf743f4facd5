//! Bounce buffers: page-aligned memory of the device's own, from a bounded pool.
//!
//! All disk data passes through them. So nothing but the device, under its lock, ever writes guest memory, and a
//! guest that changes data in flight changes nothing that was submitted.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Alignment of every buffer, enough for O_DIRECT on any storage.
pub const ALIGN: usize = 4096;
/// Sizes that are kept for reuse.
const CLASSES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Largest buffer.
pub const BUFFER_MAX: usize = 1 << 20;

/// Page-aligned bytes, `len` of them in use.
pub struct IoBuffer {
    at: NonNull<u8>,
    capacity: usize,
    len: usize,
}

// SAFETY: an IoBuffer owns its allocation alone, as a Vec<u8> does.
unsafe impl Send for IoBuffer {}

impl IoBuffer {
    fn layout(capacity: usize) -> Option<Layout> {
        Layout::from_size_align(capacity, ALIGN).ok()
    }

    fn allocate(capacity: usize) -> Option<Self> {
        let layout = Self::layout(capacity).filter(|l| l.size() > 0)?;
        // SAFETY: the layout has a size that is not zero.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { at, capacity, len: 0 })
    }

    /// A buffer outside any pool, for tests and tools.
    #[must_use]
    pub fn with_len(len: usize) -> Option<Self> {
        let mut buffer = Self::allocate(len.max(1).next_multiple_of(ALIGN))?;
        buffer.len = len;
        Some(buffer)
    }

    /// Bytes in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte, for the kernel.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.at.as_ptr()
    }
}

impl std::ops::Deref for IoBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` bytes are allocated and were initialised (zeroed) at allocation.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for IoBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl Drop for IoBuffer {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.capacity) {
            // SAFETY: allocated in `allocate` with the same layout, and not freed before.
            unsafe { dealloc(self.at.as_ptr(), layout) };
        }
    }
}

/// A pool that never holds more than its bound, in use and kept together.
pub struct BufferPool {
    free: [Vec<IoBuffer>; CLASSES.len()],
    /// Bytes in use and kept.
    total: usize,
    max: usize,
}

impl BufferPool {
    /// A pool of at most `max` bytes, at least one largest buffer.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            free: Default::default(),
            total: 0,
            max: max.max(BUFFER_MAX),
        }
    }

    /// A buffer of `len` bytes with arbitrary contents; `None` when the pool is used up (wait for a completion) or
    /// `len` is more than [`BUFFER_MAX`].
    pub fn take(&mut self, len: usize) -> Option<IoBuffer> {
        let class = CLASSES.iter().position(|c| *c >= len)?;
        let mut buffer = match self.free[class].pop() {
            Some(kept) => kept,
            None => {
                self.make_room(CLASSES[class])?;
                let fresh = IoBuffer::allocate(CLASSES[class])?;
                self.total += fresh.capacity;
                fresh
            }
        };
        buffer.len = len;
        Some(buffer)
    }

    /// Frees kept buffers of other classes until `bytes` more fit.
    fn make_room(&mut self, bytes: usize) -> Option<()> {
        while self.total + bytes > self.max {
            let dropped = self.free.iter_mut().rev().find_map(Vec::pop)?;
            self.total -= dropped.capacity;
        }
        Some(())
    }

    /// Takes a buffer back.
    pub fn put(&mut self, buffer: IoBuffer) {
        match CLASSES.iter().position(|c| *c == buffer.capacity) {
            Some(class) => self.free[class].push(buffer),
            None => self.total = self.total.saturating_sub(buffer.capacity),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_bounded_and_moves_between_sizes() {
        let mut pool = BufferPool::new(1 << 20);
        let mut held = Vec::new();
        while let Some(b) = pool.take(5000) {
            assert_eq!(b.as_ptr() as usize % ALIGN, 0);
            assert_eq!(b.len(), 5000);
            held.push(b);
            assert!(held.len() <= 64);
        }
        assert_eq!(held.len(), 64);
        assert!(pool.take(1).is_none());
        for b in held {
            pool.put(b);
        }
        let big = pool.take(1 << 20).unwrap();
        assert!(pool.take(1).is_none());
        pool.put(big);
        assert!(pool.take((1 << 20) + 1).is_none());
        assert!(pool.take(1).is_some());
    }
}
