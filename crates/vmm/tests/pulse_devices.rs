//! Each device does real work, before and after a save and restore into a new process.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::peer::{Peer, VsockHost, client};
use common::{GUEST, LONG, Saved, World, busy, came, can_run, wait_for};
use pulse::shared::{ECHO_PORT, page_gpa};
use pulse::{Config, kind};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use steadfast_vmm::control::{Request, Then};

const RUN: &str = "run";

/// A look at the running VM's memory, by way of a copy. The disk runs on meanwhile, so only memory is looked at.
fn look(world: &World) -> pulse::Summary {
    world.save(RUN, "look.save", Then::Resume).unwrap();
    world.memory("look.save")
}

fn saved_and_restored(world: &World, process: &mut common::Process) -> Saved {
    world.save(RUN, "vm.save", Then::Stop).unwrap();
    assert!(process.wait().success());
    let saved = world.check_save("vm.save");
    *process = world.restore(RUN, "vm.save");
    saved
}

/// Waits until a counter of the shared page has grown by `by` after `from`.
fn grows(world: &World, what: &str, from: u64, by: u64, read: impl Fn(&pulse::Summary) -> u64) {
    let mut now = 0;
    assert!(
        came(LONG, || {
            now = read(&look(world));
            now >= from + by
        }),
        "{what}: {now} after {LONG:?}, from {from}"
    );
}

#[test]
fn pulse_devices() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let host = VsockHost::listen(&world);
    let mut process = world.boot(RUN, &busy(), 2);
    let peer = Peer::start(&world);
    peer.fresh();
    for _ in 0..2 {
        let s = look(&world).shared;
        grows(&world, "rng", s.rng_reads, 3, |s| s.shared.rng_reads);
        grows(&world, "console", s.console_lines, 3, |s| s.shared.console_lines);
        grows(&world, "vsock", s.vsock_answers, 3, |s| s.shared.vsock_answers);
        grows(&world, "disk reads", s.disk_reads, 3, |s| s.shared.disk_reads);
        grows(&world, "disk ring", s.verify_seq, 3, |s| s.shared.verify_seq);
        grows(&world, "flushes", s.disk_flushes, 2, |s| s.shared.disk_flushes);
        grows(&world, "frames", s.rx_frames.min(s.tx_frames), 10, |s| {
            s.shared.rx_frames.min(s.shared.tx_frames)
        });
        let reached = host.accepted();
        wait_for("the guest to reach the host over vsock", || {
            host.accepted() > reached
        });
        saved_and_restored(&world, &mut process);
        peer.fresh();
    }
    let lines = world.console_lines();
    assert!(lines > 0);
    // A host program that asks the guest: the guest listens to nobody, and the connection ends instead of hanging.
    let mut stream = UnixStream::connect(world.at("vsock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"nonsense\n").unwrap();
    assert_eq!(
        stream.read(&mut [0; 8]).unwrap(),
        0,
        "nonsense ends the connection"
    );
    peer.finish();
    world.serial_is_clean();
}

/// Bytes of guest memory that the process holds.
fn memory_held(process: &common::Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|l| l.starts_with("RssShmem:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// RAM on both sides of the hole below 4 GiB: the guest dirties pages all over it, and all of them are saved and restored.
#[test]
fn pulse_memory_above_the_hole() {
    if !can_run() {
        return;
    }
    let mut world = World::new();
    world.ram = "5GiB";
    let config = busy().dirty(500).high().ram_stride();
    let mut process = world.boot(RUN, &config, 2);
    let peer = Peer::start(&world);
    for _ in 0..2 {
        let before = peer.fresh();
        let saved = saved_and_restored(&world, &mut process);
        let s = &saved.summary.shared;
        let pages: Vec<u64> = (0..s.ncpus)
            .flat_map(|cpu| (0..s.pages).map(move |page| page_gpa(s, cpu, page)))
            .collect();
        let (low, high): (Vec<u64>, Vec<u64>) = pages.iter().partition(|gpa| **gpa < 3 << 30);
        assert!(
            low.len() > 100 && high.len() > 100 && high.iter().all(|gpa| *gpa >= 4 << 30),
            "{} pages are below the hole, {} above",
            low.len(),
            high.len()
        );
        // A reply may come before the guest is through its first loop since.
        let until = Instant::now() + Duration::from_secs(20);
        while peer.fresh().loops <= before.loops {
            assert!(Instant::now() < until, "the guest does not go on");
        }
    }
    peer.finish();
    let status = world.ask(RUN, &Request::Status).unwrap();
    assert_eq!(status["memory_bytes"], 5u64 << 30);
}

#[test]
fn pulse_balloon() {
    const BYTES: u64 = 64 * 4096;
    if !can_run() {
        return;
    }
    let world = World::new();
    // Nothing else touches memory: what the process holds changes by the balloon alone.
    let config = Config::new().ip(GUEST).extras(0, 0, 0, 5);
    let mut process = world.boot(RUN, &config, 1);
    let mut client = client(&world);
    client.ask(kind::INC, LONG).unwrap();
    let shown = |world: &World| world.ask(RUN, &Request::Status).unwrap()["balloon_bytes"].clone();
    let set = |bytes| world.ask(RUN, &Request::Balloon { bytes }).unwrap();
    for round in 0..3u64 {
        let before = memory_held(&process);
        set(BYTES);
        wait_for("the balloon to inflate", || shown(&world) == BYTES);
        let after = memory_held(&process);
        println!("round {round}: {before} bytes held, {after} with the balloon inflated");
        if round == 0 {
            // The image's buffers were filled at boot, so all of the balloon was held.
            assert!(
                after + BYTES / 2 <= before,
                "the balloon's memory did not go back to the host"
            );
        }
        let saved = saved_and_restored(&world, &mut process);
        assert_eq!(saved.summary.shared.balloon_pages, BYTES / 4096);
        wait_for("the balloon to be as it was", || shown(&world) == BYTES);
        client.ask(kind::FLUSH_INC, LONG).unwrap();
        set(0);
        wait_for("the balloon to deflate", || shown(&world) == 0);
        assert_eq!(client.ask(kind::INC, LONG).unwrap().counter, 3 + 2 * round);
    }
    let refused = world
        .ask(RUN, &Request::Balloon { bytes: 64 << 20 })
        .unwrap_err()
        .to_string();
    assert!(refused.contains("less memory"), "{refused}");
}

#[test]
fn pulse_reset_keeps_what_was_flushed() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let _process = world.boot(RUN, &busy(), 2);
    let mut client = client(&world);
    let mut flushed = 0;
    for round in 1..=3 {
        client.nonces_from(round * 1_000_000);
        client.ask(kind::INC, LONG).unwrap();
        let reply = client.ask(kind::FLUSH_INC, LONG).unwrap();
        assert!(reply.errors == 0 && reply.boot_counter >= flushed, "{reply:?}");
        flushed = reply.counter;
        let stream = client.connect(ECHO_PORT, LONG).unwrap();
        client.echo_stream(stream, b"before the fall", LONG).unwrap();
        client.tell(kind::PANIC).unwrap();
        // A triple fault resets the machine; the same process boots the guest again, with all its devices.
        wait_for("the guest to be reset", || {
            world.ask(RUN, &Request::Status).unwrap()["guest_resets"] == round
        });
        let reply = client.ask(kind::READ, LONG).unwrap();
        assert_eq!(
            (reply.boot_counter, reply.counter, reply.errors),
            (flushed, flushed, 0)
        );
    }
    assert_eq!(world.text("serial").matches("pulse 1 ready").count(), 4);
}
