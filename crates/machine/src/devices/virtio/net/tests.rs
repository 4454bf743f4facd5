use super::*;
use crate::devices::virtio::common::Rate;
use crate::devices::virtio::common::testkit::{DATA, Harness, r, ram, w};
use std::os::unix::net::UnixDatagram;
use vm_memory::{Bytes, GuestAddress};

const FEATURES: u64 = F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE | (1 << 29);

fn device() -> (Net, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let config = NetConfig {
        name: "net0".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
        tx_rate: RateHandle::default(),
        rx_rate: RateHandle::default(),
    };
    let backend = SocketBackend::new(ours).unwrap();
    (Net::new(config, Box::new(backend)).unwrap(), theirs)
}

fn start(features: u64) -> (Harness<Net>, UnixDatagram) {
    let (device, wire) = device();
    let h = Harness::on(ram().unwrap(), device, 256, features).unwrap();
    assert!(h.activate());
    (h, wire)
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend((0..len).map(|i| (i * 31 + i / 251) as u8));
    frame
}

#[test]
fn frames_go_out_whole_from_scattered_buffers() {
    let (mut h, wire) = start(FEATURES);
    let sent = frame(1500);
    h.memory.write_slice(&sent, GuestAddress(DATA)).unwrap();
    h.add(TX, &[r(DATA, 12), r(DATA + 12, 3), r(DATA + 15, 1497)]);
    h.add(TX, &[r(DATA, 1512)]);
    assert!(h.notify(TX));
    assert_eq!(h.used(TX).len(), 2);
    let mut got = vec![0; 2000];
    for _ in 0..2 {
        assert_eq!(wire.recv(&mut got).unwrap(), 1512);
        assert!(got[..1512] == sent);
    }
}

#[test]
fn a_large_frame_is_merged_over_buffers_in_one_step() {
    let (mut h, wire) = start(FEATURES);
    let sent = frame(5000);
    wire.send(&sent).unwrap();
    // No buffers, then too few: the frame waits.
    let heads: Vec<u16> = (0..2).map(|i| h.add(RX, &[w(DATA + i * 4096, 1600)])).collect();
    assert!(h.notify(RX));
    assert!(h.used(RX).is_empty());
    let mut all = heads;
    all.extend((2..5).map(|i| h.add(RX, &[w(DATA + i * 4096, 1600)])));
    assert!(h.notify(RX));
    let used = h.wait_used(RX, 4);
    assert_eq!(used.iter().map(|u| u.0).collect::<Vec<_>>(), all[..4]);
    assert_eq!(
        used.iter().map(|u| u.1).collect::<Vec<_>>(),
        [1600, 1600, 1600, 212]
    );
    let mut got = Vec::new();
    for (i, (_, len)) in used.iter().enumerate() {
        let mut part = vec![0; *len as usize];
        h.memory
            .read_slice(&mut part, GuestAddress(DATA + i as u64 * 4096))
            .unwrap();
        got.extend(part);
    }
    assert_eq!(got[10..12], [4, 0]);
    assert!(got[12..] == sent[12..]);
    assert_eq!(h.interrupts.queues[RX].load(Ordering::SeqCst), 1);
}

#[test]
fn without_merging_a_frame_needs_one_buffer() {
    let (mut h, wire) = start(0);
    wire.send(&frame(3000)).unwrap();
    wire.send(&frame(100)).unwrap();
    h.add(RX, &[w(DATA, 1600)]);
    h.add(RX, &[w(DATA + 4096, 1600)]);
    h.notify(RX);
    // The first is lost, the second takes the first buffer.
    assert_eq!(h.wait_used(RX, 1)[0].1, 112);
    let handle = h.lock().device.handle();
    assert_eq!(handle.stats().rx_dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn a_burst_beyond_the_budget_passes_both_ways() {
    let (mut h, wire) = start(FEATURES);
    let handle = h.lock().device.handle();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; 2000];
        for _ in 0..200 {
            assert_eq!(wire.recv(&mut got).unwrap(), 112);
        }
        wire
    });
    h.memory.write_slice(&frame(100), GuestAddress(DATA)).unwrap();
    for _ in 0..200 {
        h.add(TX, &[r(DATA, 112)]);
    }
    h.notify(TX);
    assert_eq!(h.wait_used(TX, 200).len(), 200);
    let wire = reader.join().unwrap();
    assert_eq!(handle.stats().tx_frames.load(Ordering::Relaxed), 200);
    for i in 0..250u64 {
        h.add(RX, &[w(DATA + (i % 200) * 4096, 1600)]);
    }
    h.notify(RX);
    for _ in 0..250 {
        wire.send(&frame(64)).unwrap();
    }
    assert_eq!(h.wait_used(RX, 250).len(), 250);
}

#[test]
fn a_peer_that_does_not_read_costs_frames_not_the_device() {
    let (mut h, wire) = start(FEATURES);
    let handle = h.lock().device.handle();
    h.memory.write_slice(&frame(1000), GuestAddress(DATA)).unwrap();
    for _ in 0..5 {
        for _ in 0..200 {
            h.add(TX, &[r(DATA, 1012)]);
        }
        h.notify(TX);
        if h.used(TX).len() < 200 {
            break;
        }
    }
    // What does not fit is retried for a while, then dropped.
    assert!(h.wait(|_| handle.stats().tx_dropped.load(Ordering::Relaxed) > 0));
    drop(wire);
    assert!(h.wait(|h| {
        h.used(TX);
        let wired = h.lock();
        let q = &wired.queues[TX];
        q.next_used() == q.next_avail()
            && q.avail_idx(&h.memory, Ordering::SeqCst).unwrap().0 == q.next_used()
    }));
}

#[test]
fn announce_and_link_reach_the_guest_and_are_acknowledged() {
    let (mut h, _wire) = start(FEATURES);
    let handle = h.lock().device.handle();
    let status = |h: &Harness<Net>| {
        let mut bytes = [0; 2];
        h.lock().device.read_config(6, &mut bytes);
        u16::from_le_bytes(bytes)
    };
    assert_eq!(status(&h), S_LINK_UP);
    handle.announce();
    assert!(h.wait(|h| status(h) == S_LINK_UP | S_ANNOUNCE));
    assert!(h.interrupts.config.load(Ordering::SeqCst) >= 1);
    h.memory.write_slice(&[3, 0, 9], GuestAddress(DATA)).unwrap();
    h.add(CTRL, &[r(DATA, 2), w(DATA + 8, 1)]);
    // Not a command.
    h.memory.write_slice(&[77, 1], GuestAddress(DATA + 16)).unwrap();
    h.add(CTRL, &[r(DATA + 16, 2), w(DATA + 9, 1)]);
    assert!(h.notify(CTRL));
    assert_eq!(h.used(CTRL).len(), 2);
    let acks: u16 = h.memory.read_obj(GuestAddress(DATA + 8)).unwrap();
    assert_eq!(acks, 0x0100);
    assert_eq!(status(&h), S_LINK_UP);
    handle.set_link(false);
    assert!(h.wait(|h| status(h) == 0));
    handle.set_link(true);
    assert!(h.wait(|h| status(h) == S_LINK_UP));
}

#[test]
fn a_frame_that_waits_for_buffers_survives_a_restore() {
    let (mut h, wire) = start(FEATURES);
    wire.send(&frame(300)).unwrap();
    assert!(h.wait(|h| h.lock().device.rx_len == 312));
    h.memory
        .write_slice(&[1, 1, 2, 0, 0, 0, 0, 77], GuestAddress(DATA))
        .unwrap();
    h.add(CTRL, &[r(DATA, 8), w(DATA + 8, 1)]);
    h.notify(CTRL);
    let (next, wire) = device();
    let mut h = h.migrate(next, FEATURES).unwrap();
    assert_eq!(h.lock().device.mac, [2, 0, 0, 0, 0, 77]);
    h.add(RX, &[w(DATA, 2000)]);
    h.notify(RX);
    assert_eq!(h.wait_used(RX, 1)[0].1, 312);
    // And the new wire works.
    h.add(RX, &[w(DATA, 2000)]);
    h.notify(RX);
    wire.send(&frame(50)).unwrap();
    assert_eq!(h.wait_used(RX, 1)[0].1, 62);
}

#[test]
fn rates_are_kept() {
    let (mut h, wire) = start(FEATURES);
    let handle = h.lock().device.handle();
    handle.tx_rate().set(Rate {
        bytes_per_s: 0,
        ops_per_s: 100,
    });
    for _ in 0..60 {
        h.add(TX, &[r(DATA, 112)]);
    }
    h.notify(TX);
    assert!(h.used(TX).len() <= 11);
    handle.rx_rate().set(Rate {
        bytes_per_s: 1000,
        ops_per_s: 0,
    });
    for i in 0..20 {
        h.add(RX, &[w(DATA + i * 4096, 1600)]);
    }
    h.notify(RX);
    for _ in 0..20 {
        wire.send(&frame(1000)).unwrap();
    }
    assert!(!h.wait_used(RX, 1).is_empty());
    assert!(handle.stats().rx_frames.load(Ordering::Relaxed) < 10);
    handle.rx_rate().set(Rate::default());
    assert!(h.wait(|_| handle.stats().rx_frames.load(Ordering::Relaxed) == 20));
    let begun = handle.stats().tx_frames.load(Ordering::Relaxed);
    assert!(begun < 60);
    handle.tx_rate().set(Rate::default());
    let mut got = [0; 200];
    for _ in 0..60 {
        wire.recv(&mut got).unwrap();
    }
    assert!(h.wait(|_| handle.stats().tx_frames.load(Ordering::Relaxed) == 60));
}

#[test]
fn hostile_chains_are_refused() {
    type Case<'a> = &'a dyn Fn(&mut Harness<Net>, &UnixDatagram);
    let bad: [Case<'_>; 4] = [
        &|h, _| {
            h.add(TX, &[r(DATA, 70_000)]);
        },
        &|h, _| {
            h.add(TX, &[r(0x7fff_f000, 100)]);
        },
        &|h, wire| {
            h.add(RX, &[w(DATA, 11)]);
            wire.send(&frame(100)).unwrap();
        },
        &|h, _| {
            h.add(CTRL, &[r(DATA, 2)]);
        },
    ];
    for (i, make) in bad.iter().enumerate() {
        let (mut h, wire) = start(FEATURES);
        make(&mut h, &wire);
        for queue in 0..3 {
            h.notify(queue);
        }
        let refused = |h: &mut Harness<Net>| matches!(h.lock().failed, Some(DeviceError::Driver { .. }));
        assert!(h.wait(refused), "case {i}");
    }
    // Too short to be a frame: dropped, nothing worse.
    let (mut h, _wire) = start(FEATURES);
    h.add(TX, &[r(DATA, 5)]);
    assert!(h.notify(TX));
    assert_eq!(h.used(TX).len(), 1);
}

#[test]
fn impossible_settings_are_refused() {
    let (ours, _theirs) = UnixDatagram::pair().unwrap();
    let config = NetConfig {
        name: "net0".to_owned(),
        mac: [1, 0, 0, 0, 0, 1],
        mtu: None,
        tx_rate: RateHandle::default(),
        rx_rate: RateHandle::default(),
    };
    let backend = SocketBackend::new(ours).unwrap();
    assert!(matches!(
        Net::new(config, Box::new(backend)),
        Err(DeviceError::Config { .. })
    ));
    let (mut device, _wire) = device();
    assert_eq!(device.features() & OFFLOADS, 0);
    assert!(device.save(0).is_ok());
}

#[test]
fn fuzz_corpus_returns() {
    common::testkit::fuzz_many(fuzz_net);
}
