//! The thread of a switch: moves frames between stream sockets (QEMU's `-netdev stream`: each frame behind its length as a
//! big-endian u32), TAP devices, and the deciding [`Core`].

use super::core::{Core, Counters, Due, FRAME_MAX, Fault, PortId};
use crate::error::{IoContext, Result, RigError};
use crate::link::mux::lock;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes that may wait for a port that does not read; what does not fit is lost, as in a real switch.
const OUT_BYTES_MAX: usize = 4 << 20;
const READ_BYTES: usize = 256 * 1024;

/// What is plugged into a port.
pub enum Cable {
    /// One end of a stream socket pair to a QEMU.
    Stream(OwnedFd),
    /// A TAP device: a frame per read and write.
    Tap(OwnedFd),
}

enum Order {
    Plug(PortId, Cable),
    Unplug(PortId),
}

struct Inner {
    core: Core,
    orders: Vec<Order>,
    stop: bool,
}

/// A running switch. Dropping it ends its thread.
pub struct Switch {
    name: String,
    inner: Arc<Mutex<Inner>>,
    waker: File,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Plugged {
    port: PortId,
    file: File,
    is_tap: bool,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    outgoing_at: usize,
}

fn event_fd() -> io::Result<File> {
    // SAFETY: plain numbers; the result is checked and owned by the File alone.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(std::os::fd::FromRawFd::from_raw_fd(fd))
    }
}

fn set_nonblocking(fd: i32) -> io::Result<()> {
    // SAFETY: an open descriptor and plain numbers.
    let result = unsafe {
        libc::fcntl(
            fd,
            libc::F_SETFL,
            libc::fcntl(fd, libc::F_GETFL) | libc::O_NONBLOCK,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Switch {
    /// Starts a switch.
    ///
    /// # Errors
    /// When the machine gives no thread or no descriptor.
    pub fn start(name: &str, seed: u64) -> Result<Switch> {
        let waker = event_fd().what(|| format!("switch {name}: eventfd"))?;
        let inner = Arc::new(Mutex::new(Inner {
            core: Core::new(seed),
            orders: Vec::new(),
            stop: false,
        }));
        let for_thread = Arc::clone(&inner);
        let wake = waker.try_clone().what(|| format!("switch {name}: eventfd"))?;
        let thread = std::thread::Builder::new()
            .name(format!("switch-{name}"))
            .spawn(move || run(&for_thread, &wake))
            .what(|| format!("switch {name}: thread"))?;
        Ok(Switch {
            name: name.to_string(),
            inner,
            waker,
            thread: Some(thread),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn wake(&self) {
        // A full counter is a wake-up too.
        let _ = (&self.waker).write(&1u64.to_ne_bytes());
    }

    fn with<T>(&self, act: impl FnOnce(&mut Core) -> T) -> T {
        let result = act(&mut lock(&self.inner).core);
        self.wake();
        result
    }

    fn port(&self, name: &str) -> Result<PortId> {
        let inner = lock(&self.inner);
        inner.core.port_named(name).ok_or_else(|| {
            let known = inner.core.port_names().join(", ");
            RigError::Unknown(format!(
                "switch {} has no port {name}; it has: {known}",
                self.name
            ))
        })
    }

    /// Adds a port. A cable can be plugged in now or later, any number of times.
    pub fn add_port(&self, name: &str) -> PortId {
        self.with(|core| core.add_port(name))
    }

    /// Plugs a cable into a port, in place of what was there.
    pub fn plug_cable(&self, port: PortId, cable: Cable) {
        lock(&self.inner).orders.push(Order::Plug(port, cable));
        self.wake();
    }

    /// Takes the cable of a port away for good (its server is off).
    pub fn drop_cable(&self, port: PortId) {
        lock(&self.inner).orders.push(Order::Unplug(port));
        self.wake();
    }

    /// The names of its ports: those of the servers, and `client` on the client switch.
    pub fn ports(&self) -> Vec<String> {
        lock(&self.inner).core.port_names()
    }

    /// Turns the whole switch off or on.
    pub fn set_down(&self, down: bool) {
        self.with(|core| core.set_down(down));
    }

    /// True when it is off.
    pub fn is_down(&self) -> bool {
        lock(&self.inner).core.is_down()
    }

    /// Pulls the cable of a port, or plugs it in again.
    pub fn set_unplugged(&self, port: &str, unplugged: bool) -> Result<()> {
        let port = self.port(port)?;
        self.with(|core| core.set_unplugged(port, unplugged));
        Ok(())
    }

    /// True when the cable of a port is pulled.
    pub fn unplugged(&self, port: &str) -> Result<bool> {
        let port = self.port(port)?;
        Ok(lock(&self.inner).core.unplugged(port))
    }

    /// Worsens a port in both directions (half of a round trip each).
    pub fn set_fault(&self, port: &str, fault: Fault) -> Result<()> {
        self.set_faults(port, fault, fault)
    }

    /// Worsens a port: `from_server` acts on what the server sends, `to_server` on what it is sent.
    pub fn set_faults(&self, port: &str, from_server: Fault, to_server: Fault) -> Result<()> {
        let port = self.port(port)?;
        self.with(|core| core.set_fault(port, from_server, to_server));
        Ok(())
    }

    /// Worsens every port alike, on the way in only (so a frame meets the fault once).
    pub fn set_fault_everywhere(&self, fault: Fault) {
        self.with(|core| {
            for port in 0..core.port_names().len() {
                core.set_fault(port, fault, Fault::default());
            }
        });
    }

    /// Changes the faults in force on one port (both directions), or on every port (on the way in, so that a frame meets them
    /// once).
    pub fn change_fault(&self, port: Option<&str>, change: impl Fn(&mut Fault)) -> Result<()> {
        let only = port.map(|name| self.port(name)).transpose()?;
        self.with(|core| {
            for port in 0..core.port_names().len() {
                let (mut ingress, mut egress) = core.fault(port);
                match only {
                    Some(only) if only == port => {
                        change(&mut ingress);
                        change(&mut egress);
                    }
                    Some(_) => continue,
                    None => change(&mut ingress),
                }
                core.set_fault(port, ingress, egress);
            }
        });
        Ok(())
    }

    /// Cuts the way from one port to another, in this direction only.
    pub fn partition_one_way(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.port(from)?, self.port(to)?);
        self.with(|core| core.cut_way(from, to));
        Ok(())
    }

    /// Cuts the way between two ports, both directions.
    pub fn partition(&self, a: &str, b: &str) -> Result<()> {
        self.partition_one_way(a, b)?;
        self.partition_one_way(b, a)
    }

    /// Ends every partition and every fault, plugs every cable in, turns the switch on.
    pub fn heal(&self) {
        self.with(|core| {
            core.heal();
            core.set_down(false);
            for port in 0..core.port_names().len() {
                core.set_fault(port, Fault::default(), Fault::default());
                if core.unplugged(port) {
                    core.set_unplugged(port, false);
                }
            }
        });
    }

    /// What went through a port.
    pub fn counters(&self, port: &str) -> Result<Counters> {
        let port = self.port(port)?;
        Ok(lock(&self.inner).core.counters(port))
    }

    /// The faults in force, in words; empty when there are none.
    pub fn faults_in_words(&self) -> Vec<String> {
        let inner = lock(&self.inner);
        let names = inner.core.port_names();
        let mut words = Vec::new();
        if inner.core.is_down() {
            words.push("down".to_string());
        }
        for (from, to) in inner.core.cuts() {
            words.push(format!("{} -x-> {}", names[from], names[to]));
        }
        for (port, name) in names.iter().enumerate() {
            if inner.core.unplugged(port) {
                words.push(format!("{name} unplugged"));
            }
            let (ingress, egress) = inner.core.fault(port);
            for (fault, way) in [(ingress, "from"), (egress, "to")] {
                if fault != Fault::default() {
                    words.push(format!("{way} {name}: {fault}"));
                }
            }
        }
        words
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        lock(&self.inner).stop = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there was printed by the thread itself.
            let _ = thread.join();
        }
    }
}

fn run(inner: &Mutex<Inner>, waker: &File) {
    let start = Instant::now();
    let now_us = || start.elapsed().as_micros() as u64;
    let mut plugged: Vec<Plugged> = Vec::new();
    let mut due: Vec<Due> = Vec::new();
    let mut buffer = vec![0u8; READ_BYTES];
    loop {
        let next_us = {
            let mut inner = lock(inner);
            if inner.stop {
                return;
            }
            for order in std::mem::take(&mut inner.orders) {
                apply(order, &mut plugged);
            }
            inner.core.next_due_us()
        };
        let mut polls = vec![libc::pollfd {
            fd: waker.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        polls.extend(plugged.iter().map(|p| {
            let out = if p.outgoing.len() > p.outgoing_at {
                libc::POLLOUT
            } else {
                0
            };
            libc::pollfd {
                fd: p.file.as_raw_fd(),
                events: libc::POLLIN | out,
                revents: 0,
            }
        }));
        wait(
            &mut polls,
            next_us.map(|at| Duration::from_micros(at.saturating_sub(now_us()))),
        );
        if polls[0].revents != 0 {
            let _ = (&*waker).read(&mut [0; 8]);
        }
        let mut gone = Vec::new();
        let mut locked = lock(inner);
        if !locked.orders.is_empty() {
            // No frame overtakes a cable that was plugged before it was sent.
            continue;
        }
        locked.core.take_due(now_us(), &mut due);
        for (index, poll) in polls[1..].iter().enumerate() {
            if poll.revents == 0 {
                continue;
            }
            let from = &mut plugged[index];
            let mut take = |frame: &[u8]| locked.core.frame_in(now_us(), from.port, frame, &mut due);
            if read_frames(
                &mut from.file,
                from.is_tap,
                &mut from.incoming,
                &mut buffer,
                &mut take,
            )
            .is_err()
            {
                gone.push(index);
            }
        }
        for Due { port, frame } in due.drain(..) {
            let taken = plugged
                .iter_mut()
                .find(|p| p.port == port)
                .is_some_and(|p| p.queue(&frame));
            if !taken {
                locked.core.count_lost(port, frame.len());
            }
        }
        drop(locked);
        for (index, p) in plugged.iter_mut().enumerate() {
            if p.flush().is_err() && !gone.contains(&index) {
                gone.push(index);
            }
        }
        gone.sort_unstable();
        for index in gone.into_iter().rev() {
            plugged.swap_remove(index);
        }
    }
}

fn wait(polls: &mut [libc::pollfd], bound: Option<Duration>) {
    let time = bound.unwrap_or(Duration::from_secs(3600));
    let time = libc::timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    };
    // SAFETY: pointer and count describe `polls`; `time` is valid to read; no signal mask.
    unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            &time,
            std::ptr::null(),
        )
    };
}

fn apply(order: Order, plugged: &mut Vec<Plugged>) {
    let (port, cable) = match order {
        Order::Plug(port, cable) => (port, Some(cable)),
        Order::Unplug(port) => (port, None),
    };
    plugged.retain(|p| p.port != port);
    let (fd, is_tap) = match cable {
        None => return,
        Some(Cable::Stream(fd)) => (fd, false),
        Some(Cable::Tap(fd)) => (fd, true),
    };
    if set_nonblocking(fd.as_raw_fd()).is_ok() {
        let file = File::from(fd);
        plugged.push(Plugged {
            port,
            file,
            is_tap,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            outgoing_at: 0,
        });
    }
}

/// Reads what is there and hands each whole frame to `take`.
///
/// # Errors
/// At the end of the stream, when it breaks, and when a length is out of bounds (there is no next frame to find then).
fn read_frames(
    file: &mut File,
    is_tap: bool,
    incoming: &mut Vec<u8>,
    buffer: &mut [u8],
    take: &mut dyn FnMut(&[u8]),
) -> io::Result<()> {
    // Bounded turns, so that one busy port does not starve the others.
    for _ in 0..32 {
        let n = match file.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        if is_tap {
            take(&buffer[..n]);
            continue;
        }
        incoming.extend_from_slice(&buffer[..n]);
        let mut at = 0;
        while let Some(header) = incoming.get(at..at + 4) {
            let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
            if length > FRAME_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let Some(frame) = incoming.get(at + 4..at + 4 + length) else {
                break;
            };
            take(frame);
            at += 4 + length;
        }
        incoming.drain(..at);
        if n < buffer.len() {
            return Ok(());
        }
    }
    Ok(())
}

impl Plugged {
    /// Takes a frame for sending; false when there is no room.
    fn queue(&mut self, frame: &[u8]) -> bool {
        if self.is_tap {
            return self.file.write(frame).is_ok();
        }
        if self.outgoing.len() - self.outgoing_at + frame.len() + 4 > OUT_BYTES_MAX {
            return false;
        }
        self.outgoing
            .extend_from_slice(&(frame.len() as u32).to_be_bytes());
        self.outgoing.extend_from_slice(frame);
        true
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.outgoing.len() > self.outgoing_at {
            match self.file.write(&self.outgoing[self.outgoing_at..]) {
                Ok(n) => self.outgoing_at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.outgoing_at > 1 << 20 {
                        self.outgoing.drain(..self.outgoing_at);
                        self.outgoing_at = 0;
                    }
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        self.outgoing.clear();
        self.outgoing_at = 0;
        Ok(())
    }
}
