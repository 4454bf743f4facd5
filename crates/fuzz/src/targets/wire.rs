//! What a peer can send: frame headers, hellos, page encodings, records in chunks.

use super::{Target, runs_anywhere};
use crate::mutate::Random;
use steadfast_wire::fuzz;

pub(super) fn targets() -> Vec<Target> {
    let target = |name, what, run, seeds| Target {
        name,
        what,
        run,
        seeds,
        dictionary: &[
            &[0xff, 0xff, 0xff, 0xff],
            &[0, 0, 0, 0],
            &[1, 0, 0, 0],
            &[0, 0x10, 0, 0],
        ],
        cannot_run: runs_anywhere,
    };
    vec![
        target(
            "wire-header",
            "frame headers",
            fuzz::fuzz_header as fn(&[u8]),
            noise as fn() -> Vec<Vec<u8>>,
        ),
        target(
            "wire-hello",
            "the first frames of a link",
            fuzz::fuzz_hello,
            noise,
        ),
        target("wire-pages", "page encodings", fuzz::fuzz_pages, noise),
        target("wire-record", "an epoch's record in frames", record, noise),
    ]
}

/// Frames of kind, number and body, as the input says: kind u8, number u32, length u16, bytes.
fn record(data: &[u8]) {
    let mut frames = Vec::new();
    let mut rest = data;
    while let [kind, a, b, c, d, l0, l1, tail @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*l0, *l1])).min(tail.len());
        frames.push((*kind, u32::from_le_bytes([*a, *b, *c, *d]), tail[..len].to_vec()));
        rest = &tail[len..];
        if frames.len() == 64 {
            break;
        }
    }
    fuzz::fuzz_chunk_frames(&frames);
}

fn noise() -> Vec<Vec<u8>> {
    let mut random = Random::new(2);
    [16, 64, 128, 5000]
        .iter()
        .map(|&n| (0..n).map(|_| random.word() as u8).collect())
        .collect()
}
