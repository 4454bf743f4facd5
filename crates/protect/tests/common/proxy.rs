//! Cables between two hosts: TCP proxies that can be cut, one way or both, and mended.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often a cable looks whether it is cut, or to end.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Default)]
struct State {
    /// Nothing passes towards who listens; towards who connects.
    cut: [AtomicBool; 2],
    /// Bytes a second that pass; 0: all that come.
    rate: AtomicU64,
    end: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

/// One cable.
pub struct Cable {
    state: Arc<State>,
}

impl Cable {
    /// Passes connections made to `from` on to `to`.
    pub fn new(from: SocketAddr, to: SocketAddr) -> Self {
        let listener = TcpListener::bind(from).unwrap();
        listener.set_nonblocking(true).unwrap();
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            while !shared.end.load(Ordering::Relaxed) {
                let Ok((near, _)) = listener.accept() else {
                    std::thread::sleep(LOOK);
                    continue;
                };
                // A host that is cut off does not even refuse.
                let Ok(far) = TcpStream::connect(to) else {
                    continue;
                };
                join(&shared, &near, &far);
            }
        });
        Self { state }
    }

    /// Stops what goes to the listening side (`[true, _]`) and to the connecting side (`[_, true]`): bytes wait, as on a
    /// network that loses packets; nothing is refused and no connection ends.
    pub fn cut(&self, ways: [bool; 2]) {
        for (flag, cut) in self.state.cut.iter().zip(ways) {
            flag.store(cut, Ordering::Relaxed);
        }
    }

    /// Lets so many bytes a second pass, each way; 0: all that come.
    pub fn slow(&self, bytes_per_s: u64) {
        self.state.rate.store(bytes_per_s, Ordering::Relaxed);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.state.end.store(true, Ordering::Relaxed);
        for s in self
            .state
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            let _ = s.shutdown(Shutdown::Both);
        }
    }
}

fn join(state: &Arc<State>, near: &TcpStream, far: &TcpStream) {
    for (way, from, to) in [(0, near, far), (1, far, near)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        from.set_nonblocking(false).unwrap();
        from.set_read_timeout(Some(LOOK)).unwrap();
        to.set_nodelay(true).unwrap();
        let mut open = state.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.push(from.try_clone().unwrap());
        drop(open);
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            let mut buf = vec![0; 64 << 10];
            while !state.end.load(Ordering::Relaxed) {
                if state.cut[way].load(Ordering::Relaxed) {
                    std::thread::sleep(LOOK);
                    continue;
                }
                let rate = state.rate.load(Ordering::Relaxed);
                // In small pieces, as a slow cable passes them.
                let most = if rate == 0 { buf.len() } else { 4096 };
                match from.read(&mut buf[..most]) {
                    Ok(0) => break,
                    Ok(n) => {
                        if let Some(us) = (n as u64 * 1_000_000).checked_div(rate) {
                            std::thread::sleep(Duration::from_micros(us));
                        }
                        if to.write_all(&buf[..n]).is_err() {
                            break;
                        }
                    }
                    Err(e)
                        if matches!(
                            e.kind(),
                            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                        ) => {}
                    Err(_) => break,
                }
            }
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
}
