//! Loads a Linux kernel: a bzImage by the 64-bit boot protocol, an ELF vmlinux by PVH where it has the note and by
//! the 64-bit protocol otherwise (Linux Documentation/arch/x86/boot.rst, zero-page.rst).

use super::{
    BootError, CMDLINE_ADDRESS, CMDLINE_ROOM, Entry, HIGH_MEMORY, LINUX_TABLES, Mode, ZERO_PAGE_ADDRESS,
    check_cmdline, e820, elf, field, paging, put, pvh, registers, slice,
};
use crate::memory::{Ram, layout};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

const HEADER_AT: u64 = 0x1f1;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const BOOT_FLAG: u16 = 0xaa55;
/// First protocol with `xloadflags`, and so with a promised 64-bit entry (Linux 3.8).
const PROTOCOL_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry is this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const LOADER_UNDEFINED: u8 = 0xff;
/// Command line limit of x86 kernels, for a vmlinux that has no header to say so.
const VMLINUX_CMDLINE_MAX: u32 = 2047;
/// Highest address of an initrd, for a vmlinux that has no header to say so.
const VMLINUX_INITRD_MAX: u32 = 0x7fff_ffff;
const PAGE: u64 = 4096;

/// Where the initrd was put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placed {
    pub address: u64,
    pub len: u64,
}

/// End of the RAM below the hole.
pub(crate) fn low_end(ram: &Ram) -> u64 {
    ram.bytes().min(layout::LOW_RAM_END_MAX)
}

/// Loads `kernel` (bzImage or ELF vmlinux), `initrd` and `cmdline`, and writes what the kernel finds at its entry:
/// zero page or PVH start info with the memory map, page tables, GDT. `rsdp` is what [`super::acpi::build`] returned.
///
/// # Errors
/// [`BootError`] names what is wrong with the kernel, or what does not fit.
pub fn linux(
    ram: &Ram,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    rsdp: Option<u64>,
) -> Result<Entry, BootError> {
    if kernel.starts_with(b"\x7fELF") {
        return vmlinux(ram, kernel, initrd, cmdline, rsdp);
    }
    let magic = field(kernel, "the setup header", 0x202).map(u32::from_le_bytes);
    if magic.ok() != Some(HEADER_MAGIC) {
        return Err(BootError::NotAKernel {
            start: kernel.iter().take(8).copied().collect(),
        });
    }
    bzimage(ram, kernel, initrd, cmdline, rsdp)
}

fn bzimage(
    ram: &Ram,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    rsdp: Option<u64>,
) -> Result<Entry, BootError> {
    let mut header = read_header(kernel)?;
    check_header(&header)?;
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        header.setup_sects
    };
    let setup = (u64::from(sectors) + 1) * 512;
    let image = slice(
        kernel,
        "the protected-mode kernel",
        setup,
        (kernel.len() as u64).saturating_sub(setup).max(ENTRY_64 + 1),
    )?;
    let load = header.pref_address;
    let size = u64::from(header.init_size).max(image.len() as u64);
    let end = load.saturating_add(size);
    let low_end = low_end(ram);
    if load < HIGH_MEMORY || !load.is_multiple_of(PAGE) || end > low_end {
        return Err(BootError::NoRoom {
            start: load,
            end,
            low_end,
        });
    }
    put(ram.memory(), "the kernel", load, image)?;
    header.code32_start = load as u32;
    let initrd = place_initrd(ram, initrd, end, header.initrd_addr_max)?;
    let cmdline_max = if header.cmdline_size == 0 {
        255
    } else {
        header.cmdline_size
    };
    write_cmdline(ram, cmdline, cmdline_max)?;
    zero_page(ram, header, initrd, rsdp)?;
    long_entry(ram, load + ENTRY_64)
}

fn vmlinux(
    ram: &Ram,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    rsdp: Option<u64>,
) -> Result<Entry, BootError> {
    let loaded = elf::load(ram.memory(), kernel, HIGH_MEMORY, low_end(ram))?;
    let initrd = place_initrd(ram, initrd, loaded.end, VMLINUX_INITRD_MAX)?;
    write_cmdline(ram, cmdline, VMLINUX_CMDLINE_MAX)?;
    if let Some(entry) = loaded.pvh {
        if u64::from(entry) < HIGH_MEMORY || u64::from(entry) >= loaded.end {
            return Err(BootError::Elf {
                why: format!("its PVH entry point {entry:#x} lies outside its segments"),
            });
        }
        let rbx = pvh::start_info(ram, initrd, rsdp)?;
        registers::write_gdt(ram.memory(), false)?;
        return Ok(Entry {
            rip: u64::from(entry),
            mode: Mode::Pvh32 { rbx },
            all_vcpus: false,
        });
    }
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_MIN,
        loadflags: LOADED_HIGH,
        kernel_alignment: 0x0100_0000,
        cmdline_size: VMLINUX_CMDLINE_MAX,
        ..setup_header::default()
    };
    zero_page(ram, header, initrd, rsdp)?;
    long_entry(ram, loaded.entry)
}

/// The setup header, as long as the kernel says it is; what a shorter one lacks is zero.
fn read_header(kernel: &[u8]) -> Result<setup_header, BootError> {
    // The byte after the jump at 0x200 tells where the header ends.
    let [jump] = field(kernel, "the setup header", 0x201)?;
    let len = (0x202 + u64::from(jump) - HEADER_AT).min(size_of::<setup_header>() as u64);
    let bytes = slice(kernel, "the setup header", HEADER_AT, len)?;
    let mut header = setup_header::default();
    header.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
    Ok(header)
}

fn check_header(header: &setup_header) -> Result<(), BootError> {
    let protocol = |why: String| Err(BootError::Protocol { why });
    let (flag, version, xloadflags) = (header.boot_flag, header.version, header.xloadflags);
    if flag != BOOT_FLAG {
        return protocol(format!("its boot sector ends with {flag:#06x}, not 0xaa55"));
    }
    if version < PROTOCOL_MIN {
        return protocol(format!(
            "it speaks boot protocol {}.{:02}, at least 2.12 is needed",
            version >> 8,
            version & 0xff
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return protocol("it is a zImage that loads below 1 MiB".into());
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return protocol("it has no 64-bit entry point (a 32-bit kernel)".into());
    }
    Ok(())
}

/// Puts the initrd as high as low memory and the kernel allow, on a page boundary.
fn place_initrd(
    ram: &Ram,
    initrd: Option<&[u8]>,
    kernel_end: u64,
    address_max: u32,
) -> Result<Placed, BootError> {
    let Some(bytes) = initrd.filter(|b| !b.is_empty()) else {
        return Ok(Placed::default());
    };
    let limit = low_end(ram).min(u64::from(address_max) + 1);
    let len = bytes.len() as u64;
    let address = limit.checked_sub(len).map(|a| a & !(PAGE - 1));
    match address {
        Some(address) if address >= kernel_end => {
            put(ram.memory(), "the initrd", address, bytes)?;
            Ok(Placed { address, len })
        }
        _ => Err(BootError::NoRoomForInitrd {
            len,
            kernel_end,
            limit,
        }),
    }
}

fn write_cmdline(ram: &Ram, cmdline: &str, kernel_max: u32) -> Result<(), BootError> {
    check_cmdline(cmdline, CMDLINE_ROOM.saturating_sub(1).min(kernel_max as usize))?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    put(ram.memory(), "the command line", CMDLINE_ADDRESS, &bytes)
}

fn zero_page(ram: &Ram, header: setup_header, initrd: Placed, rsdp: Option<u64>) -> Result<(), BootError> {
    let mut page = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp.unwrap_or(0),
        ..boot_params::default()
    };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = CMDLINE_ADDRESS as u32;
    // Both lie below 4 GiB: low memory ends at 3 GiB.
    page.hdr.ramdisk_image = initrd.address as u32;
    page.hdr.ramdisk_size = initrd.len as u32;
    // Never a list of the file's own choosing: the kernel would follow it.
    page.hdr.setup_data = 0;
    let map = e820(ram.bytes());
    page.e820_entries = map.len() as u8;
    let mut table = page.e820_table;
    for (slot, e) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: e.start,
            size: e.len,
            r#type: e.kind as u32,
        };
    }
    page.e820_table = table;
    put(ram.memory(), "the zero page", ZERO_PAGE_ADDRESS, page.as_slice())
}

fn long_entry(ram: &Ram, rip: u64) -> Result<Entry, BootError> {
    let cr3 = paging::identity(ram.memory(), 4 << 30, LINUX_TABLES)?;
    registers::write_gdt(ram.memory(), true)?;
    Ok(Entry {
        rip,
        mode: Mode::Long64 {
            rsi: ZERO_PAGE_ADDRESS,
            cr3,
        },
        all_vcpus: false,
    })
}
