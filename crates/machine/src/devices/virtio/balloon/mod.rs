//! Virtio balloon device.
