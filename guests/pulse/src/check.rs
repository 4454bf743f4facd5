//! Checks a frozen guest from outside: its memory against itself, against replies, against the disk.
//!
//! The guest may have been frozen at any instruction, so each rule allows exactly the in-between states that the guest's
//! order of stores can show (see `guest/counter.rs` and `guest/work.rs`) and nothing else.

use crate::shared::*;

/// What a consistent guest's memory says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The first shared page.
    pub shared: Shared,
    /// The counter.
    pub counter: u64,
    /// The counter last written to disk and flushed.
    pub disk_counter: u64,
    /// Per vCPU: completed loops and pages done in the current one.
    pub progress: Vec<(u64, u64)>,
}

/// As [`invariants_hold_with`], for guest memory in one slice that starts at address 0.
pub fn invariants_hold(memory: &[u8]) -> Result<Summary, String> {
    invariants_hold_with(|gpa, out| {
        let Ok(at) = usize::try_from(gpa) else {
            return false;
        };
        match at.checked_add(out.len()).and_then(|end| memory.get(at..end)) {
            Some(from) => {
                out.copy_from_slice(from);
                true
            }
            None => false,
        }
    })
}

/// Checks the memory that `read(gpa, buffer)` reads (false: no such memory). The error says what disagrees.
pub fn invariants_hold_with(mut read: impl FnMut(u64, &mut [u8]) -> bool) -> Result<Summary, String> {
    let mut page = [0u8; Shared::BYTES];
    if !read(SHARED_GPA, &mut page) {
        return Err(format!("no memory at {SHARED_GPA:#x}"));
    }
    let s = Shared::from_bytes(&page).ok_or("short shared page")?;
    if s.magic != SHARED_MAGIC || s.version != 1 {
        return Err(format!("not ready: magic {:#x}, version {}", s.magic, s.version));
    }
    if s.errors != 0 {
        return Err(format!(
            "the guest found errors {:#x}; first {:#x} at {:#x}: expected {:#x}, found {:#x}",
            s.errors, s.error_bit, s.error_at, s.error_want, s.error_found
        ));
    }
    counters(&s)?;
    if s.ncpus == 0 || s.ncpus as usize > MAX_VCPUS || s.pages > 1 << 23 {
        return Err(format!("impossible layout: {} vCPUs, {} pages", s.ncpus, s.pages));
    }
    let mut progress = Vec::new();
    for cpu in 0..s.ncpus {
        let mut bytes = [0u8; Lane::BYTES];
        if !read(SHARED_GPA + LANES_OFFSET + cpu * LANE_BYTES, &mut bytes) {
            return Err(format!("no memory for the lane of vCPU {cpu}"));
        }
        let lane = Lane::from_bytes(&bytes).ok_or("short lane")?;
        if lane.errors != 0 {
            return Err(format!(
                "vCPU {cpu} found errors {:#x} at {:#x}: expected {:#x}, found {:#x}",
                lane.errors, lane.error_at, lane.error_want, lane.error_found
            ));
        }
        let (loops, pos) = (lane.progress >> 24, lane.progress & 0xff_ffff);
        if s.pages > 0 && lane.running != 0 {
            pages(&s, cpu, loops, pos, lane.chunk, &mut read)?;
        }
        progress.push((loops, pos));
    }
    Ok(Summary {
        counter: s.counter,
        disk_counter: s.disk_counter,
        shared: s,
        progress,
    })
}

fn counters(s: &Shared) -> Result<(), String> {
    let before = s.counter.wrapping_sub(1);
    let sum = s.boot_counter.wrapping_add(s.inc_ops).wrapping_add(s.flush_ops);
    let inv_new = s.counter_inv == !s.counter;
    let inv_old = s.counter_inv == !before;
    let right = match (inv_new, inv_old) {
        (true, _) => sum == s.counter || sum == before,
        // The complement is not written yet, so the count of operations is not either.
        (false, true) => sum == before,
        (false, false) => false,
    };
    if !right {
        return Err(format!(
            "counter {} disagrees: complement of {}, boot {} + inc {} + flush {} = {sum}",
            s.counter, !s.counter_inv, s.boot_counter, s.inc_ops, s.flush_ops
        ));
    }
    if s.disk_counter > s.counter || s.disk_counter < s.boot_counter {
        return Err(format!(
            "disk counter {} is not between boot {} and counter {}",
            s.disk_counter, s.boot_counter, s.counter
        ));
    }
    Ok(())
}

/// Words are `loops + 1` up to some page between `pos` and `pos + chunk`, and `loops` from there on.
fn pages(
    s: &Shared,
    cpu: u64,
    loops: u64,
    pos: u64,
    chunk: u64,
    read: &mut impl FnMut(u64, &mut [u8]) -> bool,
) -> Result<(), String> {
    let whole = matches!(s.content, content::RANDOM | content::TEXT);
    let mut page = vec![0u8; if whole { PAGE as usize } else { 8 }];
    let mut turned = None;
    for i in 0..s.pages {
        let gpa = page_gpa(s, cpu, i);
        if !read(gpa, &mut page) {
            return Err(format!("no memory at {gpa:#x} (page {i} of vCPU {cpu})"));
        }
        let word = word_at(&page, 0);
        let new = word == loops + 1;
        if !new && word != loops {
            return Err(format!(
                "page {i} of vCPU {cpu} at {gpa:#x} holds {word} in loop {loops} (done {pos})"
            ));
        }
        match (new, turned) {
            (true, Some(t)) => {
                return Err(format!(
                    "page {i} of vCPU {cpu} is ahead of page {t} in loop {loops}"
                ));
            }
            (false, None) => turned = Some(i),
            _ => {}
        }
        if whole {
            let in_work = !new && turned == Some(i);
            contents(s, cpu, i, word, in_work, &page).map_err(|at| {
                format!("page {i} of vCPU {cpu} at {gpa:#x}: wrong content at word {at}, loop {loops}")
            })?;
        }
    }
    let turn = turned.unwrap_or(s.pages);
    if turn < pos || turn > pos.saturating_add(chunk) {
        return Err(format!(
            "vCPU {cpu} says {pos} pages done in loop {loops}, its memory says {turn} (chunk {chunk})"
        ));
    }
    Ok(())
}

fn word_at(page: &[u8], i: usize) -> u64 {
    let mut b = [0u8; 8];
    b.copy_from_slice(&page[i * 8..i * 8 + 8]);
    u64::from_le_bytes(b)
}

/// All words belong to the loop in word 0; in the page being worked on, the first ones may belong to the next loop.
fn contents(s: &Shared, cpu: u64, page: u64, word0: u64, in_work: bool, bytes: &[u8]) -> Result<(), usize> {
    let shown = |x: u64| {
        if s.content == content::TEXT {
            page_text(x)
        } else {
            x
        }
    };
    let mut now = page_seed(cpu, page, word0);
    let mut next = page_seed(cpu, page, word0 + 1);
    let mut may_be_next = in_work;
    for i in 1..512 {
        now = page_next(now);
        next = page_next(next);
        let old = if word0 == 0 { 0 } else { shown(now) };
        let found = word_at(bytes, i);
        if may_be_next && found == shown(next) {
            continue;
        }
        may_be_next = false;
        if found != old {
            return Err(i);
        }
    }
    Ok(())
}

impl Summary {
    /// Whether a reply that was received before the guest was frozen (by the same, or by a promoted instance that
    /// lost nothing) can be true of this memory.
    pub fn covers(&self, reply: &Reply) -> Result<(), String> {
        let pairs = [
            ("counter", reply.counter, self.counter),
            ("disk counter", reply.disk_counter, self.disk_counter),
            ("disk sequence", reply.disk_seq, self.shared.disk_seq),
            ("loops", reply.loops, self.progress.first().map_or(0, |p| p.0)),
            ("flush loops", reply.flush_loops, self.shared.flush_loops),
            ("verify sequence", reply.verify_seq, self.shared.verify_seq),
        ];
        for (what, said, is) in pairs {
            if said > is {
                return Err(format!("{what}: a reply said {said}, memory says only {is}"));
            }
        }
        if !reply.is_valid() || reply.errors != 0 {
            return Err(format!(
                "bad reply: valid {}, errors {:#x}",
                reply.is_valid(),
                reply.errors
            ));
        }
        Ok(())
    }

    /// Whether the sector at [`COUNTER_LBA`] agrees: never behind what memory says is durable, at most one write ahead.
    pub fn agrees_with_disk(&self, sector: &[u8]) -> Result<DiskRecord, String> {
        let rec = disk_counter(sector)?.unwrap_or_default();
        let (seq, done) = (rec.seq, self.shared.disk_seq);
        if seq != done && seq != done + 1 {
            return Err(format!("disk has write {seq}, memory has {done} completed"));
        }
        if seq == done && rec.counter != self.disk_counter || rec.counter > self.counter {
            return Err(format!(
                "disk has counter {}, memory has {} (durable {})",
                rec.counter, self.counter, self.disk_counter
            ));
        }
        Ok(rec)
    }
}

/// The counter's record in the sector at [`COUNTER_LBA`]; `None` if never written; an error if damaged.
pub fn disk_counter(sector: &[u8]) -> Result<Option<DiskRecord>, String> {
    let rec = DiskRecord::from_bytes(sector).ok_or("short sector")?;
    if rec == DiskRecord::default() {
        return Ok(None);
    }
    if !rec.is_valid(DISK_MAGIC) {
        return Err(format!("damaged counter block: {rec:x?}"));
    }
    Ok(Some(rec))
}

/// Checks all blocks of a verify ring (`bytes` from [`RING_LBA`] on, a multiple of 4 KiB) and returns the highest
/// sequence number: each block is empty or whole, in its place, and no block is older than one round.
pub fn ring_holds(bytes: &[u8]) -> Result<u64, String> {
    let blocks = (bytes.len() / PAGE as usize) as u64;
    let mut seqs = Vec::new();
    for (i, b) in bytes.chunks_exact(PAGE as usize).enumerate() {
        let seq = word_at(b, 1);
        if b.iter().all(|x| *x == 0) {
            seqs.push(0);
            continue;
        }
        if word_at(b, 0) != RING_MAGIC || seq % blocks != i as u64 {
            return Err(format!("block {i} of the ring: not its own (sequence {seq})"));
        }
        if let Some(at) = (2..512).find(|w| word_at(b, *w) != ring_word(seq, *w as u64)) {
            return Err(format!(
                "block {i} of the ring, sequence {seq}: word {at} is wrong"
            ));
        }
        seqs.push(seq);
    }
    let top = seqs.iter().copied().max().unwrap_or(0);
    for (i, seq) in seqs.iter().enumerate() {
        if (*seq == 0 && top >= blocks) || (*seq != 0 && *seq + blocks <= top) {
            return Err(format!(
                "block {i} of the ring is at {seq} while the newest is {top}: a write was lost"
            ));
        }
    }
    Ok(top)
}
