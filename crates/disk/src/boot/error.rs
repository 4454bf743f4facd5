//! What can go wrong while looking for a kernel, and what the operator can do.

use crate::error::DiskError;

/// An error of boot discovery.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image itself cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The partition table cannot be right.
    #[error(
        "partition table ({table}): {why}; repair it with `sgdisk --verify` or give --kernel and --initrd"
    )]
    Table {
        /// `GPT` or `MBR`.
        table: &'static str,
        /// What was found.
        why: String,
    },
    /// A file system cannot be read.
    #[error("{place}: {why}")]
    FileSystem {
        /// Which one.
        place: String,
        /// What was found.
        why: String,
    },
    /// A configuration file cannot be understood.
    #[error("{file}: {why}")]
    Config {
        /// Which one.
        file: String,
        /// What was found, with the line where there is one.
        why: String,
    },
    /// A file is larger than anything sensible.
    #[error("{file} has {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// Which one.
        file: String,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A file that an entry names is not there.
    #[error("{origin} names {file}, which does not exist")]
    Missing {
        /// Who named it.
        origin: String,
        /// The path.
        file: String,
    },
    /// A file that an entry names as kernel is none.
    #[error("{file} is not a Linux kernel for x86-64 (neither bzImage nor ELF)")]
    NotAKernel {
        /// The path.
        file: String,
    },
    /// Nothing in the image can be booted.
    #[error(
        "image has no kernel: {looked}; install one in the image (on Debian: linux-image-amd64) or give --kernel"
    )]
    NoKernel {
        /// Where was looked, and what was found there.
        looked: String,
    },
    /// The contents kept the search busy for too long.
    #[error("looking for a kernel took more than {seconds} s and was stopped; give --kernel and --initrd")]
    Deadline {
        /// The limit in seconds.
        seconds: u64,
    },
}
