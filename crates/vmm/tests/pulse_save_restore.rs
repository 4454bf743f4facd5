//! A guest with two vCPUs and every device, busy with all of them, is saved and restored into a new process again and
//! again: its peer notices nothing but time, and memory, replies, disk and console agree after each round.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::peer::{Peer, VsockHost};
use common::{World, busy, busy_with_whole_pages, can_run};
use std::time::{Duration, Instant};

const RUN: &str = "run";

fn rounds(rounds: u32, config: &pulse::Config) {
    if !can_run() {
        return;
    }
    let world = World::new();
    let host = VsockHost::listen(&world);
    let mut process = world.boot(RUN, config, 2);
    let peer = Peer::start(&world);
    peer.fresh();
    let began = Instant::now();
    let (mut save, mut restore) = (Duration::ZERO, Duration::ZERO);
    let mut worked = [0; 4];
    for round in 0..rounds {
        let file = format!("save-{}", round % 2);
        let path = world.at(&file);
        let before = peer.latest();
        let at = Instant::now();
        world.must(RUN, &["vm", "save", "pulse", path.to_str().unwrap()]);
        assert!(process.wait().success(), "round {round}: {}", process.said());
        save += at.elapsed();
        let saved = world.check_save(&file);
        let memory = &saved.summary;
        memory
            .covers(&before)
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        let s = &memory.shared;
        assert_eq!(
            s.devices,
            1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 19,
            "round {round}: not every device is there"
        );
        assert_eq!((s.ncpus, s.tx_dropped), (2, 0), "round {round}");
        worked = [s.rng_reads, s.console_lines, s.vsock_answers, s.disk_flushes];
        let at = Instant::now();
        process = world.restore(RUN, &file);
        restore += at.elapsed();
        let after = peer.fresh();
        assert!(
            after.counter > memory.counter
                && after.disk_seq > saved.disk_seq
                && after.loops >= memory.progress[0].0,
            "round {round}: the restored guest is behind what was saved: {after:?}"
        );
    }
    let took = began.elapsed();
    let last = peer.finish();
    assert!(
        worked.iter().all(|n| *n > 0) && host.accepted() > 0,
        "a device did nothing: rng, console, vsock, flush {worked:?}, host {}",
        host.accepted()
    );
    world.serial_is_clean();
    drop(process);
    println!(
        "{rounds} rounds in {took:?}: save and end {:?}, restore {:?} each; counter {}, rng, console, vsock, flush {worked:?}",
        save / rounds,
        restore / rounds,
        last.counter
    );
}

#[test]
fn pulse_save_restore() {
    rounds(60, &busy());
}

#[test]
fn pulse_save_restore_of_whole_pages() {
    rounds(10, &busy_with_whole_pages());
}

#[test]
#[ignore = "minutes; ./test --full"]
fn long_pulse_save_restore() {
    rounds(1000, &busy());
}
