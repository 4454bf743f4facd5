//! The guest's network peer: a thread that asks all the time and checks every answer, and a host program behind vsock.

use super::{GUEST, LONG, ME, World, wait_for};
use pulse::client::{Client, Wire};
use pulse::shared::{ECHO_PORT, VSOCK_HOST_PORT};
use pulse::{Reply, kind};
use std::io;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of the virtio-net header in front of each frame.
const HEADER: usize = 12;

/// Frames over unix datagram sockets, as `--nic socket:OWN:PEER` has them.
pub struct Cable {
    socket: UnixDatagram,
    to: PathBuf,
    /// Set when nobody waits for answers any more.
    abandoned: Arc<AtomicBool>,
}

impl Cable {
    pub fn plug(world: &World) -> Self {
        let own = world.at("peer.net");
        let _ = std::fs::remove_file(&own);
        let socket = UnixDatagram::bind(own).unwrap();
        world.share("peer.net");
        Self {
            socket,
            to: world.at("guest.net"),
            abandoned: Arc::default(),
        }
    }
}

impl Wire for Cable {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let mut datagram = vec![0; HEADER];
        datagram.extend(frame);
        self.socket.set_nonblocking(true)?;
        let end = Instant::now() + Duration::from_millis(50);
        // A full queue is given a moment; a guest that is away loses the frame, as on a cut wire.
        while let Err(e) = self.socket.send_to(&datagram, &self.to) {
            if e.kind() != io::ErrorKind::WouldBlock || Instant::now() > end {
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        if self.abandoned.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        // The kernel rounds a timeout up to a tick, so "do not wait" is said in another way.
        self.socket.set_nonblocking(timeout.is_zero())?;
        if !timeout.is_zero() {
            self.socket.set_read_timeout(Some(timeout))?;
        }
        let mut buf = [0u8; 4096];
        match self.socket.recv(&mut buf) {
            Ok(n) => Ok(Some(buf[n.min(HEADER)..n].to_vec())),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

pub fn client(world: &World) -> Client<Cable> {
    Client::new(Cable::plug(world), ME, GUEST)
}

#[derive(Default)]
struct Board {
    stop: AtomicBool,
    /// Rounds of questions completed.
    rounds: AtomicU64,
    latest: Mutex<Reply>,
    broken: Mutex<Option<String>>,
}

/// Asks the guest without pause: counter over UDP, counter with flush, a TCP stream. It is the only one to ask, so
/// the counter must grow by one with each request, whatever happens to the guest meanwhile.
pub struct Peer {
    board: Arc<Board>,
    abandoned: Arc<AtomicBool>,
    join: Option<JoinHandle<()>>,
}

impl Peer {
    pub fn start(world: &World) -> Self {
        let board = Arc::new(Board::default());
        let (for_thread, mut client) = (Arc::clone(&board), client(world));
        let abandoned = Arc::clone(&client.wire().abandoned);
        let join = std::thread::spawn(move || {
            if let Err(e) = talk(client, &for_thread) {
                *for_thread.broken.lock().unwrap() = Some(e);
            }
        });
        Self {
            board,
            abandoned,
            join: Some(join),
        }
    }

    /// Panics if an answer was wrong, or none came.
    pub fn check(&self) {
        if let Some(e) = &*self.board.broken.lock().unwrap() {
            panic!("the guest's peer: {e}");
        }
    }

    /// The last answer.
    pub fn latest(&self) -> Reply {
        self.check();
        *self.board.latest.lock().unwrap()
    }

    /// Waits for answers to questions that were all asked after this call.
    pub fn fresh(&self) -> Reply {
        let from = self.board.rounds.load(Ordering::SeqCst);
        wait_for("the guest to answer its peer", || {
            self.check();
            self.board.rounds.load(Ordering::SeqCst) > from + 1
        });
        self.latest()
    }

    /// Ends the talk, and checks it.
    pub fn finish(mut self) -> Reply {
        let last = self.fresh();
        self.board.stop.store(true, Ordering::SeqCst);
        self.join.take().unwrap().join().unwrap();
        self.check();
        last
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::SeqCst);
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}

fn talk(mut client: Client<Cable>, board: &Board) -> Result<(), String> {
    let fail = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    client.resolve(LONG).map_err(fail("ARP"))?;
    let stream = client.connect(ECHO_PORT, LONG).map_err(fail("TCP connect"))?;
    let mut expected: Option<u64> = None;
    let mut before = Reply::default();
    let mut salt = 0u8;
    while !board.stop.load(Ordering::SeqCst) {
        for what in [kind::INC, kind::FLUSH_INC, kind::INC, kind::READ] {
            let reply = client.ask(what, LONG).map_err(fail("counter"))?;
            if reply.errors != 0 || reply.status != pulse::status::OK {
                return Err(format!(
                    "the guest reports errors {:#x}, status {}",
                    reply.errors, reply.status
                ));
            }
            let adds = u64::from(what != kind::READ);
            let want = expected.map_or(reply.counter, |c| c + adds);
            if reply.counter != want {
                return Err(format!(
                    "kind {what}: counter {} where {want} is due",
                    reply.counter
                ));
            }
            if what == kind::FLUSH_INC && reply.disk_counter != reply.counter {
                return Err(format!(
                    "counter {} answered before it was on disk",
                    reply.counter
                ));
            }
            if reply.uptime_ticks <= before.uptime_ticks || reply.loops < before.loops {
                return Err(format!("time or work went back: {before:?} then {reply:?}"));
            }
            expected = Some(reply.counter);
            before = reply;
            *board.latest.lock().unwrap() = reply;
        }
        salt = salt.wrapping_add(1);
        let data: Vec<u8> = (0..3000u32).map(|i| (i as u8).wrapping_mul(salt)).collect();
        client
            .echo_stream(stream, &data, LONG)
            .map_err(fail("TCP echo"))?;
        board.rounds.fetch_add(1, Ordering::SeqCst);
    }
    client.close(stream, LONG).map_err(fail("TCP close"))
}

/// A host program that the guest reaches over vsock.
pub struct VsockHost {
    accepted: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    join: Option<JoinHandle<()>>,
}

impl VsockHost {
    pub fn listen(world: &World) -> Self {
        let name = format!("vsock_{VSOCK_HOST_PORT}");
        let listener = UnixListener::bind(world.at(&name)).unwrap();
        world.share(&name);
        listener.set_nonblocking(true).unwrap();
        let (accepted, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (Arc::clone(&accepted), Arc::clone(&stop));
        let join = std::thread::spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok(_) => drop(count.fetch_add(1, Ordering::SeqCst)),
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Self {
            accepted,
            stop,
            join: Some(join),
        }
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for VsockHost {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}
