//! Boot discovery on real file systems in real partition tables, and on configurations as distributions write them.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod fixtures;

use common::have;
use fixtures::*;
use std::sync::Arc;
use steadfast_disk::boot::partition::{self, TableKind};
use steadfast_disk::boot::{BootError, BootPlan, DiscoverOptions, discover};
use steadfast_disk::image::{BlockIo, MemImage};

fn find(bytes: Vec<u8>) -> Result<BootPlan, BootError> {
    let io: Arc<dyn BlockIo> = Arc::new(MemImage::new(bytes, true));
    discover(&io, &DiscoverOptions::default())
}

fn kernel_name(plan: &BootPlan) -> String {
    String::from_utf8_lossy(&plan.kernel[0x300..])
        .trim_end_matches('\0')
        .to_owned()
}

#[test]
fn mmdebstrap_image_without_partitions() {
    if !have("mke2fs", "mmdebstrap_image_without_partitions") {
        return;
    }
    let mut tree = Tree::new();
    tree.file("etc/os-release", b"ID=debian\n");
    for v in ["6.1.0-9-cloud-amd64", "6.1.0-28-cloud-amd64"] {
        tree.file(&format!("boot/vmlinuz-{v}"), &kernel(v));
        tree.file(&format!("boot/initrd.img-{v}"), format!("initrd {v}").as_bytes());
    }
    let plan = find(tree.ext4(ROOT_UUID, "", &[])).unwrap();
    assert_eq!(kernel_name(&plan), "6.1.0-28-cloud-amd64");
    assert_eq!(plan.initrd.as_deref(), Some(&b"initrd 6.1.0-28-cloud-amd64"[..]));
    assert_eq!(plan.cmdline, format!("root=UUID={ROOT_UUID} ro console=ttyS0"));
    assert!(
        plan.source.contains("whole disk") && plan.source.contains("vmlinuz-6.1.0-28"),
        "{}",
        plan.source
    );

    // The links that Debian's kernel packages keep win; they are relative, and absolute ones work too.
    tree.link("vmlinuz", "boot/vmlinuz-6.1.0-9-cloud-amd64");
    tree.link("initrd.img", "/boot/initrd.img-6.1.0-9-cloud-amd64");
    let plan = find(tree.ext4(ROOT_UUID, "", &[])).unwrap();
    assert_eq!(kernel_name(&plan), "6.1.0-9-cloud-amd64");
    assert_eq!(plan.initrd.as_deref(), Some(&b"initrd 6.1.0-9-cloud-amd64"[..]));
}

/// Large files, fragmented by holes, come back byte for byte; also with 1 KiB blocks and block maps instead of extents.
#[test]
fn large_files() {
    if !have("mke2fs", "large_files") {
        return;
    }
    let mut big = common::pattern(1, 1_500_001);
    big[..0x400].copy_from_slice(&kernel("big"));
    big[300_000..700_000].fill(0);
    let initrd = common::pattern(2, 2_000_003);
    for features in ["extents", "^extents,^64bit,^metadata_csum", "^has_journal"] {
        for block in ["1024", "4096"] {
            let mut tree = Tree::new();
            tree.file("boot/vmlinuz-1", &big);
            tree.file("boot/initrd.img-1", &initrd);
            let plan = find(tree.ext4(ROOT_UUID, "", &["-O", features, "-b", block])).unwrap();
            assert!(
                plan.kernel == big && plan.initrd.as_deref() == Some(&initrd[..]),
                "{features} {block}"
            );
        }
    }
}

#[test]
fn debian_grub_in_gpt() {
    if !have("mke2fs", "debian_grub_in_gpt") {
        return;
    }
    for (features, block) in [("^metadata_csum", "1024"), ("metadata_csum,64bit", "4096")] {
        let root = debian_root().ext4(ROOT_UUID, "root", &["-O", features, "-b", block]);
        // The EFI partition comes first and a decoy without a kernel second: numbers mean nothing.
        let decoy = Tree::new().ext4("11111111-2222-3333-4444-555555555555", "data", &[]);
        let disk = gpt(&[("ESP", fat_stub()), ("data", decoy), ("Linux", root)]);
        let plan = find(disk).unwrap();
        assert_eq!(
            plan.cmdline,
            format!("root=UUID={ROOT_UUID} ro console=ttyS0,115200 quiet")
        );
        assert_eq!(kernel_name(&plan), "6.1.0-28-amd64");
        assert_eq!(plan.title, "Debian GNU/Linux");
        assert!(
            plan.source.contains("GPT partition 3 \"Linux\"") && plan.source.contains("grub.cfg"),
            "{}",
            plan.source
        );
    }
}

#[test]
fn fedora_bls_with_separate_boot_in_gpt_and_mbr() {
    if !have("mke2fs", "fedora_bls_with_separate_boot_in_gpt_and_mbr") {
        return;
    }
    let (boot, root) = fedora();
    let (boot, root) = (
        boot.ext4(BOOT_UUID, "BOOT", &[]),
        root.ext4(ROOT_UUID, "fedora", &[]),
    );
    let images = [
        gpt(&[("root", root.clone()), ("boot", boot.clone())]),
        mbr(std::slice::from_ref(&root), &[fat_stub(), boot.clone()]),
    ];
    for disk in images {
        let plan = find(disk).unwrap();
        assert_eq!(kernel_name(&plan), "6.10.3-200.fc40.x86_64");
        assert_eq!(
            plan.cmdline,
            format!("root=UUID={ROOT_UUID} ro rhgb quiet console=ttyS0")
        );
        assert_eq!(plan.title, "Fedora Linux (6.10.3-200.fc40.x86_64) 40");
        assert!(plan.source.contains("loader/entries"), "{}", plan.source);
    }
}

#[test]
fn nothing_to_boot_says_where_it_looked() {
    if !have("mke2fs", "nothing_to_boot_says_where_it_looked") {
        return;
    }
    let empty = Tree::new().ext4(ROOT_UUID, "data", &[]);
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let error = find(gpt(&[("a", empty), ("b", xfs)])).unwrap_err().to_string();
    for part in [
        "no kernel",
        "GPT partition 1",
        ROOT_UUID,
        "XFS, which is not supported",
        "--kernel",
        "linux-image",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = find(vec![0; 1 << 20]).unwrap_err().to_string();
    assert!(error.contains("no known file system"), "{error}");

    let mut tree = Tree::new();
    tree.file("boot/vmlinuz-1", b"#!/bin/sh\n");
    let error = find(tree.ext4(ROOT_UUID, "", &[])).unwrap_err().to_string();
    assert!(error.contains("not a Linux kernel"), "{error}");
}

#[test]
fn chosen_by_name() {
    if !have("mke2fs", "chosen_by_name") {
        return;
    }
    let make = |v: &str, uuid: &str, label: &str| {
        let mut tree = Tree::new();
        tree.file("etc/os-release", b"ID=x\n");
        tree.file(&format!("boot/vmlinuz-{v}"), &kernel(v));
        tree.ext4(uuid, label, &[])
    };
    let disk = gpt(&[
        ("", make("1.0", ROOT_UUID, "slot-a")),
        ("", make("2.0", BOOT_UUID, "slot-b")),
    ]);
    let io: Arc<dyn BlockIo> = Arc::new(MemImage::new(disk, true));
    for (name, version) in [
        ("slot-a", "1.0"),
        ("slot-b", "2.0"),
        (BOOT_UUID, "2.0"),
        (ROOT_UUID, "1.0"),
    ] {
        let options = DiscoverOptions {
            boot_fs: Some(name.to_owned()),
            ..DiscoverOptions::default()
        };
        let result = discover(&io, &options);
        // Two roots: a plain kernel cannot say which root belongs to it, but its own file system is one.
        assert_eq!(kernel_name(&result.unwrap()), version);
    }
    let options = DiscoverOptions {
        boot_fs: Some("slot-c".to_owned()),
        ..DiscoverOptions::default()
    };
    assert!(
        discover(&io, &options)
            .unwrap_err()
            .to_string()
            .contains("slot-c")
    );
}

#[test]
fn gpt_is_checked() {
    let disk = gpt(&[("a", vec![1; 1 << 20]), ("b", vec![2; 1 << 20])]);
    let table = |bytes: &[u8]| partition::read(&MemImage::new(bytes.to_vec(), true));
    let good = table(&disk).unwrap();
    assert_eq!(good.kind, TableKind::Gpt);
    assert_eq!(good.partitions.len(), 2);
    // Either copy alone will do.
    for at in [512 + 20, 1024 + 40] {
        let mut broken = disk.clone();
        broken[at] ^= 1;
        assert_eq!(table(&broken).unwrap(), good, "backup");
        let last = broken.len() - 512 + 20;
        broken[last] ^= 1;
        assert!(matches!(
            table(&broken),
            Err(BootError::Table { table: "GPT", .. })
        ));
    }
    let mut overlap = gpt_raw(&[("a", 2048, 4095), ("b", 4000, 5000)], 16 << 20);
    assert!(table(&overlap).unwrap_err().to_string().contains("overlap"));
    overlap = gpt_raw(&[("a", 2048, 1 << 40)], 16 << 20);
    assert!(
        table(&overlap)
            .unwrap_err()
            .to_string()
            .contains("outside the disk")
    );
    overlap = gpt_raw(&[("a", 4096, 2048)], 16 << 20);
    assert!(
        table(&overlap)
            .unwrap_err()
            .to_string()
            .contains("ends before it begins")
    );
    overlap = gpt_raw(&[("a", u64::MAX - 1, u64::MAX)], 16 << 20);
    assert!(table(&overlap).is_err());
    assert!(table(&disk[..2 << 20]).is_err(), "cut short");
}

#[test]
fn mbr_is_checked() {
    let disk = mbr(&[vec![1; 1 << 20]], &[vec![2; 1 << 20], vec![3; 1 << 20]]);
    let table = |bytes: &[u8]| partition::read(&MemImage::new(bytes.to_vec(), true));
    let good = table(&disk).unwrap();
    assert_eq!(good.kind, TableKind::Mbr);
    assert_eq!(
        good.partitions.iter().map(|p| p.number).collect::<Vec<_>>(),
        [1, 5, 6]
    );
    for (n, p) in good.partitions.iter().enumerate() {
        assert_eq!(disk[p.start as usize], n as u8 + 1);
    }
    // The second extended record points back to the first: a loop.
    let extended = mbr_extended_start(&disk);
    let second = extended
        + u64::from(u32::from_le_bytes(
            disk[(extended * 512 + 470) as usize..][..4].try_into().unwrap(),
        ));
    let mut looping = disk.clone();
    let link = (second * 512 + 462) as usize;
    looping[link + 4] = 5;
    looping[link + 8..link + 12].copy_from_slice(&1_u32.to_le_bytes());
    assert!(table(&looping).unwrap_err().to_string().contains("loop"));
    let mut outside = disk.clone();
    outside[446 + 12..446 + 16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(table(&outside).is_err());
}

/// A file system with bits flipped all over: an answer or an error, in bounded time, never a panic that escapes.
#[test]
fn broken_ext4() {
    if !have("mke2fs", "broken_ext4") {
        return;
    }
    let good = debian_root().ext4(ROOT_UUID, "root", &["-O", "^metadata_csum", "-b", "1024"]);
    let mut found = 0;
    for n in 0..400_u64 {
        let mut bytes = good.clone();
        let r = |k: u64| ((n * 8 + k).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16) as usize;
        for k in 0..1 + n % 6 {
            // Superblock, descriptors, inodes and directories are at the front.
            let span = if n % 2 == 0 { 4096 } else { 200_000 };
            let at = 1024 + r(k) % span;
            bytes[at] = if n % 3 == 0 {
                0xff
            } else {
                bytes[at] ^ (1 << (n % 8))
            };
        }
        found += usize::from(find(bytes).is_ok());
    }
    assert!(found > 20, "{found}");
    for cut in [1024, 2047, 2048, 4096, 65_536, good.len() / 2] {
        assert!(find(good[..cut].to_vec()).is_err());
    }
}

/// The Debian configuration with this `grubenv` and extra text in front.
fn debian_with(env: &str, front: &str) -> BootPlan {
    let mut tree = debian_root();
    tree.file(
        "boot/grub/grubenv",
        format!("# GRUB Environment Block\n{env}\n#####").as_bytes(),
    );
    tree.file(
        "boot/grub/grub.cfg",
        DEBIAN_GRUB.replacen("set default=\"0\"", front, 1).as_bytes(),
    );
    find(tree.ext4(ROOT_UUID, "", &[])).unwrap()
}

#[test]
fn grub_defaults() {
    if !have("mke2fs", "grub_defaults") {
        return;
    }
    let old = "6.1.0-9-amd64";
    let advanced = format!("gnulinux-advanced-{ROOT_UUID}");
    let id = format!("gnulinux-{old}-advanced-{ROOT_UUID}");
    for (env, front, version, end) in [
        (
            String::new(),
            "set default=0",
            "6.1.0-28-amd64",
            "console=ttyS0,115200 quiet",
        ),
        (String::new(), "set default='1>1'", old, "ro quiet"),
        (String::new(), "set default=\"1>2\"", old, "ro single"),
        (
            format!("saved_entry={advanced}>{id}"),
            "set default=\"${saved_entry}\"",
            old,
            "ro quiet",
        ),
        (
            format!("next_entry={advanced}>{id}"),
            "set default=0",
            old,
            "ro quiet",
        ),
        (
            String::new(),
            "set default='Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-9-amd64'",
            old,
            "ro quiet",
        ),
        // Gone: the first, as GRUB does.
        (
            "saved_entry=gone".to_owned(),
            "set default=\"${saved_entry}\"",
            "6.1.0-28-amd64",
            "quiet",
        ),
        (String::new(), "set default=", "6.1.0-28-amd64", "quiet"),
        (
            String::new(),
            "if [ 1 = 2 ] ; then set default=0; elif false; then true; else for i in 9 1; do set default=$i; done; fi",
            "6.1.0-28-amd64",
            "ro quiet",
        ),
    ] {
        let plan = debian_with(&env, front);
        assert_eq!(kernel_name(&plan), version, "{env} {front}");
        assert_eq!(plan.initrd.as_deref(), Some(version.as_bytes()));
        assert!(plan.cmdline.ends_with(end), "{front}: {}", plan.cmdline);
    }
}

#[test]
fn grub_on_a_separate_boot_file_system() {
    if !have("mke2fs", "grub_on_a_separate_boot_file_system") {
        return;
    }
    let mut boot = Tree::new();
    let cfg = format!(
        "set root='hd0,gpt7'\nfunction add {{\n linux /vmlinuz-$1 root=\"$2\" ro \"a b\" $nothing\n initrd /ucode /initrd-$1\n}}\n\
         menuentry \"L $version\" {{ search --no-floppy --fs-uuid --set=root {BOOT_UUID}\n add 5 UUID={ROOT_UUID}; }}"
    );
    boot.file("grub/grub.cfg", cfg.as_bytes());
    boot.file("vmlinuz-5", &kernel("5"));
    boot.file("ucode", b"12345");
    boot.file("initrd-5", b"abc");
    let root = debian_root();
    let disk = gpt(&[
        ("", root.ext4(ROOT_UUID, "", &[])),
        ("", boot.ext4(BOOT_UUID, "", &[])),
    ]);
    let plan = find(disk).unwrap();
    assert_eq!(kernel_name(&plan), "5");
    assert_eq!(plan.initrd.as_deref(), Some(&b"12345\0\0\0abc"[..]));
    assert_eq!(plan.cmdline, format!("root=UUID={ROOT_UUID} ro \"a b\""));
    assert_eq!(plan.title, "L ");
}

#[test]
fn bls_order() {
    if !have("mke2fs", "bls_order") {
        return;
    }
    let (mut boot, root) = fedora();
    let root = root.ext4(ROOT_UUID, "", &[]);
    let id = "0123456789abcdef0123456789abcdef";
    let mut take = |name: &str, data: &str| {
        boot.file(name, data.as_bytes());
        kernel_name(&find(gpt(&[("", boot.ext4(BOOT_UUID, "", &[])), ("", root.clone())])).unwrap())
    };
    let saved = |v: &str| format!("# GRUB Environment Block\nsaved_entry={id}-{v}\n####");
    assert_eq!(
        take("grub2/grubenv", &saved("6.9.12-200.fc40.x86_64")),
        "6.9.12-200.fc40.x86_64"
    );
    assert_eq!(take("grub2/grubenv", &saved("gone")), "6.10.3-200.fc40.x86_64");
    // No kernel, another machine's, exhausted, another architecture: each would be the newest.
    assert_eq!(
        take(&format!("loader/entries/{id}-9.conf"), "linux /vmlinuz-9\n"),
        "6.10.3-200.fc40.x86_64"
    );
    let other = "machine-id ffffffffffffffffffffffffffffffff\nlinux /vmlinuz-0-rescue\n";
    assert_eq!(
        take(&format!("loader/entries/{id}-8.conf"), other),
        "6.10.3-200.fc40.x86_64"
    );
    assert_eq!(
        take(
            &format!("loader/entries/{id}-7+0-3.conf"),
            "linux /vmlinuz-0-rescue\n"
        ),
        "6.10.3-200.fc40.x86_64"
    );
    let arm = "architecture aa64\nlinux /vmlinuz-0-rescue\n";
    assert_eq!(
        take(&format!("loader/entries/{id}-6.99.conf"), arm),
        "6.10.3-200.fc40.x86_64"
    );
    // A sort key comes before those without.
    assert_eq!(
        take("loader/entries/0.conf", "sort-key a\nlinux /vmlinuz-0-rescue\n"),
        "0-rescue"
    );
    assert_eq!(
        take("loader/loader.conf", "timeout 3\ndefault *-6.9.*\n"),
        "6.9.12-200.fc40.x86_64"
    );
}

#[test]
fn a_path_below_boot_and_extlinux() {
    if !have("mke2fs", "a_path_below_boot_and_extlinux") {
        return;
    }
    let mut tree = Tree::new();
    tree.file(
        "boot/loader/entries/x.conf",
        b"linux /vmlinuz\noptions a\noptions b\n",
    );
    tree.file("boot/vmlinuz", &kernel("below"));
    let plan = find(tree.ext4(ROOT_UUID, "", &[])).unwrap();
    assert_eq!(
        (kernel_name(&plan).as_str(), plan.cmdline.as_str(), plan.initrd),
        ("below", "a b", None)
    );
    let mut tree = Tree::new();
    tree.file(
        "boot/extlinux/extlinux.conf",
        b"default l\nlabel l\n linux ../k\n append root=LABEL=r\n",
    );
    tree.file("boot/k", &kernel("ext"));
    let plan = find(tree.ext4(ROOT_UUID, "", &[])).unwrap();
    assert_eq!(
        (kernel_name(&plan).as_str(), plan.cmdline.as_str()),
        ("ext", "root=LABEL=r")
    );
}
