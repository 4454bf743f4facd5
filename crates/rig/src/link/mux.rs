//! Channels over one link: many commands and files at once over one virtio-serial port.
//!
//! Invariant: per channel and direction at most [`WINDOW_BYTES`] of bulk bytes are sent and not yet consumed, so a slow
//! reader on one channel neither blocks the others nor makes a queue grow. A peer that sends more than its credit is cut
//! off. Frames that are not bulk are few by construction (at most [`SMALL_MAX`] waiting).
//!
//! ```text
//! caller -> Channel::send -> (credit) -> frames -> link -> frames -> queue of the channel -> Channel::recv -> Credit back
//! ```

use super::frame::{self, Frame, Kind};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bulk bytes in flight per channel and direction.
pub const WINDOW_BYTES: usize = 256 * 1024;
/// Small frames that may wait on a channel.
pub const SMALL_MAX: usize = 64;
/// Channels open at once on one link.
pub const CHANNELS_MAX: usize = 256;

/// Locks a mutex; a panic elsewhere must not take the rig with it, the data are plain counters and queues.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Inbox {
    frames: VecDeque<(Kind, Vec<u8>)>,
    bulk_bytes: usize,
    credit: usize,
    closed: bool,
}

struct ChannelState {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

struct Shared {
    writer: Mutex<Box<dyn Write + Send>>,
    channels: Mutex<Channels>,
}

struct Channels {
    open: HashMap<u32, Arc<ChannelState>>,
    next: u32,
    closed: Option<String>,
}

/// One end of a link.
#[derive(Clone)]
pub struct Mux {
    shared: Arc<Shared>,
}

/// One channel; dropping it closes it on this side (frames that still come for it are thrown away).
pub struct Channel {
    id: u32,
    state: Arc<ChannelState>,
    mux: Mux,
}

impl Mux {
    /// A link that writes to `writer`; somebody must call [`Mux::pump`] with the reading half.
    pub fn new(writer: Box<dyn Write + Send>) -> Mux {
        let channels = Channels {
            open: HashMap::new(),
            next: 1,
            closed: None,
        };
        Mux {
            shared: Arc::new(Shared {
                writer: Mutex::new(writer),
                channels: Mutex::new(channels),
            }),
        }
    }

    /// Reads frames until the link ends, filling the channels; `on_other` receives `Hello` and `Open` frames (and must
    /// not block). When it returns, every channel is closed.
    pub fn pump(&self, reader: &mut dyn Read, on_other: &mut dyn FnMut(Frame)) {
        let why = loop {
            match frame::read(reader) {
                Ok(None) => break "the link ended".to_string(),
                Err(e) => break format!("the link broke: {e}"),
                Ok(Some(frame)) if matches!(frame.kind, Kind::Hello | Kind::Open) => on_other(frame),
                Ok(Some(frame)) => {
                    if let Err(why) = self.deliver(frame) {
                        break why;
                    }
                }
            }
        };
        self.close(&why);
    }

    fn deliver(&self, frame: Frame) -> Result<(), String> {
        let Some(state) = lock(&self.shared.channels).open.get(&frame.channel).cloned() else {
            return Ok(()); // A channel that was dropped here: its last frames are of no interest.
        };
        let mut inbox = lock(&state.inbox);
        if frame.kind == Kind::Credit {
            let Ok(bytes) = <[u8; 4]>::try_from(frame.payload.as_slice()) else {
                return Err("a credit frame without its number".to_string());
            };
            inbox.credit = (inbox.credit + u32::from_le_bytes(bytes) as usize).min(WINDOW_BYTES);
        } else {
            if frame.kind.is_bulk() {
                inbox.bulk_bytes += frame.payload.len();
            }
            if inbox.bulk_bytes > WINDOW_BYTES || inbox.frames.len() > WINDOW_BYTES / 64 + SMALL_MAX {
                return Err("the peer sent more than its credit".to_string());
            }
            inbox.frames.push_back((frame.kind, frame.payload));
        }
        drop(inbox);
        state.changed.notify_all();
        Ok(())
    }

    /// Closes the link on this side: every wait on it ends.
    pub fn close(&self, why: &str) {
        let mut channels = lock(&self.shared.channels);
        channels.closed.get_or_insert_with(|| why.to_string());
        for (_, state) in channels.open.drain() {
            lock(&state.inbox).closed = true;
            state.changed.notify_all();
        }
    }

    /// Why the link is closed, when it is.
    pub fn closed(&self) -> Option<String> {
        lock(&self.shared.channels).closed.clone()
    }

    /// Sends a frame that needs no credit.
    pub fn send(&self, kind: Kind, channel: u32, payload: &[u8]) -> io::Result<()> {
        if let Some(why) = self.closed() {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, why));
        }
        frame::write(lock(&self.shared.writer).as_mut(), kind, channel, payload)
    }

    /// Opens a new channel with an `Open` frame (the rig's side).
    pub fn open(&self, request: &[u8]) -> io::Result<Channel> {
        let id = {
            let mut channels = lock(&self.shared.channels);
            let id = channels.next;
            channels.next = channels.next.checked_add(1).unwrap_or(1);
            id
        };
        let channel = self.accept(id)?;
        self.send(Kind::Open, id, request)?;
        Ok(channel)
    }

    /// Takes up a channel that the peer opened (the agent's side). Call it before the next frame is read.
    pub fn accept(&self, id: u32) -> io::Result<Channel> {
        let inbox = Inbox {
            frames: VecDeque::new(),
            bulk_bytes: 0,
            credit: WINDOW_BYTES,
            closed: false,
        };
        let state = Arc::new(ChannelState {
            inbox: Mutex::new(inbox),
            changed: Condvar::new(),
        });
        let mut channels = lock(&self.shared.channels);
        if let Some(why) = &channels.closed {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, why.clone()));
        }
        if channels.open.len() >= CHANNELS_MAX || channels.open.contains_key(&id) {
            return Err(io::Error::other("too many channels on this link"));
        }
        channels.open.insert(id, Arc::clone(&state));
        Ok(Channel {
            id,
            state,
            mux: self.clone(),
        })
    }
}

impl Channel {
    /// Sends bulk bytes, waiting for credit as needed.
    ///
    /// # Errors
    /// `TimedOut` when the peer consumes nothing for `bound`; `BrokenPipe` when the link or channel is closed.
    pub fn send_bulk(&self, kind: Kind, mut bytes: &[u8], bound: Duration) -> io::Result<()> {
        while !bytes.is_empty() {
            let take = {
                let mut inbox = lock(&self.state.inbox);
                let deadline = Instant::now() + bound;
                while inbox.credit == 0 && !inbox.closed {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    inbox = self
                        .state
                        .changed
                        .wait_timeout(inbox, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                if inbox.closed {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                let take = bytes.len().min(inbox.credit).min(frame::PAYLOAD_MAX);
                inbox.credit -= take;
                take
            };
            self.mux.send(kind, self.id, &bytes[..take])?;
            bytes = &bytes[take..];
        }
        Ok(())
    }

    /// Sends a small frame.
    pub fn send_small(&self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.mux.send(kind, self.id, payload)
    }

    /// The next frame of this channel; `Ok(None)` when the bound passes first.
    ///
    /// # Errors
    /// `BrokenPipe` when the link is closed and nothing is left.
    pub fn recv(&self, bound: Duration) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let deadline = Instant::now() + bound;
        let (kind, payload) = {
            let mut inbox = lock(&self.state.inbox);
            loop {
                if let Some(frame) = inbox.frames.pop_front() {
                    if frame.0.is_bulk() {
                        inbox.bulk_bytes -= frame.1.len();
                    }
                    break frame;
                }
                if inbox.closed {
                    let why = self.mux.closed().unwrap_or_default();
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, why));
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(None);
                }
                inbox = self
                    .state
                    .changed
                    .wait_timeout(inbox, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        };
        if kind.is_bulk() && !payload.is_empty() {
            // The peer may be gone already; what it sent is still worth having.
            let _ = self
                .mux
                .send(Kind::Credit, self.id, &(payload.len() as u32).to_le_bytes());
        }
        Ok(Some((kind, payload)))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        lock(&self.mux.shared.channels).open.remove(&self.id);
        lock(&self.state.inbox).closed = true;
        self.state.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Mux, Mux) {
        let (a, b) = UnixStream::pair().unwrap();
        let left = Mux::new(Box::new(a.try_clone().unwrap()));
        let right = Mux::new(Box::new(b.try_clone().unwrap()));
        for (mux, mut stream) in [(left.clone(), a), (right.clone(), b)] {
            std::thread::spawn(move || mux.pump(&mut stream, &mut |_| {}));
        }
        (left, right)
    }

    #[test]
    fn a_reader_that_does_not_read_stops_its_sender_but_nobody_else() {
        let (left, right) = pair();
        let (slow_a, slow_b) = (left.accept(1).unwrap(), right.accept(1).unwrap());
        let (fast_a, fast_b) = (left.accept(2).unwrap(), right.accept(2).unwrap());
        let big = vec![7u8; WINDOW_BYTES + 1];
        let blocked = slow_a.send_bulk(Kind::Input, &big, Duration::from_millis(50));
        assert_eq!(blocked.unwrap_err().kind(), io::ErrorKind::TimedOut);
        fast_a
            .send_bulk(Kind::Input, b"still here", Duration::from_secs(5))
            .unwrap();
        assert_eq!(
            fast_b.recv(Duration::from_secs(5)).unwrap().unwrap().1,
            b"still here"
        );
        let mut got = 0;
        while got < WINDOW_BYTES {
            got += slow_b.recv(Duration::from_secs(5)).unwrap().unwrap().1.len();
        }
        slow_a
            .send_bulk(Kind::Input, b"x", Duration::from_secs(5))
            .unwrap();
        assert_eq!(slow_b.recv(Duration::from_secs(5)).unwrap().unwrap().1, b"x");
    }

    #[test]
    fn a_closed_link_ends_every_wait() {
        let (left, right) = pair();
        let channel = left.accept(1).unwrap();
        let waiter = std::thread::spawn(move || channel.recv(Duration::from_secs(30)));
        right.close("test");
        left.close("test");
        assert_eq!(
            waiter.join().unwrap().unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        assert!(left.open(b"{}").is_err());
    }

    #[test]
    fn a_peer_that_ignores_credit_is_cut_off() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let mux = Mux::new(Box::new(a.try_clone().unwrap()));
        let _channel = mux.accept(1).unwrap();
        let pumped = mux.clone();
        let mut stream = a;
        let pump = std::thread::spawn(move || pumped.pump(&mut stream, &mut |_| {}));
        for _ in 0..=WINDOW_BYTES / frame::PAYLOAD_MAX {
            let _ = frame::write(&mut b, Kind::Input, 1, &vec![0; frame::PAYLOAD_MAX]);
        }
        pump.join().unwrap();
        assert!(mux.closed().unwrap().contains("credit"));
    }
}
