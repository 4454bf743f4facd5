//! What engines say to each other beside the epoch protocol: about disks and the CPU, and nothing that anybody's right depends on.
//!
//! A control frame whose payload begins with [`MARK`]; an instance that does not know it drops it. Within a session messages are neither
//! lost nor reordered (W4), so `Cpu` is there before the Hello that it belongs to. One that is lost with its session costs time (a question is
//! asked again, a copy becomes larger), never correctness.
//!
//! | tag | message | fields, little-endian |
//! |---|---|---|
//! | 1 | `Read` | id u64, volume u16, offset u64, length u32 |
//! | 2 | `Block` | id u64, outcome u8 (0 good, 1 bad there too, 2 failed), epoch u64, bytes |
//! | 3 | `Holds` | epoch u64, term u64 |
//! | 4 | `Stands` | number of the unfinished copy u64 (0: none), epoch u64, term u64 |
//! | 5 | `Cpu` | CPUID leaves of the first vCPU: function, index, flags, eax, ebx, ecx, edx u32 each; or nothing |
//! | 6 | `Unfit` | why, UTF-8 |
//! | 7 | `Shared` | id u64, number of disks u16; for each: length in bytes u64, number of blocks u16; for each: offset u64, CRC-32 u32 |
//! | 8 | `SharedSeen` | id u64; why they are not the same, UTF-8, or nothing |

use crate::shared_mark::{BLOCKS_MAX, DISKS_MAX, Mark};
use steadfast_disk::scrub::PeerError;
use steadfast_epoch::message::EpochRef;
use steadfast_machine::cpuid::GuestCpu;
use steadfast_types::{Epoch, Term};

/// First byte of such a message; no version of the protocol's own encoding.
pub const MARK: u8 = 0xa5;
/// Most bytes asked for at a time.
pub const READ_MAX: u32 = 64 << 10;
/// Most bytes of a reason.
const WHY_MAX: usize = 1024;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Aside {
    /// Give me these bytes of this volume as of your last committed epoch, if they are good.
    Read {
        /// To be repeated in the answer.
        id: u64,
        /// Number among the writable disks.
        volume: u16,
        /// In bytes.
        offset: u64,
        /// In bytes, at most [`READ_MAX`].
        len: u32,
    },
    /// The answer.
    Block {
        /// From the question.
        id: u64,
        /// The epoch and the bytes as of it.
        got: Result<(Epoch, Vec<u8>), PeerError>,
    },
    /// All my volumes hold this epoch as committed, durably.
    Holds(EpochRef),
    /// Said before every Welcome: my volumes are an unfinished copy with this number over this epoch. `None`: they are whole
    /// or nothing, as the Welcome says.
    Stands(Option<(u64, EpochRef)>),
    /// Said before every Hello: the CPU that the guest sees. None where only disks are mirrored: it will be booted, with another's.
    Cpu(Option<GuestCpu>),
    /// I cannot stand in for you, and will not answer: why.
    Unfit(String),
    /// I have let these shared disks go, so that you may take them: are they yours too?
    Shared {
        /// To be repeated in the answer.
        id: u64,
        /// Of each disk.
        marks: Vec<Mark>,
    },
    /// The answer.
    SharedSeen {
        /// From the question.
        id: u64,
        /// Why they are not.
        why: Option<String>,
    },
}

/// Encodes it.
#[must_use]
pub fn encode(aside: &Aside) -> Vec<u8> {
    let mut b = vec![MARK];
    let words = |b: &mut Vec<u8>, list: &[u64]| list.iter().for_each(|n| b.extend(n.to_le_bytes()));
    match aside {
        Aside::Read {
            id,
            volume,
            offset,
            len,
        } => {
            b.push(1);
            words(&mut b, &[*id]);
            b.extend(volume.to_le_bytes());
            words(&mut b, &[*offset]);
            b.extend(len.to_le_bytes());
        }
        Aside::Block { id, got } => {
            b.push(2);
            words(&mut b, &[*id]);
            let (outcome, epoch, bytes): (_, _, &[u8]) = match got {
                Ok((epoch, bytes)) => (0, *epoch, bytes),
                Err(PeerError::BadThere) => (1, Epoch::ZERO, &[]),
                Err(_) => (2, Epoch::ZERO, &[]),
            };
            b.push(outcome);
            words(&mut b, &[epoch.0]);
            b.extend(bytes);
        }
        Aside::Holds(at) => {
            b.push(3);
            words(&mut b, &[at.epoch.0, at.term.0]);
        }
        Aside::Stands(copy) => {
            b.push(4);
            let (join, at) = copy.unwrap_or((0, EpochRef::ZERO));
            words(&mut b, &[join, at.epoch.0, at.term.0]);
        }
        Aside::Cpu(cpu) => {
            b.push(5);
            b.extend(cpu.iter().flat_map(GuestCpu::encode));
        }
        Aside::Unfit(why) => {
            b.push(6);
            b.extend(why.bytes().take(WHY_MAX));
        }
        Aside::Shared { id, marks } => {
            b.push(7);
            words(&mut b, &[*id]);
            b.extend((marks.len() as u16).to_le_bytes());
            for mark in marks {
                words(&mut b, &[mark.bytes]);
                b.extend((mark.blocks.len() as u16).to_le_bytes());
                for (at, sum) in &mark.blocks {
                    words(&mut b, &[*at]);
                    b.extend(sum.to_le_bytes());
                }
            }
        }
        Aside::SharedSeen { id, why } => {
            b.push(8);
            words(&mut b, &[*id]);
            b.extend(why.iter().flat_map(|why| why.bytes().take(WHY_MAX)));
        }
    }
    b
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// All that is left.
    fn text(&mut self) -> String {
        let text = std::mem::take(&mut self.0);
        String::from_utf8_lossy(text.get(..WHY_MAX).unwrap_or(text)).into_owned()
    }

    fn word(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// As many as are said to come, and no more than may.
    fn list<T>(&mut self, most: usize, mut one: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let n = usize::from(self.take().map(u16::from_le_bytes)?);
        (n <= most).then_some(())?;
        (0..n).map(|_| one(self)).collect()
    }

    fn epoch(&mut self) -> Option<EpochRef> {
        Some(EpochRef {
            epoch: Epoch(self.word()?),
            term: Term(self.word()?),
        })
    }
}

/// Decodes a control payload: outer `None`, it is not one of these; inner `None`, it is one that does not parse.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Option<Aside>> {
    let (&MARK, rest) = bytes.split_first()? else {
        return None;
    };
    Some(parse(Reader(rest)))
}

fn parse(mut r: Reader<'_>) -> Option<Aside> {
    let aside = match r.take::<1>()? {
        [1] => Aside::Read {
            id: r.word()?,
            volume: r.take().map(u16::from_le_bytes)?,
            offset: r.word()?,
            len: r.take().map(u32::from_le_bytes).filter(|len| *len <= READ_MAX)?,
        },
        [2] => {
            let (id, [outcome], epoch) = (r.word()?, r.take::<1>()?, Epoch(r.word()?));
            let got = match outcome {
                0 => Ok((epoch, std::mem::take(&mut r.0).to_vec())),
                1 => Err(PeerError::BadThere),
                _ => Err(PeerError::Failed("the other host could not read it".into())),
            };
            Aside::Block { id, got }
        }
        [3] => Aside::Holds(r.epoch()?),
        [4] => {
            let (join, at) = (r.word()?, r.epoch()?);
            Aside::Stands((join != 0).then_some((join, at)))
        }
        [5] => match std::mem::take(&mut r.0) {
            [] => Aside::Cpu(None),
            leaves => Aside::Cpu(Some(GuestCpu::decode(leaves)?)),
        },
        [6] => Aside::Unfit(r.text()),
        [7] => Aside::Shared {
            id: r.word()?,
            marks: r.list(DISKS_MAX, |r| {
                Some(Mark {
                    bytes: r.word()?,
                    blocks: r.list(BLOCKS_MAX, |r| {
                        Some((r.word()?, r.take().map(u32::from_le_bytes)?))
                    })?,
                })
            })?,
        },
        [8] => Aside::SharedSeen {
            id: r.word()?,
            why: Some(r.text()).filter(|why| !why.is_empty()),
        },
        _ => return None,
    };
    r.0.is_empty().then_some(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_comes_back() {
        let at = EpochRef::new(7, 3);
        let all = [
            Aside::Read {
                id: 1,
                volume: 2,
                offset: 1 << 40,
                len: 4096,
            },
            Aside::Block {
                id: 9,
                got: Ok((Epoch(4), vec![1, 2, 3])),
            },
            Aside::Block {
                id: 9,
                got: Err(PeerError::BadThere),
            },
            Aside::Holds(at),
            Aside::Stands(None),
            Aside::Stands(Some((5, at))),
            Aside::Cpu(Some(GuestCpu::decode(&[7; 56]).unwrap())),
            Aside::Cpu(None),
            Aside::Unfit("it lacks avx2".into()),
            Aside::Shared {
                id: 3,
                marks: vec![
                    Mark {
                        bytes: 1 << 33,
                        blocks: vec![(0, 1), (4096, u32::MAX)],
                    },
                    Mark {
                        bytes: 512,
                        blocks: Vec::new(),
                    },
                ],
            },
            Aside::SharedSeen { id: 3, why: None },
            Aside::SharedSeen {
                id: 3,
                why: Some("it differs".into()),
            },
        ];
        for aside in all {
            let bytes = encode(&aside);
            assert_eq!(decode(&bytes), Some(Some(aside.clone())));
            if !matches!(
                aside,
                Aside::Block { .. } | Aside::Cpu(_) | Aside::Unfit(_) | Aside::SharedSeen { .. }
            ) {
                for cut in 1..bytes.len() {
                    assert_eq!(decode(&bytes[..cut]), Some(None), "{aside:?} cut at {cut}");
                }
            }
        }
        assert_eq!(decode(&[MARK, 5, 1, 2]), Some(None), "no whole leaf");
        assert_eq!(decode(&[1, 2, 3]), None);
        assert_eq!(decode(&[]), None);
    }
}
