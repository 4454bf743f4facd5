//! The main job on three simulated servers: a protected Linux with redis, a web server and an open TCP session goes on when its
//! server dies, and again when the next one does; its clients lose nothing, repeat nothing and are never reset.
//!
//! What `./demo` shows, with shorter looks. Rows 1 and 45 of the faults in `docs/testing.md` (where: rig).

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Lines, can_run};
use std::time::{Duration, Instant};
use steadfast_rig::failover::{Options, play};

/// The whole play, on a busy machine.
const BOUND: Duration = Duration::from_secs(600);

/// QEMU processes that this process has started and that are still there.
fn servers_left() -> usize {
    let own = format!("PPid:\t{}\n", std::process::id());
    let children = std::fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        read("status").contains(&own) && read("cmdline").contains("qemu-system")
    });
    children.count()
}

#[test]
fn rig_failover_of_a_service_twice() {
    if !can_run("rig_failover_of_a_service_twice") {
        return;
    }
    let began = Instant::now();
    let options = Options {
        look: Duration::from_secs(3),
        ..Options::default()
    };
    let report = play(&options, &mut Lines::new()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(servers_left(), 0, "simulated servers outlive the play");

    let ways: Vec<_> = report
        .failovers
        .iter()
        .map(|f| (f.killed.as_str(), f.to.as_str()))
        .collect();
    assert_eq!(ways, [("s1", "s2"), ("s2", "s3")]);
    let standbys: Vec<_> = report.protections.iter().map(|p| p.standby.as_str()).collect();
    assert_eq!(standbys, ["s2", "s3", "s1"]);
    for failover in &report.failovers {
        // A dead host says nothing: nobody may have been suspected earlier than after the set silence, nor much later.
        let suspect = options.plan.suspect;
        assert!(
            failover.detect + Duration::from_millis(200) > suspect && failover.detect < suspect * 3,
            "{failover:?}"
        );
    }
    assert!(report.audited.writes > 0 && report.audited.pages > 0 && report.audited.steps > 0);
    assert!(began.elapsed() < BOUND, "it took {:?}", began.elapsed());
}
