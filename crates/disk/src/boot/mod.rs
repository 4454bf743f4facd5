//! Boot discovery: from any [`BlockIo`] to a kernel, an initrd and a command line, as the guest's own upgrades left
//! them. Nothing is mounted, nothing is written, no boot loader runs.
//!
//! ```text
//! BlockIo ─ partition (GPT, MBR, none) ─ tree (ext4) ─┬ bls      loader/entries/*.conf
//!                                                     ├ grub     grub.cfg, a small bounded interpreter
//!                                                     ├ extlinux extlinux.conf
//!                                                     └ plain    /vmlinuz, or the newest /boot/vmlinuz-*
//! ```
//!
//! File systems are chosen by what is in them, and by UUID or label; never by partition number.
//!
//! Invariant I9: the image is hostile. Tables, configuration files and directories are read up to fixed limits, the
//! interpreter counts its steps, third-party code runs behind [`crate::guard::no_panic`], and [`discover`] has a
//! deadline. The files handed out are as large as the limits in this module allow, never larger.
//!
//! Specifications: UEFI 2.10 chapter 5 (GPT); the UAPI Group's Boot Loader Specification and Version Format
//! Specification; the GRUB manual, chapters 6 and 16; the syslinux wiki for `extlinux.conf`.

mod bls;
mod error;
mod ext4;
mod extlinux;
mod find;
pub mod grub;
pub mod partition;
mod plain;
mod tree;
mod version;

pub use bls::{Entry as BlsEntry, parse_entry as parse_bls_entry};
pub use error::BootError;
pub(crate) use find::plan_of;
pub use find::{DiscoverOptions, discover, discover_here};
pub use tree::{FileTree, MemTree};
pub use version::compare as compare_versions;

/// Largest kernel, in bytes.
pub const KERNEL_MAX: u64 = 256 << 20;
/// Largest initrd, in bytes; where an entry names several, their sum.
pub const INITRD_MAX: u64 = 1 << 30;
/// Largest configuration file, in bytes.
pub const CONFIG_MAX: u64 = 4 << 20;

/// What to boot.
#[derive(Clone, PartialEq, Eq)]
pub struct BootPlan {
    /// The kernel's file: a bzImage or an ELF image.
    pub kernel: Vec<u8>,
    /// The initrd's file, or several joined, each padded to four bytes.
    pub initrd: Option<Vec<u8>>,
    /// The kernel's command line, as the guest configured it.
    pub cmdline: String,
    /// For people: which partition, which file, which entry.
    pub source: String,
    /// The entry's title.
    pub title: String,
}

impl std::fmt::Debug for BootPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootPlan")
            .field("kernel_bytes", &self.kernel.len())
            .field("initrd_bytes", &self.initrd.as_ref().map(Vec::len))
            .field("cmdline", &self.cmdline)
            .field("source", &self.source)
            .field("title", &self.title)
            .finish()
    }
}

/// An entry of any boot loader, before its files are read. Paths are absolute in the file system `fs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Index of the file system that holds the kernel.
    pub(crate) fs: usize,
    pub(crate) kernel: String,
    /// Each with its file system.
    pub(crate) initrds: Vec<(usize, String)>,
    pub(crate) cmdline: String,
    pub(crate) title: String,
    /// The file and the entry that said so.
    pub(crate) origin: String,
}
