//! Virtio devices: descriptors, rings, configuration, over the transport-free harness of each device.

use super::{Target, runs_anywhere};
use crate::mutate::Random;
use steadfast_machine::devices::virtio;

pub(super) fn targets() -> Vec<Target> {
    let device = |name, what, run| Target {
        name,
        what,
        run,
        seeds,
        dictionary: &[
            &[0, 0, 0, 0],
            &[0xff, 0xff, 0xff, 0xff],
            &[16, 0, 0, 0],
            &[0, 0x10, 0, 0],
        ],
        cannot_run: runs_anywhere,
    };
    vec![
        device(
            "virtio-block",
            "block requests",
            virtio::block::fuzz_block as fn(&[u8]),
        ),
        device("virtio-net", "network frames and control", virtio::net::fuzz_net),
        device("virtio-console", "console buffers", virtio::console::fuzz_console),
        device("virtio-rng", "rng buffers", virtio::rng::fuzz_rng),
        device(
            "virtio-balloon",
            "balloon pages and statistics",
            virtio::balloon::fuzz_balloon,
        ),
        device("virtio-vsock", "vsock packets", virtio::vsock::fuzz_vsock),
    ]
}

/// The harness reads its input as a program, so any bytes are a deep seed; a few lengths of noise will do.
fn seeds() -> Vec<Vec<u8>> {
    let mut random = Random::new(1);
    [64, 200, 600, 2000]
        .iter()
        .map(|&n| (0..n).map(|_| random.word() as u8).collect())
        .collect()
}
