use super::common::testkit::{DATA, Harness, r, ram, w};
use super::*;
use vm_memory::Bytes;

type Seen = Arc<Mutex<Vec<(u64, u64)>>>;

struct Recorder(Seen);

impl PageReclaimer for Recorder {
    fn reclaim(&self, first_gfn: u64, pages: u64) {
        self.0.lock().unwrap().push((first_gfn, pages));
    }
}

fn device() -> (Balloon, Seen) {
    let seen = Seen::default();
    (
        Balloon::new("balloon0", Box::new(Recorder(seen.clone()))).unwrap(),
        seen,
    )
}

fn start(features: u64) -> (Harness<Balloon>, Seen) {
    let (device, seen) = device();
    let h = Harness::on(ram().unwrap(), device, 64, features).unwrap();
    assert!(h.activate());
    (h, seen)
}

fn put_numbers(h: &Harness<Balloon>, numbers: &[u32]) {
    for (i, n) in numbers.iter().enumerate() {
        h.memory.write_obj(*n, GuestAddress(DATA + 4 * i as u64)).unwrap();
    }
}

#[test]
fn pages_go_back_in_runs_and_never_outside_ram() {
    let (mut h, seen) = start(0);
    // Falling, twice, across the end of the first region (page 2048), in the second (4096 to 4111), far outside.
    put_numbers(
        &h,
        &[12, 11, 10, 10, 2047, 2048, 4095, 4096, 4111, 4112, u32::MAX],
    );
    h.add(INFLATE, &[r(DATA, 20), r(DATA + 20, 24)]);
    assert!(h.notify(INFLATE));
    assert_eq!(h.used(INFLATE).len(), 1);
    assert_eq!(*seen.lock().unwrap(), [(10, 3), (2047, 1), (4096, 1), (4111, 1)]);
    let handle = h.lock().device.handle();
    assert_eq!(handle.stats().inflated.load(Ordering::Relaxed), 6);
    h.add(DEFLATE, &[r(DATA, 12)]);
    assert!(h.notify(DEFLATE));
    assert_eq!(h.used(DEFLATE).len(), 1);
    assert_eq!(handle.stats().deflated.load(Ordering::Relaxed), 3);
}

#[test]
fn the_target_reaches_the_guest_and_its_answer_the_handle() {
    let (mut h, _seen) = start(0);
    let handle = h.lock().device.handle();
    handle.set_target(0x1234);
    assert!(h.wait(|h| h.interrupts.config.load(Ordering::SeqCst) == 1));
    let mut bytes = [0; 4];
    h.lock().device.read_config(0, &mut bytes);
    assert_eq!(bytes, [0x34, 0x12, 0, 0]);
    h.lock().device.write_config(4, &7u32.to_le_bytes());
    assert_eq!(handle.actual(), 7);
    h.lock().device.write_config(0, &[0xff; 20]);
    assert_eq!((handle.actual(), handle.target()), (u32::MAX, 0x1234));
}

#[test]
fn free_pages_are_reported_on_the_queue_that_the_negotiation_gives() {
    for (features, queue) in [(F_REPORTING, 2), (F_REPORTING | F_STATS_VQ, 3)] {
        let (mut h, seen) = start(features);
        h.add(
            queue,
            &[
                w(0x20_0000, 0x10_0000),
                w(0x40_0800, 0x1000),
                w(0x50_0000, 0x1fff),
            ],
        );
        assert!(h.notify(queue));
        assert_eq!(h.used(queue).len(), 1);
        assert_eq!(*seen.lock().unwrap(), [(0x200, 0x100), (0x500, 1)]);
    }
}

#[test]
fn statistics_come_when_asked_for_also_after_a_restore() {
    let (mut h, _seen) = start(F_STATS_VQ);
    let handle = h.lock().device.handle();
    let put = |h: &Harness<Balloon>, value: u64| {
        h.memory.write_obj(5u16, GuestAddress(DATA)).unwrap();
        h.memory.write_obj(value, GuestAddress(DATA + 2)).unwrap();
    };
    put(&h, 111);
    let head = h.add(2, &[r(DATA, 10)]);
    assert!(h.notify(2));
    assert!(h.used(2).is_empty());
    assert_eq!(handle.guest_stats(), BTreeMap::from([(5, 111)]));
    let (next, _seen) = device();
    let mut h = h.migrate(next, F_STATS_VQ).unwrap();
    let handle = h.lock().device.handle();
    handle.refresh();
    assert_eq!(h.wait_used(2, 1), [(head, 0)]);
    put(&h, 222);
    h.add(2, &[r(DATA, 10)]);
    assert!(h.notify(2));
    assert_eq!(handle.guest_stats(), BTreeMap::from([(5, 222)]));
    assert!(h.lock().device.stats_head.is_some());
}

#[test]
fn hostile_page_lists_are_refused_or_bounded() {
    for len in [3, 4 * PAGES_MAX + 4] {
        let (mut h, _seen) = start(0);
        h.add(INFLATE, &[r(DATA, len)]);
        assert!(!h.notify(INFLATE));
        assert!(matches!(h.lock().failed, Some(DeviceError::Driver { .. })));
    }
    let (mut h, _seen) = start(0);
    for _ in 0..60 {
        h.add(INFLATE, &[r(DATA, 4 * PAGES_MAX)]);
    }
    assert!(h.notify(INFLATE));
    assert!(h.used(INFLATE).len() < 60);
    assert!(h.wait(|h| h.lock().queues[INFLATE].next_used() == 60));
}

#[test]
fn fuzz_corpus_returns() {
    common::testkit::fuzz_many(fuzz_balloon);
}
