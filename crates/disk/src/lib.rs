//! Disk images, boot discovery, volumes with an epoch journal.
//!
//! * [`image`]: what a virtio block device stands on. Raw files and block devices, qcow2, memory; one blocking
//!   trait, plain threads, no async runtime. Also [`image::create`] and [`image::convert`].
//! * [`boot`]: finds the kernel, the initrd and the command line inside an image, as the guest's own upgrades left
//!   them, without mounting anything.
//! * [`seed`]: the cloud-init NoCloud volume made from user-data.
//!
//! * [`volume`]: a replicated disk: a raw image plus an epoch [`journal`], on each host that holds a replica, with a
//!   [`checksum`] per block, a [`scrub`] that repairs from the peer and a [`resync`] that sends only what changed.
//! * [`storage`]: the files below a volume; [`testing`] has a copy of it in memory that fails on demand.
//!
//! Invariant I9 holds throughout: nothing that an image contains may crash or hang the caller. Parsers are bounded
//! in steps and memory and return typed errors; third-party parsers run behind [`guard::no_panic`] and only see
//! input whose sizes were checked first.

pub mod boot;
pub mod checksum;
pub mod error;
#[doc(hidden)]
pub mod fuzz;
pub mod guard;
pub mod image;
pub mod journal;
pub mod resync;
pub mod scrub;
pub mod seed;
pub mod storage;
#[doc(hidden)]
pub mod testing;
pub mod volume;

pub use error::DiskError;
