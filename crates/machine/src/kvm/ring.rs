//! The dirty ring of one vCPU: page numbers that KVM writes and the monitor takes.
//!
//! Each entry goes through three states (api.rst, 8.29): clean (0), dirty (KVM set bit 0), harvested (the monitor
//! set bit 1). `KVM_RESET_DIRTY_RINGS` write-protects the harvested pages of all rings again and cleans them.

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
        })
    }

    /// Takes all dirty entries as `(slot, page within the slot)`; returns how many. [`DirtyRing::reset`] must
    /// follow before the guest may rely on being logged for those pages again.
    pub fn harvest(&mut self, mut visit: impl FnMut(u32, u64)) -> usize {
        let mut taken = 0;
        while taken < self.count {
            // SAFETY: `next` is below `count`, so the entry is inside the mapping; `flags` is a u32 that KVM and
            // we change concurrently, hence the atomic view (release/acquire as api.rst asks).
            let (flags, entry) = unsafe {
                let e = self.entries.add(self.next);
                (AtomicU32::from_ptr(&raw mut (*e).flags), e)
            };
            if flags.load(Ordering::Acquire) & (DIRTY | HARVESTED) != DIRTY {
                break;
            }
            // SAFETY: an entry with the dirty flag is complete and KVM does not touch it until the reset.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            visit(slot, offset);
            flags.store(HARVESTED, Ordering::Release);
            self.next = (self.next + 1) % self.count;
            taken += 1;
        }
        taken
    }

    /// Write-protects what was harvested from any ring of the VM and gives the entries back.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn reset(vm: &VmFd) -> Result<(), KvmError> {
        for _ in 0..RESET_TRIES {
            // SAFETY: the call takes no argument.
            let ret = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
            // Newer kernels (6.16) give up at a pending signal, such as the kick of a vCPU thread that empties its
            // full ring; the signal is handled on the way out, so the next try gets further.
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

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made by `map`, and nobody else holds a pointer into it.
        unsafe { libc::munmap(self.entries.cast(), self.count * size_of::<kvm_dirty_gfn>()) };
    }
}
