//! Unit tests of booting: tables are read back as a guest would, hostile kernels are refused, and the entry states
//! run on a real KVM where there is one.

use super::*;
use crate::memory::{Ram, layout};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

fn ram(bytes: u64) -> Ram {
    Ram::new(bytes, &RamBacking::Memfd).unwrap()
}

fn read(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    ram.memory().read_slice(&mut out, GuestAddress(at)).unwrap();
    out
}

fn u64_at(ram: &Ram, at: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(at)).unwrap()
}

/// A bzImage with the smallest valid setup header and `image` as protected-mode kernel.
fn bzimage(image: &[u8]) -> Vec<u8> {
    let mut k = vec![0u8; 5 * 512];
    k[0x1f1] = 4;
    k[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    k[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    k[0x202..0x206].copy_from_slice(b"HdrS");
    k[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    k[0x211] = 1;
    k[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    k[0x234] = 1;
    k[0x236] = 1; // xloadflags: 64-bit
    k[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    k[0x250..0x258].copy_from_slice(&0xdead_beefu64.to_le_bytes()); // setup_data: must not survive
    k[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    k[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    k.extend(image);
    k
}

/// A static ELF-64 with one segment at 1 MiB that starts with `code`, and optionally a PVH note.
fn elf_file(code: &[u8], pvh: bool) -> Vec<u8> {
    let mut f = vec![0u8; 64 + 2 * 56];
    f[..6].copy_from_slice(b"\x7fELF\x02\x01");
    f[18] = 62;
    f[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
    f[32..40].copy_from_slice(&64u64.to_le_bytes());
    f[54] = 56;
    f[56] = 2;
    let at = f.len() as u64;
    let header = |f: &mut [u8], i: usize, kind: u32, at: u64, addr: u64, len: u64, mem: u64| {
        let h = 64 + i * 56;
        f[h..h + 4].copy_from_slice(&kind.to_le_bytes());
        for (offset, v) in [(8, at), (24, addr), (32, len), (40, mem)] {
            f[h + offset..h + offset + 8].copy_from_slice(&v.to_le_bytes());
        }
    };
    header(
        &mut f,
        0,
        1,
        at,
        0x10_0000,
        code.len() as u64,
        code.len() as u64 + 5000,
    );
    f.extend(code);
    if pvh {
        let note = f.len() as u64;
        for word in [4u32, 4, 99] {
            f.extend(word.to_le_bytes());
        }
        f.extend(b"GNU\0xxxx");
        for word in [4u32, 4, 18] {
            f.extend(word.to_le_bytes());
        }
        f.extend(b"Xen\0");
        f.extend(0x10_0000u32.to_le_bytes());
        let len = f.len() as u64 - note;
        header(&mut f, 1, 4, note, 0, len, len);
    }
    f
}

#[test]
fn bzimage_gets_a_zero_page_and_a_64_bit_entry() {
    let ram = ram(4 << 30);
    let initrd = vec![7u8; 10_000];
    let entry = linux(
        &ram,
        &bzimage(&[0x90; 4096]),
        Some(&initrd),
        "console=ttyS0",
        Some(0xE_0000),
    )
    .unwrap();
    assert_eq!(entry.rip, 0x100_0200);
    assert_eq!(
        entry.mode,
        Mode::Long64 {
            rsi: 0x7000,
            cr3: 0x9000
        }
    );
    assert!(!entry.all_vcpus);
    assert_eq!(read(&ram, 0x100_0000, 4096), [0x90; 4096]);

    let page = read(&ram, 0x7000, 4096);
    let field = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    assert_eq!(long(0x70), 0xE_0000, "RSDP");
    assert_eq!(page[0x210], 0xff, "type of loader");
    assert_eq!(long(0x250), 0, "no setup_data of the file's choosing");
    assert_eq!(&read(&ram, u64::from(field(0x228)), 14), b"console=ttyS0\0");
    let (image, size) = (u64::from(field(0x218)), field(0x21c) as usize);
    assert_eq!(size, initrd.len());
    assert_eq!(read(&ram, image, size), initrd);
    assert_eq!(image % 4096, 0);
    assert!(image + size as u64 <= 0x8000_0000 && image + size as u64 > 0x8000_0000 - 8192);

    let map = e820(4 << 30);
    assert_eq!(usize::from(page[0x1e8]), map.len());
    for (i, e) in map.iter().enumerate() {
        let at = 0x2d0 + i * 20;
        assert_eq!(
            (long(at), long(at + 8), field(at + 16)),
            (e.start, e.len, e.kind as u32)
        );
    }
}

#[test]
fn e820_rises_covers_ram_and_reserves_the_rest() {
    for bytes in [64 << 20, 3 << 30, (3 << 30) + 4096, 5 << 30, 200 << 30] {
        let map = e820(bytes);
        for pair in map.windows(2) {
            assert!(pair[0].start + pair[0].len <= pair[1].start, "{pair:x?}");
        }
        let usable: u64 = map
            .iter()
            .filter(|e| e.kind == E820Type::Ram)
            .map(|e| e.len)
            .sum();
        assert_eq!(usable, bytes - (HIGH_MEMORY - EBDA_START));
        let regions = layout::ram_regions(bytes);
        for e in map.iter().filter(|e| e.kind == E820Type::Ram) {
            assert!(
                regions
                    .iter()
                    .any(|&(s, l)| e.start >= s && e.start + e.len <= s + l)
            );
        }
        let reserved = |at: u64| {
            map.iter()
                .any(|e| e.kind == E820Type::Reserved && (e.start..e.start + e.len).contains(&at))
        };
        assert!(reserved(layout::KVM_IDENTITY_MAP) && reserved(layout::KVM_TSS + 0x2fff));
        assert!(
            reserved(layout::PCI_ECAM_START) && reserved(layout::PCI_ECAM_START + layout::PCI_ECAM_SIZE - 1)
        );
    }
}

/// Follows the page tables as the CPU does.
fn walk(ram: &Ram, cr3: u64, address: u64) -> Option<u64> {
    let mut table = cr3;
    for level in (0..4u32).rev() {
        let shift = 12 + 9 * level;
        let entry = u64_at(ram, table + (address >> shift & 511) * 8);
        if entry & 1 == 0 {
            return None;
        }
        if level == 0 || (level < 3 && entry & 0x80 != 0) {
            let mask = (1u64 << shift) - 1;
            return Some((entry & 0xf_ffff_ffff_f000 & !mask) | (address & mask));
        }
        table = entry & 0xf_ffff_ffff_f000;
    }
    None
}

#[test]
fn page_tables_map_everything_onto_itself() {
    let ram = ram(6 << 30);
    let cr3 = paging::identity(ram.memory(), 4 << 30, LINUX_TABLES).unwrap();
    for address in [0, 0x10_0000, 0xBFFF_FFFF, 0xFEE0_0000, 0xFFFF_FFFF] {
        assert_eq!(walk(&ram, cr3, address), Some(address));
    }
    assert_eq!(walk(&ram, cr3, 4 << 30), None);
    // A machine far larger than this one: only the tables matter.
    let cr3 = paging::identity(ram.memory(), 300 << 30, FLAT_TABLES).unwrap();
    for address in [0, (64 << 30) - 1, 64 << 30, (300 << 30) - 1] {
        assert_eq!(walk(&ram, cr3, address), Some(address));
    }
    assert_eq!(walk(&ram, cr3, 300 << 30), None);
    assert!(matches!(
        paging::identity(ram.memory(), 513 << 30, FLAT_TABLES),
        Err(BootError::Flat { .. })
    ));
    assert!(matches!(
        paging::identity(ram.memory(), 9 << 30, LINUX_TABLES),
        Err(BootError::Flat { .. })
    ));
}

#[test]
fn vmlinux_starts_by_pvh_if_it_can() {
    let ram = ram(128 << 20);
    let entry = linux(
        &ram,
        &elf_file(&[0xf4; 64], true),
        Some(&[1; 100]),
        "quiet",
        Some(0xE_0000),
    )
    .unwrap();
    assert_eq!((entry.rip, entry.mode), (0x10_0000, Mode::Pvh32 { rbx: 0x6000 }));
    let info = read(&ram, 0x6000, 56);
    let word = |at: usize| u32::from_le_bytes(info[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(12)), (0x336e_c578, 1, 1));
    assert_eq!(u64_at(&ram, 0x6000 + 32), 0xE_0000);
    assert_eq!(word(48) as usize, e820(128 << 20).len());
    let (map, modules) = (u64_at(&ram, 0x6028), u64_at(&ram, 0x6010));
    assert_eq!((u64_at(&ram, map), u64_at(&ram, map + 8)), (0, EBDA_START));
    assert_eq!(u64_at(&ram, modules + 8), 100);
    assert_eq!(read(&ram, u64_at(&ram, modules), 100), [1; 100]);

    let entry = linux(&ram, &elf_file(&[0xf4; 64], false), None, "quiet", None).unwrap();
    assert!(matches!(entry.mode, Mode::Long64 { .. }));
    let page = read(&ram, 0x7000, 4096);
    assert_eq!(&page[0x202..0x206], b"HdrS");
}

#[test]
fn segments_are_cleared_beyond_the_file() {
    let ram = ram(64 << 20);
    ram.memory()
        .write_slice(&[0xaa; 8192], GuestAddress(0x10_0000))
        .unwrap();
    flat(&ram, &elf_file(&[0xf4; 64], false), "", 1).unwrap();
    assert_eq!(read(&ram, 0x10_0000, 64), [0xf4; 64]);
    assert_eq!(read(&ram, 0x10_0040, 5000), [0; 5000]);
    assert_eq!(read(&ram, 0x10_0040 + 5000, 1), [0xaa]);
}

#[test]
fn flat_guest_gets_its_boot_info() {
    let ram = ram(5 << 30);
    let entry = flat(&ram, &elf_file(&[0xf4], false), "pages=10 e9=1", 3).unwrap();
    assert!(entry.all_vcpus);
    let info = read(&ram, BOOT_INFO_ADDRESS, 64);
    assert_eq!(&info[..8], b"PULSEBI1");
    assert_eq!(info[8..12], 1u32.to_le_bytes());
    assert_eq!(info[12..16], 3u32.to_le_bytes());
    assert_eq!(info[16..24], (5u64 << 30).to_le_bytes());
    assert_eq!(info[24..32], 13u64.to_le_bytes());
    assert_eq!(&info[32..46], b"pages=10 e9=1\0");
    let Mode::Flat64 { cr3, .. } = entry.mode else {
        panic!("{entry:?}")
    };
    assert_eq!(walk(&ram, cr3, (6 << 30) - 8), Some((6 << 30) - 8));
    let (regs, sregs) = initial_registers(&entry, 2, Default::default());
    assert_eq!((regs.rdi, regs.rsi, regs.rflags), (2, 0x7000, 2));
    assert_eq!((sregs.cs.l, sregs.cr0 >> 31, sregs.efer), (1, 1, 0x500));
    assert!(matches!(
        flat(&ram, &elf_file(&[0xf4], false), "", 65),
        Err(BootError::Flat { .. })
    ));
    assert!(matches!(
        flat(&ram, &elf_file(&[0xf4], false), &"x".repeat(3073), 1),
        Err(BootError::CmdlineLength { len: 3073, max: 3072 })
    ));
}

/// The contract is written down twice: here and in pulse, which says what it expects.
#[test]
fn the_pulse_guest_gets_what_its_contract_says() {
    let ram = ram(5 << 30);
    let config: pulse::Config = pulse::Config::default();
    let theirs = pulse::boot::boot_info(&config, 3, 5 << 30).unwrap();
    let line = String::from_utf8(theirs[32..].iter().copied().take_while(|b| *b != 0).collect()).unwrap();
    let entry = flat(&ram, pulse::elf(), &line, 3).unwrap();
    assert_eq!(read(&ram, pulse::shared::BOOT_INFO_GPA, theirs.len()), theirs);
    assert_eq!(
        (BOOT_INFO_ADDRESS, FLAT_CMDLINE_MAX),
        (pulse::shared::BOOT_INFO_GPA, pulse::shared::CMDLINE_MAX)
    );
    assert!((pulse::shared::LOAD_GPA..pulse::shared::SHARED_GPA).contains(&entry.rip));
}

#[test]
fn unusable_kernels_are_refused_with_a_reason() {
    let ram = ram(64 << 20);
    let good = bzimage(&[0x90; 4096]);
    let changed = |at: usize, bytes: &[u8]| {
        let mut k = good.clone();
        k[at..at + bytes.len()].copy_from_slice(bytes);
        linux(&ram, &k, None, "", None)
    };
    assert!(linux(&ram, &good, None, "", None).is_ok());
    assert!(matches!(
        linux(&ram, b"", None, "", None),
        Err(BootError::NotAKernel { .. })
    ));
    assert!(matches!(
        linux(&ram, &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0], None, "", None),
        Err(BootError::NotAKernel { .. })
    ));
    assert!(matches!(
        changed(0x206, &[0x0b, 2]),
        Err(BootError::Protocol { .. })
    ));
    assert!(matches!(changed(0x211, &[0]), Err(BootError::Protocol { .. })));
    assert!(matches!(changed(0x236, &[0]), Err(BootError::Protocol { .. })));
    assert!(matches!(changed(0x1fe, &[0]), Err(BootError::Protocol { .. })));
    assert!(matches!(
        changed(0x1f1, &[0xff]),
        Err(BootError::Truncated { .. })
    ));
    assert!(matches!(changed(0x258, &[0; 8]), Err(BootError::NoRoom { .. })));
    assert!(matches!(
        changed(0x258, &[0xff; 8]),
        Err(BootError::NoRoom { .. })
    ));
    assert!(matches!(
        changed(0x260, &[0xff; 4]),
        Err(BootError::NoRoom { .. })
    ));
    for len in 0..good.len().min(5 * 512 + 0x200) {
        assert!(linux(&ram, &good[..len], None, "", None).is_err(), "{len}");
    }
    let big = vec![0; 60 << 20];
    assert!(matches!(
        linux(&ram, &good, Some(&big), "", None),
        Err(BootError::NoRoomForInitrd { .. })
    ));
    assert!(matches!(
        linux(&ram, &good, None, &"x".repeat(2048), None),
        Err(BootError::CmdlineLength { max: 2047, .. })
    ));
    assert!(matches!(
        linux(&ram, &good, None, "a\nb", None),
        Err(BootError::CmdlineCharacter { at: 1, .. })
    ));
}

#[test]
fn unusable_elf_files_are_refused() {
    let ram = ram(64 << 20);
    let good = elf_file(&[0xf4; 64], true);
    let changed = |at: usize, bytes: &[u8]| {
        let mut k = good.clone();
        k[at..at + bytes.len()].copy_from_slice(bytes);
        linux(&ram, &k, None, "", None)
    };
    assert!(matches!(changed(4, &[1]), Err(BootError::Elf { .. })));
    assert!(matches!(changed(18, &[3]), Err(BootError::Elf { .. })));
    assert!(matches!(changed(56, &[0xff, 0xff]), Err(BootError::Elf { .. })));
    assert!(matches!(
        changed(32, &[0xff; 8]),
        Err(BootError::Elf { .. } | BootError::Truncated { .. })
    ));
    assert!(
        matches!(changed(24, &[0; 8]), Err(BootError::Elf { .. })),
        "entry outside"
    );
    assert!(
        matches!(changed(64 + 24, &[0; 8]), Err(BootError::Elf { .. })),
        "below 1 MiB"
    );
    assert!(matches!(
        changed(64 + 24, &[0xff; 8]),
        Err(BootError::NoRoom { .. })
    ));
    assert!(matches!(
        changed(64 + 40, &[0xff; 8]),
        Err(BootError::NoRoom { .. })
    ));
    assert!(matches!(changed(64 + 32, &[0xff; 8]), Err(BootError::Elf { .. })));
    assert!(matches!(
        changed(64 + 8, &[0xff; 8]),
        Err(BootError::Truncated { .. })
    ));
    let note_entry = good.len() - 4;
    assert!(matches!(
        changed(note_entry, &[0, 0, 0, 0]),
        Err(BootError::Elf { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn mutated_kernels_neither_panic_nor_hang(
        pvh in any::<bool>(),
        elf in any::<bool>(),
        cut in 0usize..4000,
        changes in proptest::collection::vec((0usize..0x400, any::<u8>()), 0..24),
    ) {
        let mut file = if elf { elf_file(&[0xf4; 700], pvh) } else { bzimage(&[0x90; 1024]) };
        for (at, byte) in changes {
            if let Some(b) = file.get_mut(at) {
                *b = byte;
            }
        }
        file.truncate(file.len().saturating_sub(cut.saturating_sub(2000)));
        fuzz_kernel(&file);
    }

    #[test]
    fn noise_neither_panics_nor_hangs(data in proptest::collection::vec(any::<u8>(), 0..2048)) {
        fuzz_kernel(&data);
    }
}

#[test]
fn structures_have_their_sizes() {
    use linux_loader::loader::bootparam::{boot_params, setup_header};
    assert_eq!(boot_params::default().as_slice().len(), 4096);
    assert_eq!(setup_header::default().as_slice().len(), 123);
}

mod acpi_tables_read_back {
    use super::super::acpi::{AcpiConfig, RSDP_ADDRESS, build};
    use super::*;
    use crate::devices::legacy::power;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    fn table(ram: &Ram, at: u64) -> Vec<u8> {
        let len: u32 = ram.memory().read_obj(GuestAddress(at + 4)).unwrap();
        let bytes = read(ram, at, len as usize);
        assert_eq!(
            sum(&bytes),
            0,
            "checksum of {:?}",
            std::str::from_utf8(&bytes[..4])
        );
        assert!(at >= RSDP_ADDRESS && at + u64::from(len) <= HIGH_MEMORY);
        bytes
    }

    fn tables(ram: &Ram, config: &AcpiConfig) -> Vec<Vec<u8>> {
        let rsdp = build(ram, config).unwrap();
        let head = read(ram, rsdp, 36);
        assert_eq!(&head[..8], b"RSD PTR ");
        assert_eq!((sum(&head[..20]), sum(&head)), (0, 0));
        let xsdt = table(ram, u64_at(ram, rsdp + 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[36..]
            .chunks_exact(8)
            .map(|c| table(ram, u64::from_le_bytes(c.try_into().unwrap())))
            .collect()
    }

    #[test]
    fn all_tables_are_found_and_whole() {
        let ram = ram(64 << 20);
        for ncpus in [1, 2, 64] {
            let all = tables(&ram, &AcpiConfig::full(ncpus));
            let names: Vec<_> = all
                .iter()
                .map(|t| String::from_utf8_lossy(&t[..4]).into_owned())
                .collect();
            assert_eq!(names, ["FACP", "APIC", "MCFG"]);
            let fadt = &all[0];
            assert_eq!(fadt.len(), 276);
            assert_ne!(
                u32::from_le_bytes(fadt[112..116].try_into().unwrap()) & 1 << 20,
                0,
                "hardware-reduced"
            );
            assert_eq!(fadt[116..128][4..6], power::RESET_PORT.to_le_bytes());
            assert_eq!(fadt[128], power::RESET_VALUE);
            let dsdt = table(&ram, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
            assert_eq!(&dsdt[..4], b"DSDT");
            assert_eq!(fadt[244..256][4..6], power::SLEEP_CONTROL_PORT.to_le_bytes());
            assert_eq!(fadt[256..268][4..6], power::SLEEP_STATUS_PORT.to_le_bytes());
            let mut ids = Vec::new();
            let mut kinds = Vec::new();
            let mut rest = &all[1][44..];
            while let [kind, len, ..] = rest {
                kinds.push(*kind);
                if *kind == 0 {
                    ids.push((rest[2], rest[3], rest[4]));
                }
                rest = &rest[usize::from(*len)..];
            }
            assert_eq!(ids, (0..ncpus as u8).map(|i| (i, i, 1)).collect::<Vec<_>>());
            assert_eq!(kinds.iter().filter(|k| **k == 1).count(), 1);
            assert_eq!(kinds.iter().filter(|k| **k == 4).count(), 1);
            let mcfg = &all[2];
            assert_eq!(mcfg[44..52], layout::PCI_ECAM_START.to_le_bytes());
        }
    }

    #[test]
    fn limits_and_options() {
        let ram = ram(64 << 20);
        assert!(build(&ram, &AcpiConfig::full(0)).is_err());
        assert!(build(&ram, &AcpiConfig::full(65)).is_err());
        let bare = AcpiConfig {
            ncpus: 1,
            serial: false,
            pci: false,
            pvpanic: false,
            watchdog: false,
        };
        assert_eq!(tables(&ram, &bare).len(), 2);
        let guarded = AcpiConfig {
            watchdog: true,
            ..AcpiConfig::full(1)
        };
        let all = tables(&ram, &guarded);
        let wdat = all.last().unwrap();
        assert_eq!(&wdat[..4], b"WDAT");
        let word = |at: usize| u32::from_le_bytes(wdat[at..at + 4].try_into().unwrap());
        assert_eq!((word(36), word(40), word(44)), (32, 0xffff_00ff, 0xff));
        assert_eq!(68 + word(64) as usize * 24, wdat.len());
        // Ping: a byte to the second port.
        assert_eq!(wdat[68..72], [1, 2, 0, 0]);
        assert_eq!(wdat[72..84], [1, 8, 0, 1, 0x21, 6, 0, 0, 0, 0, 0, 0]);
        let find = |d: &[u8], what: &[u8]| d.windows(what.len()).any(|w| w == what);
        assert!(find(&acpi::dsdt(&AcpiConfig::full(1)), b"QEMU0001\0"));
        assert!(!find(&acpi::dsdt(&bare), b"QEMU0001\0"));
    }

    /// With `STEADFAST_DUMP_DSDT=file` the DSDT is written there, to disassemble it with `iasl -d`.
    #[test]
    fn dsdt_can_be_dumped() {
        let dsdt = acpi::dsdt(&AcpiConfig::full(4));
        assert_eq!(sum(&dsdt), 0);
        if let Ok(path) = std::env::var("STEADFAST_DUMP_DSDT") {
            std::fs::write(path, dsdt).unwrap();
        }
    }
}

/// The three entry states, on a real KVM: the guest reloads its segments from the GDT, so a wrong descriptor,
/// selector or page table ends in a triple fault instead of a byte on the port.
mod on_kvm {
    use super::*;
    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit};

    fn run(ram: &Ram, entry: &Entry, vcpu: u32) -> Option<Vec<u8>> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: no /dev/kvm that can be opened; entry states were not run");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(layout::KVM_TSS as usize).unwrap();
        for r in ram.regions() {
            let slot = kvm_userspace_memory_region {
                slot: r.slot,
                guest_phys_addr: r.start,
                memory_size: r.len,
                userspace_addr: r.host,
                flags: 0,
            };
            // SAFETY: the region is a live mapping of `ram`, which outlives the VM in this function.
            unsafe { vm.set_user_memory_region(slot) }.unwrap();
        }
        let mut fd = vm.create_vcpu(u64::from(vcpu)).unwrap();
        fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap())
            .unwrap();
        let (regs, sregs) = initial_registers(entry, vcpu, fd.get_sregs().unwrap());
        fd.set_sregs(&sregs).unwrap();
        fd.set_regs(&regs).unwrap();
        let mut out = Vec::new();
        for _ in 0..16 {
            match fd.run().unwrap() {
                VcpuExit::IoOut(0xe9, data) => out.extend(data),
                VcpuExit::Hlt => return Some(out),
                other => panic!("{other:?} after {out:x?}"),
            }
        }
        panic!("no halt");
    }

    /// mov eax, 0x18; mov ds, ax; mov ss, ax; the same bytes in 32 and 64-bit mode.
    const RELOAD: &[u8] = &[0xb8, 0x18, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0];

    #[test]
    fn long_mode_of_linux_runs() {
        let ram = ram(64 << 20);
        // mov al, [rsi + 0x210]: the loader type in the zero page; out 0xe9, al; hlt
        let mut code = RELOAD.to_vec();
        code.extend([0x8a, 0x86, 0x10, 2, 0, 0, 0xe6, 0xe9, 0xf4]);
        let mut image = vec![0x90; 0x200];
        image.extend(code);
        let entry = linux(&ram, &bzimage(&image), None, "", None).unwrap();
        if let Some(out) = run(&ram, &entry, 0) {
            assert_eq!(out, [0xff]);
        }
    }

    #[test]
    fn pvh_runs() {
        let ram = ram(64 << 20);
        // mov al, [ebx]: first byte of the magic; out; hlt
        let mut code = RELOAD.to_vec();
        code.extend([0x8a, 0x03, 0xe6, 0xe9, 0xf4]);
        let entry = linux(&ram, &elf_file(&code, true), None, "", None).unwrap();
        if let Some(out) = run(&ram, &entry, 0) {
            assert_eq!(out, [0x78]);
        }
    }

    /// A guest that jumps to the BIOS in real mode resets the machine.
    #[test]
    fn the_reset_vector_resets() {
        use crate::devices::legacy::power;
        let ram = ram(64 << 20);
        acpi::build(&ram, &acpi::AcpiConfig::full(1)).unwrap();
        assert_eq!(
            read(&ram, 0xF_FFF0, 9),
            [0xb0, power::RESET_VALUE, 0xba, 2, 6, 0xee, 0xf4, 0xeb, 0xfd]
        );
        assert_eq!(power::RESET_PORT, 0x602);
    }

    #[test]
    fn flat_runs_on_every_vcpu_and_reaches_high_memory() {
        let ram = ram(4 << 30);
        let last = (5u64 << 30) - 1;
        ram.memory().write_obj(0x5au8, GuestAddress(last)).unwrap();
        // mov rax, last; mov al, [rax]; out; mov al, dil; out; mov al, [rsi]; out; hlt
        let mut code = RELOAD.to_vec();
        code.extend([0x48, 0xb8]);
        code.extend(last.to_le_bytes());
        code.extend([
            0x8a, 0x00, 0xe6, 0xe9, 0x40, 0x88, 0xf8, 0xe6, 0xe9, 0x8a, 0x06, 0xe6, 0xe9, 0xf4,
        ]);
        let entry = flat(&ram, &elf_file(&code, false), "", 2).unwrap();
        for vcpu in 0..2 {
            if let Some(out) = run(&ram, &entry, vcpu) {
                assert_eq!(out, [0x5a, vcpu as u8, b'P']);
            }
        }
    }
}
