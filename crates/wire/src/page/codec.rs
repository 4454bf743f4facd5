//! Encoder and decoder of page records; see the format in [`super`].

use super::delta::{diff, walk_runs};
use super::gain::Gain;
use super::shadow::{Place, Shadow};
use super::{Class, EncodeConfig, GFN_MAX, PAGE_BYTES, Page, PageStats, fill_word};
use crate::varint;
use lz4_flex::block::{CompressTable, compress_into_with_table};

/// Room in bytes that one page record may need: tag, page number, checksum, lengths, and what lz4_flex wants to see free
/// before it starts (a tenth of the input and 20 bytes), else it refuses.
pub const PAGE_RECORD_BYTES_MAX: usize = PAGE_BYTES + PAGE_BYTES / 10 + 128;
/// A delta up to this size is sent as it is; LZ4 would gain less than its start-up costs.
const PLAIN_RUNS_BYTES: usize = 192;
/// A delta beyond this size is no better than the whole page.
const RUNS_BYTES_MAX: usize = PAGE_BYTES - 512;
const TAG_CHECKED: u8 = 0x80;

/// Encodes pages against what was sent before.
pub struct PageCodec {
    shadow: Shadow,
    gain: Gain,
    lz4: bool,
    check_every: u32,
    unchecked: u32,
    stats: PageStats,
    scratch: Box<[u8; PAGE_RECORD_BYTES_MAX]>,
    table: CompressTable,
}

impl PageCodec {
    /// A codec that has sent nothing yet.
    #[must_use]
    pub fn new(config: &EncodeConfig) -> Self {
        Self {
            shadow: Shadow::new(config.shadow_bytes_max),
            gain: Gain::new(config.wire_ns_per_byte),
            lz4: config.lz4,
            check_every: config.check_every,
            unchecked: 0,
            stats: PageStats::default(),
            scratch: Box::new([0; PAGE_RECORD_BYTES_MAX]),
            table: CompressTable::small(),
        }
    }

    /// Forgets what was sent: every page goes whole again.
    pub fn reset(&mut self) {
        self.shadow.clear();
    }

    /// See [`Gain::set_wire_ns_per_byte`].
    pub fn set_wire_ns_per_byte(&mut self, ns: f64) {
        self.gain.set_wire_ns_per_byte(ns);
    }

    /// Counters since the start.
    #[must_use]
    pub const fn stats(&self) -> &PageStats {
        &self.stats
    }

    /// Switches LZ4 on or off (what the peer understands).
    pub fn set_lz4(&mut self, on: bool) {
        self.lz4 = on;
    }

    fn count(&mut self, class: Class, bytes: usize) {
        self.stats.pages[class as usize] += 1;
        self.stats.bytes[class as usize] += bytes as u64;
    }

    /// Writes the record of one page at `out[at..]` and returns the position behind it, which is `at` if the receiver
    /// has this content already. `out` must have [`PAGE_RECORD_BYTES_MAX`] bytes of room; `prev_gfn` is the page of the
    /// record before in this chunk (0 for the first), `gfn` is below [`GFN_MAX`].
    pub fn encode(&mut self, prev_gfn: u64, gfn: u64, new: &Page, out: &mut [u8], at: usize) -> usize {
        let head = |out: &mut [u8], class: Class, check: bool| -> usize {
            out[at] = class as u8 | if check { TAG_CHECKED } else { 0 };
            let moved = (gfn as i64).wrapping_sub(prev_gfn as i64);
            let mut p = varint::put(out, at + 1, varint::zigzag(moved));
            if check {
                out[p..p + 4].copy_from_slice(&crc32fast::hash(new).to_le_bytes());
                p += 4;
            }
            p
        };
        // 1. A delta, if the receiver has the page.
        let mut plain_runs = None;
        match self.shadow.place(gfn) {
            Place::Known(old) => {
                let changed = diff(new, old);
                if changed.is_empty() {
                    self.count(Class::Same, 0);
                    return at;
                }
                let size = changed.encoded_bytes_max();
                if size <= PLAIN_RUNS_BYTES {
                    self.unchecked += 1;
                    let check = self.check_every != 0 && self.unchecked >= self.check_every;
                    if check {
                        self.unchecked = 0;
                    }
                    let p = head(out, Class::Runs, check);
                    // At most 192 bytes: the length takes one or two bytes; write the runs behind two and close the gap.
                    let body = p + 2;
                    let end = changed.encode(new, old, out, body);
                    let n = end - body;
                    let after_len = varint::put(out, p, n as u64);
                    let end = if after_len == body {
                        end
                    } else {
                        out.copy_within(body..end, after_len);
                        after_len + n
                    };
                    self.count(Class::Runs, end - at);
                    return end;
                }
                if size <= RUNS_BYTES_MAX {
                    plain_runs = Some(changed.encode(new, old, &mut self.scratch[..], 0));
                } else {
                    *old = *new;
                }
            }
            Place::Fresh(place, evicted) => {
                *place = *new;
                self.stats.evicted += u64::from(evicted);
            }
            Place::Nowhere => {}
        }
        // 2. One word repeated.
        if let Some(word) = fill_word(new) {
            if word == 0 {
                let end = head(out, Class::Zero, false);
                self.count(Class::Zero, end - at);
                return end;
            }
            let p = head(out, Class::Fill, false);
            out[p..p + 8].copy_from_slice(&word.to_ne_bytes());
            self.count(Class::Fill, p + 8 - at);
            return p + 8;
        }
        // 3. LZ4 of the delta or of the page, where it pays.
        let input_len = plain_runs.unwrap_or(PAGE_BYTES);
        if self.lz4 {
            if self.gain.wants(gfn) {
                self.stats.lz4_tried += 1;
                let class = if plain_runs.is_some() {
                    Class::RunsLz4
                } else {
                    Class::Lz4
                };
                let mut p = head(out, class, plain_runs.is_some() && self.check_every != 0);
                if plain_runs.is_some() {
                    p = varint::put(out, p, input_len as u64);
                }
                let started = self.gain.start();
                let input = plain_runs.map_or(&new[..], |n| &self.scratch[..n]);
                // Room for a length of two bytes (an output above 16 KiB cannot come from a page).
                let body = p + 2;
                let n = compress_into_with_table(input, &mut out[body..], &mut self.table)
                    .unwrap_or(usize::MAX / 2);
                if self.gain.result(gfn, started, input_len, n) {
                    let after_len = varint::put(out, p, n as u64);
                    if after_len != body {
                        out.copy_within(body..body + n, after_len);
                    }
                    self.count(class, after_len + n - at);
                    return after_len + n;
                }
            } else {
                self.stats.lz4_skipped += 1;
            }
        }
        // 4. As it is.
        if let Some(n) = plain_runs {
            let p = head(out, Class::Runs, self.check_every != 0);
            let p = varint::put(out, p, n as u64);
            out[p..p + n].copy_from_slice(&self.scratch[..n]);
            self.count(Class::Runs, p + n - at);
            return p + n;
        }
        let p = head(out, Class::Raw, false);
        out[p..p + PAGE_BYTES].copy_from_slice(new);
        self.count(Class::Raw, p + PAGE_BYTES - at);
        p + PAGE_BYTES
    }
}

/// One decoded page record: what to do to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOp<'a> {
    /// Fill with this word (0: a zero page).
    Fill(u64),
    /// Overwrite with these runs; see [`walk_runs`].
    Runs(&'a [u8]),
    /// Overwrite with the LZ4 block of `raw` bytes of runs.
    RunsLz4 {
        /// Length of the runs when unpacked, in bytes.
        raw: usize,
        /// The LZ4 block.
        block: &'a [u8],
    },
    /// Overwrite with this LZ4 block of 4096 bytes.
    Lz4(&'a [u8]),
    /// Overwrite with this.
    Raw(&'a Page),
}

/// Why page records are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The record ends too early.
    #[error("page record cut short")]
    Short,
    /// Unknown tag.
    #[error("page record with unknown class {0}")]
    Class(u8),
    /// A page number out of range.
    #[error("page number out of range")]
    Gfn,
    /// Runs or LZ4 data that do not describe a page.
    #[error("page {0}: its {1} data does not describe a page")]
    Body(u64, &'static str),
    /// Memory differs from what the sender has.
    #[error(
        "page {gfn}: content has checksum {found:08x}, the sender has {expected:08x}: the copies have diverged"
    )]
    Diverged {
        /// Page number.
        gfn: u64,
        /// Of the sender.
        expected: u32,
        /// Here.
        found: u32,
    },
}

/// A record with its page number and, if carried, the checksum of the page after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// Page number.
    pub gfn: u64,
    /// CRC-32 of the whole content afterwards.
    pub check: Option<u32>,
    /// The change.
    pub op: PageOp<'a>,
}

fn take<'a>(input: &mut &'a [u8], n: u64) -> Result<&'a [u8], PageError> {
    let n = usize::try_from(n).map_err(|_| PageError::Short)?;
    let (head, rest) = input.split_at_checked(n).ok_or(PageError::Short)?;
    *input = rest;
    Ok(head)
}

impl<'a> PageRecord<'a> {
    /// Reads one record from the front of `input` and moves it on. Structure only; [`PageRecord::check`] does the rest.
    ///
    /// # Errors
    /// [`PageError`].
    pub fn parse(input: &mut &'a [u8], prev_gfn: u64) -> Result<Self, PageError> {
        let tag = take(input, 1)?[0];
        let moved = varint::unzigzag(varint::get(input).ok_or(PageError::Short)?);
        let gfn = (prev_gfn as i64)
            .checked_add(moved)
            .and_then(|g| u64::try_from(g).ok());
        let gfn = gfn.filter(|g| *g < GFN_MAX).ok_or(PageError::Gfn)?;
        let check = if tag & TAG_CHECKED != 0 {
            let b = take(input, 4)?;
            Some(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        } else {
            None
        };
        let op = match tag & !TAG_CHECKED {
            0 => PageOp::Fill(0),
            1 => {
                let (word, _) = take(input, 8)?.as_chunks::<8>();
                PageOp::Fill(u64::from_ne_bytes(word[0]))
            }
            2 => {
                let n = varint::get(input).ok_or(PageError::Short)?;
                PageOp::Runs(take(input, n)?)
            }
            3 => {
                let raw = varint::get(input).ok_or(PageError::Short)?;
                if raw > PAGE_BYTES as u64 {
                    return Err(PageError::Body(gfn, "delta"));
                }
                let n = varint::get(input).ok_or(PageError::Short)?;
                PageOp::RunsLz4 {
                    raw: raw as usize,
                    block: take(input, n)?,
                }
            }
            4 => {
                let n = varint::get(input).ok_or(PageError::Short)?;
                PageOp::Lz4(take(input, n)?)
            }
            5 => {
                let bytes = take(input, PAGE_BYTES as u64)?;
                PageOp::Raw(bytes.first_chunk().ok_or(PageError::Short)?)
            }
            other => return Err(PageError::Class(other)),
        };
        Ok(Self { gfn, check, op })
    }

    /// Checks that applying cannot fail, without the page. `scratch` is working memory.
    ///
    /// # Errors
    /// [`PageError::Body`].
    pub fn check(&self, scratch: &mut Page) -> Result<(), PageError> {
        match self.op {
            PageOp::Fill(_) | PageOp::Raw(_) => Ok(()),
            PageOp::Runs(runs) => walk_runs(runs, |_, _| {}).ok_or(PageError::Body(self.gfn, "delta")),
            PageOp::RunsLz4 { raw, block } => {
                let runs =
                    unpack(block, &mut scratch[..raw]).ok_or(PageError::Body(self.gfn, "LZ4 delta"))?;
                walk_runs(runs, |_, _| {}).ok_or(PageError::Body(self.gfn, "LZ4 delta"))
            }
            PageOp::Lz4(block) => unpack(block, scratch)
                .map(|_| ())
                .ok_or(PageError::Body(self.gfn, "LZ4")),
        }
    }

    /// Brings `page` from the content of the record before to the content of this one.
    ///
    /// # Errors
    /// [`PageError::Diverged`] if the result is not what the sender has; `Body` if the record was not checked.
    pub fn apply(&self, page: &mut Page, scratch: &mut Page) -> Result<(), PageError> {
        match self.op {
            PageOp::Fill(word) => {
                for w in page.as_chunks_mut::<8>().0 {
                    *w = word.to_ne_bytes();
                }
            }
            PageOp::Raw(bytes) => *page = *bytes,
            PageOp::Lz4(block) => {
                unpack(block, page).ok_or(PageError::Body(self.gfn, "LZ4"))?;
            }
            PageOp::Runs(runs) => apply_runs(runs, page).ok_or(PageError::Body(self.gfn, "delta"))?,
            PageOp::RunsLz4 { raw, block } => {
                let runs = unpack(block, &mut scratch[..raw.min(PAGE_BYTES)]);
                runs.and_then(|r| apply_runs(r, page))
                    .ok_or(PageError::Body(self.gfn, "LZ4 delta"))?;
            }
        }
        if let Some(expected) = self.check {
            let found = crc32fast::hash(page);
            if found != expected {
                return Err(PageError::Diverged {
                    gfn: self.gfn,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }
}

/// Unpacks an LZ4 block that must fill `out` exactly.
fn unpack<'o>(block: &[u8], out: &'o mut [u8]) -> Option<&'o [u8]> {
    let n = lz4_flex::block::decompress_into(block, out).ok()?;
    (n == out.len()).then_some(&*out)
}

fn apply_runs(runs: &[u8], page: &mut Page) -> Option<()> {
    walk_runs(runs, |at, bytes| {
        page[at..at + bytes.len()].copy_from_slice(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn noise(seed: u64, page: &mut [u8]) {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for b in page {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *b = x as u8;
        }
    }

    struct Pair {
        codec: PageCodec,
        memory: HashMap<u64, Page>,
        prev: u64,
        scratch: Page,
    }

    impl Pair {
        fn new(config: &EncodeConfig) -> Self {
            Self {
                codec: PageCodec::new(config),
                memory: HashMap::new(),
                prev: 0,
                scratch: [0; PAGE_BYTES],
            }
        }

        fn send(&mut self, gfn: u64, page: &Page) -> usize {
            let mut out = vec![0xaa; PAGE_RECORD_BYTES_MAX];
            let n = self.codec.encode(self.prev, gfn, page, &mut out, 0);
            if n > 0 {
                let mut input = &out[..n];
                let r = PageRecord::parse(&mut input, self.prev).expect("parses");
                assert!(input.is_empty());
                assert_eq!(r.gfn, gfn);
                r.check(&mut self.scratch).expect("valid");
                let target = self.memory.entry(gfn).or_insert([0x55; PAGE_BYTES]);
                r.apply(target, &mut self.scratch).expect("applies");
                let once = *target;
                r.apply(target, &mut self.scratch).expect("applies again");
                assert_eq!(once, *target, "applying twice changes nothing");
                self.prev = gfn;
            }
            assert_eq!(&self.memory[&gfn], page);
            n
        }
    }

    #[test]
    fn each_class_is_used_where_it_should_be() {
        let mut p = Pair::new(&EncodeConfig::default());
        let mut page = [0u8; PAGE_BYTES];
        assert!(p.send(5, &page) <= 3, "zero");
        page.fill(0xff);
        assert!(p.send(6, &page) <= 12, "fill");
        noise(1, &mut page);
        assert!(p.send(7, &page) >= PAGE_BYTES, "raw");
        assert_eq!(p.send(7, &page), 0, "same");
        page[100] ^= 1;
        assert!(p.send(7, &page) <= 20, "runs");
        p.send(700, &page);
        page[..2400].fill(b'x');
        page[2000] = 0;
        page[3000] ^= 1;
        // The first try in this neighbourhood (the noise) did not gain: the next page is not tried.
        p.send(700, &page);
        for i in 0..300 {
            page[i * 8..i * 8 + 8].copy_from_slice(&(i as u64 % 7).to_le_bytes());
        }
        p.send(700, &page);
        let text: Vec<u8> = b"key:0001 value:abcdef "
            .iter()
            .copied()
            .cycle()
            .take(PAGE_BYTES)
            .collect();
        page.copy_from_slice(&text);
        assert!(p.send(70_000, &page) < 200, "lz4");
        let s = *p.codec.stats();
        for class in [
            Class::Zero,
            Class::Fill,
            Class::Raw,
            Class::Same,
            Class::Runs,
            Class::RunsLz4,
            Class::Lz4,
        ] {
            assert!(s.pages[class as usize] > 0, "{class:?} was not used: {s:?}");
        }
    }

    #[test]
    fn divergence_is_noticed() {
        let config = EncodeConfig {
            check_every: 1,
            ..EncodeConfig::default()
        };
        let mut codec = PageCodec::new(&config);
        let mut page = [0u8; PAGE_BYTES];
        noise(3, &mut page);
        let mut out = vec![0; PAGE_RECORD_BYTES_MAX];
        codec.encode(0, 1, &page, &mut out, 0);
        let mut theirs = page;
        theirs[4000] ^= 1;
        page[8] ^= 1;
        let n = codec.encode(0, 1, &page, &mut out, 0);
        let r = PageRecord::parse(&mut &out[..n], 0).expect("parses");
        let result = r.apply(&mut theirs, &mut [0; PAGE_BYTES]);
        assert!(
            matches!(result, Err(PageError::Diverged { gfn: 1, .. })),
            "{result:?}"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn memory_follows_through_any_history(
            shadow_pages in 0usize..6,
            lz4 in any::<bool>(),
            steps in proptest::collection::vec((0u64..10, 0u8..6, any::<u64>(), 0usize..PAGE_BYTES, 1usize..4096), 1..80),
        ) {
            let config = EncodeConfig {
                shadow_bytes_max: shadow_pages * PAGE_BYTES, lz4, check_every: 3, ..EncodeConfig::default()
            };
            let mut pair = Pair::new(&config);
            let mut memory: HashMap<u64, Page> = HashMap::new();
            for (gfn, kind, seed, at, len) in steps {
                let page = memory.entry(gfn).or_insert([0x55; PAGE_BYTES]);
                let end = (at + len).min(PAGE_BYTES);
                match kind {
                    0 => page.fill(0),
                    1 => page.fill(seed as u8),
                    2 => noise(seed, page),
                    3 => page[at..end].fill(seed as u8),
                    4 => noise(seed, &mut page[at..end]),
                    _ => page[at] ^= 1,
                }
                pair.send(gfn, page);
            }
        }

        #[test]
        fn any_bytes_are_pages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..5000), prev in any::<u64>()) {
            let mut input = &bytes[..];
            let mut page = [0; PAGE_BYTES];
            let mut scratch = [0; PAGE_BYTES];
            let mut prev = prev;
            while !input.is_empty() {
                let Ok(r) = PageRecord::parse(&mut input, prev) else { break };
                prev = r.gfn;
                if r.check(&mut scratch).is_ok() {
                    let result = r.apply(&mut page, &mut scratch);
                    prop_assert!(matches!(result, Ok(()) | Err(PageError::Diverged { .. })), "{:?}", result);
                }
            }
        }
    }
}
