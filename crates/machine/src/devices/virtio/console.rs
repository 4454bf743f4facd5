//! Virtio console device.
