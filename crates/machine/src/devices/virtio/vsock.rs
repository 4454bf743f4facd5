//! Virtio vsock device.
