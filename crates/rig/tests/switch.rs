//! The switch: the deciding half alone, with time as a number; then the thread, over real sockets.

#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use steadfast_rig::switch::core::{Core, DELAYED_BYTES_MAX, Due, FRAME_MAX};
use steadfast_rig::switch::plane::Cable;
use steadfast_rig::{Fault, Switch};

const BROADCAST: [u8; 6] = [0xff; 6];

fn mac(port: usize) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, port as u8]
}

fn frame(to: [u8; 6], from: usize, tag: u32) -> Vec<u8> {
    let mut frame = [&to[..], &mac(from)[..], &[0x08, 0x00][..]].concat();
    frame.extend_from_slice(&tag.to_be_bytes());
    frame.resize(64, 0);
    frame
}

fn tag(due: &Due) -> u32 {
    u32::from_be_bytes(due.frame[14..18].try_into().unwrap())
}

/// A switch of three ports that has seen a frame of each.
fn learnt() -> Core {
    let mut core = Core::new(1);
    let mut out = Vec::new();
    for port in 0..3 {
        core.add_port(&format!("s{port}"));
    }
    for port in 0..3 {
        core.frame_in(0, port, &frame(BROADCAST, port, 0), &mut out);
    }
    core
}

fn send(core: &mut Core, now: u64, from: usize, to: usize, number: u32) -> Vec<Due> {
    let mut out = Vec::new();
    core.frame_in(now, from, &frame(mac(to), from, number), &mut out);
    out
}

#[test]
fn it_learns_addresses_and_floods_what_it_does_not_know() {
    let mut core = Core::new(1);
    for port in 0..3 {
        core.add_port(&format!("s{port}"));
    }
    let ports = |due: Vec<Due>| due.iter().map(|due| due.port).collect::<Vec<_>>();
    assert_eq!(
        ports(send(&mut core, 0, 0, 2, 1)),
        [1, 2],
        "an unknown address is flooded, not sent back"
    );
    assert_eq!(
        ports(send(&mut core, 0, 2, 0, 2)),
        [0],
        "a learnt address gets it alone"
    );
    assert_eq!(ports(send(&mut core, 0, 0, 2, 3)), [2]);
    let mut out = Vec::new();
    core.frame_in(0, 0, &frame(BROADCAST, 0, 4), &mut out);
    assert_eq!(ports(out), [1, 2], "a broadcast goes to all others");
    // The address moves: a failover announces it from another port.
    let mut out = Vec::new();
    core.frame_in(0, 1, &frame(BROADCAST, 2, 5), &mut out);
    assert_eq!(ports(send(&mut core, 0, 0, 2, 6)), [1]);
    // A frame to an address on its own side stays there.
    assert_eq!(ports(send(&mut core, 0, 1, 2, 7)), [0usize; 0]);
}

#[test]
fn a_group_address_is_never_learnt() {
    let mut core = learnt();
    let mut hostile = frame(mac(1), 0, 0);
    hostile[6..12].copy_from_slice(&BROADCAST);
    let mut out = Vec::new();
    core.frame_in(0, 0, &hostile, &mut out);
    out.clear();
    core.frame_in(0, 1, &frame(BROADCAST, 1, 0), &mut out);
    assert_eq!(out.len(), 2, "a broadcast went to one port only");
}

#[test]
fn a_partition_cuts_what_it_says_and_no_more() {
    let mut core = learnt();
    core.cut_way(0, 1);
    assert_eq!(send(&mut core, 0, 0, 1, 1).len(), 0);
    assert_eq!(
        send(&mut core, 0, 1, 0, 2).len(),
        1,
        "the other direction is whole"
    );
    assert_eq!(send(&mut core, 0, 0, 2, 3).len(), 1, "the third port is whole");
    core.heal();
    assert_eq!(send(&mut core, 0, 0, 1, 4).len(), 1);
    core.set_unplugged(1, true);
    assert_eq!(send(&mut core, 0, 1, 0, 5).len(), 0);
    assert!(send(&mut core, 0, 0, 1, 6).iter().all(|due| due.port != 1));
    core.set_unplugged(1, false);
    assert!(send(&mut core, 0, 0, 1, 7).iter().any(|due| due.port == 1));
    core.set_down(true);
    assert_eq!(send(&mut core, 0, 0, 2, 8).len(), 0);
    core.set_down(false);
    assert!(!send(&mut core, 0, 0, 2, 9).is_empty());
}

#[test]
fn delay_holds_frames_and_keeps_their_order() {
    let mut core = learnt();
    core.set_fault(
        0,
        Fault {
            delay_us: 1000,
            ..Fault::default()
        },
        Fault::default(),
    );
    for number in 0..10 {
        assert!(send(&mut core, u64::from(number), 0, 1, number).is_empty());
    }
    assert_eq!(core.next_due_us(), Some(1000));
    let mut out = Vec::new();
    core.take_due(999, &mut out);
    assert!(out.is_empty());
    core.take_due(1004, &mut out);
    assert_eq!(out.iter().map(tag).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    core.take_due(5000, &mut out);
    assert_eq!(
        out.iter().map(tag).collect::<Vec<_>>(),
        (0..10).collect::<Vec<_>>()
    );
    assert_eq!(core.next_due_us(), None);
}

#[test]
fn a_rate_spaces_frames() {
    let mut core = learnt();
    // 64 bytes at 512 kbit/s take 1 ms.
    core.set_fault(
        0,
        Fault {
            rate_kbit: 512,
            ..Fault::default()
        },
        Fault::default(),
    );
    for number in 0..3 {
        assert!(send(&mut core, 0, 0, 1, number).is_empty());
    }
    let mut out = Vec::new();
    core.take_due(2000, &mut out);
    assert_eq!(out.len(), 2);
}

#[test]
fn the_same_seed_loses_the_same_frames() {
    let run = |seed: u64| {
        let mut core = Core::new(seed);
        core.add_port("a");
        core.add_port("b");
        core.set_fault(
            0,
            Fault {
                loss_ppm: 300_000,
                duplicate_ppm: 100_000,
                ..Fault::default()
            },
            Fault::default(),
        );
        (0..1000)
            .flat_map(|number| send(&mut core, 0, 0, 1, number))
            .map(|due| tag(&due))
            .collect::<Vec<_>>()
    };
    let (first, again, other) = (run(7), run(7), run(8));
    assert_eq!(first, again);
    assert_ne!(first, other);
    // 700 arrive, a tenth of them twice: about 770.
    assert!(
        (700..840).contains(&first.len()),
        "{} frames arrived",
        first.len()
    );
}

#[test]
fn reorder_lets_later_frames_pass_and_corrupt_flips_one_bit() {
    let mut core = learnt();
    core.set_fault(
        0,
        Fault {
            reorder_ppm: 200_000,
            ..Fault::default()
        },
        Fault::default(),
    );
    let mut got: Vec<u32> = Vec::new();
    for number in 0..200 {
        let now = u64::from(number) * 1000;
        let mut out = Vec::new();
        core.take_due(now, &mut out);
        out.extend(send(&mut core, now, 0, 1, number));
        got.extend(out.iter().map(tag));
    }
    let mut rest = Vec::new();
    core.take_due(u64::MAX, &mut rest);
    got.extend(rest.iter().map(tag));
    assert!(
        got.windows(2).any(|pair| pair[0] > pair[1]),
        "nothing was reordered"
    );
    got.sort_unstable();
    assert_eq!(
        got,
        (0..200).collect::<Vec<_>>(),
        "reordering lost or doubled a frame"
    );

    core.set_fault(
        0,
        Fault {
            corrupt_ppm: 1_000_000,
            ..Fault::default()
        },
        Fault::default(),
    );
    let sent = frame(mac(1), 0, 5);
    let mut out = Vec::new();
    core.frame_in(0, 0, &sent, &mut out);
    let differ: u32 = out[0]
        .frame
        .iter()
        .zip(&sent)
        .map(|(a, b)| (a ^ b).count_ones())
        .sum();
    assert_eq!(differ, 1);
}

#[test]
fn delayed_frames_are_bounded() {
    let mut core = learnt();
    core.set_fault(
        0,
        Fault {
            delay_us: u64::MAX / 4,
            ..Fault::default()
        },
        Fault::default(),
    );
    let mut big = frame(mac(1), 0, 0);
    big.resize(FRAME_MAX, 0);
    let mut out = Vec::new();
    let fit = DELAYED_BYTES_MAX / FRAME_MAX;
    for _ in 0..fit + 10 {
        core.frame_in(0, 0, &big, &mut out);
    }
    assert!(out.is_empty());
    assert_eq!(
        core.counters(1).lost_frames,
        10,
        "frames beyond the bound are lost, and counted"
    );
}

proptest! {
    /// Whatever comes in, nothing panics, and nothing goes back out where it came in.
    #[test]
    fn hostile_frames_do_no_harm(
        frames in prop::collection::vec((0usize..3, prop::collection::vec(any::<u8>(), 0..100)), 0..50),
        loss in 0u32..1_000_000, duplicate in 0u32..1_000_000, corrupt in 0u32..1_000_000, delay in 0u64..10_000,
    ) {
        let mut core = Core::new(3);
        for name in ["a", "b", "c"] {
            core.add_port(name);
        }
        let fault = Fault {
            loss_ppm: loss, duplicate_ppm: duplicate, corrupt_ppm: corrupt, delay_us: delay, ..Fault::default()
        };
        core.set_fault(1, fault, fault);
        for (now, (port, bytes)) in frames.iter().enumerate() {
            let mut out = Vec::new();
            core.frame_in(now as u64, *port, bytes, &mut out);
            prop_assert!(out.iter().all(|due| due.port != *port));
            core.take_due(now as u64, &mut out);
        }
        let mut out = Vec::new();
        core.take_due(u64::MAX, &mut out);
        prop_assert_eq!(core.next_due_us(), None);
    }
}

/// The server's end of a cable, as QEMU uses it.
struct Nic(UnixStream);

impl Nic {
    fn on(switch: &Switch, name: &str) -> Nic {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let port = switch.add_port(name);
        switch.plug_cable(port, Cable::Stream(theirs.into()));
        Nic(ours)
    }

    fn send(&mut self, frame: &[u8]) {
        let bytes = [&(frame.len() as u32).to_be_bytes()[..], frame].concat();
        self.0.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> std::io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame)?;
        Ok(frame)
    }
}

#[test]
fn frames_cross_the_thread_whole_and_in_order() {
    let switch = Switch::start("test", 1).unwrap();
    let (mut a, mut b) = (Nic::on(&switch, "a"), Nic::on(&switch, "b"));
    let writer = std::thread::spawn(move || {
        for number in 0..2000u32 {
            let mut sent = frame(mac(1), 0, number);
            sent.resize(64 + number as usize % 9000, 7);
            a.send(&sent);
        }
        a
    });
    for number in 0..2000u32 {
        let got = b.receive().unwrap();
        assert_eq!(got.len(), 64 + number as usize % 9000);
        assert_eq!(got[14..18], number.to_be_bytes());
    }
    let mut a = writer.join().unwrap();
    assert_eq!(switch.counters("b").unwrap().out_frames, 2000);

    // Delay is kept by the thread's own clock.
    switch
        .set_faults(
            "a",
            Fault {
                delay_us: 60_000,
                ..Fault::default()
            },
            Fault::default(),
        )
        .unwrap();
    let start = Instant::now();
    a.send(&frame(mac(1), 0, 1));
    b.receive().unwrap();
    assert!(
        start.elapsed() >= Duration::from_millis(60),
        "it came after {:?}",
        start.elapsed()
    );

    // A cable that is plugged anew (a server that restarted) works; the old end is closed.
    switch.heal();
    let (ours, theirs) = UnixStream::pair().unwrap();
    switch.plug_cable(1, Cable::Stream(theirs.into()));
    assert!(b.receive().is_err(), "the old cable is still there");
    let mut b = Nic(ours);
    b.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    a.send(&frame(mac(1), 0, 2));
    assert_eq!(b.receive().unwrap()[14..18], 2u32.to_be_bytes());
}

#[test]
fn a_peer_that_breaks_the_framing_or_does_not_read_harms_nobody_else() {
    let switch = Switch::start("test", 1).unwrap();
    let (mut a, mut b, mut hostile) = (
        Nic::on(&switch, "a"),
        Nic::on(&switch, "b"),
        Nic::on(&switch, "hostile"),
    );
    hostile.0.write_all(&[0xff; 64]).unwrap();
    // `deaf` never reads; its share is bounded and lost.
    let deaf = Nic::on(&switch, "deaf");
    let mut broadcast = frame(BROADCAST, 0, 9);
    broadcast.resize(9000, 0);
    for _ in 0..1000 {
        a.send(&broadcast);
        assert_eq!(b.receive().unwrap().len(), 9000);
    }
    assert!(switch.counters("deaf").unwrap().lost_frames > 0);
    assert!(hostile.receive().is_err() || switch.counters("hostile").unwrap().out_frames > 0);
    drop(deaf);
    assert!(switch.partition("a", "nobody").is_err());
}
