//! The epoch protocol's messages as bytes: tag, fields in order, little-endian varints by hand. Version 1.
//!
//! ```text
//! version u8 | term | session | tag u8 | fields
//! ```
//! Every number is a LEB128 varint; an option is a byte 0 or 1 and then the value. Decoding is total: any bytes give a
//! message or `None`, and bytes left over are an error (I9).

use steadfast_epoch::arbiter::Instance;
use steadfast_epoch::message::{Base, Body, Cursors, EpochHeader, EpochRef, Message, Welcome};
use steadfast_types::{Epoch, Term};

const VERSION: u8 = 1;

struct Writer(Vec<u8>);

impl Writer {
    fn n(&mut self, mut v: u64) -> &mut Self {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
        self
    }
    fn flag(&mut self, v: bool) -> &mut Self {
        self.0.push(u8::from(v));
        self
    }
    fn r(&mut self, v: EpochRef) -> &mut Self {
        self.n(v.epoch.0).n(v.term.0)
    }
    fn cursors(&mut self, c: Cursors) -> &mut Self {
        self.n(c.sent.0).n(c.committed.0).n(c.released.0).n(c.stable.0)
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }
    fn n(&mut self) -> Option<u64> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let b = self.byte()?;
            let part = u64::from(b & 0x7f);
            if shift == 63 && part > 1 {
                return None;
            }
            v |= part << shift;
            if b & 0x80 == 0 {
                return Some(v);
            }
        }
        None
    }
    fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
    fn option<T>(&mut self, f: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        Some(if self.flag()? { Some(f(self)?) } else { None })
    }
    fn r(&mut self) -> Option<EpochRef> {
        Some(EpochRef {
            epoch: Epoch(self.n()?),
            term: Term(self.n()?),
        })
    }
    fn cursors(&mut self) -> Option<Cursors> {
        Some(Cursors {
            sent: Epoch(self.n()?),
            committed: Epoch(self.n()?),
            released: Epoch(self.n()?),
            stable: Epoch(self.n()?),
        })
    }
}

/// Encodes a message.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    let mut w = Writer(vec![VERSION]);
    w.n(message.term.0).n(message.session);
    let tag = |w: &mut Writer, t: u8| w.0.push(t);
    match &message.body {
        Body::Hello => tag(&mut w, 1),
        Body::Resume { after } => {
            tag(&mut w, 2);
            w.r(*after);
        }
        Body::Join { join, next } => {
            tag(&mut w, 3);
            w.n(*join).n(*next);
        }
        Body::Chunk { join, seq } => {
            tag(&mut w, 4);
            w.n(*join).n(*seq);
        }
        Body::Epoch(h) => {
            tag(&mut w, 5);
            w.r(h.epoch)
                .r(h.prev)
                .flag(h.flush)
                .n(h.bytes)
                .flag(h.base.is_some());
            if let Some(base) = h.base {
                w.n(base.join).n(base.chunks);
            }
            w.cursors(h.cursors);
        }
        Body::Heartbeat { seq, cursors, rank } => {
            tag(&mut w, 6);
            w.n(*seq).cursors(*cursors).flag(rank.is_some());
            if let Some(rank) = rank {
                w.n(u64::from(*rank));
            }
        }
        Body::Handover { at, released } => {
            tag(&mut w, 7);
            w.r(*at).n(released.0);
        }
        Body::Welcome(v) => {
            tag(&mut w, 8);
            w.flag(v.staged.is_some());
            if let Some(staged) = v.staged {
                w.r(staged);
            }
            w.r(v.applied).n(v.durable.0).flag(v.join.is_some());
            if let Some((join, next)) = v.join {
                w.n(join).n(next);
            }
            w.n(v.instance.0).r(v.disk);
        }
        Body::Ack {
            staged,
            durable,
            echo,
            top,
        } => {
            tag(&mut w, 9);
            w.r(*staged).n(durable.0).n(*echo).n(top.0);
        }
        Body::ChunkAck { join, next, echo } => {
            tag(&mut w, 10);
            w.n(*join).n(*next).n(*echo);
        }
        Body::Resend { after } => {
            tag(&mut w, 11);
            w.r(*after);
        }
        Body::NoSession => tag(&mut w, 12),
        Body::Fenced => tag(&mut w, 13),
        Body::Alive { heard } => {
            tag(&mut w, 16);
            w.n(*heard);
        }
        Body::Poll => tag(&mut w, 14),
        Body::PollReply { staged, promised } => {
            tag(&mut w, 15);
            w.r(*staged).flag(*promised);
        }
    }
    w.0
}

/// Decodes a message; `None` if the bytes are not exactly one.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Message> {
    let mut r = Reader(bytes);
    if r.byte()? != VERSION {
        return None;
    }
    let (term, session) = (Term(r.n()?), r.n()?);
    let body = match r.byte()? {
        1 => Body::Hello,
        2 => Body::Resume { after: r.r()? },
        3 => Body::Join {
            join: r.n()?,
            next: r.n()?,
        },
        4 => Body::Chunk {
            join: r.n()?,
            seq: r.n()?,
        },
        5 => Body::Epoch(EpochHeader {
            epoch: r.r()?,
            prev: r.r()?,
            flush: r.flag()?,
            bytes: r.n()?,
            base: r.option(|r| {
                Some(Base {
                    join: r.n()?,
                    chunks: r.n()?,
                })
            })?,
            cursors: r.cursors()?,
        }),
        6 => Body::Heartbeat {
            seq: r.n()?,
            cursors: r.cursors()?,
            rank: r.option(|r| u8::try_from(r.n()?).ok())?,
        },
        7 => Body::Handover {
            at: r.r()?,
            released: Epoch(r.n()?),
        },
        8 => Body::Welcome(Welcome {
            staged: r.option(Reader::r)?,
            applied: r.r()?,
            durable: Epoch(r.n()?),
            join: r.option(|r| Some((r.n()?, r.n()?)))?,
            instance: Instance(r.n()?),
            disk: r.r()?,
        }),
        9 => Body::Ack {
            staged: r.r()?,
            durable: Epoch(r.n()?),
            echo: r.n()?,
            top: Term(r.n()?),
        },
        10 => Body::ChunkAck {
            join: r.n()?,
            next: r.n()?,
            echo: r.n()?,
        },
        11 => Body::Resend { after: r.r()? },
        12 => Body::NoSession,
        13 => Body::Fenced,
        16 => Body::Alive { heard: r.n()? },
        14 => Body::Poll,
        15 => Body::PollReply {
            staged: r.r()?,
            promised: r.flag()?,
        },
        _ => return None,
    };
    r.0.is_empty().then_some(Message { term, session, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Body> {
        let r = EpochRef::new(300, 7);
        let cursors = Cursors {
            sent: Epoch(9),
            committed: Epoch(8),
            released: Epoch(7),
            stable: Epoch(u64::MAX),
        };
        vec![
            Body::Hello,
            Body::Resume { after: r },
            Body::Join { join: 1, next: 2 },
            Body::Chunk { join: 1, seq: 128 },
            Body::Epoch(EpochHeader {
                epoch: r,
                prev: EpochRef::new(299, 6),
                flush: true,
                bytes: 1 << 40,
                base: Some(Base { join: 3, chunks: 4 }),
                cursors,
            }),
            Body::Heartbeat {
                seq: 5,
                cursors,
                rank: Some(2),
            },
            Body::Heartbeat {
                seq: 5,
                cursors,
                rank: None,
            },
            Body::Handover {
                at: r,
                released: Epoch(1),
            },
            Body::Welcome(Welcome {
                staged: Some(r),
                applied: r,
                durable: Epoch(3),
                join: Some((1, 2)),
                instance: Instance(u64::MAX),
                disk: r,
            }),
            Body::Welcome(Welcome::default()),
            Body::Ack {
                staged: r,
                durable: Epoch(2),
                echo: 3,
                top: Term(4),
            },
            Body::ChunkAck {
                join: 1,
                next: 2,
                echo: 3,
            },
            Body::Alive { heard: 1 << 60 },
            Body::Resend { after: r },
            Body::NoSession,
            Body::Fenced,
            Body::Poll,
            Body::PollReply {
                staged: r,
                promised: true,
            },
        ]
    }

    #[test]
    fn every_message_comes_back_and_no_prefix_does() {
        for body in samples() {
            let m = Message {
                term: Term(200),
                session: 1 << 33,
                body,
            };
            let bytes = encode(&m);
            assert_eq!(decode(&bytes), Some(m.clone()));
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes[..cut]), None, "{m:?} cut at {cut}");
            }
            let mut longer = bytes.clone();
            longer.push(0);
            assert_eq!(decode(&longer), None);
        }
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut seed = 1u64;
        for _ in 0..200_000 {
            let bytes: Vec<u8> = (0..seed % 40)
                .map(|i| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1 + i);
                    if i == 0 {
                        VERSION
                    } else {
                        (seed >> 56) as u8 & if i < 4 { 0x0f } else { 0xff }
                    }
                })
                .collect();
            let _ = decode(&bytes);
            seed = seed.wrapping_add(12_345);
        }
    }
}
