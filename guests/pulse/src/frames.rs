//! Ethernet, ARP (RFC 826), IPv4 (RFC 791), UDP (RFC 768), ICMP echo and TCP (RFC 9293) as the client needs them: built
//! with all checksums, and parsed with all checksums checked.

use std::net::Ipv4Addr;

/// A MAC address.
pub type Mac = [u8; 6];

/// IPv4 protocol numbers.
pub mod proto {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

/// TCP flag bits.
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Synchronise.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Push.
    pub const PSH: u8 = 8;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 16;
}

/// What a frame carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// ARP: operation (1 asks, 2 answers), sender, asked-for address.
    Arp {
        /// 1 asks, 2 answers.
        op: u16,
        /// The sender's MAC.
        mac: Mac,
        /// The sender's address.
        ip: Ipv4Addr,
        /// Whom it is about.
        target: Ipv4Addr,
    },
    /// ICMP echo reply: its payload after type, code and checksum.
    Pong(Vec<u8>),
    /// UDP.
    Udp {
        /// Source port.
        sport: u16,
        /// Destination port.
        dport: u16,
        /// Payload.
        data: Vec<u8>,
    },
    /// TCP.
    Tcp(Segment),
}

/// A TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// [`flag`] bits.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Payload.
    pub data: Vec<u8>,
}

fn sum(data: &[u8], start: u32) -> u32 {
    data.chunks(2).fold(start, |s, c| {
        s + (u32::from(c[0]) << 8) + c.get(1).map_or(0, |b| u32::from(*b))
    })
}

fn fold(mut s: u32) -> u16 {
    while s > 0xffff {
        s = (s & 0xffff) + (s >> 16);
    }
    !(s as u16)
}

fn pseudo(src: Ipv4Addr, dst: Ipv4Addr, p: u8, len: usize) -> u32 {
    sum(&dst.octets(), sum(&src.octets(), u32::from(p) + len as u32))
}

/// Sender and receiver of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// From.
    pub src: (Mac, Ipv4Addr),
    /// To.
    pub dst: (Mac, Ipv4Addr),
}

fn ethernet(dst: Mac, src: Mac, typ: u16) -> Vec<u8> {
    [&dst[..], &src[..], &typ.to_be_bytes()[..]].concat()
}

/// An ARP packet.
pub fn arp(op: u16, e: Ends) -> Vec<u8> {
    let dst = if op == 1 { [0xff; 6] } else { e.dst.0 };
    let mut f = ethernet(dst, e.src.0, 0x0806);
    f.extend([0, 1, 8, 0, 6, 4]);
    f.extend(op.to_be_bytes());
    f.extend(e.src.0);
    f.extend(e.src.1.octets());
    f.extend(e.dst.0);
    f.extend(e.dst.1.octets());
    f
}

fn ipv4(e: Ends, p: u8, mut payload: Vec<u8>, check_at: usize) -> Vec<u8> {
    let start = if p == proto::ICMP {
        0
    } else {
        pseudo(e.src.1, e.dst.1, p, payload.len())
    };
    let mut c = fold(sum(&payload, start));
    if p == proto::UDP && c == 0 {
        c = 0xffff;
    }
    payload[check_at..check_at + 2].copy_from_slice(&c.to_be_bytes());
    let mut h = vec![0x45, 0];
    h.extend((20 + payload.len() as u16).to_be_bytes());
    h.extend([0, 0, 0x40, 0, 64, p, 0, 0]);
    h.extend(e.src.1.octets());
    h.extend(e.dst.1.octets());
    let c = fold(sum(&h, 0));
    h[10..12].copy_from_slice(&c.to_be_bytes());
    let mut f = ethernet(e.dst.0, e.src.0, 0x0800);
    f.extend(h);
    f.extend(payload);
    f
}

/// A UDP datagram.
pub fn udp(e: Ends, sport: u16, dport: u16, data: &[u8]) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(sport.to_be_bytes());
    p.extend(dport.to_be_bytes());
    p.extend((8 + data.len() as u16).to_be_bytes());
    p.extend([0, 0]);
    p.extend(data);
    ipv4(e, proto::UDP, p, 6)
}

/// An ICMP echo request with this payload (identifier and sequence are its first four bytes).
pub fn ping(e: Ends, data: &[u8]) -> Vec<u8> {
    ipv4(e, proto::ICMP, [&[8, 0, 0, 0][..], data].concat(), 2)
}

/// A TCP segment.
pub fn tcp(e: Ends, s: &Segment) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(s.sport.to_be_bytes());
    p.extend(s.dport.to_be_bytes());
    p.extend(s.seq.to_be_bytes());
    p.extend(s.ack.to_be_bytes());
    let syn = s.flags & flag::SYN != 0;
    p.extend([if syn { 0x60 } else { 0x50 }, s.flags]);
    p.extend(s.window.to_be_bytes());
    p.extend([0; 4]);
    if syn {
        p.extend([2, 4, 0x05, 0xb4]); // MSS 1460
    }
    p.extend(&s.data);
    ipv4(e, proto::TCP, p, 16)
}

/// What is in a frame and who sent it; `None` if it is damaged or of another kind.
pub fn parse(f: &[u8]) -> Option<(Mac, Ipv4Addr, Packet)> {
    let mac: Mac = f.get(6..12)?.try_into().ok()?;
    let be16 = |b: &[u8], at: usize| Some(u16::from_be_bytes(b.get(at..at + 2)?.try_into().ok()?));
    let be32 = |b: &[u8], at: usize| Some(u32::from_be_bytes(b.get(at..at + 4)?.try_into().ok()?));
    let addr = |b: &[u8], at: usize| be32(b, at).map(Ipv4Addr::from);
    match be16(f, 12)? {
        0x0806 => {
            let sender: Mac = f.get(22..28)?.try_into().ok()?;
            let (ip, target) = (addr(f, 28)?, addr(f, 38)?);
            Some((
                mac,
                ip,
                Packet::Arp {
                    op: be16(f, 20)?,
                    mac: sender,
                    ip,
                    target,
                },
            ))
        }
        0x0800 => {
            let h = f.get(14..34)?;
            let total = usize::from(be16(h, 2)?);
            if h[0] != 0x45 || fold(sum(h, 0)) != 0 || total < 20 {
                return None;
            }
            let p = f.get(34..14 + total)?;
            let (src, dst) = (addr(h, 12)?, addr(h, 16)?);
            let start = if h[9] == proto::ICMP {
                0
            } else {
                pseudo(src, dst, h[9], p.len())
            };
            if fold(sum(p, start)) != 0 {
                return None;
            }
            let packet = match h[9] {
                proto::ICMP if p.first() == Some(&0) => Packet::Pong(p.get(4..)?.to_vec()),
                proto::UDP => Packet::Udp {
                    sport: be16(p, 0)?,
                    dport: be16(p, 2)?,
                    data: p.get(8..)?.to_vec(),
                },
                proto::TCP => {
                    let off = usize::from(p.get(12)? >> 4) * 4;
                    Packet::Tcp(Segment {
                        sport: be16(p, 0)?,
                        dport: be16(p, 2)?,
                        seq: be32(p, 4)?,
                        ack: be32(p, 8)?,
                        flags: *p.get(13)?,
                        window: be16(p, 14)?,
                        data: p.get(off.max(20)..)?.to_vec(),
                    })
                }
                _ => return None,
            };
            Some((mac, src, packet))
        }
        _ => None,
    }
}
