use super::common::testkit::{DATA, Harness, r, ram, w};
use super::*;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

fn harness(capacity: usize) -> (Harness<Console>, RingReader) {
    let (sink, reader) = ring(capacity);
    let device = Console::new("console0", Box::new(sink)).unwrap();
    let h = Harness::on(ram().unwrap(), device, 64, F_SIZE | (1 << 29)).unwrap();
    assert!(h.activate());
    (h, reader)
}

#[test]
fn output_reaches_the_sink_in_order() {
    let (mut h, reader) = harness(1 << 16);
    h.memory.write_slice(b"hello, world", GuestAddress(DATA)).unwrap();
    h.add(TX, &[r(DATA, 7), r(DATA + 7, 5)]);
    h.add(TX, &[r(DATA, 5)]);
    assert!(h.notify(TX));
    assert_eq!(h.used(TX).len(), 2);
    assert_eq!(reader.read(Duration::from_secs(5)).unwrap(), b"hello, worldhello");
}

#[test]
fn a_flood_is_dropped_and_counted_not_blocked() {
    let (mut h, reader) = harness(1000);
    for _ in 0..60 {
        h.add(TX, &[r(DATA, 60_000)]);
    }
    assert!(h.notify(TX));
    // The budget stops the first call; the device goes on by itself.
    assert_eq!(h.wait_used(TX, 60).len(), 60);
    let stats = h.lock().device.stats();
    assert_eq!(stats.bytes_out.load(Ordering::Relaxed), 3_600_000);
    assert_eq!(stats.dropped.load(Ordering::Relaxed), 3_599_000);
    assert_eq!(reader.dropped(), 3_599_000);
    // Still served.
    let _ = reader.read(Duration::from_secs(5));
    h.memory.write_slice(b"x", GuestAddress(DATA)).unwrap();
    h.add(TX, &[r(DATA, 1)]);
    h.notify(TX);
    assert_eq!(reader.read(Duration::from_secs(5)).unwrap(), b"x");
}

#[test]
fn input_waits_for_buffers_and_is_bounded() {
    let (mut h, _reader) = harness(1000);
    let input = h.lock().device.input();
    assert_eq!(input.send(&[b'a'; 100_000]), INPUT_MAX);
    assert_eq!(input.send(b"b"), 0);
    h.add(RX, &[w(DATA, 10), w(DATA + 100, 20)]);
    assert!(h.notify(RX));
    let got = h.wait_used(RX, 1);
    assert_eq!(got[0].1, 30);
    let bytes: [u8; 20] = h.memory.read_obj(GuestAddress(DATA + 100)).unwrap();
    assert_eq!(bytes, [b'a'; 20]);
}

#[test]
fn input_not_yet_taken_survives_a_restore_once() {
    let (h, _reader) = harness(1000);
    let input = h.lock().device.input();
    assert_eq!(input.send(b"typed"), 5);
    assert!(h.notify(RX));
    let (sink, _r2) = ring(1000);
    let mut h = h
        .migrate(Console::new("console0", Box::new(sink)).unwrap(), F_SIZE)
        .unwrap();
    let head = h.add(RX, &[w(DATA, 100)]);
    assert!(h.notify(RX));
    assert_eq!(h.wait_used(RX, 1), [(head, 5)]);
    let bytes: [u8; 5] = h.memory.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(&bytes, b"typed");
    assert!(h.lock().device.input().lock().is_empty());
}

#[test]
fn resize_is_seen_in_the_configuration() {
    let (mut h, _reader) = harness(10);
    let size = h.lock().device.size().unwrap();
    size.set(132, 50);
    assert!(h.wait(|h| h.interrupts.config.load(Ordering::SeqCst) == 1));
    let mut bytes = [0; 16];
    h.lock().device.read_config(0, &mut bytes);
    assert_eq!(bytes[..4], [132, 0, 50, 0]);
    assert_eq!(bytes[12..], [0; 4]);
}

#[test]
fn hostile_receive_buffers_are_refused() {
    let (mut h, _reader) = harness(10);
    assert_eq!(h.lock().device.input().send(b"x"), 1);
    h.add(RX, &[r(DATA, 10)]);
    h.notify(RX);
    assert!(h.wait(|h| matches!(h.lock().failed, Some(DeviceError::Driver { .. }))));
}

#[test]
fn fuzz_corpus_returns() {
    common::testkit::fuzz_many(fuzz_console);
}
