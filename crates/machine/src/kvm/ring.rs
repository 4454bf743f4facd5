//! The dirty ring of one vCPU: page numbers that KVM writes and the monitor takes.
//!
//! Each entry goes through three states (api.rst, 8.29): clean (0), dirty (KVM set bit 0), harvested (the monitor
//! set bit 1). `KVM_RESET_DIRTY_RINGS` write-protects the harvested pages of all rings again and cleans them.
//!
//! Two defects of kernels lose pages, both seen and both met here:
//! - A vCPU is to stop at a limit below the ring's size. A KVM that emulates instructions (without hardware virtualization)
//!   pushes an entry for each emulated write and looks at the limit only afterwards: entries are overwritten (the kernel
//!   warns in `kvm_dirty_ring_push`), their pages are never protected again, and KVM's index is ahead of ours. A ring
//!   without any clean entry tells it ([`DirtyRing::overran`]). Then every page counts as dirty at every harvest, and
//!   gaps are passed, so that the vCPU does not stop for ever at a ring that seems full.
//! - From 6.16 on a reset gives up at a pending signal, and forgets to protect up to 64 pages whose entries it has cleaned
//!   already. So no signal may be pending: all are blocked meanwhile.

use super::KvmError;
use super::dirty::check;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, 0xAE, 0xc7);

const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;
/// Bound on resets that signals interrupt; each signal interrupts one.
const RESET_TRIES: u32 = 1000;

/// A mapped ring. Only one thread looks at it at a time: it lives in a mutex.
pub struct DirtyRing {
    entries: *mut kvm_dirty_gfn,
    count: usize,
    next: usize,
    overran: bool,
}

// SAFETY: the mapping is shared memory that stays valid in every thread; all access is through `&mut self`.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Size of each ring in bytes: 65,536 entries.
    pub const BYTES: u64 = 1 << 20;

    /// Maps the ring of a vCPU, of `bytes` as enabled for the VM.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn map(vcpu: &VcpuFd, bytes: u64) -> Result<Self, KvmError> {
        let len = bytes as usize;
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: a fresh shared mapping of the vCPU descriptor at the offset that the API names; checked below.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(KvmError::Call {
                what: "map dirty ring".into(),
                source: io::Error::last_os_error(),
            });
        }
        Ok(Self {
            entries: p.cast(),
            count: len / size_of::<kvm_dirty_gfn>(),
            next: 0,
            overran: false,
        })
    }

    /// Takes all dirty entries as `(slot, page within the slot)`; returns how many. [`DirtyRing::reset`] must
    /// follow before the guest may rely on being logged for those pages again.
    pub fn harvest(&mut self, mut visit: impl FnMut(u32, u64)) -> usize {
        let (mut taken, mut passed) = (0, 0);
        while passed < self.count {
            if self.flags(self.next).load(Ordering::Acquire) & (DIRTY | HARVESTED) != DIRTY {
                match self.gap(self.count - passed) {
                    None => break,
                    // KVM waits for these before it takes any behind them. Their pages are protected once more: no harm.
                    Some(gap) => {
                        for _ in 0..gap {
                            self.flags(self.next).store(HARVESTED, Ordering::Release);
                            self.next = (self.next + 1) % self.count;
                        }
                        passed += gap;
                    }
                }
            }
            // SAFETY: `next` is below `count`, so the entry is inside the mapping; one with the dirty flag is complete
            // and KVM does not touch it until the reset.
            let (slot, offset) = unsafe {
                let entry = self.entries.add(self.next);
                ((*entry).slot, (*entry).offset)
            };
            visit(slot, offset);
            self.flags(self.next).store(HARVESTED, Ordering::Release);
            self.next = (self.next + 1) % self.count;
            taken += 1;
            passed += 1;
        }
        self.overran |= taken == self.count;
        taken
    }

    fn flags(&self, index: usize) -> &AtomicU32 {
        debug_assert!(index < self.count);
        // SAFETY: the index is below `count` (it is always taken modulo), so the entry is inside the mapping, which lives
        // as long as `self`; `flags` is an aligned u32 that KVM and we change concurrently, hence the atomic view
        // (release/acquire as api.rst asks).
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entries.add(index)).flags) }
    }

    /// How many entries without the dirty flag are before the next one with it, among `within` from `next` on. Only an
    /// overrun leaves such gaps.
    fn gap(&self, within: usize) -> Option<usize> {
        let dirty = |i: &usize| {
            let flags = self.flags((self.next + i) % self.count).load(Ordering::Acquire);
            flags & (DIRTY | HARVESTED) == DIRTY
        };
        self.overran.then(|| (1..within).find(dirty)).flatten()
    }

    /// KVM wrote more entries than there was room for: what the ring tells is not all.
    #[must_use]
    pub fn overran(&self) -> bool {
        self.overran
    }

    /// Write-protects what was harvested from any ring of the VM and gives the entries back.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn reset(vm: &VmFd) -> Result<(), KvmError> {
        let _quiet = NoSignals::new();
        for _ in 0..RESET_TRIES {
            // SAFETY: the call takes no argument.
            let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
            // Only SIGKILL is left that could interrupt it.
            if ret >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return check(ret, "reset dirty rings");
            }
        }
        Err(KvmError::Call {
            what: format!("reset dirty rings, interrupted {RESET_TRIES} times"),
            source: io::Error::from(io::ErrorKind::Interrupted),
        })
    }
}

/// Blocks all signals of this thread while it lives. A kick that arrives meanwhile comes when it is gone.
struct NoSignals(libc::sigset_t);

impl NoSignals {
    fn new() -> Self {
        // SAFETY: an all-zero sigset is a valid value, sigfillset fills it, and pthread_sigmask only reads the one and
        // writes the other; both live on this frame. Neither fails for these arguments.
        unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for NoSignals {
    fn drop(&mut self) {
        // SAFETY: gives back the mask that `new` was given.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made by `map`, and nobody else holds a pointer into it.
        unsafe { libc::munmap(self.entries.cast(), self.count * size_of::<kvm_dirty_gfn>()) };
    }
}
