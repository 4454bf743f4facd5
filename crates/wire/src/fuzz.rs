//! Entry points for fuzzers: any input must be handled without a panic and within the stated memory.

use crate::frame::hello::Hello;
use crate::frame::{Frame, HEADER_BYTES, Header, Kind};
use crate::page::codec::PageRecord;
use crate::page::{PAGE_BYTES, Page};
use crate::record::{PageSink, StageConfig, Staged, Stager};
use steadfast_types::{Epoch, Gfn, Term};

/// A frame header, also with its checksum put right so that what lies behind it is reached.
#[doc(hidden)]
pub fn fuzz_header(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HEADER_BYTES>() {
        let _ = Header::decode(bytes, 1 << 20);
        let mut repaired = *bytes;
        repaired[..4].copy_from_slice(&crate::frame::MAGIC);
        let crc = crc32fast::hash(&repaired[..HEADER_BYTES - 4]);
        repaired[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        let _ = Header::decode(&repaired, 1 << 20);
    }
}

/// A Hello.
#[doc(hidden)]
pub fn fuzz_hello(data: &[u8]) {
    if let Ok(h) = Hello::decode(data) {
        assert_eq!(Hello::decode(&h.encode()), Ok(h));
    }
}

/// Page records.
#[doc(hidden)]
pub fn fuzz_pages(data: &[u8]) {
    let (mut input, mut prev) = (data, 0);
    let (mut page, mut scratch): (Page, Page) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    while let Ok(r) = PageRecord::parse(&mut input, prev) {
        prev = r.gfn;
        if r.check(&mut scratch).is_ok() {
            let _ = r.apply(&mut page, &mut scratch);
        }
    }
}

struct OnePage(Page);

impl PageSink for OnePage {
    fn update(&mut self, _gfn: Gfn, change: &mut dyn FnMut(&mut Page)) -> bool {
        change(&mut self.0);
        true
    }
}

/// Chunks with arbitrary (flags, index, payload), as a hostile peer with a valid certificate could send them.
#[doc(hidden)]
pub fn fuzz_chunk_frames(chunks: &[(u8, u32, Vec<u8>)]) {
    let config = StageConfig {
        bytes_max: 1 << 20,
        device_bytes_max: 1 << 16,
        chunk_bytes_max: 1 << 16,
    };
    let mut stager = Stager::new(config, |g| g.0 < 1 << 20);
    for (flags, index, payload) in chunks {
        let payload = payload.clone().into();
        let frame = Frame::new(Kind::Bulk, *flags, 1, Term(1), Epoch(1), *index, payload);
        if let Ok(Staged::Complete(r)) = stager.chunk(frame) {
            let _ = r.disk_ops().count();
            let _ = r.apply(&mut OnePage([0; PAGE_BYTES]));
        }
        assert!(stager.held_bytes() <= 1 << 20, "staging beyond its bound");
    }
}
