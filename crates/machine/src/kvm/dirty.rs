//! Which pages were written since the last look: KVM's log or ring, joined with the monitor's own writes.
//!
//! Two methods, chosen by measurement (`cargo xtask bench machine`):
//! - the dirty log: a bitmap per slot. Its harvest copies the whole bitmap, 32 KiB per GiB of RAM; with manual
//!   protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`) only the words that have bits are write-protected again.
//! - the dirty ring: a ring of page numbers per vCPU. Its harvest costs what is dirty and not what is mapped.
//!
//! A ring that was overrun (see [`super::DirtyRing`]) makes every page dirty at every harvest: dear, never wrong.
//!
//! A harvest that failed half-way keeps what it took in `pending`, so nothing is forgotten: dirty bits are owned by
//! somebody at every instant.

use super::{DirtyRing, KvmError};
use crate::memory::{Ram, RamRegion};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use steadfast_types::{Gfn, PAGE_SIZE};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

const KVMIO: u32 = 0xAE;
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// How dirty pages are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyMethod {
    /// The log with manual protection where KVM has it, else the plain log: both measured better than the ring
    /// (`docs/decisions/0007-dirty-tracking.md`).
    #[default]
    Auto,
    /// Bitmap per slot, cleared with the read.
    Log,
    /// Bitmap per slot, cleared by hand for the words that have bits.
    LogManual,
    /// Ring per vCPU.
    Ring,
}

/// Pages that rings gave up before a harvest asked (a full ring stops its vCPU).
pub type RingOverflow = Arc<Mutex<Vec<Gfn>>>;

struct Slot {
    region: RamRegion,
    bitmap: Vec<u64>,
}

/// Harvests the dirty pages of one VM.
pub struct DirtyTracker {
    method: DirtyMethod,
    slots: Vec<Slot>,
    rings: Vec<Arc<Mutex<DirtyRing>>>,
    overflow: RingOverflow,
    pending: Vec<Gfn>,
    on: bool,
    ring_bytes: u64,
    /// A ring was overrun, which is told once.
    overran: bool,
}

fn locked<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DirtyTracker {
    pub(super) fn new(vm: &VmFd, ram: &Ram, wanted: DirtyMethod) -> Result<Self, KvmError> {
        let manual = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)) & 1 != 0;
        let ring_cap = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .into_iter()
            .find(|&c| vm.check_extension_raw(u64::from(c)) > 0);
        let method = match wanted {
            DirtyMethod::Auto if manual => DirtyMethod::LogManual,
            DirtyMethod::Auto => DirtyMethod::Log,
            DirtyMethod::Ring if ring_cap.is_none() => return Err(KvmError::Capability("the dirty ring")),
            DirtyMethod::LogManual if !manual => {
                return Err(KvmError::Capability("manual dirty log protection"));
            }
            other => other,
        };
        let mut ring_bytes = 0;
        match (method, ring_cap) {
            (DirtyMethod::Ring, Some(cap)) => {
                let max = vm.check_extension_raw(u64::from(cap));
                let bytes = DirtyRing::BYTES.min(u64::try_from(max).unwrap_or(0));
                enable(vm, cap, bytes, "enable dirty ring")?;
                ring_bytes = bytes;
            }
            (DirtyMethod::LogManual, _) => enable(
                vm,
                KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE),
                "enable manual dirty log",
            )?,
            _ => {}
        }
        let slots = ram
            .regions()
            .into_iter()
            .map(|region| Slot {
                region,
                bitmap: vec![0; (region.len / PAGE_SIZE).div_ceil(64) as usize],
            })
            .collect();
        Ok(Self {
            method,
            slots,
            rings: Vec::new(),
            overflow: Arc::default(),
            pending: Vec::new(),
            on: false,
            ring_bytes,
            overran: false,
        })
    }

    /// The method in use, never `Auto`.
    #[must_use]
    pub fn method(&self) -> DirtyMethod {
        self.method
    }

    /// Size of each vCPU's ring in bytes; zero without rings.
    #[must_use]
    pub fn ring_bytes(&self) -> u64 {
        self.ring_bytes
    }

    /// Takes the ring of a vCPU; only with [`DirtyMethod::Ring`].
    pub fn add_ring(&mut self, ring: Arc<Mutex<DirtyRing>>) {
        self.rings.push(ring);
    }

    /// Where a vCPU thread puts the pages of a full ring.
    #[must_use]
    pub fn overflow(&self) -> RingOverflow {
        Arc::clone(&self.overflow)
    }

    /// Gives pages back that could not be captured: they are dirty again.
    pub fn merge_back(&mut self, pages: &[Gfn]) {
        self.pending.extend_from_slice(pages);
    }

    pub(super) fn start(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        self.on = true;
        self.pending.clear();
        self.from_kvm(vm)?;
        self.pending.clear();
        Ok(())
    }

    pub(super) fn stop(&mut self) {
        self.on = false;
        self.pending.clear();
    }

    pub(super) fn harvest(&mut self, vm: &VmFd, ram: &Ram, pages: &mut Vec<Gfn>) -> Result<(), KvmError> {
        let pending = &mut self.pending;
        ram.harvest_own_writes(|g| pending.push(g));
        self.from_kvm(vm)?;
        // Each source is nearly sorted, and the joined list is small against the copy that follows.
        self.pending.sort_unstable();
        self.pending.dedup();
        pages.clear();
        pages.append(&mut self.pending);
        Ok(())
    }

    /// Adds what KVM knows to `pending`.
    #[allow(clippy::wrong_self_convention)]
    fn from_kvm(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        if !self.on {
            return Ok(());
        }
        match self.method {
            DirtyMethod::Ring | DirtyMethod::Auto => self.from_rings(vm),
            DirtyMethod::Log => self.from_log(vm, false),
            DirtyMethod::LogManual => self.from_log(vm, true),
        }
    }

    #[allow(clippy::wrong_self_convention)]
    fn from_rings(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        let mut overflow = locked(&self.overflow);
        // Pages of a full ring whose reset failed on its own thread are protected again here.
        let mut taken = overflow.len();
        self.pending.append(&mut overflow);
        drop(overflow);
        let mut overran = false;
        for ring in &self.rings {
            let slots = &self.slots;
            let pending = &mut self.pending;
            let mut ring = locked(ring);
            taken += ring.harvest(|slot, page| {
                if let Some(s) = slots.get(slot as usize) {
                    pending.push(Gfn(s.region.start / PAGE_SIZE + page));
                }
            });
            overran |= ring.overran();
        }
        if overran {
            if !std::mem::replace(&mut self.overran, true) {
                tracing::error!(
                    "this KVM wrote beyond the end of a dirty ring: from now on every page counts as dirty. Use the dirty log \
                     (dirty: log-manual) for this VM"
                );
            }
            for slot in &self.slots {
                let first = slot.region.start / PAGE_SIZE;
                let all = first..first + slot.region.len / PAGE_SIZE;
                self.pending.extend(all.map(Gfn));
            }
        }
        if taken > 0 { DirtyRing::reset(vm) } else { Ok(()) }
    }

    #[allow(clippy::wrong_self_convention)]
    fn from_log(&mut self, vm: &VmFd, manual: bool) -> Result<(), KvmError> {
        for slot in &mut self.slots {
            let log = kvm_dirty_log {
                slot: slot.region.slot,
                __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: slot.bitmap.as_mut_ptr().cast(),
                },
                ..Default::default()
            };
            // SAFETY: `bitmap` has one bit for each page of the slot, rounded up to 64, which is what KVM writes.
            let ret = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
            check(ret, "read dirty log")?;
            let base = slot.region.start / PAGE_SIZE;
            let mut first_word = None;
            let mut last_word = 0;
            for (w, &word) in slot.bitmap.iter().enumerate() {
                let mut bits = word;
                if bits == 0 {
                    continue;
                }
                first_word.get_or_insert(w);
                last_word = w;
                while bits != 0 {
                    self.pending
                        .push(Gfn(base + w as u64 * 64 + u64::from(bits.trailing_zeros())));
                    bits &= bits - 1;
                }
            }
            if let (true, Some(first)) = (manual, first_word) {
                clear_log(vm, slot, first, last_word)?;
            }
        }
        Ok(())
    }
}

/// Write-protects the logged pages of words `first..=last` again.
fn clear_log(vm: &VmFd, slot: &mut Slot, first: usize, last: usize) -> Result<(), KvmError> {
    let pages = slot.region.len / PAGE_SIZE;
    let first_page = first as u64 * 64;
    let num_pages = ((last + 1) as u64 * 64).min(pages) - first_page;
    let clear = kvm_clear_dirty_log {
        slot: slot.region.slot,
        num_pages: num_pages as u32,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: slot.bitmap[first..].as_mut_ptr().cast(),
        },
    };
    // SAFETY: the bitmap from `first` on has a bit for each of `num_pages` pages; KVM only reads it. `num_pages` is
    // a multiple of 64 or ends at the slot's end, as the API asks.
    let ret = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) };
    check(ret, "clear dirty log")
}

fn enable(vm: &VmFd, cap: u32, arg: u64, what: &str) -> Result<(), KvmError> {
    let mut c = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    c.args[0] = arg;
    vm.enable_cap(&c).map_err(KvmError::call(what))
}

pub(super) fn check(ret: i32, what: &str) -> Result<(), KvmError> {
    if ret < 0 {
        Err(KvmError::Call {
            what: what.into(),
            source: io::Error::last_os_error(),
        })
    } else {
        Ok(())
    }
}
