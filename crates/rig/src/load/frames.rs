//! Looks at the client's cable: when did the guest speak, and what did it say first after a silence. packet(7).

use crate::host::client::Client;
use crate::link::mux::lock;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Frames remembered; older ones are forgotten.
const KEPT_MAX: usize = 1 << 16;
/// The thread looks so often whether it shall end.
const LOOK: Duration = Duration::from_millis(100);
const ALL_PROTOCOLS: u16 = 0x0003;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ARP or RARP: who has which address.
    Address,
    /// Anything else.
    Data,
}

/// A silence of the guest and how it ended.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    /// From its last frame before, or from the moment that was asked about, to its first frame of any kind.
    pub lasted: Duration,
    /// When that was.
    pub ended: Instant,
    /// From that frame to the first that carries data; zero if it was that one, none if none came yet.
    pub to_data: Option<Duration>,
}

type Log = VecDeque<(Instant, Kind)>;

/// Watches until dropped.
pub struct Frames {
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
}

impl Frames {
    /// Watches for frames from this address.
    ///
    /// # Errors
    /// A packet socket takes root.
    pub fn watch(client: &Client, mac: [u8; 6]) -> io::Result<Frames> {
        let mut socket = client.within(open)?;
        let (log, stop) = (Arc::<Mutex<Log>>::default(), Arc::<AtomicBool>::default());
        let (theirs, stopping) = (Arc::clone(&log), Arc::clone(&stop));
        std::thread::Builder::new()
            .name("frames".to_string())
            .spawn(move || {
                let mut frame = [0; 256];
                while !stopping.load(Ordering::Acquire) {
                    // With a time limit on the socket: an error is a look at the flag.
                    let Ok(bytes) = socket.read(&mut frame) else {
                        continue;
                    };
                    if bytes < 14 || frame[6..12] != mac {
                        continue;
                    }
                    let kind = match u16::from_be_bytes([frame[12], frame[13]]) {
                        0x0806 | 0x8035 => Kind::Address,
                        _ => Kind::Data,
                    };
                    let mut log = lock(&theirs);
                    if log.len() == KEPT_MAX {
                        log.pop_front();
                    }
                    log.push_back((Instant::now(), kind));
                }
            })?;
        Ok(Frames { log, stop })
    }

    /// The longest silence since `since` that has ended.
    pub fn longest_silence(&self, since: Instant) -> Option<Silence> {
        longest(&lock(&self.log), since)
    }

    /// When the guest spoke last.
    pub fn last(&self) -> Option<Instant> {
        lock(&self.log).back().map(|(at, _)| *at)
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn longest(log: &Log, since: Instant) -> Option<Silence> {
    let after: Vec<_> = log.iter().filter(|(at, _)| *at >= since).collect();
    let mut before = since;
    let mut best: Option<(usize, Duration)> = None;
    for (index, (at, _)) in after.iter().enumerate() {
        let lasted = *at - before;
        if best.is_none_or(|(_, so_far)| lasted > so_far) {
            best = Some((index, lasted));
        }
        before = *at;
    }
    let (index, lasted) = best?;
    let ended = after[index].0;
    let data = after[index..].iter().find(|(_, kind)| *kind == Kind::Data);
    Some(Silence {
        lasted,
        ended,
        to_data: data.map(|(at, _)| *at - ended),
    })
}

fn open() -> io::Result<File> {
    // SAFETY: plain numbers; the descriptor is checked and owned by the File alone.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(ALL_PROTOCOLS.to_be()),
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    let limit = libc::timeval {
        tv_sec: 0,
        tv_usec: LOOK.as_micros() as libc::suseconds_t,
    };
    // SAFETY: pointer and length describe `limit`, which outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_silence_and_what_ended_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let log: Log = [
            (at(0), Kind::Data),
            (at(900), Kind::Data),
            (at(1000), Kind::Data),
            (at(1500), Kind::Address),
            (at(1530), Kind::Data),
        ]
        .into();
        let silence = longest(&log, at(950)).unwrap();
        assert_eq!(silence.lasted, Duration::from_millis(500));
        assert_eq!(silence.ended, at(1500));
        assert_eq!(silence.to_data, Some(Duration::from_millis(30)));
        assert_eq!(longest(&log, at(10)).unwrap().lasted, Duration::from_millis(890));
        assert!(longest(&log, at(2000)).is_none());
    }
}
