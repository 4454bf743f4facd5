//! The other virtio devices: entropy (virtio 1.2, section 5.4), console (5.3), balloon (5.5), socket (5.10). Each is
//! exercised by a simple exchange on a timer, with at most one request in flight per queue.

use crate::config::Config;
use crate::cpu::rdtsc;
use crate::pci::Devices;
use crate::serial::decimal;
use crate::shared::{PAGE, VSOCK_HOST_PORT, error};
use crate::state::{Every, fail, shared};
use crate::virtio::{Device, Queue, WRITE};
use crate::{count, set};

#[repr(C, align(4096))]
struct Buffers {
    /// Pages lent to the balloon.
    spare: [[u8; PAGE as usize]; SPARE],
    pfns: [u32; SPARE],
    random: [u8; 64],
    line: [u8; 64],
    console_in: [u8; 64],
    vsock_rx: [[u8; 4096]; 4],
    vsock_tx: [u8; 64],
    vsock_event: [u8; 16],
}

const SPARE: usize = 64;
static mut B: Buffers = Buffers {
    spare: [[0; PAGE as usize]; SPARE],
    pfns: [0; SPARE],
    random: [0; 64],
    line: [0; 64],
    console_in: [0; 64],
    vsock_rx: [[0; 4096]; 4],
    vsock_tx: [0; 64],
    vsock_event: [0; 16],
};

/// Address of a part of the buffers.
macro_rules! at {
    ($($f:tt)+) => {{
        // SAFETY: address only.
        #[allow(unused_unsafe)]
        let p = unsafe { core::ptr::addr_of_mut!(B.$($f)+) };
        p
    }};
}

struct Rng {
    queue: Queue,
    busy: bool,
    last: [u8; 64],
    every: Every,
}

struct Console {
    rx: Queue,
    tx: Queue,
    busy: bool,
    lines: u64,
    every: Every,
}

struct Balloon {
    dev: Device,
    inflate: Queue,
    deflate: Queue,
    busy: bool,
    pages: usize,
    every: Every,
}

struct Vsock {
    rx: Queue,
    tx: Queue,
    _event: Queue,
    cid: u64,
    port: u32,
    busy: bool,
    every: Every,
}

pub struct Extras {
    rng: Option<Rng>,
    console: Option<Console>,
    balloon: Option<Balloon>,
    vsock: Option<Vsock>,
}

impl Extras {
    pub fn new(c: &Config, d: &Devices) -> Self {
        Self {
            rng: d
                .rng
                .filter(|_| c.rng_ms != 0)
                .and_then(|d| Rng::new(d, c.rng_ms)),
            console: d
                .console
                .filter(|_| c.console_ms != 0)
                .and_then(|d| Console::new(d, c.console_ms)),
            balloon: d
                .balloon
                .filter(|_| c.balloon_ms != 0)
                .and_then(|d| Balloon::new(d, c.balloon_ms)),
            vsock: d
                .vsock
                .filter(|_| c.vsock_ms != 0)
                .and_then(|d| Vsock::new(d, c.vsock_ms)),
        }
    }

    pub fn poll(&mut self) {
        if self.rng.is_none() && self.console.is_none() && self.balloon.is_none() && self.vsock.is_none() {
            return;
        }
        let now = rdtsc();
        if let Some(r) = &mut self.rng {
            r.poll(now);
        }
        if let Some(c) = &mut self.console {
            c.poll(now);
        }
        if let Some(b) = &mut self.balloon {
            b.poll(now);
        }
        if let Some(v) = &mut self.vsock {
            v.poll(now);
        }
    }
}

impl Rng {
    fn new(dev: Device, ms: u64) -> Option<Self> {
        dev.begin(0)?;
        let queue = dev.queue(0, 3)?;
        dev.finish();
        Some(Self {
            queue,
            busy: false,
            last: [0; 64],
            every: Every::new(ms),
        })
    }

    fn poll(&mut self, now: u64) {
        if !self.busy {
            if self.every.due(now) {
                self.queue.desc(0, at!(random) as u64, 64, WRITE, 0);
                self.queue.push(0);
                self.queue.kick();
                self.busy = true;
            }
            return;
        }
        let Some((_, len)) = self.queue.pop() else { return };
        self.busy = false;
        // SAFETY: the device is done with the buffer.
        let got = unsafe { at!(random).read_volatile() };
        let word = u64::from_le_bytes([got[0], got[1], got[2], got[3], got[4], got[5], got[6], got[7]]);
        // The device may give fewer than asked; 8 bytes are enough to tell.
        let n = (len as usize).min(64);
        if n == 0 || n >= 8 && (got[..n] == self.last[..n] || got[..n].iter().all(|b| *b == got[0])) {
            fail(error::RNG, u64::from(len), !word, word);
        }
        self.last = got;
        count!(rng_reads, 1);
    }
}

impl Console {
    fn new(dev: Device, ms: u64) -> Option<Self> {
        dev.begin(0)?;
        let mut rx = dev.queue(0, 4)?;
        let tx = dev.queue(1, 5)?;
        rx.desc(0, at!(console_in) as u64, 64, WRITE, 0);
        rx.push(0);
        dev.finish();
        rx.kick();
        Some(Self {
            rx,
            tx,
            busy: false,
            lines: 0,
            every: Every::new(ms),
        })
    }

    /// One line `pulse console N`, N = 1, 2, 3, ...: a lost or repeated line shows.
    fn poll(&mut self, now: u64) {
        while let Some((id, _)) = self.rx.pop() {
            self.rx.push(id); // input is taken and ignored
            self.rx.kick();
        }
        if self.busy {
            if self.tx.pop().is_some() {
                self.busy = false;
                self.lines += 1;
                count!(console_lines, 1);
            }
            return;
        }
        if !self.every.due(now) {
            return;
        }
        let mut digits = [0u8; 20];
        let digits = decimal(self.lines + 1, &mut digits);
        // SAFETY: no request is in flight, so the device does not look at the line.
        let line = unsafe { &mut *at!(line) };
        line[..14].copy_from_slice(b"pulse console ");
        line[14..14 + digits.len()].copy_from_slice(digits);
        line[14 + digits.len()] = b'\n';
        let len = 15 + digits.len() as u32;
        self.tx.desc(0, at!(line) as u64, len, 0, 0);
        self.tx.push(0);
        self.tx.kick();
        self.busy = true;
    }
}

impl Balloon {
    fn new(dev: Device, ms: u64) -> Option<Self> {
        dev.begin(0)?;
        let inflate = dev.queue(0, 6)?;
        let deflate = dev.queue(1, 7)?;
        dev.finish();
        Some(Self {
            dev,
            inflate,
            deflate,
            busy: false,
            pages: 0,
            every: Every::new(ms),
        })
    }

    /// Goes to what the host wants, as far as the spare pages reach.
    fn poll(&mut self, now: u64) {
        if self.busy {
            if self.inflate.pop().is_some() || self.deflate.pop().is_some() {
                self.busy = false;
                set!(shared(), balloon_pages, self.pages as u64);
                self.dev.set_config32(4, self.pages as u32);
            }
            return;
        }
        if !self.every.due(now) {
            return;
        }
        let want = (self.dev.config32(0) as usize).min(SPARE);
        if want == self.pages {
            return;
        }
        let (from, to) = (want.min(self.pages), want.max(self.pages));
        let spare = at!(spare) as u64;
        for i in from..to {
            // SAFETY: in bounds; no request is in flight.
            unsafe { at!(pfns[i - from]).write_volatile(((spare + i as u64 * PAGE) / PAGE) as u32) };
        }
        let queue = if want > self.pages {
            &mut self.inflate
        } else {
            &mut self.deflate
        };
        queue.desc(0, at!(pfns) as u64, (to - from) as u32 * 4, 0, 0);
        queue.push(0);
        queue.kick();
        self.pages = want;
        self.busy = true;
    }
}

/// virtio_vsock_hdr is 44 bytes.
const VSOCK_HDR: u32 = 44;
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;

impl Vsock {
    fn new(dev: Device, ms: u64) -> Option<Self> {
        dev.begin(0)?;
        let mut rx = dev.queue(0, 8)?;
        let tx = dev.queue(1, 9)?;
        let mut event = dev.queue(2, 10)?;
        for i in 0..4u16 {
            rx.desc(i, at!(vsock_rx[i as usize]) as u64, 4096, WRITE, 0);
            rx.push(i);
        }
        event.desc(0, at!(vsock_event) as u64, 16, WRITE, 0);
        event.push(0);
        dev.finish();
        rx.kick();
        event.kick();
        let cid = u64::from(dev.config32(4)) << 32 | u64::from(dev.config32(0));
        Some(Self {
            rx,
            tx,
            _event: event,
            cid,
            port: 40_000,
            busy: false,
            every: Every::new(ms),
        })
    }

    /// Asks for a connection to CID 2; a RESPONSE is answered with RST, so nothing stays open.
    fn poll(&mut self, now: u64) {
        if self.busy && self.tx.pop().is_some() {
            self.busy = false;
        }
        if self.busy {
            return;
        }
        if let Some((id, len)) = self.rx.pop() {
            // SAFETY: in bounds; the device is done with the buffer until it is pushed again.
            let h = unsafe { &*at!(vsock_rx[id as usize % 4]) };
            let to_us = len >= VSOCK_HDR && h[20..24] == self.port.to_le_bytes();
            let op = u16::from_le_bytes([h[30], h[31]]);
            self.rx.push(id);
            self.rx.kick();
            if to_us && (op == OP_RESPONSE || op == OP_RST) {
                count!(vsock_answers, 1);
                if op == OP_RESPONSE {
                    self.send(OP_RST);
                }
            }
        } else if self.every.due(now) {
            self.port += 1;
            self.send(OP_REQUEST);
        }
    }

    fn send(&mut self, op: u16) {
        // SAFETY: no request is in flight on the transmit queue.
        let h = unsafe { &mut *at!(vsock_tx) };
        h[..64].fill(0);
        h[0..8].copy_from_slice(&self.cid.to_le_bytes());
        h[8..16].copy_from_slice(&2u64.to_le_bytes());
        h[16..20].copy_from_slice(&self.port.to_le_bytes());
        h[20..24].copy_from_slice(&VSOCK_HOST_PORT.to_le_bytes());
        h[28..30].copy_from_slice(&1u16.to_le_bytes()); // stream
        h[30..32].copy_from_slice(&op.to_le_bytes());
        h[36..40].copy_from_slice(&4096u32.to_le_bytes()); // buf_alloc
        self.tx.desc(0, at!(vsock_tx) as u64, VSOCK_HDR, 0, 0);
        self.tx.push(0);
        self.tx.kick();
        self.busy = true;
    }
}
