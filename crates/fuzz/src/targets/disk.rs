//! What a disk image can hold: partition tables, qcow2, ext4, boot configurations.

use super::{Target, runs_anywhere};
use std::process::{Command, Stdio};
use steadfast_disk::fuzz;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target {
            name: "partitions",
            what: "GPT and MBR tables",
            run: fuzz::fuzz_partitions,
            seeds: || vec![mbr(), gpt()],
            dictionary: &[b"EFI PART", &[0x55, 0xaa], &[0xee], &[0x83], &[0x0f]],
            cannot_run: runs_anywhere,
        },
        Target {
            name: "grub-cfg",
            what: "grub.cfg scripts and grubenv",
            run: fuzz::fuzz_grub_cfg,
            seeds: || vec![GRUB.as_bytes().to_vec(), GRUB_LOOP.as_bytes().to_vec()],
            dictionary: GRUB_WORDS,
            cannot_run: runs_anywhere,
        },
        Target {
            name: "bls",
            what: "Boot Loader Specification entries, extlinux.conf",
            run: fuzz::fuzz_bls,
            seeds: || vec![BLS.as_bytes().to_vec()],
            dictionary: &[
                b"title ",
                b"version ",
                b"linux ",
                b"initrd ",
                b"options ",
                b"\n",
                b"~",
                b"label ",
                b"kernel ",
                b"append ",
            ],
            cannot_run: runs_anywhere,
        },
        Target {
            name: "qcow2",
            what: "qcow2 images: open, read, write, discard",
            run: fuzz::fuzz_qcow2_open,
            seeds: || vec![qcow2()],
            dictionary: &[
                b"QFI\xfb",
                &[0, 0, 0, 3],
                &[0x80, 0, 0, 0, 0, 0, 6, 0],
                &[0x40, 0, 0, 0, 0, 0, 0, 0],
                &[0, 0, 0, 1],
            ],
            cannot_run: runs_anywhere,
        },
        Target {
            name: "ext4",
            what: "ext4 file systems and boot discovery on them",
            run: fuzz::fuzz_ext4_boot,
            seeds: || vec![superblock(), ext4().unwrap_or_default()],
            dictionary: &[
                &[0x53, 0xef],
                &[0x0a, 0xf3],
                b"vmlinuz",
                b"boot",
                &[0, 4, 0, 0],
                &[2, 0, 0, 0],
            ],
            cannot_run: runs_anywhere,
        },
    ]
}

const GRUB: &str = r#"set timeout=5
if [ -s $prefix/grubenv ]; then load_env; fi
if [ "${next_entry}" ] ; then set default="${next_entry}"; set next_entry=; else set default="${saved_entry}"; fi
search --no-floppy --fs-uuid --set=root 12-34
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {
	load_video
	insmod gzio
	linux /vmlinuz root=UUID=12-34 ro quiet $kernelopts
	initrd /initrd.img
}
submenu 'Advanced' --id adv { menuentry 'old' { linux /vmlinuz root=LABEL=root ro single } }
source $prefix/custom.cfg
"#;
const GRUB_LOOP: &str = r#"function f { for x in a b c; do set y="${x}$y"; done; while [ "$n" != 3 ]; do set n=3; done }
f; if test -e /vmlinuz -a ! -d /x; then configfile /boot/grub/grub.cfg; fi
blscfg
regexp --set=1:a '^([0-9]+)$' "$y"
"#;
const GRUB_WORDS: &[&[u8]] = &[
    b"menuentry '",
    b"submenu ",
    b"linux ",
    b"initrd ",
    b"if ",
    b"; then ",
    b"; fi\n",
    b"while ",
    b"until ",
    b"do ",
    b"done",
    b"for ",
    b" in ",
    b"function ",
    b"{",
    b"}",
    b"[ ",
    b" ]",
    b"${",
    b"$",
    b"\"",
    b"'",
    b"\\\n",
    b"source ",
    b"configfile ",
    b"search ",
    b"--set=root ",
    b"set ",
    b"blscfg",
    b"load_env",
    b"test ",
    b"elif ",
    b"else ",
    b"\n",
    b"$prefix/custom.cfg",
    b"break",
    b"continue",
    b"return",
    b"setparams ",
    b"shift",
    b"/vmlinuz",
];
const BLS: &str = "debian-6.1.0-1.conf\ntitle Debian\nversion 6.1.0-1\nlinux /vmlinuz\ninitrd /initrd.img\noptions root=UUID=12-34 ro $kernelopts\n\
default linux\nlabel linux\n kernel /vmlinuz\n append initrd=/initrd.img ro\n";

fn mbr() -> Vec<u8> {
    let mut disk = vec![0; 64 << 10];
    for (i, (kind, start, count)) in [(0x83u8, 1u32, 30u32), (0x0f, 40, 60)].iter().enumerate() {
        let at = 446 + i * 16;
        disk[at + 4] = *kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    // The extended partition's own table.
    let at = 40 * 512 + 446;
    disk[at + 4] = 0x83;
    disk[at + 8] = 1;
    disk[at + 12] = 8;
    disk[40 * 512 + 510..40 * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// CRC-32 as GPT has it (IEEE 802.3).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |mut c, &b| {
        c ^= u32::from(b);
        for _ in 0..8 {
            c = if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
        }
        c
    })
}

fn gpt() -> Vec<u8> {
    let sectors = 128u64;
    let mut disk = vec![0u8; sectors as usize * 512];
    disk[446 + 4] = 0xee;
    disk[446 + 8] = 1;
    disk[446 + 12] = 127;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let entries = 2 * 512;
    disk[entries..entries + 32].fill(0x11);
    disk[entries + 32] = 40;
    disk[entries + 40] = 60;
    let table = crc32(&disk[entries..entries + 4 * 128]);
    let mut header = vec![0u8; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x1_0000u32.to_le_bytes());
    header[12..16].copy_from_slice(&92u32.to_le_bytes());
    header[24] = 1;
    header[32..40].copy_from_slice(&(sectors - 1).to_le_bytes());
    header[40] = 34;
    header[48] = 94;
    header[72] = 2;
    header[80] = 4;
    header[84] = 128;
    header[88..92].copy_from_slice(&table.to_le_bytes());
    let own = crc32(&header);
    header[16..20].copy_from_slice(&own.to_le_bytes());
    disk[512..604].copy_from_slice(&header);
    disk
}

/// The smallest qcow2 file: clusters of 512 bytes, 32 KiB of disk.
fn qcow2() -> Vec<u8> {
    let mut bytes = vec![0_u8; 4 * 512];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb\0\0\0\x02");
    put(20, &9_u32.to_be_bytes());
    put(24, &(32_u64 << 10).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &1536_u64.to_be_bytes());
    put(48, &512_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(512, &1024_u64.to_be_bytes());
    put(1024, &[0, 1, 0, 1, 0, 1, 0, 1]);
    bytes
}

/// An ext4 superblock with plausible numbers; for machines without mke2fs.
fn superblock() -> Vec<u8> {
    let mut disk = vec![0u8; 64 << 10];
    let mut put = |at: usize, v: u32| disk[1024 + at..1024 + at + 4].copy_from_slice(&v.to_le_bytes());
    put(0, 16);
    put(4, 64);
    put(20, 1);
    put(32, 8192);
    put(40, 16);
    put(56, 0xef53);
    put(76, 1);
    put(88, 256);
    put(96, 0x40);
    disk
}

/// A real file system of 512 KiB with a kernel and a grub.cfg, made by mke2fs where it is installed.
fn ext4() -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().ok()?;
    let root = folder.path().join("root");
    std::fs::create_dir_all(root.join("boot/grub")).ok()?;
    std::fs::write(root.join("vmlinuz"), [0u8; 64]).ok()?;
    std::fs::write(root.join("boot/grub/grub.cfg"), GRUB).ok()?;
    let image = folder.path().join("image");
    let made = ["mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"]
        .iter()
        .any(|program| {
            Command::new(program)
                .args([
                    "-q",
                    "-F",
                    "-t",
                    "ext4",
                    "-O",
                    "^has_journal",
                    "-b",
                    "1024",
                    "-N",
                    "32",
                    "-d",
                ])
                .arg(&root)
                .arg(&image)
                .arg("512")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
        });
    if made {
        return std::fs::read(&image).ok();
    }
    println!("SKIPPED: fuzz ext4: no seed file system: mke2fs is not installed (package e2fsprogs)");
    None
}
