//! Virtio block device.
