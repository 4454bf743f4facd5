//! What can go wrong with an image, and what the operator can do about it.

use std::io;
use std::path::PathBuf;

/// An error of an image or of an operation on one.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file could not be opened.
    #[error("cannot open image {}: {source}; check the path and that this user may access it", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process holds a conflicting lock.
    #[error(
        "image {} is in use by another process{}; stop that VM, or open the image read-only",
        path.display(),
        if *read_only { " that may write it" } else { "" }
    )]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether this opening was for reading only.
        read_only: bool,
    },
    /// The file is not something that can be a disk.
    #[error("image {}: {why}", path.display())]
    Unsuitable {
        /// The image.
        path: PathBuf,
        /// What is wrong, and the way out.
        why: String,
    },
    /// The image uses a feature that is not supported.
    #[error("image {}: {feature} is not supported; {way_out}", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// The feature.
        feature: String,
        /// What the operator can do.
        way_out: String,
    },
    /// The image is damaged.
    #[error("image {} is damaged: {why}; restore it, or try `qemu-img check`", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// A request reaches beyond the end, or is not what the image can take.
    #[error("request of {len} bytes at {offset} is outside the image of {capacity} bytes")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Size of the image in bytes.
        capacity: u64,
    },
    /// A write to an image that was opened for reading only.
    #[error("image is open read-only")]
    ReadOnly,
    /// The operating system or the storage said no.
    #[error("{op} of {len} bytes at {offset} failed: {source}")]
    Io {
        /// `read`, `write`, `flush`, `discard` or `write zeroes`.
        op: &'static str,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A parser panicked on the contents of an image. The image stays unusable until it is opened again.
    #[error("{what} failed on malformed contents ({message}); the image is damaged or hostile")]
    Panicked {
        /// The operation.
        what: String,
        /// The panic's message.
        message: String,
    },
    /// The image was given up after an earlier panic inside its format driver.
    #[error(
        "image was given up after an earlier internal failure; open it again, or check it with `qemu-img check`"
    )]
    GivenUp,
    /// Nothing is asked of it any more.
    #[error("the disk is closed")]
    Closed,
    /// An operation on a file other than a request to an image.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was tried, for example `cannot create`.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An argument that cannot be right.
    #[error("{0}")]
    Invalid(String),
}

impl DiskError {
    /// The errno nearest to this error, for a block device that has to answer with one.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } | Self::Open { source, .. } | Self::File { source, .. } => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            Self::InUse { .. } => libc::EBUSY,
            Self::ReadOnly => libc::EROFS,
            Self::OutOfRange { .. } | Self::Invalid(_) => libc::EINVAL,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            _ => libc::EIO,
        }
    }
}
