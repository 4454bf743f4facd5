//! Prints the measurements of this crate.

use steadfast_wire::EncodeConfig;
use steadfast_wire::bench::{BenchError, Workload, codec, round_trip, throughput};
use steadfast_wire::link::Security;

fn main() -> Result<(), BenchError> {
    println!(
        "{:<9} {:>6} {:>10} {:>10} {:>10} {:>9}",
        "workload", "pages", "encode us", "stage us", "apply us", "wire/dirty"
    );
    for workload in [
        Workload::OneWord,
        Workload::Eighth,
        Workload::Noise,
        Workload::Text,
        Workload::Mixed,
    ] {
        for pages in [100, 1000, 5000] {
            let r = codec(workload, pages, 40, &EncodeConfig::default())?;
            let us = |ns: u64| ns as f64 / 1000.0;
            let name = format!("{workload:?}");
            println!(
                "{name:<9} {pages:>6} {:>10.1} {:>10.1} {:>10.1} {:>9.4}  zero, fill, runs, runs+lz4, lz4, raw, same: {:?}",
                us(r.encode_ns),
                us(r.stage_ns),
                us(r.apply_ns),
                r.wire_ratio,
                r.stats.pages
            );
        }
    }
    let plain = (&Security::Plain, &Security::Plain);
    for (paths, pages) in [(1, 10), (2, 10), (1, 100), (1, 1000)] {
        let r = round_trip(paths, pages, 2000, plain)?;
        let (p50, p99) = (r.p50_ns as f64 / 1000.0, r.p99_ns as f64 / 1000.0);
        println!("round trip, {paths} path(s), {pages} pages: p50 {p50:.1} us, p99 {p99:.1} us");
    }
    for paths in [1, 2] {
        println!(
            "bulk, {paths} path(s): {:.2} GB/s",
            throughput(paths, 2 << 30, plain)? / 1e9
        );
    }
    Ok(())
}
