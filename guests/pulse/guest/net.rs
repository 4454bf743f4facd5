//! ARP, IPv4, ICMP echo and UDP: what comes in is answered to where it came from. No routes, no fragments.

use crate::config::Config;
use crate::counter;
use crate::cpu::{rdtsc, sum_bytes, sum_fold};
use crate::disk::Disk;
use crate::link::{ETH, ICMP, IP, Link, Peer, TCP, UDP, be16, be32, pseudo, put16};
use crate::shared::{COUNTER_PORT, ECHO_PORT, EVENT_PORT, Reply, Request, kind, status};
use crate::state::ticks;
use crate::tcp::Tcp;
use crate::virtio::Device;

/// The last counted request of a sender, so that a repeated one is answered and not counted again.
#[derive(Clone, Copy)]
struct Answered {
    ip: u32,
    port: u16,
    nonce: u64,
    reply: [u8; Reply::BYTES],
}

const ANSWERED: usize = 32;
static mut TABLE: [Answered; ANSWERED] = [Answered {
    ip: 0,
    port: 0,
    nonce: 0,
    reply: [0; Reply::BYTES],
}; ANSWERED];

pub struct Net {
    link: Link,
    tcp: Tcp,
    udp_on: bool,
    tcp_on: bool,
    next_answered: usize,
    collector: Peer,
    collector_port: u16,
    collector_known: bool,
    collector_asked: u64,
}

impl Net {
    pub fn new(dev: Device, c: &Config) -> Option<Self> {
        Some(Self {
            link: Link::new(dev, c.ip)?,
            tcp: Tcp::new(),
            udp_on: c.udp,
            tcp_on: c.tcp,
            next_answered: 0,
            collector: Peer {
                mac: [0; 6],
                ip: c.collector.0,
            },
            collector_port: c.collector.1,
            collector_known: false,
            collector_asked: 0,
        })
    }

    /// Takes what came in, answers, runs TCP's timers.
    pub fn poll(&mut self, disk: &mut Option<Disk>) {
        // Bounded, so that a flood of frames cannot keep vCPU 0 from its other work. While nothing can be sent, what
        // came in waits in the queue instead of being answered into the void.
        for _ in 0..32 {
            if self.link.room() == 0 {
                break;
            }
            let Some((id, frame)) = self.link.receive() else {
                break;
            };
            self.frame(frame, disk);
            self.link.give_back(id);
        }
        if self.tcp_on {
            self.tcp.timers(&mut self.link);
        }
        self.link.flush();
    }

    fn frame(&mut self, f: &[u8], disk: &mut Option<Disk>) {
        if f.len() < ETH {
            return;
        }
        match be16(f, 12) {
            0x0806 => self.arp(f),
            0x0800 => self.ipv4(f, disk),
            _ => {}
        }
    }

    fn arp(&mut self, f: &[u8]) {
        if f.len() < 42 || f[14..20] != [0, 1, 8, 0, 6, 4] {
            return;
        }
        let mut mac = [0u8; 6];
        mac.copy_from_slice(&f[22..28]);
        let from = Peer { mac, ip: be32(f, 28) };
        if from.ip == self.collector.ip && from.ip != 0 {
            self.collector = from;
            self.collector_known = true;
        }
        if be16(f, 20) == 1 && be32(f, 38) == self.link.ip {
            self.link.send_arp(2, from);
        }
    }

    fn ipv4(&mut self, f: &[u8], disk: &mut Option<Disk>) {
        let h = &f[ETH..];
        if h.len() < IP || h[0] >> 4 != 4 {
            return;
        }
        let (hlen, total) = (usize::from(h[0] & 15) * 4, usize::from(be16(h, 2)));
        if hlen < IP || total < hlen || total > h.len() || be16(h, 6) & 0x3fff != 0 {
            return;
        }
        if be32(h, 16) != self.link.ip || sum_fold(sum_bytes(&h[..hlen], 0)) != 0 {
            return;
        }
        let mut mac = [0u8; 6];
        mac.copy_from_slice(&f[6..12]);
        let from = Peer { mac, ip: be32(h, 12) };
        let p = &h[hlen..total];
        match h[9] {
            ICMP => self.icmp(from, p),
            UDP if self.udp_on => self.udp(from, p, disk),
            TCP if self.tcp_on => {
                let sum = pseudo(from.ip, self.link.ip, TCP, p.len());
                if sum_fold(sum_bytes(p, sum)) == 0 {
                    self.tcp.input(&mut self.link, from, p, disk);
                }
            }
            _ => {}
        }
    }

    fn icmp(&mut self, from: Peer, p: &[u8]) {
        if p.len() >= 8 && p[0] == 8 && sum_fold(sum_bytes(p, 0)) == 0 {
            self.link.send_ip(from, ICMP, p.len(), 2, |out| {
                out.copy_from_slice(p);
                out[0] = 0;
            });
        }
    }

    fn udp(&mut self, from: Peer, p: &[u8], disk: &mut Option<Disk>) {
        if p.len() < 8 {
            return;
        }
        let len = usize::from(be16(p, 4));
        if len < 8 || len > p.len() {
            return;
        }
        let p = &p[..len];
        if be16(p, 6) != 0 && sum_fold(sum_bytes(p, pseudo(from.ip, self.link.ip, UDP, len))) != 0 {
            return;
        }
        let (port, data) = (be16(p, 0), &p[8..]);
        match be16(p, 2) {
            ECHO_PORT => {
                self.send_udp(from, ECHO_PORT, port, data);
            }
            COUNTER_PORT => {
                let Some(req) = Request::from_bytes(data) else {
                    return;
                };
                let reply = self.answer(from.ip, port, req, disk);
                self.send_udp(from, COUNTER_PORT, port, &reply);
            }
            _ => {}
        }
    }

    fn answer(&mut self, ip: u32, port: u16, req: Request, disk: &mut Option<Disk>) -> [u8; Reply::BYTES] {
        if !matches!(req.kind, kind::INC | kind::FLUSH_INC) || req.nonce == 0 {
            return counter::serve(req, disk).to_bytes();
        }
        let mut place = self.next_answered;
        for i in 0..ANSWERED {
            // SAFETY: in bounds; used by vCPU 0 only, here only.
            let a = unsafe { &*core::ptr::addr_of!(TABLE[i]) };
            if a.nonce != 0 && a.ip == ip && a.port == port {
                if a.nonce == req.nonce {
                    return a.reply;
                }
                place = i;
                break;
            }
        }
        if place == self.next_answered {
            self.next_answered = (place + 1) % ANSWERED;
        }
        let reply = counter::serve(req, disk).to_bytes();
        // SAFETY: as above.
        unsafe {
            *core::ptr::addr_of_mut!(TABLE[place]) = Answered {
                ip,
                port,
                nonce: req.nonce,
                reply,
            }
        };
        reply
    }

    fn send_udp(&mut self, to: Peer, sport: u16, dport: u16, data: &[u8]) -> bool {
        let len = data.len() + 8;
        self.link.send_ip(to, UDP, len, 6, |out| {
            put16(out, 0, sport);
            put16(out, 2, dport);
            put16(out, 4, len as u16);
            out[8..].copy_from_slice(data);
        })
    }

    /// Sends the state to the collector; asks for its MAC address first, at most ten times a second.
    pub fn report(&mut self) {
        if self.collector.ip == 0 {
            return;
        }
        if !self.collector_known {
            let now = rdtsc();
            if now.wrapping_sub(self.collector_asked) > ticks(100) {
                self.collector_asked = now;
                self.link.send_arp(
                    1,
                    Peer {
                        mac: [0; 6],
                        ip: self.collector.ip,
                    },
                );
            }
            return;
        }
        let reply = counter::reply(kind::EVENT, 0, status::OK);
        let (to, port) = (self.collector, self.collector_port);
        self.send_udp(to, EVENT_PORT, port, &reply.to_bytes());
    }
}
