//! A whole Debian as a VM's disk, made with mmdebstrap: systemd, its own kernel with initramfs-tools, grub.cfg, redis, a web server,
//! a root shell on the serial line (root's password is `steadfast`).
//!
//! In a server, under `/guests/debian`: `debian.raw` (ext4, no partition table), `debian.qcow2` (the same), `debian-gpt.raw` (an EFI
//! system partition, then the same file system), and `vmlinuz`, `initrd.img`, `cmdline` beside them for a start from kernel and
//! initrd. Copy an image to `/data` to write to it (`cp --sparse=always`).
//!
//! Its address: `rig.ip=10.90.0.N/24` on the kernel command line, or `address: ...` in the meta-data of a NoCloud seed, or
//! 10.90.0.N/24 where N is the last byte of its MAC address. When it is up it prints `RIG-GUEST-UP`.

use super::cache::{Cache, digest};
use super::gpt::{self, Partition};
use super::packages::{self, suite};
use crate::error::{IoContext, Result, RigError};
use crate::tools;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The serial number of its disk in a server.
pub const SERIAL: &str = "guests-debian";
/// Where it is mounted in a server.
pub const MOUNTED_AT: &str = "/guests/debian";
/// What it is made of beside the minimal base.
pub const PACKAGES: &[&str] = &[
    "busybox-static",
    // systemd-logind, which answers the power button, needs it; every installed Debian has it.
    "dbus",
    "e2fsprogs",
    "grub2-common",
    "grub-pc-bin",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "linux-image-cloud-amd64",
    "login",
    "procps",
    "python3-minimal",
    "redis-server",
    "systemd",
    "systemd-sysv",
    "udev",
    "zstd",
];

const UUID: &str = "5f5f5f5f-0001-4d4d-8a8a-5afe5afe5afe";
/// The file system of the image with a partition table has another identity: both may be disks of one VM.
const GPT_UUID: &str = "5f5f5f5f-0002-4d4d-8a8a-5afe5afe5afe";
const LABEL: &str = "debian-rig";
const CUSTOMIZE: &str = include_str!("../../assets/debian-customize.sh");
const IMAGE_BYTES: u64 = 3 << 30;
const GPT_ROOT_START: u64 = 17 << 20;

/// The Debian guest.
#[derive(Debug, Clone)]
pub struct DebianGuest {
    /// The folder with all its files, as a server has them.
    pub folder: PathBuf,
    /// ext4 without a partition table.
    pub raw: PathBuf,
    /// The same as qcow2.
    pub qcow2: PathBuf,
    /// With a partition table (GPT).
    pub gpt: PathBuf,
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its kernel's command line, for a start from kernel and initramfs.
    pub command_line: String,
    /// An ext4 image with all of these, for the servers.
    pub image: PathBuf,
}

impl DebianGuest {
    /// Takes it out of the cache, making it when it is not there (about a minute), with `extra` packages.
    ///
    /// # Errors
    /// [`RigError::NotHere`] without root: a file system with root's files is made here.
    pub fn of(cache: &Cache, extra: &[String]) -> Result<DebianGuest> {
        let mut wanted: Vec<&str> = PACKAGES
            .iter()
            .copied()
            .chain(extra.iter().map(String::as_str))
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let key = format!(
            "debian-{}-{}",
            suite(),
            digest(&[wanted.join(",").as_bytes(), CUSTOMIZE.as_bytes(), b"2"])
        );
        let made = cache.get_or_make(&key, |folder| make(folder, &wanted))?;
        let folder = made.join("guest");
        let command_line = format!("root=UUID={UUID} ro console=ttyS0 net.ifnames=0");
        Ok(DebianGuest {
            raw: folder.join("debian.raw"),
            qcow2: folder.join("debian.qcow2"),
            gpt: folder.join("debian-gpt.raw"),
            kernel: folder.join("vmlinuz"),
            initramfs: folder.join("initrd.img"),
            command_line,
            image: made.join("guest.ext4"),
            folder,
        })
    }
}

fn make(folder: &Path, wanted: &[&str]) -> Result<()> {
    // SAFETY: no memory is passed, it cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err(RigError::NotHere {
            what: "making the Debian guest".to_string(),
            why: "its files belong to root; run `steadfast-rig artifacts` as root once".to_string(),
        });
    }
    // All tools before the minutes that the first of them takes.
    for tool in ["mmdebstrap", "mke2fs", "qemu-img"] {
        tools::find(tool)?;
    }
    let (tree, guest) = (folder.join("tree"), folder.join("guest"));
    std::fs::create_dir(&guest).what(|| format!("make {}", guest.display()))?;
    let script = folder.join("customize.sh");
    std::fs::write(&script, CUSTOMIZE.replace("$RIG_UUID", UUID))
        .what(|| format!("write {}", script.display()))?;
    let hook = format!("--customize-hook=sh '{}' \"$1\"", script.display());
    let arguments = [
        "--variant=minbase",
        "--mode=root",
        "--format=directory",
        "--dpkgopt=force-unsafe-io",
        &hook,
    ];
    packages::mmdebstrap(&arguments, wanted, &tree)?;
    for (link, name) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd.img")] {
        // Debian keeps links to the newest kernel in / (relative ones).
        let newest =
            std::fs::canonicalize(tree.join(link)).what(|| format!("find {link} of the Debian guest"))?;
        std::fs::copy(&newest, guest.join(name)).what(|| format!("copy {}", newest.display()))?;
    }
    let options = ["-U", UUID, "-L", LABEL];
    let raw = guest.join("debian.raw");
    packages::ext4_of(Some(&tree), &raw, IMAGE_BYTES, 0, &options)?;
    for file in ["etc/fstab", "boot/grub/grub.cfg"] {
        let path = tree.join(file);
        let text = std::fs::read_to_string(&path).what(|| format!("read {}", path.display()))?;
        std::fs::write(&path, text.replace(UUID, GPT_UUID)).what(|| format!("write {}", path.display()))?;
    }
    let options = ["-U", GPT_UUID, "-L", "debian-rig-gpt"];
    let gpt_image = guest.join("debian-gpt.raw");
    packages::ext4_of(Some(&tree), &gpt_image, IMAGE_BYTES, GPT_ROOT_START, &options)?;
    let size = GPT_ROOT_START + IMAGE_BYTES + (1 << 20);
    let sized = std::fs::OpenOptions::new()
        .write(true)
        .open(&gpt_image)
        .and_then(|file| file.set_len(size));
    sized.what(|| format!("size {}", gpt_image.display()))?;
    let partition = |kind, start, bytes, name| Partition {
        kind,
        start,
        bytes,
        name,
    };
    gpt::write(
        &gpt_image,
        &[
            partition(gpt::EFI_SYSTEM, 1 << 20, 16 << 20, "efi"),
            partition(gpt::LINUX, GPT_ROOT_START, IMAGE_BYTES, "root"),
        ],
    )?;
    let mut convert = Command::new(tools::find("qemu-img")?);
    convert
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&raw)
        .arg(guest.join("debian.qcow2"));
    tools::run(&mut convert, Duration::from_secs(300))?;
    let command_line = format!("root=UUID={UUID} ro console=ttyS0 net.ifnames=0\n");
    std::fs::write(guest.join("cmdline"), command_line).what(|| "write cmdline".to_string())?;
    std::fs::remove_dir_all(&tree).what(|| format!("remove {}", tree.display()))?;
    // Holes stay holes in the copy, so it is much smaller than its contents look.
    let bytes = allocated_bytes(&guest)? * 11 / 10 + (64 << 20);
    packages::ext4_of(
        Some(&guest),
        &folder.join("guest.ext4"),
        bytes,
        0,
        &["-O", "^has_journal", "-m", "0"],
    )
}

fn allocated_bytes(folder: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).what(|| format!("list {}", folder.display()))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|data| data.blocks() * 512)
        .sum())
}
