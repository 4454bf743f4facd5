//! Cables between two hosts: TCP proxies that can be cut, one way or both, and mended.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often a cable looks whether it is cut, or to end.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Default)]
struct State {
    /// Nothing passes towards who listens; towards who connects.
    cut: [AtomicBool; 2],
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
                match from.read(&mut buf) {
                    Ok(0) => break,
                    Ok(n) => {
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
