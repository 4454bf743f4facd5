//! Virtio rng device.
