//! Reusable byte buffers. Bulk chunks are large (about 1 MiB); taking them from the allocator each time would fault
//! in 256 fresh pages per chunk, which costs more than filling them.
//!
//! A [`Buf`] goes back to its pool when the last owner drops it. The pool keeps at most a fixed number of bytes; what
//! does not fit is freed.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers below this size in bytes are not worth keeping.
const POOLED_BYTES_MIN: usize = 32 << 10;

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// A bounded store of buffers; clones share it.
#[derive(Clone, Debug)]
pub struct BufPool {
    free: Arc<Mutex<Free>>,
    bytes_max: usize,
}

impl BufPool {
    /// A pool that keeps at most `bytes_max` bytes of unused buffers.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            free: Arc::default(),
            bytes_max,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        // A panic in between leaves only a list of buffers: still usable.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` bytes. Its content is unspecified (old content of this process, never uninitialised).
    #[must_use]
    pub fn take(&self, len: usize) -> Buf {
        if len < POOLED_BYTES_MIN {
            return Buf {
                data: vec![0; len],
                len,
                pool: None,
            };
        }
        let found = {
            let mut free = self.lock();
            let at = free.buffers.iter().rposition(|b| b.len() >= len);
            let found = at.map(|i| free.buffers.swap_remove(i));
            if let Some(b) = &found {
                free.bytes -= b.len();
            }
            found
        };
        let data = found.unwrap_or_else(|| vec![0; len.next_multiple_of(POOLED_BYTES_MIN)]);
        Buf {
            data,
            len,
            pool: Some(self.clone()),
        }
    }

    /// Bytes that lie unused in the pool.
    #[must_use]
    pub fn idle_bytes(&self) -> usize {
        self.lock().bytes
    }
}

/// A byte buffer with a length of its own, returned to its pool on drop.
pub struct Buf {
    data: Vec<u8>,
    len: usize,
    pool: Option<BufPool>,
}

impl Buf {
    /// An owned copy of `bytes`, outside of any pool.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self {
            data: bytes.to_vec(),
            len: bytes.len(),
            pool: None,
        }
    }

    /// Shortens the buffer; a longer `len` than the present one has no effect.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl From<Vec<u8>> for Buf {
    fn from(data: Vec<u8>) -> Self {
        Self {
            len: data.len(),
            data,
            pool: None,
        }
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.data[..self.len]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.data[..self.len]
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let Some(pool) = self.pool.take() else { return };
        let data = std::mem::take(&mut self.data);
        let mut free = pool.lock();
        if free.bytes + data.len() <= pool.bytes_max {
            free.bytes += data.len();
            free.buffers.push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_the_pool_is_bounded() {
        let pool = BufPool::new(100 << 10);
        let a = pool.take(64 << 10);
        let b = pool.take(64 << 10);
        drop(a);
        assert_eq!(pool.idle_bytes(), 64 << 10);
        drop(b);
        assert_eq!(pool.idle_bytes(), 64 << 10, "the second does not fit");
        let c = pool.take(40 << 10);
        assert_eq!((c.len(), pool.idle_bytes()), (40 << 10, 0));
    }
}
