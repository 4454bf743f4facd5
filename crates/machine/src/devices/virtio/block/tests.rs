use super::backend::{Completion, Op, Request};
use super::fuzz::MemoryBackend;
use super::*;
use crate::devices::virtio::common::Rate;
use crate::devices::virtio::common::testkit::{DATA, DRAIN, Desc, Harness, r, ram, w};
use std::os::fd::RawFd;
use std::sync::Mutex;
use vm_memory::{Bytes, GuestAddress};

const FEATURES: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES | F_MQ | (1 << 29);
const HEADERS: u64 = 0xf_0000;
const STATUS: u64 = 0xf_8000;

fn config(policy: Box<dyn ErrorPolicy>) -> BlockConfig {
    BlockConfig {
        name: "block0".to_owned(),
        serial: "serial-1".to_owned(),
        queues: 2,
        rate: RateHandle::default(),
        policy,
    }
}

fn start(backend: Box<dyn BlockBackend>, features: u64) -> Harness<Block> {
    let device = Block::new(config(Box::new(ReportErrors)), backend).unwrap();
    let h = Harness::on(ram().unwrap(), device, 256, features).unwrap();
    assert!(h.activate());
    h
}

/// Adds one request; `n` chooses its header and status bytes.
fn request(h: &mut Harness<Block>, n: u64, kind: u32, sector: u64, data: &[Desc]) -> u16 {
    let mut header = [0u8; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    h.memory
        .write_slice(&header, GuestAddress(HEADERS + n * 16))
        .unwrap();
    h.memory.write_slice(&[0xff], GuestAddress(STATUS + n)).unwrap();
    let mut descs = vec![r(HEADERS + n * 16, 16)];
    descs.extend_from_slice(data);
    descs.push(w(STATUS + n, 1));
    h.add(0, &descs)
}

fn status(h: &Harness<Block>, n: u64) -> u8 {
    h.memory.read_obj(GuestAddress(STATUS + n)).unwrap()
}

fn file(bytes: u64) -> (tempfile::TempDir, File, BackendInfo) {
    let dir = tempfile::tempdir().unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.path().join("disk"))
        .unwrap();
    file.set_len(bytes).unwrap();
    let info = BackendInfo {
        capacity_bytes: bytes,
        read_only: false,
        logical_block: 512,
        physical_block: 4096,
        discard: true,
        write_zeroes: true,
    };
    (dir, file, info)
}

fn every_operation(backend: Box<dyn BlockBackend>) {
    let mut h = start(backend, FEATURES);
    let data: Vec<u8> = (0..3_000_320u32).map(|i| (i * 7 + i / 513) as u8).collect();
    let mem = h.memory.clone();
    mem.write_slice(&data, GuestAddress(DATA)).unwrap();
    // One write of three parts, from buffers that are not aligned to anything.
    let len = data.len() as u32;
    request(&mut h, 0, 1, 8, &[r(DATA, 1001), r(DATA + 1001, len - 1001)]);
    h.notify(0);
    assert_eq!(h.wait_used(0, 1)[0].1, 1);
    request(&mut h, 1, 4, 0, &[]);
    request(
        &mut h,
        2,
        0,
        8,
        &[w(DATA + (4 << 20), 77), w(DATA + (4 << 20) + 77, len - 77)],
    );
    request(&mut h, 3, 8, 0, &[w(0xf_4000, 20)]);
    h.notify(0);
    let mut used = h.wait_used(0, 3);
    used.sort_unstable();
    assert_eq!(used.iter().map(|u| u.1).sum::<u32>(), 1 + (len + 1) + 21);
    let mut back = vec![0; data.len()];
    mem.read_slice(&mut back, GuestAddress(DATA + (4 << 20))).unwrap();
    assert!(back == data);
    let id: [u8; 20] = mem.read_obj(GuestAddress(0xf_4000)).unwrap();
    assert_eq!(&id, b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    // Zero sectors 8 to 15 (no unmap) and 24 to 31 (unmap), discard 40 to 47.
    let segment = |at: u64, sector: u64, flags: u32| {
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&sector.to_le_bytes());
        raw[8..12].copy_from_slice(&8u32.to_le_bytes());
        raw[12..].copy_from_slice(&flags.to_le_bytes());
        mem.write_slice(&raw, GuestAddress(0xf_5000 + at * 16)).unwrap();
    };
    segment(0, 8, 0);
    segment(1, 24, 1);
    segment(2, 40, 0);
    request(&mut h, 4, 13, 0, &[r(0xf_5000, 32)]);
    request(&mut h, 5, 11, 0, &[r(0xf_5020, 16)]);
    // Not allowed: discard with the unmap flag, unknown request, beyond the end.
    request(&mut h, 6, 11, 0, &[r(0xf_5010, 16)]);
    request(&mut h, 7, 99, 0, &[]);
    request(&mut h, 8, 0, 1 << 50, &[w(DATA, 512)]);
    request(&mut h, 9, 0, 0, &[w(DATA, 511)]);
    h.notify(0);
    assert_eq!(h.wait_used(0, 6).len(), 6);
    let got: Vec<u8> = (0..10).map(|n| status(&h, n)).collect();
    assert_eq!(got, [0, 0, 0, 0, 0, 0, 2, 2, 1, 1]);
    request(&mut h, 10, 0, 8, &[w(DATA, 512 * 40)]);
    h.notify(0);
    h.wait_used(0, 1);
    let mut back = vec![1; 512 * 24];
    mem.read_slice(&mut back, GuestAddress(DATA)).unwrap();
    assert!(back[..4096].iter().all(|b| *b == 0));
    assert!(back[4096..8192] == data[4096..8192]);
    assert!(back[8192..].iter().all(|b| *b == 0));
}

#[test]
fn every_operation_on_io_uring() {
    let (_dir, file, info) = file(16 << 20);
    match UringBackend::new(file, info) {
        Ok(backend) => every_operation(Box::new(backend)),
        Err(e) => println!("SKIPPED: io_uring is not available here: {e}"),
    }
}

#[test]
fn every_operation_on_threads() {
    let (_dir, file, info) = file(16 << 20);
    let disk = Arc::new(RawFile::new(file, info));
    every_operation(Box::new(ThreadBackend::new(disk, 3).unwrap()));
}

#[test]
fn every_operation_where_zeroes_must_be_written() {
    every_operation(Box::new(MemoryBackend::new(32768, false, 0).unwrap()));
}

#[test]
fn every_operation_on_images() {
    use steadfast_disk::image::{ImageOptions, MemImage, open};
    let (dir, _file, _info) = file(16 << 20);
    let image = open(&dir.path().join("disk"), &ImageOptions::default()).unwrap();
    every_operation(image_backend(image).unwrap());
    let image = Arc::new(MemImage::new(vec![0; 16 << 20], false));
    every_operation(image_backend(image).unwrap());
}

/// Holds requests until the gate opens; what a slow disk does.
struct Gate {
    inner: MemoryBackend,
    held: Vec<Request>,
    open: Arc<AtomicBool>,
    ops: Arc<Mutex<Vec<&'static str>>>,
}

impl Gate {
    fn new(fail_every: u64) -> (Self, Arc<AtomicBool>, Arc<Mutex<Vec<&'static str>>>) {
        let (open, ops) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let gate = Self {
            inner: MemoryBackend::new(8192, true, fail_every).unwrap(),
            held: Vec::new(),
            open: Arc::clone(&open),
            ops: Arc::clone(&ops),
        };
        (gate, open, ops)
    }
}

impl BlockBackend for Gate {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }
    fn event_fd(&self) -> RawFd {
        self.inner.event_fd()
    }
    fn submit(&mut self, request: Request) -> Result<(), Box<Request>> {
        self.ops.lock().unwrap().push(match request.op {
            Op::Read { .. } => "read",
            Op::Write { .. } => "write",
            Op::Flush => "flush",
            _ => "other",
        });
        self.held.push(request);
        Ok(())
    }
    fn kick(&mut self) -> io::Result<()> {
        self.inner.kick()
    }
    fn poll_completions(&mut self, into: &mut Vec<Completion>) {
        if self.open.load(Ordering::SeqCst) {
            for request in self.held.drain(..) {
                assert!(self.inner.submit(request).is_ok());
            }
        }
        self.inner.poll_completions(into);
    }
    fn in_flight(&self) -> usize {
        self.held.len() + self.inner.in_flight()
    }
    fn drain(&mut self, _timeout: Duration, into: &mut Vec<Completion>) -> bool {
        self.poll_completions(into);
        self.in_flight() == 0
    }
}

#[test]
fn requests_in_flight_are_issued_again_after_a_restore() {
    let (gate, _open, _) = Gate::new(0);
    let mut h = start(Box::new(gate), FEATURES);
    let mem = h.memory.clone();
    mem.write_slice(&[0xab; 2048], GuestAddress(DATA)).unwrap();
    let mut heads = Vec::new();
    for n in 0..4 {
        heads.push(request(&mut h, n, 1, n, &[r(DATA + n * 512, 512)]));
    }
    heads.push(request(&mut h, 4, 4, 0, &[]));
    // Answered at once, so not in flight.
    let id = request(&mut h, 5, 8, 0, &[w(0xf_4000, 20)]);
    h.notify(0);
    assert_eq!(h.used(0), [(id, 21)]);
    let record = h.lock().device.save(3).unwrap();
    let state: State = record.decode(1).unwrap();
    assert_eq!(
        state.in_flight,
        heads.iter().map(|head| (0, *head)).collect::<Vec<_>>()
    );
    let next = Block::new(
        config(Box::new(ReportErrors)),
        Box::new(MemoryBackend::new(8192, true, 0).unwrap()),
    )
    .unwrap();
    let mut h = h.restore_into(next, FEATURES, &record).unwrap();
    let mut used: Vec<u16> = h.wait_used(0, 5).iter().map(|u| u.0).collect();
    used.sort_unstable();
    assert_eq!(used, heads);
    assert_eq!((0..5).map(|n| status(&h, n)).collect::<Vec<_>>(), [0; 5]);
    assert!(h.lock().device.engine.in_flight().is_empty());
    request(&mut h, 6, 0, 0, &[w(DATA + 8192, 2048)]);
    h.notify(0);
    assert_eq!(h.wait_used(0, 1).len(), 1);
    let mut back = [0; 2048];
    mem.read_slice(&mut back, GuestAddress(DATA + 8192)).unwrap();
    assert_eq!(back, [0xab; 2048]);
}

#[test]
fn guest_memory_stands_still_and_writes_are_taken_when_submitted() {
    let (gate, open, _) = Gate::new(0);
    let mut h = start(Box::new(gate), FEATURES);
    let mem = h.memory.clone();
    mem.write_slice(&[1; 512], GuestAddress(DATA)).unwrap();
    request(&mut h, 0, 1, 0, &[r(DATA, 512)]);
    request(&mut h, 1, 0, 9, &[w(DATA + 4096, 512)]);
    h.notify(0);
    mem.write_slice(&[2; 512], GuestAddress(DATA)).unwrap();
    mem.write_slice(&[3; 512], GuestAddress(DATA + 4096)).unwrap();
    open.store(true, Ordering::SeqCst);
    // The disk may finish now, but nothing reaches the guest while its lock is held.
    let guard = h.wired.clone();
    let guard = guard.lock().unwrap();
    let mut back = [0; 512];
    mem.read_slice(&mut back, GuestAddress(DATA + 4096)).unwrap();
    assert_eq!(back, [3; 512]);
    drop(guard);
    h.notify(0);
    assert_eq!(h.wait_used(0, 2).len(), 2);
    mem.read_slice(&mut back, GuestAddress(DATA + 4096)).unwrap();
    assert_eq!(back, [0; 512]);
    request(&mut h, 2, 0, 0, &[w(DATA + 4096, 512)]);
    h.notify(0);
    assert_eq!(h.wait_used(0, 1).len(), 1);
    mem.read_slice(&mut back, GuestAddress(DATA + 4096)).unwrap();
    assert_eq!(back, [1; 512]);
}

#[test]
fn a_burst_larger_than_the_pool_is_served_with_one_interrupt_per_batch() {
    let (_dir, file, info) = file(16 << 20);
    let mut h = start(raw_backend(file, info).unwrap(), FEATURES);
    for n in 0..20 {
        request(&mut h, n, 0, 0, &[w(DATA, 3 << 20), w(DATA + (3 << 20), 3 << 20)]);
    }
    h.notify(0);
    assert_eq!(h.wait_used(0, 20).len(), 20);
    let handle = h.lock().device.handle();
    assert_eq!(handle.stats().bytes_read.load(Ordering::Relaxed), 120 << 20);
    assert!(h.interrupts.queues[0].load(Ordering::SeqCst) <= 20);
}

#[test]
fn without_a_flush_command_every_write_is_flushed() {
    for (features, ops) in [
        (0, &["write", "flush"][..]),
        (F_FLUSH, &["write"]),
        (F_FLUSH | F_CONFIG_WCE, &["write"]),
    ] {
        let (gate, open, seen) = Gate::new(0);
        open.store(true, Ordering::SeqCst);
        let mut h = start(Box::new(gate), features);
        request(&mut h, 0, 1, 0, &[r(DATA, 512)]);
        h.notify(0);
        assert_eq!(h.wait_used(0, 1).len(), 1);
        assert_eq!(*seen.lock().unwrap(), ops);
        if features & F_CONFIG_WCE != 0 {
            h.lock().device.write_config(32, &[0]);
            request(&mut h, 1, 1, 0, &[r(DATA, 512)]);
            h.notify(0);
            assert_eq!(h.wait_used(0, 1).len(), 1);
            assert_eq!(*seen.lock().unwrap(), ["write", "write", "flush"]);
        }
    }
}

#[test]
fn errors_are_reported_or_held_as_the_policy_says() {
    let backend = MemoryBackend::new(8192, true, 2).unwrap();
    let mut h = start(Box::new(backend), FEATURES);
    for n in 0..2 {
        request(&mut h, n, 0, 0, &[w(DATA, 512)]);
        h.notify(0);
        assert_eq!(h.wait_used(0, 1).len(), 1);
    }
    assert_eq!((status(&h, 0), status(&h, 1)), (0, 1));
    h.lock().device.set_policy(Box::new(HoldErrors));
    for n in 2..4 {
        request(&mut h, n, 0, 0, &[w(DATA, 512)]);
        h.notify(0);
    }
    assert_eq!(h.wait_used(0, 1).len(), 1);
    let handle = h.lock().device.handle();
    assert!(h.wait(|_| handle.stats().held.load(Ordering::Relaxed) == 1));
    assert_eq!((status(&h, 2), status(&h, 3)), (0, 0xff));
    // Held requests are in the state, and keep the disk from coming to rest.
    let state: State = h.lock().device.save(0).unwrap().decode(1).unwrap();
    assert_eq!(state.in_flight.len(), 1);
    assert!(!h.lock().call(|d, ctx| d.drain(Some(ctx), DRAIN)));
    assert!(matches!(h.lock().failed.take(), Some(DeviceError::Host { .. })));
    handle.retry();
    assert_eq!(h.wait_used(0, 1).len(), 1);
    assert_eq!(status(&h, 3), 0);
    assert!(h.lock().call(|d, ctx| d.drain(Some(ctx), DRAIN)));
}

#[test]
fn drain_completes_and_reset_forgets() {
    let (_dir, file, info) = file(16 << 20);
    let mut h = start(raw_backend(file, info).unwrap(), FEATURES);
    for n in 0..20 {
        request(&mut h, n, 1, n * 8, &[r(DATA, 4096)]);
    }
    h.notify(0);
    assert!(h.lock().call(|d, ctx| d.drain(Some(ctx), DRAIN)));
    assert_eq!(h.used(0).len(), 20);
    for n in 0..20 {
        request(&mut h, n, 1, n * 8, &[r(DATA, 4096)]);
    }
    h.notify(0);
    h.reset();
    assert_eq!(h.lock().device.engine.backend.in_flight(), 0);
    assert!(h.activate());
    request(&mut h, 0, 4, 0, &[]);
    h.notify(0);
    assert_eq!(h.wait_used(0, 1).len(), 1);
}

#[test]
fn the_rate_is_kept_and_can_be_lifted() {
    let backend = MemoryBackend::new(8192, true, 0).unwrap();
    let mut h = start(Box::new(backend), FEATURES);
    let handle = h.lock().device.handle();
    handle.rate().set(Rate {
        bytes_per_s: 0,
        ops_per_s: 10,
    });
    for n in 0..40 {
        request(&mut h, n, 0, 0, &[w(DATA, 512)]);
    }
    h.notify(0);
    assert!(h.used(0).len() < 5);
    assert!(handle.stats().throttled.load(Ordering::Relaxed) > 0);
    handle.rate().set(Rate::default());
    let begun = std::time::Instant::now();
    assert!(h.wait(|_| handle.stats().reads.load(Ordering::Relaxed) == 40));
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn hostile_requests_are_refused() {
    type Case<'a> = &'a dyn Fn(&mut Harness<Block>);
    let bad: [Case<'_>; 6] = [
        // No header, short header, no status.
        &|h| {
            h.add(0, &[w(STATUS, 1)]);
        },
        &|h| {
            h.add(0, &[r(HEADERS, 15), w(STATUS, 1)]);
        },
        &|h| {
            h.add(0, &[r(HEADERS, 16)]);
        },
        // Data outside RAM, and far too long.
        &|h| {
            request(h, 0, 0, 0, &[w(0x4000_0000, 512)]);
        },
        &|h| {
            request(h, 0, 0, 0, &[w(DATA, u32::MAX)]);
        },
        // A head that is in use already.
        &|h| {
            let head = request(h, 0, 1, 0, &[r(DATA, 512)]);
            h.memory
                .write_slice(&head.to_le_bytes(), GuestAddress(0x1_8006))
                .unwrap();
            h.set_avail(0, 2);
        },
    ];
    for (i, make) in bad.iter().enumerate() {
        let (gate, _open, _) = Gate::new(0);
        let mut h = start(Box::new(gate), FEATURES);
        make(&mut h);
        assert!(!h.notify(0), "case {i}");
        assert!(
            matches!(h.lock().failed, Some(DeviceError::Driver { .. })),
            "case {i}"
        );
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let make = |sectors| {
        let backend = MemoryBackend::new(sectors, true, 0).unwrap();
        Block::new(config(Box::new(ReportErrors)), Box::new(backend)).unwrap()
    };
    let record = make(100).save(0).unwrap();
    assert!(make(100).restore(&record).is_ok());
    assert!(make(101).restore(&record).is_err());
    for in_flight in [vec![(2, 0)], vec![(0, 256)], vec![(0, 1), (0, 1)]] {
        let state = State {
            capacity_bytes: 51200,
            writeback: true,
            in_flight,
        };
        let record = StateRecord::encode(StateKind::VirtioBlock, 0, 1, &state).unwrap();
        assert!(make(100).restore(&record).is_err());
    }
}

#[test]
fn fuzz_corpus_returns() {
    common::testkit::fuzz_many(fuzz_block);
}

/// Prints what the bounce buffers cost: `cargo nextest run --release --run-ignored all -p steadfast-machine cost --no-capture`.
#[test]
#[ignore = "a measurement, not a test"]
fn cost_of_bounce_buffers() {
    use std::os::unix::fs::FileExt;
    const REQUESTS: u64 = 4000;
    for (name, len) in [("4 KiB", 4096usize), ("64 KiB", 65536), ("1 MiB", 1 << 20)] {
        let (_dir, file, info) = file(16 << 20);
        file.write_all_at(&vec![7; 16 << 20], 0).unwrap();
        let plain = file.try_clone().unwrap();
        let requests = if len > 65536 { REQUESTS / 4 } else { REQUESTS };
        // The device, 16 requests deep, from the page cache.
        let mut h = start(raw_backend(file, info).unwrap(), FEATURES);
        let begun = std::time::Instant::now();
        let mut done = 0;
        while done < requests {
            for n in 0..16 {
                let at = DATA + (n * len as u64) % (6 << 20);
                request(&mut h, n, 0, (n * len as u64 / 512) % 30000, &[w(at, len as u32)]);
            }
            h.notify(0);
            done += h.wait_used(0, 16).len() as u64;
        }
        let device = begun.elapsed() / done as u32;
        // The same bytes copied once more: the bounce.
        let (from, mut to) = (vec![1u8; len], vec![0u8; len]);
        let begun = std::time::Instant::now();
        for _ in 0..requests {
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
        }
        let copy = begun.elapsed() / requests as u32;
        let begun = std::time::Instant::now();
        for n in 0..requests {
            plain
                .read_exact_at(&mut to, (n % 16) * len as u64 % (15 << 20))
                .unwrap();
        }
        let pread = begun.elapsed() / requests as u32;
        println!("{name}: device {device:?} per request, of it the copy {copy:?}; a plain pread {pread:?}");
    }
}
