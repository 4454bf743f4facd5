use super::common::testkit::{DATA, Harness, r, ram, w};
use super::connection::BUF_ALLOC;
use super::packet::{
    OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_RESPONSE, OP_RW, OP_SHUTDOWN, SHUT_RECEIVE, SHUT_SEND,
};
use super::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 5;
const OUT: u64 = DATA;
const IN: u64 = DATA + (1 << 20);
const IN_SIZE: u32 = 8192;

struct Guest {
    h: Harness<Vsock>,
    dir: tempfile::TempDir,
    buffers: u64,
    /// Address by head.
    at: BTreeMap<u16, u64>,
    inbox: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Vsock::new("vsock0", CID, &dir.path().join("v")).unwrap();
        let h = Harness::on(ram().unwrap(), device, 128, 1 << 29).unwrap();
        assert!(h.activate());
        let mut guest = Self {
            h,
            dir,
            buffers: 0,
            at: BTreeMap::new(),
            inbox: VecDeque::new(),
        };
        guest.supply(100);
        guest
    }

    fn supply(&mut self, n: usize) {
        for _ in 0..n {
            let at = IN + (self.buffers % 120) * u64::from(IN_SIZE);
            self.buffers += 1;
            let head = self.h.add(RX, &[w(at, IN_SIZE)]);
            self.at.insert(head, at);
        }
        self.h.notify(RX);
    }

    fn send_with(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            kind: TYPE_STREAM,
            len: data.len() as u32,
            ..header
        };
        self.h
            .memory
            .write_slice(&header.encode(), GuestAddress(OUT))
            .unwrap();
        self.h.memory.write_slice(data, GuestAddress(OUT + 64)).unwrap();
        let mut descs = vec![r(OUT, HEADER as u32)];
        if !data.is_empty() {
            descs.push(r(OUT + 64, data.len() as u32));
        }
        self.h.add(TX, &descs);
        self.h.notify(TX);
        assert_eq!(self.h.used(TX).len(), 1);
    }

    fn send(&mut self, op: u16, guest: u32, host: u32, data: &[u8]) {
        let header = Header {
            op,
            src_port: guest,
            dst_port: host,
            buf_alloc: 10_000,
            ..Header::default()
        };
        self.send_with(header, data);
    }

    fn poll(&mut self) {
        let used = self.h.used(RX);
        let n = used.len();
        for (head, len) in used {
            let at = self.at.remove(&head).unwrap();
            let mut raw = [0; HEADER];
            self.h.memory.read_slice(&mut raw, GuestAddress(at)).unwrap();
            let header = Header::decode(&raw);
            assert_eq!(header.len as usize + HEADER, len as usize);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            let mut data = vec![0; header.len as usize];
            self.h
                .memory
                .read_slice(&mut data, GuestAddress(at + HEADER as u64))
                .unwrap();
            self.inbox.push_back((header, data));
        }
        if n > 0 {
            self.supply(n);
        }
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..50_000 {
            self.poll();
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        panic!("no packet came");
    }

    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.next();
        assert_eq!(packet.0.op, op, "{packet:?}");
        packet
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("v")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn open(&mut self, guest: u32, port: u32) -> UnixStream {
        let listener = self.listen(port);
        self.send(OP_REQUEST, guest, port, &[]);
        let (header, _) = self.expect(OP_RESPONSE);
        assert_eq!((header.src_port, header.dst_port), (port, guest));
        assert_eq!(header.buf_alloc, BUF_ALLOC);
        let stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }
}

#[test]
fn the_guest_connects_talks_and_closes() {
    let mut g = Guest::new();
    let mut host = g.open(1000, 52);
    g.send(OP_RW, 1000, 52, b"hello");
    let mut got = [0; 5];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    host.write_all(b"world").unwrap();
    assert_eq!(g.expect(OP_RW).1, b"world");
    // Half-close by the host, then the rest by the guest.
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(g.expect(OP_SHUTDOWN).0.flags, SHUT_SEND);
    g.send(OP_RW, 1000, 52, b"bye");
    let header = Header {
        op: OP_SHUTDOWN,
        src_port: 1000,
        dst_port: 52,
        flags: SHUT_RECEIVE | SHUT_SEND,
        ..Header::default()
    };
    g.send_with(header, &[]);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
    g.expect(OP_RST);
    assert!(g.h.lock().device.connections.is_empty());
    // Nobody listens there.
    g.send(OP_REQUEST, 1000, 53, &[]);
    assert_eq!(g.expect(OP_RST).0.src_port, 53);
}

#[test]
fn the_host_connects_with_its_one_line_protocol() {
    let mut g = Guest::new();
    let mut bad = g.connect();
    bad.write_all(b"GET / HTTP/1.1\n").unwrap();
    assert_eq!(bad.read(&mut [0; 10]).unwrap_or(0), 0);
    let mut client = g.connect();
    // In pieces, with data already behind the line.
    client.write_all(b"CONN").unwrap();
    client.write_all(b"ECT 22\nearly").unwrap();
    let (header, _) = g.expect(OP_REQUEST);
    assert_eq!(header.dst_port, 22);
    g.send(OP_RESPONSE, 22, header.src_port, &[]);
    let mut line = [0; 14];
    client.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", header.src_port).as_bytes()[..]);
    assert_eq!(g.expect(OP_RW).1, b"early");
    g.send(OP_RW, 22, header.src_port, b"answer");
    let mut got = [0; 6];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
    // A guest that refuses: the client sees the end.
    let mut client = g.connect();
    client.write_all(b"CONNECT 23\n").unwrap();
    let (header, _) = g.expect(OP_REQUEST);
    g.send(OP_RST, 23, header.src_port, &[]);
    assert_eq!(client.read(&mut [0; 10]).unwrap_or(0), 0);
}

#[test]
fn credit_is_kept_in_both_directions() {
    let mut g = Guest::new();
    let mut host = g.open(1, 2);
    // To the guest: 10,000 bytes of credit, whatever the host has.
    host.write_all(&[7; 30_000]).unwrap();
    let mut total = 0;
    while total < 10_000 {
        total += g.expect(OP_RW).1.len();
    }
    assert_eq!(total, 10_000);
    g.expect(OP_CREDIT_REQUEST);
    g.poll();
    assert!(g.inbox.is_empty());
    let update = Header {
        op: OP_CREDIT_UPDATE,
        src_port: 1,
        dst_port: 2,
        buf_alloc: 20_000,
        fwd_cnt: 10_000,
        ..Header::default()
    };
    g.send_with(update, &[]);
    while total < 30_000 {
        total += g.expect(OP_RW).1.len();
    }
    assert_eq!(total, 30_000);
    let update = Header {
        fwd_cnt: 30_000,
        ..update
    };
    g.send_with(update, &[]);
    // From the guest: as the host reads, the guest is told.
    let mut sent = 0;
    let mut forwarded = 0;
    while sent < 200_000usize {
        let data = vec![(sent / 1000) as u8; 1000];
        let header = Header {
            op: OP_RW,
            src_port: 1,
            dst_port: 2,
            buf_alloc: 20_000,
            fwd_cnt: 30_000,
            ..Header::default()
        };
        g.send_with(header, &data);
        sent += 1000;
        let mut got = vec![0; 1000];
        host.read_exact(&mut got).unwrap();
        assert_eq!(got, data);
        g.poll();
        while let Some((header, _)) = g.inbox.pop_front() {
            // The credit was used up exactly, so the device may have asked for more.
            assert!(matches!(header.op, OP_CREDIT_UPDATE | OP_CREDIT_REQUEST));
            forwarded = header.fwd_cnt;
        }
    }
    assert!(sent - forwarded as usize <= BUF_ALLOC as usize / 2, "{forwarded}");
}

#[test]
fn a_guest_that_overruns_its_credit_is_cut_off() {
    let mut g = Guest::new();
    let host = g.open(1, 2);
    for _ in 0..200 {
        g.send(OP_RW, 1, 2, &[1; 8000]);
        if g.h.lock().device.connections.is_empty() {
            break;
        }
    }
    loop {
        match g.next().0.op {
            OP_RST => break,
            op => assert_eq!(op, OP_CREDIT_UPDATE),
        }
    }
    drop(host);
}

#[test]
fn tables_are_bounded() {
    let mut g = Guest::new();
    let listener = g.listen(9);
    let accepting = std::thread::spawn(move || {
        let mut all = Vec::new();
        while all.len() < CONNECTIONS_MAX {
            all.push(listener.accept().unwrap().0);
        }
        (listener, all)
    });
    let (mut open, mut refused) = (0, 0);
    let mut port = 0;
    while open < CONNECTIONS_MAX || refused < 10 {
        port += 1;
        assert!(port < 20_000);
        g.send(OP_REQUEST, port, 9, &[]);
        match g.next().0.op {
            OP_RESPONSE => open += 1,
            // The listener's own queue may be full for a moment.
            OP_RST if open < CONNECTIONS_MAX => std::thread::sleep(Duration::from_millis(1)),
            OP_RST => refused += 1,
            op => panic!("{op}"),
        }
    }
    let all = accepting.join().unwrap();
    assert_eq!(g.h.lock().device.connections.len(), CONNECTIONS_MAX);
    drop(all);
    // Silent greeters: the oldest makes room.
    let mut greeters: Vec<UnixStream> = (0..GREETERS_MAX + 8).map(|_| g.connect()).collect();
    assert_eq!(greeters[0].read(&mut [0; 1]).unwrap_or(0), 0);
    let known = |g: &mut Guest| g.h.lock().device.greeters.iter().flatten().count();
    assert!(known(&mut g) <= GREETERS_MAX);
    // Resets are bounded when the guest takes none.
    for port in 0..400 {
        let header = Header {
            op: OP_RW,
            src_port: port,
            dst_port: 77,
            src_cid: CID,
            dst_cid: HOST_CID,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        g.h.lock().device.packet(&header, &[]);
    }
    assert_eq!(g.h.lock().device.resets.len(), RESETS_MAX);
}

#[test]
fn after_a_restore_the_guest_is_told_that_its_connections_are_gone() {
    let mut g = Guest::new();
    let mut host = g.open(1, 2);
    let dir = tempfile::tempdir().unwrap();
    let next = Vsock::new("vsock0", 99, &dir.path().join("v")).unwrap();
    let mut h = g.h.migrate(next, 1 << 29).unwrap();
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    let mut cid = [0; 8];
    h.lock().device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    assert!(h.used(EVENT).is_empty());
    h.memory.write_obj(u32::MAX, GuestAddress(DATA)).unwrap();
    let head = h.add(EVENT, &[w(DATA, 4)]);
    assert!(h.notify(EVENT));
    assert_eq!(h.wait_used(EVENT, 1), [(head, 4)]);
    assert_eq!(h.memory.read_obj::<u32>(GuestAddress(DATA)).unwrap(), 0);
    // Once.
    h.add(EVENT, &[w(DATA, 4)]);
    assert!(h.notify(EVENT));
    assert!(h.used(EVENT).is_empty());
}

#[test]
fn hostile_packets_are_refused_or_ignored() {
    let header = |len: u32| Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        len,
        kind: TYPE_STREAM,
        op: OP_RW,
        ..Header::default()
    };
    for (len, room) in [(0, 43), (1, 44), (u32::MAX, 4096), (65537, 70_000)] {
        let mut g = Guest::new();
        g.h.memory
            .write_slice(&header(len).encode(), GuestAddress(OUT))
            .unwrap();
        g.h.add(TX, &[r(OUT, room)]);
        assert!(!g.h.notify(TX), "{len} {room}");
        assert!(matches!(g.h.lock().failed, Some(DeviceError::Driver { .. })));
    }
    // Another context id, another destination: not for us.
    let mut g = Guest::new();
    for (src, dst) in [(6, HOST_CID), (CID, 3), (CID, u64::MAX)] {
        let bytes = Header {
            src_cid: src,
            dst_cid: dst,
            ..header(0)
        };
        g.h.memory
            .write_slice(&bytes.encode(), GuestAddress(OUT))
            .unwrap();
        g.h.add(TX, &[r(OUT, 44)]);
        assert!(g.h.notify(TX));
    }
    g.poll();
    assert!(g.inbox.is_empty());
    assert_eq!(g.h.lock().device.stats.ignored.load(Ordering::Relaxed), 3);
    // Receive buffers that hold no data.
    let mut h = g.h;
    h.lock().device.owe_reset(Key {
        host_port: 1,
        guest_port: 1,
    });
    h.reset();
    assert!(h.activate());
    h.lock().device.owe_reset(Key {
        host_port: 1,
        guest_port: 1,
    });
    h.add(RX, &[w(DATA, 44)]);
    assert!(!h.notify(RX));
}

#[test]
fn reserved_ids_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        let refused = Vsock::new("v", cid, &dir.path().join("v"));
        assert!(matches!(refused, Err(DeviceError::Config { .. })));
    }
}

#[test]
fn fuzz_corpus_returns() {
    common::testkit::fuzz_many(fuzz_vsock);
}
