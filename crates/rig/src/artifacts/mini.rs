//! The mini guest as an artefact: kernel and initramfs, as files, and on a read-only disk for the servers.
//!
//! In a server they are `/guests/mini/bzImage`, `/guests/mini/initrd` and `/guests/mini/cmdline`.

use super::cache::{Cache, digest};
use super::{initramfs, kernel::Kernel, packages};
use crate::error::{IoContext, Result};
use crate::inside::mini::{MODULES, WORD};
use std::path::PathBuf;

/// The mini guest.
#[derive(Debug, Clone)]
pub struct MiniGuest {
    /// Its kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// The words its kernel needs: add `mini.ip=...` and so on (see [`crate::inside::mini`]).
    pub command_line: String,
    /// An ext4 image with these three.
    pub image: PathBuf,
}

/// The serial number of its disk in a server.
pub const SERIAL: &str = "guests-mini";
/// Where it is mounted in a server.
pub const MOUNTED_AT: &str = "/guests/mini";

impl MiniGuest {
    /// Takes it out of the cache, making it when this program or the kernel has changed.
    pub fn of(cache: &Cache, kernel: &Kernel) -> Result<MiniGuest> {
        let program = initramfs::own_program()?;
        let bytes = std::fs::read(&program).what(|| format!("read {}", program.display()))?;
        let key = format!(
            "mini-{}",
            digest(&[&initramfs::stripped(bytes), kernel.release.as_bytes()])
        );
        let command_line = format!("console=ttyS0 quiet loglevel=4 panic=-1 net.ifnames=0 {WORD}");
        let folder = cache.get_or_make(&key, |folder| {
            let tree = folder.join("tree");
            std::fs::create_dir(&tree).what(|| format!("make {}", tree.display()))?;
            let write = |name: &str, bytes: &[u8]| {
                std::fs::write(tree.join(name), bytes).what(|| format!("write {}/{name}", tree.display()))
            };
            std::fs::copy(&kernel.image, tree.join("bzImage"))
                .what(|| format!("copy {}", kernel.image.display()))?;
            write("initrd", &initramfs::base(kernel, MODULES, &program)?)?;
            write("cmdline", format!("{command_line}\n").as_bytes())?;
            let size = packages::tree_bytes(&tree)? * 11 / 10 + (4 << 20);
            packages::ext4_of(
                Some(&tree),
                &folder.join("mini.ext4"),
                size,
                0,
                &["-O", "^has_journal", "-m", "0"],
            )
        })?;
        let tree = folder.join("tree");
        Ok(MiniGuest {
            kernel: tree.join("bzImage"),
            initramfs: tree.join("initrd"),
            command_line,
            image: folder.join("mini.ext4"),
        })
    }
}
