//! virtio-net (virtio 1.2, section 5.1) and the building of Ethernet and IPv4 frames. No offloads are negotiated: every
//! checksum is made and checked here.

use crate::count;
use crate::cpu::{sum_bytes, sum_fold};
use crate::shared::error;
use crate::state::fail;
use crate::virtio::{Device, Queue, WRITE};

/// virtio_net_hdr with num_buffers.
const HDR: usize = 12;
const BUF: usize = 2048;
const BUFS: usize = 128;
/// Ethernet and IPv4 header.
pub const ETH: usize = 14;
pub const IP: usize = 20;
/// Largest IPv4 payload.
pub const PAYLOAD_MAX: usize = 1480;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

#[repr(C, align(4096))]
struct Buffers([[u8; BUF]; BUFS]);
static mut RX: Buffers = Buffers([[0; BUF]; BUFS]);
static mut TX: Buffers = Buffers([[0; BUF]; BUFS]);

/// One end of a conversation.
#[derive(Clone, Copy, PartialEq)]
pub struct Peer {
    pub mac: [u8; 6],
    pub ip: u32,
}

pub struct Link {
    rx: Queue,
    tx: Queue,
    free: [u16; BUFS],
    nfree: usize,
    id: u16,
    pub mac: [u8; 6],
    pub ip: u32,
}

pub fn be16(f: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([f[at], f[at + 1]])
}
pub fn be32(f: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([f[at], f[at + 1], f[at + 2], f[at + 3]])
}
pub fn put16(f: &mut [u8], at: usize, v: u16) {
    f[at..at + 2].copy_from_slice(&v.to_be_bytes());
}
pub fn put32(f: &mut [u8], at: usize, v: u32) {
    f[at..at + 4].copy_from_slice(&v.to_be_bytes());
}

/// The sum of the pseudo-header (RFC 768, RFC 9293 section 3.1).
pub fn pseudo(src: u32, dst: u32, proto: u8, len: usize) -> u64 {
    u64::from(src.swap_bytes())
        + u64::from(dst.swap_bytes())
        + u64::from((u16::from(proto)).swap_bytes())
        + u64::from((len as u16).swap_bytes())
}

impl Link {
    pub fn new(dev: Device, ip: u32) -> Option<Self> {
        const F_MAC: u64 = 1 << 5;
        let features = dev.begin(F_MAC)?;
        let mut rx = dev.queue(0, 0)?;
        let tx = dev.queue(1, 1)?;
        let mut mac = [0x02, 0x50, 0x55, 0x4c, 0x53, 0x45];
        if features & F_MAC != 0 {
            for (i, b) in mac.iter_mut().enumerate() {
                *b = dev.config8(i as u64);
            }
        }
        for i in 0..(BUFS as u16).min(rx.size()) {
            // SAFETY: address only.
            let addr = unsafe { core::ptr::addr_of!(RX.0[i as usize]) } as u64;
            rx.desc(i, addr, BUF as u32, WRITE, 0);
            rx.push(i);
        }
        dev.finish();
        rx.kick();
        let mut free = [0u16; BUFS];
        for (i, f) in free.iter_mut().enumerate() {
            *f = i as u16;
        }
        let nfree = BUFS.min(usize::from(tx.size()));
        Some(Self {
            rx,
            tx,
            free,
            nfree,
            id: 1,
            mac,
            ip,
        })
    }

    /// The next received frame and the token that gives its buffer back.
    pub fn receive(&mut self) -> Option<(u16, &'static [u8])> {
        let (id, len) = self.rx.pop()?;
        count!(rx_frames, 1);
        let len = len as usize;
        if usize::from(id) >= BUFS || !(HDR..=BUF).contains(&len) {
            fail(error::DEVICE, u64::from(id), BUF as u64, len as u64);
            return None;
        }
        // SAFETY: the device is done with this buffer until `give_back`.
        let buf = unsafe { &*core::ptr::addr_of!(RX.0[id as usize]) };
        Some((id, &buf[HDR..len]))
    }

    /// Lets the device fill the buffer again.
    pub fn give_back(&mut self, id: u16) {
        self.rx.push(id);
    }

    /// Tells the device about all that was given since the last call, and takes sent buffers back.
    pub fn flush(&mut self) {
        self.rx.kick();
        self.tx.kick();
        self.reclaim();
    }

    fn reclaim(&mut self) {
        while let Some((id, _)) = self.tx.pop() {
            if usize::from(id) >= BUFS || self.nfree >= BUFS {
                fail(error::DEVICE, u64::from(id), BUFS as u64, self.nfree as u64);
                continue;
            }
            self.free[self.nfree] = id;
            self.nfree += 1;
        }
    }

    /// How many frames can be sent now.
    pub fn room(&self) -> usize {
        self.nfree
    }

    fn send(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        if self.nfree == 0 {
            self.reclaim();
        }
        if self.nfree == 0 {
            count!(tx_dropped, 1);
            return false;
        }
        self.nfree -= 1;
        let id = self.free[self.nfree];
        // SAFETY: the buffer is free, so the device does not look at it; its header stays zero for ever.
        let buf = unsafe { &mut *core::ptr::addr_of_mut!(TX.0[id as usize % BUFS]) };
        fill(&mut buf[HDR..HDR + len]);
        // A frame on a wire has at least 60 bytes; a reused buffer must not leak an old frame's.
        let padded = len.max(60);
        for b in &mut buf[HDR + len..HDR + padded] {
            *b = 0;
        }
        self.tx.desc(id, buf.as_ptr() as u64, (HDR + padded) as u32, 0, 0);
        self.tx.push(id);
        count!(tx_frames, 1);
        true
    }

    fn ethernet(&self, f: &mut [u8], dst: [u8; 6], typ: u16) {
        f[0..6].copy_from_slice(&dst);
        f[6..12].copy_from_slice(&self.mac);
        put16(f, 12, typ);
    }

    /// Sends an ARP packet (RFC 826): 1 asks, 2 answers.
    pub fn send_arp(&mut self, op: u16, to: Peer) -> bool {
        let (mac, ip) = (self.mac, self.ip);
        let dst = if op == 1 { [0xff; 6] } else { to.mac };
        let mut f = [0u8; 42];
        self.ethernet(&mut f, dst, 0x0806);
        f[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, op as u8]);
        f[22..28].copy_from_slice(&mac);
        put32(&mut f, 28, ip);
        f[32..38].copy_from_slice(&to.mac);
        put32(&mut f, 38, to.ip);
        self.send(42, |out| out.copy_from_slice(&f))
    }

    /// Sends an IPv4 packet whose payload of `len` bytes `fill` writes; then the checksum at `check_at` of the payload is set.
    pub fn send_ip(
        &mut self,
        to: Peer,
        proto: u8,
        len: usize,
        check_at: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        if len > PAYLOAD_MAX || len < check_at + 2 {
            return false;
        }
        let (mac, ip, id) = (self.mac, self.ip, self.id);
        self.id = id.wrapping_add(1);
        self.send(ETH + IP + len, |f| {
            f[0..6].copy_from_slice(&to.mac);
            f[6..12].copy_from_slice(&mac);
            put16(f, 12, 0x0800);
            let (h, p) = f[ETH..].split_at_mut(IP);
            put16(h, 0, 0x4500);
            put16(h, 2, (IP + len) as u16);
            put16(h, 4, id);
            put16(h, 6, 0x4000);
            h[8] = 64;
            h[9] = proto;
            put16(h, 10, 0);
            put32(h, 12, ip);
            put32(h, 16, to.ip);
            let sum = sum_fold(sum_bytes(h, 0));
            h[10..12].copy_from_slice(&sum.to_le_bytes());
            fill(p);
            put16(p, check_at, 0);
            let start = if proto == ICMP {
                0
            } else {
                pseudo(ip, to.ip, proto, len)
            };
            let mut sum = sum_fold(sum_bytes(p, start));
            if proto == UDP && sum == 0 {
                sum = 0xffff;
            }
            p[check_at..check_at + 2].copy_from_slice(&sum.to_le_bytes());
        })
    }
}
