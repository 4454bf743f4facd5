//! Virtio net device.
