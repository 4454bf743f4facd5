//! Packets, command line, layout and the checker, on made-up memory: what is right passes, each single defect is named.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::Ipv4Addr;

use pulse::shared::*;
use pulse::{Config, Content, DiskMode, DiskOp, DiskRecord, FlatBoot, Loop, Reply, Request, check, frames};

const PAGES: u64 = 20;
const MEM: usize = 32 << 20;

/// Memory of a guest with two vCPUs, both in loop 5 with 8 pages published and 10 done.
struct Memory(Vec<u8>, Shared);

impl Memory {
    fn new(content: u64) -> Memory {
        let counter = 42;
        let s = Shared {
            magic: SHARED_MAGIC,
            version: 1,
            ncpus: 2,
            pages: PAGES,
            stride: PAGE,
            span: PAGES * PAGE,
            base: DIRTY_GPA,
            content,
            counter,
            counter_inv: !counter,
            boot_counter: 30,
            inc_ops: 10,
            flush_ops: 2,
            disk_counter: 41,
            disk_seq: 9,
            ..Default::default()
        };
        let mut m = Memory(vec![0; MEM], s);
        m.shared(s);
        for cpu in 0..2 {
            m.lane(
                cpu,
                Lane {
                    progress: 5 << 24 | 8,
                    running: 1,
                    chunk: 4,
                    ..Default::default()
                },
            );
            for page in 0..PAGES {
                m.page(cpu, page, if page < 10 { 6 } else { 5 });
            }
        }
        m
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn shared(&mut self, s: Shared) {
        self.put(SHARED_GPA, &s.to_bytes());
    }

    fn lane(&mut self, cpu: u64, l: Lane) {
        self.put(SHARED_GPA + LANES_OFFSET + cpu * LANE_BYTES, &l.to_bytes());
    }

    fn word(&mut self, cpu: u64, page: u64, word: u64, v: u64) {
        let at = page_gpa(&self.1, cpu, page) + word * 8;
        self.put(at, &v.to_le_bytes());
    }

    fn page(&mut self, cpu: u64, page: u64, loops: u64) {
        self.word(cpu, page, 0, loops);
        let mut x = page_seed(cpu, page, loops);
        for i in 1..512 {
            x = page_next(x);
            match self.1.content {
                content::RANDOM => self.word(cpu, page, i, x),
                content::TEXT => self.word(cpu, page, i, page_text(x)),
                _ => {}
            }
        }
    }

    fn error(&self) -> String {
        pulse::invariants_hold(&self.0).unwrap_err()
    }

    fn holds(&self) {
        pulse::invariants_hold(&self.0).unwrap();
    }
}

#[test]
fn right_memory_passes() {
    for c in [content::WORD, content::RANDOM, content::TEXT, content::UNCHECKED] {
        let m = Memory::new(c);
        let s = pulse::invariants_hold(&m.0).unwrap();
        assert_eq!((s.counter, s.disk_counter, s.progress), (42, 41, vec![(5, 8); 2]));
    }
}

#[test]
fn each_defect_of_the_counter_is_found() {
    let right = Memory::new(content::WORD).1;
    let case = |change: &dyn Fn(&mut Shared)| {
        let mut m = Memory::new(content::WORD);
        let mut s = right;
        change(&mut s);
        m.shared(s);
        pulse::invariants_hold(&m.0).map(drop)
    };
    // In between two stores of an increment.
    case(&|s| s.counter += 1).unwrap();
    case(&|s| (s.counter, s.counter_inv) = (43, !43)).unwrap();
    case(&|s| (s.counter, s.counter_inv, s.inc_ops) = (43, !43, 11)).unwrap();
    // Never.
    assert!(case(&|s| s.counter += 2).unwrap_err().contains("disagrees"));
    assert!(
        case(&|s| (s.counter, s.inc_ops) = (43, 11))
            .unwrap_err()
            .contains("disagrees")
    );
    assert!(case(&|s| s.inc_ops += 1).unwrap_err().contains("disagrees"));
    assert!(case(&|s| s.counter_inv ^= 4).unwrap_err().contains("disagrees"));
    assert!(
        case(&|s| s.disk_counter = 43)
            .unwrap_err()
            .contains("not between")
    );
    assert!(
        case(&|s| s.disk_counter = 29)
            .unwrap_err()
            .contains("not between")
    );
    assert!(case(&|s| s.errors = 2).unwrap_err().contains("found errors"));
    assert!(case(&|s| s.magic = 0).unwrap_err().contains("not ready"));
    assert!(case(&|s| s.ncpus = 65).unwrap_err().contains("impossible"));
    assert!(case(&|s| s.base = 1 << 40).unwrap_err().contains("no memory"));
    assert!(
        pulse::invariants_hold(&[0; 4096])
            .unwrap_err()
            .contains("no memory")
    );
}

#[test]
fn each_defect_of_the_pages_is_found() {
    let change = |f: &dyn Fn(&mut Memory)| {
        let mut m = Memory::new(content::WORD);
        f(&mut m);
        m
    };
    change(&|m| m.page(0, 10, 6)).holds();
    change(&|m| (10..12).for_each(|p| m.page(1, p, 6))).holds();
    assert!(change(&|m| m.page(0, 3, 5)).error().contains("ahead of"));
    assert!(change(&|m| m.page(0, 15, 6)).error().contains("ahead of"));
    assert!(change(&|m| m.page(1, 19, 4)).error().contains("holds 4"));
    assert!(change(&|m| m.page(1, 0, 7)).error().contains("holds 7"));
    assert!(
        change(&|m| (10..13).for_each(|p| m.page(1, p, 6)))
            .error()
            .contains("memory says 13")
    );
    assert!(
        change(&|m| (7..10).for_each(|p| m.page(1, p, 5)))
            .error()
            .contains("memory says 7")
    );
    let lane = Lane {
        progress: 5 << 24 | 8,
        running: 1,
        errors: 1,
        ..Default::default()
    };
    assert!(
        change(&|m| m.lane(1, lane))
            .error()
            .contains("vCPU 1 found errors")
    );
}

#[test]
fn each_defect_of_whole_pages_is_found() {
    for c in [content::RANDOM, content::TEXT] {
        let mut m = Memory::new(c);
        // The page being worked on: first words already of the next loop.
        let mut x = page_seed(0, 10, 6);
        for i in 1..100 {
            x = page_next(x);
            m.word(0, 10, i, if c == content::TEXT { page_text(x) } else { x });
        }
        m.holds();
        m.word(0, 10, 300, 77);
        assert!(m.error().contains("wrong content at word 300"));
        let mut m = Memory::new(c);
        m.word(1, 4, 511, 1);
        assert!(m.error().contains("wrong content at word 511"));
        let mut m = Memory::new(c);
        m.word(1, 15, 1, 1);
        assert!(m.error().contains("wrong content at word 1"));
    }
}

#[test]
fn replies_and_disk_are_compared() {
    let m = Memory::new(content::WORD);
    let s = pulse::invariants_hold(&m.0).unwrap();
    let reply = Reply {
        counter: 42,
        disk_counter: 41,
        disk_seq: 9,
        loops: 5,
        ..Default::default()
    };
    s.covers(&reply.seal(1)).unwrap();
    s.covers(&Reply { counter: 7, ..reply }.seal(1)).unwrap();
    assert!(
        s.covers(&Reply { counter: 43, ..reply }.seal(1))
            .unwrap_err()
            .contains("counter")
    );
    assert!(
        s.covers(
            &Reply {
                disk_counter: 42,
                ..reply
            }
            .seal(1)
        )
        .unwrap_err()
        .contains("disk counter")
    );
    assert!(
        s.covers(&Reply { loops: 6, ..reply }.seal(1))
            .unwrap_err()
            .contains("loops")
    );
    assert!(
        s.covers(&Reply { errors: 1, ..reply }.seal(1))
            .unwrap_err()
            .contains("bad reply")
    );
    assert!(s.covers(&reply).unwrap_err().contains("bad reply"));

    let sector = |counter, seq| {
        let mut b = DiskRecord::new(DISK_MAGIC, counter, seq).to_bytes().to_vec();
        b.resize(512, 0);
        b
    };
    s.agrees_with_disk(&sector(41, 9)).unwrap();
    s.agrees_with_disk(&sector(42, 10)).unwrap();
    assert!(
        s.agrees_with_disk(&sector(40, 8))
            .unwrap_err()
            .contains("write 8")
    );
    assert!(
        s.agrees_with_disk(&sector(42, 11))
            .unwrap_err()
            .contains("write 11")
    );
    assert!(
        s.agrees_with_disk(&sector(40, 9))
            .unwrap_err()
            .contains("counter 40")
    );
    assert!(
        s.agrees_with_disk(&sector(43, 10))
            .unwrap_err()
            .contains("counter 43")
    );
    assert!(s.agrees_with_disk(&[0; 512]).unwrap_err().contains("write 0"));
    let mut torn = sector(41, 9);
    torn[9] ^= 1;
    assert!(s.agrees_with_disk(&torn).unwrap_err().contains("damaged"));
}

#[test]
fn the_ring_is_checked() {
    let block = |seq: u64| {
        let words = (0..512).map(|i| match i {
            0 => RING_MAGIC,
            1 => seq,
            _ => ring_word(seq, i),
        });
        words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
    };
    let ring = |seqs: [u64; 4]| {
        let one = |s: u64| if s == 0 { vec![0; 4096] } else { block(s) };
        seqs.into_iter().flat_map(one).collect::<Vec<u8>>()
    };
    assert_eq!(check::ring_holds(&ring([0, 0, 0, 0])), Ok(0));
    assert_eq!(check::ring_holds(&ring([0, 1, 2, 3])), Ok(3));
    assert_eq!(check::ring_holds(&ring([4, 5, 2, 3])), Ok(5));
    assert!(
        check::ring_holds(&ring([4, 5, 0, 3]))
            .unwrap_err()
            .contains("lost")
    );
    assert!(
        check::ring_holds(&ring([8, 5, 6, 3]))
            .unwrap_err()
            .contains("lost")
    );
    assert!(
        check::ring_holds(&ring([5, 0, 0, 0]))
            .unwrap_err()
            .contains("not its own")
    );
    let mut bad = ring([4, 5, 2, 3]);
    bad[2000] ^= 1;
    assert!(check::ring_holds(&bad).unwrap_err().contains("word 250"));
}

#[test]
fn packets_survive_the_round_trip() {
    let req = Request {
        kind: 3,
        nonce: 0x0102_0304_0506_0708,
    };
    assert_eq!(req.to_bytes(), *b"PLSQ\x03\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
    assert_eq!(Request::from_bytes(&req.to_bytes()), Some(req));
    assert_eq!(Request::from_bytes(&req.to_bytes()[..15]), None);
    assert_eq!(Request::from_bytes(&[0; 16]), None);

    let reply = Reply {
        nonce: 9,
        counter: 10,
        errors: 11,
        console_lines: 12,
        ..Default::default()
    }
    .seal(2);
    let bytes = reply.to_bytes();
    assert_eq!((bytes.len(), &bytes[..4], bytes[4]), (27 * 8, &b"PLSR"[..], 2));
    assert_eq!(Reply::from_bytes(&bytes), Some(reply));
    assert!(reply.is_valid());
    for at in 0..bytes.len() {
        let mut b = bytes;
        b[at] ^= 0x10;
        // The kind is under the checksum too.
        assert!(!Reply::from_bytes(&b).unwrap().is_valid(), "byte {at}");
    }
    assert_eq!(Reply::from_bytes(&bytes[1..]), None);
    assert_eq!(
        (Lane::BYTES as u64, Shared::BYTES as u64 <= LANES_OFFSET),
        (LANE_BYTES, true)
    );
}

#[test]
fn frames_survive_the_round_trip_and_damage_is_found() {
    let e = frames::Ends {
        src: ([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 1)),
        dst: ([2, 0, 0, 0, 0, 2], Ipv4Addr::new(10, 0, 0, 2)),
    };
    let s = frames::Segment {
        sport: 1,
        dport: 2,
        seq: 3,
        ack: 4,
        flags: 18,
        window: 5,
        data: b"odd".to_vec(),
    };
    let f = frames::tcp(e, &s);
    assert_eq!(
        frames::parse(&f),
        Some((e.src.0, e.src.1, frames::Packet::Tcp(s)))
    );
    for at in 14..f.len() {
        let mut b = f.clone();
        b[at] ^= 1;
        assert_eq!(frames::parse(&b), None, "byte {at}");
    }
    for n in 0..f.len() {
        assert_eq!(frames::parse(&f[..n]), None);
    }
    let u = frames::udp(e, 7, 9, b"x");
    let udp = frames::Packet::Udp {
        sport: 7,
        dport: 9,
        data: b"x".to_vec(),
    };
    assert_eq!(frames::parse(&u), Some((e.src.0, e.src.1, udp)));
}

#[test]
fn command_lines() {
    assert_eq!(Config::new().to_string(), "");
    let c = Config::new()
        .dirty(1000)
        .stride(8192)
        .ip(Ipv4Addr::new(10, 1, 2, 3))
        .disk(DiskMode::Verify);
    assert_eq!(
        c.to_string(),
        "loop=dirty pages=1000 stride=8192 ip=10.1.2.3 disk=verify"
    );
    assert_eq!(c.looping(Loop::Flush).to_string().matches("loop=").count(), 1);
    let b = Config::new()
        .disk_bench(DiskOp::RandWrite, 4096, 16)
        .content(Content::Unchecked);
    assert_eq!(
        b.to_string(),
        "loop=diskbench op=randwrite bs=4096 qd=16 content=word check=0"
    );
}

#[test]
fn flat_boot_is_laid_out_apart() {
    assert!(FlatBoot::new(&Config::new(), 1, 16 << 20).is_err());
    assert!(FlatBoot::new(&Config::new(), 65, 64 << 20).is_err());
    for mem in [32u64 << 20, 8 << 30, 60 << 30] {
        let b = FlatBoot::new(&Config::new().dirty(10), 4, mem).unwrap();
        let mut spans: Vec<_> = b
            .writes
            .iter()
            .map(|(at, d)| (*at, at + d.len() as u64))
            .collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0), "{spans:x?}");
        assert!(
            spans
                .iter()
                .all(|s| s.1 <= SHARED_GPA && (s.1 <= 0x8_0000 || s.0 >= LOAD_GPA)),
            "{spans:x?}"
        );
        assert!((LOAD_GPA..SHARED_GPA).contains(&b.entry));
    }
    // Pages above the hole for devices.
    let s = Shared {
        base: DIRTY_GPA,
        stride: PAGE,
        hole_at: LOW_RAM_END,
        hole_bytes: 1 << 30,
        ..Default::default()
    };
    let last_low = (LOW_RAM_END - DIRTY_GPA) / PAGE - 1;
    assert_eq!(page_gpa(&s, 0, last_low), LOW_RAM_END - PAGE);
    assert_eq!(page_gpa(&s, 0, last_low + 1), 1 << 32);
}
