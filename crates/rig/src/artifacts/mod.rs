//! What the rig boots: fetched as Debian packages or made from them, and kept in a cache.
//!
//! | artefact | what | made of |
//! |---|---|---|
//! | [`kernel`] | Debian's cloud kernel and its modules | `linux-image-cloud-amd64`'s real package |
//! | [`root`] | root file system of the simulated servers | etcd, iproute2, dmsetup... and the modules |
//! | [`initramfs`] | what a server starts from | boot modules and this very program |
//! | [`mini`] | a small Linux guest that checks itself | kernel, boot modules and this very program |
//! | [`service`] | a service disk for the mini guest: redis, a web server | Debian packages |
//! | [`debian`] | a whole Debian as a VM's disk: raw, qcow2, with a partition table | mmdebstrap |

pub mod cache;
pub mod cpio;
pub mod debian;
pub mod gpt;
pub mod initramfs;
pub mod kernel;
pub mod mini;
pub mod packages;
pub mod root;
pub mod service;

pub use cache::Cache;
pub use kernel::Kernel;
