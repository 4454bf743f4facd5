//! Paused and resumed over the control socket as fast as it goes, while the guest works and answers.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::peer::Peer;
use common::{LONG, World, busy, can_run};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use steadfast_vmm::control::{Request, Then};

const RUN: &str = "run";

#[test]
fn pulse_pause_storm() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let _process = world.boot(RUN, &busy(), 2);
    let peer = Peer::start(&world);
    peer.fresh();
    let mut control = UnixStream::connect(world.control(RUN)).unwrap();
    control.set_read_timeout(Some(LONG)).unwrap();
    let mut answers = BufReader::new(control.try_clone().unwrap());
    let mut ask = |request: &Request| -> Duration {
        let at = Instant::now();
        let line = serde_json::to_string(request).unwrap() + "\n";
        control.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        let took = at.elapsed();
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["ok"], true, "{request:?}: {answer}");
        took
    };
    let (mut pause, mut resume) = (Vec::new(), Vec::new());
    for round in 0..2000 {
        pause.push(ask(&Request::Pause));
        resume.push(ask(&Request::Resume));
        if round % 500 == 499 {
            // It is not only alive at the end.
            peer.fresh();
        }
    }
    let before = peer.fresh();
    // Twice each is no error, and a pause holds.
    ask(&Request::Pause);
    ask(&Request::Pause);
    world.save(RUN, "vm.save", Then::Pause).unwrap();
    let saved = world.check_save("vm.save");
    saved.summary.covers(&before).unwrap();
    ask(&Request::Resume);
    ask(&Request::Resume);
    peer.finish();
    world.console_lines();
    world.serial_is_clean();
    for (what, mut times) in [("pause", pause), ("resume", resume)] {
        times.sort();
        let mean = times.iter().sum::<Duration>() / times.len() as u32;
        println!(
            "{what}: mean {mean:?}, median {:?}, worst {:?}",
            times[times.len() / 2],
            times[times.len() - 1]
        );
    }
}
