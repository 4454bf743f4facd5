//! What this crate is to reach, checked in every run (with room for a loaded machine).
#![allow(clippy::unwrap_used)]

use steadfast_wire::EncodeConfig;
use steadfast_wire::bench::{Workload, codec};

#[test]
fn a_mixed_load_takes_less_than_three_tenths_of_its_dirty_bytes() {
    let r = codec(Workload::Mixed, 2000, 10, &EncodeConfig::default()).unwrap();
    println!("{r:?}");
    assert!(r.wire_ratio < 0.3, "{} bytes per dirty byte", r.wire_ratio);
}

#[test]
fn a_thousand_pages_with_one_changed_word_encode_in_less_than_a_millisecond() {
    // The best of some tries: others use this machine, too.
    let best = (0..5)
        .map(|_| {
            codec(Workload::OneWord, 1000, 20, &EncodeConfig::default())
                .unwrap()
                .encode_ns
        })
        .min()
        .unwrap();
    println!("{best} ns");
    assert!(best < 1_000_000, "{best} ns");
}

#[test]
fn a_working_set_beyond_the_cache_still_arrives_right() {
    let small = EncodeConfig {
        shadow_bytes_max: 1 << 20,
        ..EncodeConfig::default()
    };
    let r = codec(Workload::Mixed, 1000, 10, &small).unwrap();
    assert!(r.stats.evicted > 0 && r.wire_ratio < 1.01, "{r:?}");
}
