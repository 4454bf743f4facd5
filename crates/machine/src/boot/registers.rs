//! What a vCPU's registers hold at the first instruction.
//!
//! Selectors are those that the Linux boot protocol asks for: `__BOOT_CS` = 0x10 and `__BOOT_DS` = 0x18, flat 4 GiB
//! segments. The GDT is in guest memory at 0x500 for a guest that reloads its segments before it has its own.

use super::{BootError, GDT_ADDRESS, put, words};
use crate::memory::GuestMemory;
use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

/// How the guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit long mode as the Linux 64-bit boot protocol has it; `rsi` is the zero page.
    Long64 {
        /// Guest physical address of the zero page.
        rsi: u64,
        /// Root of the identity page tables.
        cr3: u64,
    },
    /// 32-bit protected mode, paging off, as PVH has it; `rbx` is the start info.
    Pvh32 {
        /// Guest physical address of `hvm_start_info`.
        rbx: u64,
    },
    /// 64-bit long mode of the flat test guest: `rdi` is the vCPU's index, `rsi` the boot-info page.
    Flat64 {
        /// Guest physical address of the boot-info page.
        rsi: u64,
        /// Root of the identity page tables.
        cr3: u64,
    },
}

/// Where and how a machine starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// Processor mode and arguments.
    pub mode: Mode,
    /// Every vCPU starts here; otherwise only vCPU 0 does, and the others wait for INIT and SIPI
    /// (`KVM_MP_STATE_UNINITIALIZED`).
    pub all_vcpus: bool,
}

impl Entry {
    /// Whether this vCPU starts at the entry, rather than waiting to be started by the guest.
    #[must_use]
    pub fn starts(&self, vcpu: u32) -> bool {
        vcpu == 0 || self.all_vcpus
    }
}

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;
const GDT_ENTRIES: usize = 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

fn code(long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE,
        type_: 0xb, // execute, read, accessed
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..kvm_segment::default()
    }
}

fn data() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: DATA,
        type_: 0x3, // read, write, accessed
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

/// A busy TSS: VM entry wants one. The guest loads its own before it could use it.
fn tss() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TSS,
        type_: 0xb,
        present: 1,
        ..kvm_segment::default()
    }
}

/// A segment as the GDT has it (Intel SDM volume 3, section 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let flags = u64::from(s.type_)
        | u64::from(s.s) << 4
        | u64::from(s.dpl & 3) << 5
        | u64::from(s.present) << 7
        | u64::from(s.avl) << 12
        | u64::from(s.l) << 13
        | u64::from(s.db) << 14
        | u64::from(s.g) << 15;
    (limit & 0xffff)
        | (s.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (s.base >> 24 & 0xff) << 56
}

/// Writes the GDT that [`initial_registers`] refers to.
pub(crate) fn write_gdt(memory: &GuestMemory, long: bool) -> Result<(), BootError> {
    let table: [u64; GDT_ENTRIES] = [
        0,
        0,
        descriptor(&code(long)),
        descriptor(&data()),
        descriptor(&tss()),
        0, // upper half of the TSS descriptor in long mode
    ];
    put(memory, "the GDT", GDT_ADDRESS, &words(&table))
}

/// Registers of a vCPU at its first instruction. `base` is what `KVM_GET_SREGS` gave for the fresh vCPU: its APIC
/// base is kept. For a vCPU that does not start here ([`Entry::starts`]) the reset state is returned.
#[must_use]
pub fn initial_registers(entry: &Entry, vcpu: u32, base: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let mut regs = kvm_regs {
        rflags: 2,
        ..kvm_regs::default()
    };
    let mut sregs = base;
    if !entry.starts(vcpu) {
        return (regs, sregs);
    }
    regs.rip = entry.rip;
    let long = !matches!(entry.mode, Mode::Pvh32 { .. });
    sregs.cs = code(long);
    for s in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *s = data();
    }
    sregs.tr = tss();
    sregs.gdt = kvm_dtable {
        base: GDT_ADDRESS,
        limit: (GDT_ENTRIES * 8 - 1) as u16,
        ..kvm_dtable::default()
    };
    sregs.idt = kvm_dtable::default();
    match entry.mode {
        Mode::Long64 { rsi, cr3 } => {
            regs.rsi = rsi;
            long_mode(&mut sregs, cr3);
        }
        Mode::Flat64 { rsi, cr3 } => {
            regs.rdi = u64::from(vcpu);
            regs.rsi = rsi;
            long_mode(&mut sregs, cr3);
        }
        Mode::Pvh32 { rbx } => {
            regs.rbx = rbx;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
    (regs, sregs)
}

fn long_mode(sregs: &mut kvm_sregs, cr3: u64) {
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = cr3;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// MSRs that firmware would have set on every processor, for each vCPU before it runs: fast strings on, and MTRRs
/// enabled with write-back as default type (without it Linux turns PAT off).
#[must_use]
pub fn initial_msrs() -> Vec<kvm_msr_entry> {
    [(MSR_IA32_MISC_ENABLE, 1), (MSR_IA32_MTRR_DEF_TYPE, 1 << 11 | 6)]
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        })
        .to_vec()
}
