//! Where a VM's frames go: TAP devices, sockets, and what stands between them and the virtio device.
//!
//! A frame on a [`NetBackend`] always starts with the 12-byte virtio-net header (virtio 1.2, 5.1.6, with
//! `num_buffers`), little-endian, whatever carries it. Backends never block.

pub mod announce;
pub mod hold;
pub mod name;
pub mod socket;
pub mod tap;

pub use announce::announcement;
pub use hold::{Hold, HoldBackend, HoldMode};
pub use name::{SocketKind, SocketName};
pub use socket::SocketBackend;
pub use tap::{Tap, TapBackend, TapError, TapOptions};

use std::io;
use std::os::fd::RawFd;

/// Bytes of the virtio-net header in front of every frame.
pub const VNET_HEADER: usize = 12;
/// Largest frame with its header: 64 KiB of segmentation offload and the link layer.
pub const FRAME_MAX: usize = VNET_HEADER + 65536 + 64;

/// What the guest takes without segments or checksums made whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames with checksums not filled in.
    pub checksum: bool,
    /// TCP over IPv4 segments larger than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 segments larger than the MTU.
    pub tso6: bool,
    /// The same with ECN.
    pub ecn: bool,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Taken.
    Done,
    /// No room now; offer it again soon.
    WouldBlock,
    /// Refused for good (malformed, link down); it is lost, as on a wire.
    Dropped,
}

/// Carries frames between a virtio-net device and the world. Called with the device's lock held.
pub trait NetBackend: Send {
    /// A descriptor that becomes readable when frames wait.
    fn fd(&self) -> RawFd;

    /// Whether frames may use the header's checksum and segmentation offloads.
    fn can_offload(&self) -> bool;

    /// Says what the guest takes.
    ///
    /// # Errors
    /// What the host said.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Sends one frame with its header. Must not block.
    fn send(&mut self, frame: &[u8]) -> Sent;

    /// Receives one frame with its header into `buf` ([`FRAME_MAX`] bytes); `None` when none waits.
    ///
    /// # Errors
    /// What the host said; the frame is lost, later ones may come.
    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>>;
}
