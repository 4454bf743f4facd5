//! Records there and back, and what a hostile or broken sender can do.

use super::*;
use crate::buf::BufPool;
use crate::frame::Frame;
use crate::page::{EncodeConfig, PAGE_BYTES, Page};
use proptest::prelude::*;
use std::collections::BTreeMap;
use steadfast_types::{Gfn, Term};

#[derive(Default, Clone)]
struct Memory(BTreeMap<u64, Page>);

impl PageSink for Memory {
    fn update(&mut self, gfn: Gfn, change: &mut dyn FnMut(&mut Page)) -> bool {
        change(self.0.entry(gfn.0).or_insert([0; PAGE_BYTES]));
        true
    }
}

impl PageSource for Memory {
    fn page<'a>(&'a self, gfn: Gfn, _scratch: &'a mut Page) -> Option<&'a Page> {
        self.0.get(&gfn.0)
    }
}

fn encoder() -> Encoder {
    let config = EncodeConfig {
        chunk_bytes: 64 << 10,
        shadow_bytes_max: 64 * PAGE_BYTES,
        ..Default::default()
    };
    Encoder::new(1, &config, BufPool::new(1 << 20))
}

fn stager() -> Stager {
    Stager::new(StageConfig::default(), |g| g.0 < 1000)
}

fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for b in &mut page {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *b = x as u8;
    }
    page
}

fn epoch(
    enc: &mut Encoder,
    n: u64,
    memory: &Memory,
    gfns: &[u64],
    device: &[u8],
    disk: &[DiskOp<'_>],
) -> Vec<Frame> {
    let mut out = Vec::new();
    enc.begin(Term(3), RecordId::Epoch(Epoch(n))).expect("begins");
    enc.pages(gfns.iter().map(|g| Gfn(*g)), memory, &mut out)
        .expect("pages");
    enc.device(device, &mut out).expect("device");
    for op in disk {
        enc.disk(op, &mut out).expect("disk");
    }
    enc.finish(
        Trailer {
            has_flush: n.is_multiple_of(2),
            output_boundary: n * 10,
        },
        &mut out,
    )
    .expect("ends");
    out
}

fn stage(stager: &mut Stager, frames: &[Frame]) -> Result<Option<StagedRecord>, StageError> {
    let mut whole = None;
    for f in frames {
        if let Staged::Complete(r) = stager.chunk(f.clone())? {
            whole = Some(r);
        }
    }
    Ok(whole)
}

#[test]
fn several_epochs_in_flight_apply_in_order() {
    let (mut enc, mut st) = (encoder(), stager());
    let mut memory = Memory::default();
    let mut device = vec![7u8; 9000];
    let mut staged = Vec::new();
    let mut after = Vec::new();
    for n in 1..=6u64 {
        let gfns: Vec<u64> = (0..40).map(|i| i * n % 200).collect();
        for g in &gfns {
            let page = memory.0.entry(*g).or_insert(noise(*g));
            page[(n as usize * 64) % PAGE_BYTES] ^= n as u8;
        }
        device[8000] = n as u8;
        let data = vec![n as u8; 100_000];
        let disk = [
            DiskOp {
                kind: DiskKind::Write,
                volume: 1,
                offset: 4096 * n,
                len: 100_000,
                data: &data,
            },
            DiskOp {
                kind: DiskKind::Flush,
                volume: 1,
                offset: 0,
                len: 0,
                data: &[],
            },
        ];
        let frames = epoch(&mut enc, n, &memory, &gfns, &device, &disk);
        let r = stage(&mut st, &frames).expect("valid").expect("whole");
        assert_eq!((r.id(), r.term()), (RecordId::Epoch(Epoch(n)), Term(3)));
        assert_eq!(
            (r.totals().has_flush, r.totals().output_boundary),
            (n % 2 == 0, n * 10)
        );
        assert_eq!(r.device(), &device[..]);
        let written: Vec<u8> = r
            .disk_ops()
            .filter(|o| o.kind == DiskKind::Write)
            .flat_map(|o| o.data.to_vec())
            .collect();
        assert_eq!(written, data);
        assert_eq!(r.disk_ops().last().map(|o| o.kind), Some(DiskKind::Flush));
        staged.push(r);
        after.push(memory.clone());
    }
    let (mut standby, mut slow) = (Memory::default(), Memory::default());
    assert!(st.held_bytes() > 0);
    for (r, expected) in staged.into_iter().zip(after) {
        r.apply(&mut standby).expect("applies");
        assert_eq!(standby.0, expected.0);
        // The same a few pages at a time, across chunks.
        let (mut at, mut pieces) = (ApplyAt::default(), 1);
        while !r.apply_some(&mut at, 3, &mut slow).expect("applies") {
            pieces += 1;
            assert!(pieces < 10_000, "it goes on from where it was");
        }
        assert!(pieces > 1, "more than one piece");
        assert_eq!(slow.0, expected.0);
    }
    assert_eq!(st.held_bytes(), 0, "staging memory is given back");
}

#[test]
fn a_small_epoch_is_small() {
    let (mut enc, mut st) = (encoder(), stager());
    let mut memory = Memory::default();
    for g in 0..10 {
        memory.0.insert(g, noise(g));
    }
    let gfns: Vec<u64> = (0..10).collect();
    let mut device: Vec<u8> = (0..20).flat_map(noise).collect();
    stage(&mut st, &epoch(&mut enc, 1, &memory, &gfns, &device, &[])).expect("valid");
    for p in memory.0.values_mut() {
        p[8] ^= 1;
    }
    device[4097] ^= 1;
    let frames = epoch(&mut enc, 2, &memory, &gfns, &device, &[]);
    let bytes: usize = frames.iter().map(Frame::wire_bytes).sum();
    assert!(
        bytes < 700,
        "10 changed words and 1 in the device state took {bytes} bytes"
    );
    assert!(stage(&mut st, &frames).expect("valid").is_some());
}

#[test]
fn pages_sent_early_and_again_end_with_the_last_content() {
    let (mut enc, mut st) = (encoder(), stager());
    let mut out = Vec::new();
    enc.begin(Term(1), RecordId::Epoch(Epoch(1))).expect("begins");
    let (a, b) = (noise(1), noise(2));
    enc.page(Gfn(9), &a, &mut out).expect("page");
    enc.page(Gfn(9), &b, &mut out).expect("page");
    let mut c = b;
    c[0] ^= 1;
    enc.page(Gfn(9), &c, &mut out).expect("page");
    enc.finish(Trailer::default(), &mut out).expect("ends");
    let mut standby = Memory::default();
    stage(&mut st, &out)
        .expect("valid")
        .expect("whole")
        .apply(&mut standby)
        .expect("applies");
    assert_eq!(standby.0[&9], c);
}

#[test]
fn a_missed_record_is_noticed_and_a_reset_heals() {
    let (mut enc, mut st) = (encoder(), stager());
    let mut memory = Memory::default();
    memory.0.insert(1, noise(1));
    let first = epoch(&mut enc, 1, &memory, &[1], &[1; 100], &[]);
    let second = epoch(&mut enc, 2, &memory, &[1], &[1; 100], &[]);
    let third = epoch(&mut enc, 3, &memory, &[1], &[1; 100], &[]);
    let kept = stage(&mut st, &first).expect("valid").expect("whole");
    assert!(matches!(
        stage(&mut st, &third),
        Err(StageError::Gap {
            found: 3,
            last: Some(1)
        })
    ));
    assert!(stage(&mut st, &second).expect("valid").is_some());
    assert!(stage(&mut st, &first).expect("a duplicate is no error").is_none());
    assert!(stage(&mut st, &third).expect("valid").is_some());
    st.rewind_to(&kept);
    assert!(stage(&mut st, &second).expect("sent again as it was").is_some());
    st.forget();
    assert!(matches!(stage(&mut st, &third), Err(StageError::Gap { .. })));
    enc.reset();
    memory.0.insert(1, noise(5));
    let fresh = epoch(&mut enc, 4, &memory, &[1], &[1; 100], &[]);
    let mut standby = Memory::default();
    standby.0.insert(1, noise(77));
    stage(&mut st, &fresh)
        .expect("valid")
        .expect("whole")
        .apply(&mut standby)
        .expect("applies");
    assert_eq!(standby.0[&1], noise(5));
}

#[test]
fn incomplete_or_reordered_records_are_refused() {
    let memory = Memory((0..60).map(|g| (g, noise(g))).collect());
    let gfns: Vec<u64> = (0..60).collect();
    let frames = epoch(&mut encoder(), 1, &memory, &gfns, &[9; 5000], &[]);
    assert!(frames.len() > 4);
    for drop in 0..frames.len() - 1 {
        let mut st = stager();
        let mut less = frames.clone();
        less.remove(drop);
        assert!(stage(&mut st, &less).is_err(), "without chunk {drop}");
        assert!(stage(&mut st, &frames).expect("then whole").is_some());
    }
    let mut swapped = frames.clone();
    swapped.swap(1, 2);
    assert!(matches!(
        stage(&mut stager(), &swapped),
        Err(StageError::Order { .. })
    ));
    let mut other_term = frames.clone();
    other_term[2].term = Term(2);
    assert!(matches!(
        stage(&mut stager(), &other_term),
        Err(StageError::Order { .. })
    ));
}

#[test]
fn limits_hold() {
    let memory = Memory((0..60).map(|g| (g, noise(g))).collect());
    let gfns: Vec<u64> = (0..60).collect();
    let frames = epoch(&mut encoder(), 1, &memory, &gfns, &[9; 5000], &[]);
    let small = StageConfig {
        bytes_max: 100_000,
        ..StageConfig::default()
    };
    let mut st = Stager::new(small, |_| true);
    assert!(matches!(stage(&mut st, &frames), Err(StageError::Full { .. })));
    assert_eq!(st.held_bytes(), 0);
    let mut st = Stager::new(StageConfig::default(), |g| g.0 < 59);
    let refused = stage(&mut st, &frames);
    let outside = ChunkError::PageOutside(59);
    assert!(matches!(refused, Err(StageError::Chunk { source, .. }) if source == outside));
    let mut st = Stager::new(
        StageConfig {
            device_bytes_max: 4999,
            ..StageConfig::default()
        },
        |_| true,
    );
    assert!(stage(&mut st, &frames).is_err());
}

#[test]
fn every_damaged_byte_is_noticed_or_harmless() {
    // Below the frame checksum: chunks that are damaged in memory of the sender, say. Never a panic; and what is
    // accepted can be applied.
    let memory = Memory((0..6).map(|g| (g, noise(g))).collect());
    let disk = [DiskOp {
        kind: DiskKind::Write,
        volume: 0,
        offset: 0,
        len: 3000,
        data: &[1; 3000],
    }];
    let frames = epoch(&mut encoder(), 1, &memory, &[0, 1, 2], &[9; 500], &disk);
    for (i, f) in frames.iter().enumerate() {
        for at in 0..f.payload().len().min(200) {
            for bit in [0, 3, 7] {
                let mut bytes = f.payload().to_vec();
                bytes[at] ^= 1 << bit;
                let mut damaged = frames.clone();
                damaged[i] = Frame::new(f.kind, f.flags, f.vm, f.term, f.epoch, f.index, bytes.into());
                let r = stage(&mut stager(), &damaged);
                assert!(
                    r.is_err() || i == frames.len() - 1,
                    "chunk {i}, byte {at}, bit {bit}"
                );
                if let Ok(Some(r)) = r {
                    r.apply(&mut Memory::default()).expect("applies");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn any_chunk_is_staged_or_refused(
        kind in 0u8..6, items in 0u32..4, unpacked in 0u32..3000, flags in 0u8..4,
        body in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut payload = vec![0u8; CHUNK_HEAD_BYTES];
        payload[0] = kind;
        payload[4..8].copy_from_slice(&items.to_le_bytes());
        payload[8] = 1;
        payload[24..28].copy_from_slice(&unpacked.to_le_bytes());
        payload.extend(&body);
        crate::fuzz::fuzz_chunk_frames(&[(flags | FLAG_RESET, 0, payload.clone()), (flags | FLAG_RESET, 1, payload)]);
    }
}
