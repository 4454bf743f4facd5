//! Measurements of this crate, for `cargo xtask bench` and by hand (`cargo run --release -p steadfast-wire --example
//! wire_bench`). All numbers come from one run; ratios between them are what can be compared.

use crate::buf::BufPool;
use crate::frame::{Frame, vm_hash};
use crate::link::{Addr, Event, Link, LinkConfig, OpenError, PathConfig, Role, Security};
use crate::page::{EncodeConfig, PAGE_BYTES, Page, PageStats};
use crate::record::{
    Encoder, PageSink, PageSource, RecordId, StageConfig, Staged, StagedRecord, Stager, Trailer,
};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};
use steadfast_types::{BadName, Epoch, Gfn, HostId, Term, VmId};

/// How the pages of a measured epoch change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// One word in each page.
    OneWord,
    /// An eighth of each page, in four places, with text.
    Eighth,
    /// Each page whole, with bytes that do not compress.
    Noise,
    /// Each page whole, with text.
    Text,
    /// A mixture as of a key-value store: most pages a few words, some an eighth, few whole.
    Mixed,
}

/// Results for one workload. Times are medians over the epochs, per epoch.
#[derive(Clone, Debug)]
pub struct CodecResult {
    /// Which.
    pub workload: Workload,
    /// Dirty pages in an epoch.
    pub pages: usize,
    /// Encoding, checksums included, in nanoseconds.
    pub encode_ns: u64,
    /// Receiving side up to the whole, validated record, in nanoseconds.
    pub stage_ns: u64,
    /// Applying, in nanoseconds.
    pub apply_ns: u64,
    /// Bytes on the wire per dirty byte.
    pub wire_ratio: f64,
    /// Pages per class.
    pub stats: PageStats,
}

/// Results of the round trip of a small epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundTripResult {
    /// Round trips made.
    pub count: usize,
    /// Median in nanoseconds.
    pub p50_ns: u64,
    /// 99th percentile in nanoseconds.
    pub p99_ns: u64,
}

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A link.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Something that must not fail did.
    #[error("measurement failed: {0}")]
    Failed(String),
}

fn failed(e: impl std::fmt::Display) -> BenchError {
    BenchError::Failed(e.to_string())
}

/// Guest memory for measurements: one block.
pub struct FlatMemory(Vec<Page>);

impl FlatMemory {
    /// So many pages, filled with text that differs between pages.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        let mut memory = Self(vec![[0; PAGE_BYTES]; pages]);
        for (i, p) in memory.0.iter_mut().enumerate() {
            text(i as u64, p);
        }
        memory
    }
}

impl PageSource for FlatMemory {
    fn page<'a>(&'a self, gfn: Gfn, _scratch: &'a mut Page) -> Option<&'a Page> {
        self.0.get(usize::try_from(gfn.0).ok()?)
    }
}

impl PageSink for FlatMemory {
    fn update(&mut self, gfn: Gfn, change: &mut dyn FnMut(&mut Page)) -> bool {
        self.0.get_mut(gfn.0 as usize).map(change).is_some()
    }
}

fn next(x: &mut u64) -> u64 {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    *x
}

fn noise(seed: u64, bytes: &mut [u8]) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for c in bytes.chunks_mut(8) {
        let word = next(&mut x).to_le_bytes();
        c.copy_from_slice(&word[..c.len()]);
    }
}

fn text(seed: u64, bytes: &mut [u8]) {
    const WORDS: [&[u8]; 8] = [
        b"SET ", b"key:", b"value ", b"GET ", b"user ", b"0000", b"\r\n", b"$3 ",
    ];
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut at = 0;
    while at < bytes.len() {
        let r = next(&mut x);
        let number = (r >> 32).to_string();
        for part in [WORDS[(r % 8) as usize], &number.as_bytes()[..number.len().min(3)]] {
            let n = part.len().min(bytes.len() - at);
            bytes[at..at + n].copy_from_slice(&part[..n]);
            at += n;
        }
    }
}

fn change(workload: Workload, epoch: u64, gfn: u64, page: &mut Page) {
    let seed = epoch * 1_000_003 + gfn;
    match workload {
        Workload::OneWord => {
            let at = (gfn as usize * 264) % (PAGE_BYTES - 8);
            page[at..at + 8].copy_from_slice(&epoch.to_le_bytes());
        }
        Workload::Eighth => (0..4).for_each(|i| text(seed + i, &mut page[i as usize * 1024..][..128])),
        Workload::Noise => noise(seed, page),
        Workload::Text => text(seed, page),
        Workload::Mixed => match gfn % 20 {
            0 => text(seed, page),
            1 => noise(seed, page),
            2..=5 => change(Workload::Eighth, epoch, gfn, page),
            _ => {
                change(Workload::OneWord, epoch, gfn, page);
                page[4000..4008].copy_from_slice(&seed.to_le_bytes());
            }
        },
    }
}

fn percentile(times: &mut [u64], percent: usize) -> u64 {
    times.sort_unstable();
    times
        .get((times.len() * percent / 100).min(times.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0)
}

fn ns(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Encodes, stages and applies `epochs` epochs of `pages` dirty pages. The memory is checked at the end.
///
/// # Errors
/// [`BenchError`] if anything fails, also if the two memories differ.
pub fn codec(
    workload: Workload,
    pages: usize,
    epochs: u64,
    config: &EncodeConfig,
) -> Result<CodecResult, BenchError> {
    let pool = BufPool::new(64 << 20);
    let mut encoder = Encoder::new(1, config, pool);
    let limit = pages as u64;
    let mut stager = Stager::new(StageConfig::default(), move |g| g.0 < limit);
    let mut memory = FlatMemory::new(pages);
    let mut standby = FlatMemory(vec![[0; PAGE_BYTES]; pages]);
    let (mut encode_ns, mut stage_ns, mut apply_ns) = (Vec::new(), Vec::new(), Vec::new());
    let (mut bytes, mut before) = (0u64, PageStats::default());
    for epoch in 0..=epochs {
        for g in 0..pages {
            change(workload, epoch, g as u64, &mut memory.0[g]);
        }
        let mut frames: Vec<Frame> = Vec::new();
        let t = Instant::now();
        encoder
            .begin(Term(1), RecordId::Epoch(Epoch(epoch)))
            .map_err(failed)?;
        encoder
            .pages((0..limit).map(Gfn), &memory, &mut frames)
            .map_err(failed)?;
        encoder.finish(Trailer::default(), &mut frames).map_err(failed)?;
        let e = ns(t);
        let wire: u64 = frames.iter().map(|f| f.wire_bytes() as u64).sum();
        let t = Instant::now();
        let mut whole: Option<StagedRecord> = None;
        for f in frames {
            if let Staged::Complete(r) = stager.chunk(f).map_err(failed)? {
                whole = Some(r);
            }
        }
        let s = ns(t);
        let record = whole.ok_or_else(|| failed("a record did not become whole"))?;
        let t = Instant::now();
        record.apply(&mut standby).map_err(failed)?;
        let a = ns(t);
        // The first epoch is the full copy: not counted.
        if epoch == 0 {
            before = *encoder.stats();
            continue;
        }
        bytes += wire;
        encode_ns.push(e);
        stage_ns.push(s);
        apply_ns.push(a);
    }
    if memory.0 != standby.0 {
        return Err(failed("the standby's memory differs"));
    }
    let mut stats = *encoder.stats();
    for (now, then) in stats.pages.iter_mut().zip(before.pages) {
        *now -= then;
    }
    for (now, then) in stats.bytes.iter_mut().zip(before.bytes) {
        *now -= then;
    }
    let dirty = (pages as u64 * epochs.max(1) * PAGE_BYTES as u64) as f64;
    Ok(CodecResult {
        workload,
        pages,
        encode_ns: percentile(&mut encode_ns, 50),
        stage_ns: percentile(&mut stage_ns, 50),
        apply_ns: percentile(&mut apply_ns, 50),
        wire_ratio: bytes as f64 / dirty,
        stats,
    })
}

fn link_config(role: Role, addr: Vec<SocketAddr>, security: &Security) -> Result<LinkConfig, BenchError> {
    let (host, peer) = match role {
        Role::Connect => ("alpha", "beta"),
        Role::Listen => ("beta", "alpha"),
    };
    let paths = addr.into_iter().map(|a| PathConfig::new(Addr::Tcp(a))).collect();
    let names = (VmId::new("bench")?, HostId::new(host)?, HostId::new(peer)?);
    Ok(LinkConfig::new(
        names.0,
        names.1,
        names.2,
        role,
        paths,
        security.clone(),
    ))
}

/// Two links over loopback; the second answers every whole record with a control frame. Measures from the call that
/// sends a record's frames to the answer's arrival in the handler, hand-over to the measuring thread included.
/// `security` is for (connecting, listening) side.
///
/// # Errors
/// [`BenchError`] if a link does not open, or no answer comes within ten seconds.
pub fn round_trip(
    paths: usize,
    pages: usize,
    count: usize,
    security: (&Security, &Security),
) -> Result<RoundTripResult, BenchError> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let vm = vm_hash(&VmId::new("bench")?);
    let (tx_sender, rx_sender) = sync_channel::<crate::LinkSender>(1);
    let limit = pages as u64;
    let mut stager = Stager::new(StageConfig::default(), move |g| g.0 < limit);
    let mut answer: Option<crate::LinkSender> = None;
    let listening = Link::open(
        link_config(Role::Listen, vec![any; paths], security.1)?,
        move |e| {
            let Event::Received(frame) = e else { return };
            if answer.is_none() {
                answer = rx_sender.recv_timeout(Duration::from_secs(10)).ok();
            }
            if let (Ok(Staged::Complete(_)), Some(to)) = (stager.chunk(frame), &answer) {
                let _ = to.try_send(&Frame::control(vm, Term(1), vec![0; 40]));
            }
        },
    )?;
    tx_sender.send(listening.sender()).map_err(failed)?;
    let addresses = listening.addresses().iter().flatten().copied().collect();
    let (tx, rx) = sync_channel::<Instant>(64);
    let connecting = Link::open(link_config(Role::Connect, addresses, security.0)?, move |e| {
        if matches!(e, Event::Received(_)) {
            let _ = tx.try_send(Instant::now());
        }
    })?;
    let end = Instant::now() + Duration::from_secs(10);
    while connecting.stats().paths.iter().any(|p| !p.up) {
        if Instant::now() > end {
            return Err(failed("the link does not come up"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut encoder = Encoder::new(vm, &EncodeConfig::default(), connecting.pool().clone());
    let mut memory = FlatMemory::new(pages);
    let device = vec![1u8; 8 << 10];
    let mut times = Vec::with_capacity(count);
    let warm_up = count / 10 + 1;
    for i in 0..count + warm_up {
        for g in 0..pages {
            change(Workload::OneWord, i as u64, g as u64, &mut memory.0[g]);
        }
        let mut frames: Vec<Frame> = Vec::new();
        encoder
            .begin(Term(1), RecordId::Epoch(Epoch(i as u64)))
            .map_err(failed)?;
        encoder
            .pages((0..limit).map(Gfn), &memory, &mut frames)
            .map_err(failed)?;
        encoder.device(&device, &mut frames).map_err(failed)?;
        encoder.finish(Trailer::default(), &mut frames).map_err(failed)?;
        let start = Instant::now();
        let mut rest: &[Frame] = &frames;
        while !rest.is_empty() {
            match connecting.try_send_all(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) => return Err(failed(e)),
            }
        }
        match rx.recv_timeout(Duration::from_secs(10)) {
            Ok(_) if i >= warm_up => times.push(ns(start)),
            Ok(_) => {}
            Err(e @ (RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) => return Err(failed(e)),
        }
    }
    let (p50_ns, p99_ns) = (percentile(&mut times, 50), percentile(&mut times, 99));
    Ok(RoundTripResult {
        count,
        p50_ns,
        p99_ns,
    })
}

/// Bytes per second of bulk frames over loopback with so many paths, all received.
///
/// # Errors
/// [`BenchError`] as [`round_trip`].
pub fn throughput(
    paths: usize,
    total_bytes: u64,
    security: (&Security, &Security),
) -> Result<f64, BenchError> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let vm = vm_hash(&VmId::new("bench")?);
    let frame = Frame::control(vm, Term(1), vec![5; 1 << 20]);
    let count = total_bytes.div_ceil(1 << 20);
    let (tx, rx) = sync_channel::<()>(1);
    let mut left = count;
    let listening = Link::open(
        link_config(Role::Listen, vec![any; paths], security.1)?,
        move |e| {
            if matches!(e, Event::Received(_)) {
                left = left.saturating_sub(1);
                if left == 0 {
                    let _ = tx.try_send(());
                }
            }
        },
    )?;
    let addresses = listening.addresses().iter().flatten().copied().collect();
    let (tx_room, rx_room) = sync_channel::<()>(1);
    let connecting = Link::open(link_config(Role::Connect, addresses, security.0)?, move |e| {
        if matches!(e, Event::Writable | Event::PathUp { .. }) {
            let _ = tx_room.try_send(());
        }
    })?;
    rx_room.recv_timeout(Duration::from_secs(10)).map_err(failed)?;
    let start = Instant::now();
    let mut sent = 0;
    while sent < count {
        if connecting.try_send(&frame).is_ok() {
            sent += 1;
        } else {
            let _ = rx_room.recv_timeout(Duration::from_millis(20));
        }
        if start.elapsed() > Duration::from_secs(60) {
            return Err(failed("too slow"));
        }
    }
    rx.recv_timeout(Duration::from_secs(60)).map_err(failed)?;
    Ok((count << 20) as f64 / start.elapsed().as_secs_f64())
}
