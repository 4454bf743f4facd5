//! Disk images, boot discovery, volumes with an epoch journal.
//!
//! * [`image`]: what a virtio block device stands on. Raw files and block devices, qcow2, memory; one blocking
//!   trait, plain threads, no async runtime. Also [`image::create`] and [`image::convert`].
//!
//! Invariant I9 holds throughout: nothing that an image contains may crash or hang the caller. Parsers are bounded
//! in steps and memory and return typed errors; third-party parsers run behind [`guard::no_panic`] and only see
//! input whose sizes were checked first.

pub mod error;
pub mod guard;
pub mod image;

pub use error::DiskError;
