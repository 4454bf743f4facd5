//! One connection: frames in and out of a [`Stream`], with what is half read and half written.

use super::event::Down;
use super::stream::Stream;
use crate::buf::{Buf, BufPool};
use crate::frame::{Frame, HEADER_BYTES, Header, Kind};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_types::{Epoch, Term};

/// Bytes of the buffer that small frames are read through; larger payloads are read in place.
const RX_BYTES: usize = 64 << 10;
/// Frames handed to the kernel in one call.
const FRAMES_PER_WRITE: usize = 16;

struct OutItem {
    header: [u8; HEADER_BYTES],
    payload: Option<Arc<Buf>>,
}

impl OutItem {
    fn len(&self) -> usize {
        HEADER_BYTES + self.payload.as_ref().map_or(0, |p| p.len())
    }
}

struct Large {
    header: Header,
    buf: Buf,
    filled: usize,
}

/// A connection with its queues and measurements.
pub struct Conn {
    /// The bytes.
    pub stream: Stream,
    /// Under which epoll knows it.
    pub token: u64,
    /// Whether epoll was asked for writability.
    pub wants_out: bool,
    /// When bytes last came.
    pub last_rx: Instant,
    /// Since when bytes have been waiting without any being written.
    pub stalled_since: Option<Instant>,
    /// No new frames are given to it while it is silent.
    pub suspect: bool,
    /// Smoothed round trip.
    pub rtt: Option<Duration>,
    /// The peer's last heartbeat: its time stamp, and when it came.
    pub heard: Option<(u64, Instant)>,
    /// Bytes of unacknowledged frames that were given to it.
    pub unacked_bytes: usize,
    /// Bytes received since the last acknowledgement that was sent on it.
    pub unanswered_bytes: usize,
    /// Bytes read and written, in all.
    pub bytes: (u64, u64),
    out: VecDeque<OutItem>,
    out_offset: usize,
    out_bytes: usize,
    rx: Box<[u8]>,
    rx_start: usize,
    rx_end: usize,
    large: Option<Large>,
}

impl Conn {
    /// A connection on a socket.
    pub fn new(stream: Stream, token: u64, now: Instant) -> Self {
        Self {
            stream,
            token,
            wants_out: false,
            last_rx: now,
            stalled_since: None,
            suspect: false,
            rtt: None,
            heard: None,
            unacked_bytes: 0,
            unanswered_bytes: 0,
            bytes: (0, 0),
            out: VecDeque::new(),
            out_offset: 0,
            out_bytes: 0,
            rx: vec![0; RX_BYTES].into_boxed_slice(),
            rx_start: 0,
            rx_end: 0,
            large: None,
        }
    }

    /// Bytes that wait to be written.
    pub fn out_bytes(&self) -> usize {
        self.out_bytes
    }

    /// Queues a numbered frame.
    pub fn push(&mut self, frame: &Frame, version: u16, seq: u64, ack: u64) {
        let payload = frame.shared_payload();
        let payload = (!payload.is_empty()).then_some(payload);
        self.push_item(OutItem {
            header: frame.header(version, seq, ack).encode(),
            payload,
        });
    }

    /// Queues a frame of the link itself.
    pub fn push_own(&mut self, kind: Kind, vm: u64, version: u16, ack: u64, payload: Vec<u8>) {
        let header = Header {
            version,
            kind,
            flags: 0,
            vm,
            term: Term::ZERO,
            epoch: Epoch::ZERO,
            seq: 0,
            ack,
            length: payload.len(),
            payload_crc: crc32fast::hash(&payload),
            index: 0,
        };
        let payload = (!payload.is_empty()).then(|| Arc::new(Buf::from(payload)));
        self.push_item(OutItem {
            header: header.encode(),
            payload,
        });
    }

    fn push_item(&mut self, item: OutItem) {
        self.out_bytes += item.len();
        self.out.push_back(item);
    }

    /// Writes what waits, as far as the socket takes it; true when nothing is left.
    pub fn flush(&mut self, now: Instant) -> Result<bool, Down> {
        while !self.out.is_empty() {
            let mut pieces = [IoSlice::new(&[]); FRAMES_PER_WRITE * 2];
            let mut n = 0;
            let mut skip = self.out_offset;
            for item in self.out.iter().take(FRAMES_PER_WRITE) {
                for part in [Some(&item.header[..]), item.payload.as_ref().map(|p| &p[..])]
                    .into_iter()
                    .flatten()
                {
                    let part = &part[skip.min(part.len())..];
                    // Only the first item is half written; its offset runs over header and payload.
                    skip = if n == 0 && part.is_empty() {
                        skip - HEADER_BYTES
                    } else {
                        0
                    };
                    if !part.is_empty() {
                        pieces[n] = IoSlice::new(part);
                        n += 1;
                    }
                }
            }
            match self.stream.write(&pieces[..n])? {
                None => {
                    self.stalled_since.get_or_insert(now);
                    return Ok(false);
                }
                Some(written) => self.written(written),
            }
            self.stalled_since = None;
        }
        let done = self.stream.flush_tls()?;
        if done {
            self.stalled_since = None;
        } else {
            self.stalled_since.get_or_insert(now);
        }
        Ok(done)
    }

    fn written(&mut self, n: usize) {
        self.bytes.1 += n as u64;
        self.out_bytes -= n;
        self.out_offset += n;
        while let Some(front) = self.out.front() {
            let len = front.len();
            if self.out_offset < len {
                break;
            }
            self.out_offset -= len;
            self.out.pop_front();
        }
    }

    /// The next whole frame, checked; `None`: not here yet. `dry` is set once the socket has nothing more.
    pub fn next_frame(
        &mut self,
        payload_max: usize,
        pool: &BufPool,
        now: Instant,
        dry: &mut bool,
    ) -> Result<Option<(Header, Buf)>, Down> {
        loop {
            if let Some(large) = &mut self.large {
                if large.filled == large.buf.len() {
                    let Some(large) = self.large.take() else { continue };
                    large.header.check_payload(&large.buf)?;
                    return Ok(Some((large.header, large.buf)));
                }
                if *dry {
                    return Ok(None);
                }
                let room = &mut large.buf[large.filled..];
                let wanted = room.len();
                match self.stream.read(room)? {
                    None => *dry = true,
                    Some(n) => {
                        large.filled += n;
                        self.bytes.0 += n as u64;
                        self.last_rx = now;
                        *dry = n < wanted && self.stream.tls().is_none();
                    }
                }
                continue;
            }
            let have = self.rx_end - self.rx_start;
            if let Some(head) = self.rx[self.rx_start..self.rx_end].first_chunk::<HEADER_BYTES>() {
                let header = Header::decode(head, payload_max)?;
                let body = self.rx_start + HEADER_BYTES;
                let whole = HEADER_BYTES + header.length;
                if have >= whole {
                    let mut buf = pool.take(header.length);
                    buf.copy_from_slice(&self.rx[body..body + header.length]);
                    self.rx_start += whole;
                    header.check_payload(&buf)?;
                    return Ok(Some((header, buf)));
                }
                if whole > RX_BYTES {
                    let mut buf = pool.take(header.length);
                    let filled = self.rx_end - body;
                    buf[..filled].copy_from_slice(&self.rx[body..self.rx_end]);
                    (self.rx_start, self.rx_end) = (0, 0);
                    self.large = Some(Large { header, buf, filled });
                    continue;
                }
            }
            if *dry {
                return Ok(None);
            }
            if self.rx_start > 0 {
                self.rx.copy_within(self.rx_start..self.rx_end, 0);
                self.rx_end -= self.rx_start;
                self.rx_start = 0;
            }
            let room = &mut self.rx[self.rx_end..];
            let wanted = room.len();
            match self.stream.read(room)? {
                None => *dry = true,
                Some(n) => {
                    self.rx_end += n;
                    self.bytes.0 += n as u64;
                    self.last_rx = now;
                    // A short read has emptied the socket; epoll (level-triggered) tells when there is more.
                    *dry = n < wanted && self.stream.tls().is_none();
                }
            }
        }
    }
}
