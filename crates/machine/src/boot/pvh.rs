//! The start info of a PVH guest (Xen public/arch-x86/hvm/start_info.h, version 1).

use super::{BootError, CMDLINE_ADDRESS, PVH_INFO_ADDRESS, e820, linux::Placed, put};
use crate::memory::Ram;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

const MODULES_AT: u64 = PVH_INFO_ADDRESS + 0x100;
const MAP_AT: u64 = PVH_INFO_ADDRESS + 0x200;

/// Writes start info, module list (the initrd) and memory map; returns the address for `ebx`.
pub(crate) fn start_info(ram: &Ram, initrd: Placed, rsdp: Option<u64>) -> Result<u64, BootError> {
    let memory = ram.memory();
    let map = e820(ram.bytes());
    for (i, e) in (0u64..).zip(&map) {
        let entry = hvm_memmap_table_entry {
            addr: e.start,
            size: e.len,
            type_: e.kind as u32,
            reserved: 0,
        };
        put(memory, "the PVH memory map", MAP_AT + i * 24, entry.as_slice())?;
    }
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: CMDLINE_ADDRESS,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: MAP_AT,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    if initrd.len > 0 {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.len,
            ..hvm_modlist_entry::default()
        };
        put(memory, "the PVH module list", MODULES_AT, module.as_slice())?;
        info.nr_modules = 1;
        info.modlist_paddr = MODULES_AT;
    }
    put(memory, "the PVH start info", PVH_INFO_ADDRESS, info.as_slice())?;
    Ok(PVH_INFO_ADDRESS)
}
