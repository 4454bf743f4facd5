//! What goes to one other host, in order: messages, and the records of epochs and full copies.
//!
//! ```text
//! message, message, [record], message ... --> encoded when it is its turn, a piece at a time --> link
//! ```
//! A record is not encoded when it is sealed but when the link has room for more of it. So what waits is the sealed pages that
//! are kept anyway; and an epoch as large as the guest's memory (a reset makes one) keeps neither the engine from what else
//! there is to do nor the other host from hearing something all the while (I7).

use crate::disks::{NumberedOp, wire_op};
use crate::peer::Record;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_capture::SealedPages;
use steadfast_types::{Epoch, HostId, Term};
use steadfast_wire::link::SendError;
use steadfast_wire::record::{EncodeError, Trailer};
use steadfast_wire::{Encoder, Frame, RecordId};

/// The engine does other things after so long: long enough for an epoch as they usually are, short against what any
/// detector waits.
pub const PIECE: Duration = Duration::from_millis(2);
/// The clock is looked at after so many pages, or operations on disks.
const STRIDE: usize = 32;

/// A record that is to be encoded.
pub struct Job {
    /// The message that it belongs to; goes before it.
    pub header: Frame,
    /// Of the sender.
    pub term: Term,
    /// What it is.
    pub id: RecordId,
    /// Its content.
    pub record: Arc<Record>,
    /// It completes the full copy of this host: it continues the stream of the copy's pieces, and its operations on disks are
    /// what that copy lacks.
    pub completes: Option<HostId>,
    /// The guest flushed a disk in it.
    pub flush: bool,
    /// What it counts for at least when copies are limited to a rate, in bytes.
    pub cost: u64,
    /// Where encoding it stands; none: not begun.
    at: Option<At>,
}

/// Pages and operations that are encoded, bytes that came of it.
#[derive(Clone, Copy, Default)]
struct At {
    pages: usize,
    ops: usize,
    bytes_before: u64,
}

impl Job {
    /// A record that waits for its turn.
    pub fn new(header: Frame, term: Term, id: RecordId, record: Arc<Record>) -> Self {
        Self {
            header,
            term,
            id,
            record,
            completes: None,
            flush: false,
            cost: 0,
            at: None,
        }
    }

    fn ops(&self) -> &[NumberedOp] {
        match &self.completes {
            Some(host) => self.record.bases.get(host),
            None => self.record.disk.as_ref(),
        }
        .map_or(&[], Vec::as_slice)
    }
}

enum Item {
    Message(Frame),
    /// Says how things stand: the newest of those that wait in a row is enough.
    Heartbeat(Frame),
    Record(Box<Job>),
}

/// See the module.
pub struct Outgoing {
    encoder: Encoder,
    /// The epoch that continues the stream.
    next: Option<Epoch>,
    /// The last record was a piece of a copy: the epoch that completes the copy continues the stream, once.
    copying: bool,
    queue: VecDeque<Item>,
    /// Encoded, and not taken by the link yet.
    ready: VecDeque<Frame>,
    /// Bytes of full copies since they were asked for.
    copied: u64,
    /// Stopped because of the time.
    more: bool,
}

impl Outgoing {
    /// Nothing waits.
    pub fn new(encoder: Encoder) -> Self {
        Self {
            encoder,
            next: None,
            copying: false,
            queue: VecDeque::new(),
            ready: VecDeque::new(),
            copied: 0,
            more: false,
        }
    }

    /// The other side has lost what it had of the stream, and what waits for it is of no use.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.ready.clear();
        self.more = false;
        self.restart();
    }

    /// A new session begins: records of the one before are not sent any more, and the next one refers to nothing before it.
    /// One that is half sent ends where it is: the first chunk of another ends it over there too.
    pub fn restart(&mut self) {
        self.queue.retain(|item| !matches!(item, Item::Record(_)));
        (self.next, self.copying) = (None, false);
        self.encoder.reset();
    }

    /// A message.
    pub fn message(&mut self, frame: Frame) {
        self.queue.push_back(Item::Message(frame));
    }

    /// A message that replaces one of its kind which nothing followed yet.
    pub fn heartbeat(&mut self, frame: Frame) {
        if let Some(Item::Heartbeat(last)) = self.queue.back_mut() {
            *last = frame;
        } else {
            self.queue.push_back(Item::Heartbeat(frame));
        }
    }

    /// A record and its message.
    pub fn record(&mut self, job: Job) {
        self.queue.push_back(Item::Record(Box::new(job)));
    }

    /// There is something to encode that the link would take.
    pub fn is_busy(&self) -> bool {
        self.more
    }

    /// Bytes of full copies that were sent since this was asked last.
    pub fn take_copied(&mut self) -> u64 {
        std::mem::take(&mut self.copied)
    }

    /// Gives to the link what it takes, for `piece` of time at most where something has to be encoded. Makes some progress always.
    ///
    /// # Errors
    /// Why a record could not be encoded, or a frame not be sent: what was given up is not sent any more.
    pub fn pump(
        &mut self,
        piece: Duration,
        mut link: impl FnMut(&Frame) -> Result<(), SendError>,
    ) -> Result<(), String> {
        let until = Instant::now() + piece;
        self.more = false;
        loop {
            while let Some(frame) = self.ready.front() {
                match link(frame) {
                    Ok(()) => drop(self.ready.pop_front()),
                    Err(SendError::Full) => return Ok(()),
                    Err(error) => {
                        self.clear();
                        return Err(format!("a frame cannot be sent: {error}"));
                    }
                }
            }
            if self.more {
                return Ok(());
            }
            match self.queue.pop_front() {
                None => return Ok(()),
                Some(Item::Message(frame) | Item::Heartbeat(frame)) => self.ready.push_back(frame),
                Some(Item::Record(mut job)) => match self.encode(&mut job, until) {
                    Ok(true) => self.more = !self.queue.is_empty() && Instant::now() >= until,
                    Ok(false) => {
                        self.more = Instant::now() >= until;
                        self.queue.push_front(Item::Record(job));
                    }
                    Err(error) => {
                        self.encoder.reset();
                        self.next = None;
                        return Err(format!("{:?} cannot be encoded: {error}", job.id));
                    }
                },
            }
        }
    }

    fn begin(&mut self, job: &Job) -> Result<At, EncodeError> {
        match job.id {
            RecordId::Epoch(epoch) => {
                let completes = job.completes.is_some() && std::mem::take(&mut self.copying);
                // Asked for again, say: what it counted as sent before is not there.
                if self.next != Some(epoch) && !completes {
                    self.encoder.reset();
                }
                self.copying = false;
                self.next = Some(epoch.next());
            }
            RecordId::Copy { seq, .. } => {
                if seq == 0 {
                    self.encoder.reset();
                }
                // After the last piece of a copy the epoch that completes it follows, in the same stream.
                (self.next, self.copying) = (None, true);
            }
        }
        let bytes_before = self.encoder.bytes_out();
        self.encoder.begin(job.term, job.id)?;
        Ok(At {
            bytes_before,
            ..At::default()
        })
    }

    /// Encodes until chunks are ready, or until the time is over; true at the record's end.
    fn encode(&mut self, job: &mut Job, until: Instant) -> Result<bool, EncodeError> {
        let mut at = match job.at {
            Some(at) => at,
            None => {
                self.ready.push_back(job.header.clone());
                self.begin(job)?
            }
        };
        let mut out = Vec::new();
        let (pages, ops) = (job.record.pages.as_ref(), job.ops());
        let all = pages.map_or(0, |p| p.gfns().len());
        while at.pages < all {
            let first = at.pages;
            for (gfn, page) in pages.into_iter().flat_map(|p| p.iter_from(first)).take(STRIDE) {
                self.encoder.page(gfn, page, &mut out)?;
                at.pages += 1;
            }
            let late = Instant::now() >= until;
            if late && at.pages < all {
                // The other side hears something after each piece, also when its pages took next to no bytes.
                self.encoder.end_chunk(&mut out);
            }
            if at.pages < all && !out.is_empty() {
                return Ok(self.pause(job, at, out));
            }
        }
        while at.ops < ops.len() {
            for op in ops.iter().skip(at.ops).take(STRIDE) {
                self.encoder.disk(&wire_op(op), &mut out)?;
                at.ops += 1;
            }
            if at.ops < ops.len() && (!out.is_empty() || Instant::now() >= until) {
                return Ok(self.pause(job, at, out));
            }
        }
        if !job.record.state.is_empty() {
            self.encoder.device(&job.record.state, &mut out)?;
        }
        let trailer = Trailer {
            has_flush: job.flush,
            output_boundary: job.record.boundary,
        };
        self.encoder.finish(trailer, &mut out)?;
        self.ready.extend(out);
        if let RecordId::Copy { .. } = job.id {
            self.copied += job.cost.max(self.encoder.bytes_out() - at.bytes_before);
        }
        Ok(true)
    }

    fn pause(&mut self, job: &mut Job, at: At, out: Vec<Frame>) -> bool {
        self.ready.extend(out);
        job.at = Some(at);
        false
    }
}

/// A record that is a piece of a full copy.
pub fn copy_record(pages: SealedPages, disk: Vec<NumberedOp>) -> Record {
    Record {
        pages: Some(pages),
        state: Vec::new(),
        boundary: 0,
        disk: Some(disk),
        bases: std::collections::BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use steadfast_capture::PageArena;
    use steadfast_types::Gfn;
    use steadfast_wire::record::{StageConfig, Staged};
    use steadfast_wire::{BufPool, EncodeConfig, Kind, PageSink, Stager};

    const VM: u64 = 7;

    fn message(text: u8) -> Frame {
        Frame::control(VM, Term(1), vec![text])
    }

    /// A page whose content is as hard to encode as it gets, different in each epoch; every other one is zero.
    fn content(gfn: u64, salt: u64) -> [u8; 4096] {
        let mut x = (gfn * 1000 + salt) | 1;
        std::array::from_fn(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            if gfn.is_multiple_of(2) { 0 } else { x as u8 }
        })
    }

    fn epoch(number: u64, pages: u64) -> Job {
        let gfns: Vec<Gfn> = (0..pages).map(Gfn).collect();
        let sealed = PageArena::new(0, 0).seal(&gfns, |part, into| {
            part.iter().zip(into).for_each(|(g, p)| *p = content(g.0, number));
            Ok::<_, ()>(())
        });
        let record = Record {
            pages: Some(sealed.unwrap()),
            state: vec![number as u8; 9000],
            boundary: 3,
            disk: None,
            bases: BTreeMap::new(),
        };
        let id = RecordId::Epoch(Epoch(number));
        Job::new(message(number as u8), Term(1), id, Arc::new(record))
    }

    fn outgoing() -> Outgoing {
        let config = EncodeConfig {
            chunk_bytes: 128 << 10,
            ..EncodeConfig::default()
        };
        Outgoing::new(Encoder::new(VM, &config, BufPool::new(1 << 20)))
    }

    #[derive(Default)]
    struct Memory(BTreeMap<u64, Box<[u8; 4096]>>);

    impl PageSink for Memory {
        fn update(&mut self, gfn: Gfn, change: &mut dyn FnMut(&mut [u8; 4096])) -> bool {
            change(self.0.entry(gfn.0).or_insert_with(|| Box::new([0; 4096])));
            true
        }
    }

    /// What the other side makes of frames: messages, and the epochs that became whole, in order.
    fn receive(frames: Vec<Frame>, stager: &mut Stager, memory: &mut Memory) -> Vec<String> {
        let mut heard = Vec::new();
        for frame in frames {
            if frame.kind == Kind::Control {
                heard.push(format!("m{}", frame.payload()[0]));
            } else if let Staged::Complete(record) = stager.chunk(frame).unwrap() {
                record.apply(memory).unwrap();
                heard.push(format!("{:?}", record.id()));
            }
        }
        heard
    }

    #[test]
    fn a_large_epoch_goes_out_in_pieces_and_in_order() {
        let mut out = outgoing();
        out.message(message(100));
        out.record(epoch(1, 2000));
        out.heartbeat(message(101));
        out.heartbeat(message(102));
        out.record(epoch(2, 2000));
        out.heartbeat(message(103));
        let (mut all, mut pumps, mut silent) = (Vec::new(), 0, 0);
        loop {
            // A link that has room for five frames each time, and an engine that has no time at all.
            let before = all.len();
            out.pump(Duration::ZERO, |f| {
                if all.len() == before + 5 {
                    return Err(SendError::Full);
                }
                all.push(f.clone());
                Ok(())
            })
            .unwrap();
            pumps += 1;
            silent += usize::from(all.len() == before);
            if !out.is_busy() && all.len() < before + 5 {
                break;
            }
        }
        assert!(
            pumps > 60 && silent == 0,
            "{pumps} pieces, {silent} without a frame"
        );
        let (mut stager, mut memory) = (Stager::new(StageConfig::default(), |_| true), Memory::default());
        let heard = receive(all, &mut stager, &mut memory);
        assert_eq!(
            heard,
            [
                "m100",
                "m1",
                "Epoch(Epoch(1))",
                "m102",
                "m2",
                "Epoch(Epoch(2))",
                "m103"
            ]
        );
        assert!((0..2000).all(|g| *memory.0[&g] == content(g, 2)));
    }

    #[test]
    fn a_usual_epoch_is_out_at_once() {
        let mut out = outgoing();
        out.record(epoch(1, 40));
        let mut all = Vec::new();
        let mut take = |f: &Frame| {
            all.push(f.clone());
            Ok(())
        };
        out.pump(Duration::from_secs(60), &mut take).unwrap();
        assert!(!out.is_busy());
        let (mut stager, mut memory) = (Stager::new(StageConfig::default(), |_| true), Memory::default());
        assert_eq!(receive(all, &mut stager, &mut memory), ["m1", "Epoch(Epoch(1))"]);
    }

    #[test]
    fn a_new_session_ends_a_record_that_is_half_sent() {
        let mut out = outgoing();
        out.record(epoch(1, 2000));
        let mut all = Vec::new();
        out.pump(Duration::ZERO, |f| {
            all.push(f.clone());
            Ok(())
        })
        .unwrap();
        assert!(out.is_busy());
        out.restart();
        out.message(message(50));
        out.record(epoch(5, 100));
        out.pump(Duration::from_secs(60), |f| {
            all.push(f.clone());
            Ok(())
        })
        .unwrap();
        let (mut stager, mut memory) = (Stager::new(StageConfig::default(), |_| true), Memory::default());
        assert_eq!(
            receive(all, &mut stager, &mut memory),
            ["m1", "m50", "m5", "Epoch(Epoch(5))"]
        );
        assert!((0..100).all(|g| *memory.0[&g] == content(g, 5)));
    }

    /// The epoch that completes a copy is asked for again in the same session: it is sent in full, not as what changed since it was
    /// sent first.
    #[test]
    fn the_end_of_a_copy_can_be_sent_again() {
        let mut out = outgoing();
        let mut copy = epoch(1, 60);
        copy.id = RecordId::Copy { join: 9, seq: 0 };
        out.record(copy);
        let base = || {
            let mut base = epoch(2, 40);
            base.completes = Some(HostId::new("b").unwrap());
            base
        };
        out.record(base());
        let pump = |out: &mut Outgoing| {
            let mut all = Vec::new();
            let take = |f: &Frame| {
                all.push(f.clone());
                Ok(())
            };
            out.pump(Duration::from_secs(60), take).unwrap();
            all
        };
        let first = pump(&mut out);
        let (mut stager, mut memory) = (Stager::new(StageConfig::default(), |_| true), Memory::default());
        let mut lost = Memory::default();
        // The copy's piece is stored; what completes it is dropped over there.
        let end_of_copy = first.iter().rposition(|f| f.kind == Kind::Control).unwrap();
        let (piece, dropped) = first.split_at(end_of_copy);
        receive(piece.to_vec(), &mut stager, &mut memory);
        receive(dropped.to_vec(), &mut stager, &mut lost);
        out.record(base());
        let again = pump(&mut out);
        receive(again, &mut stager, &mut memory);
        assert!((0..40).all(|g| *memory.0[&g] == content(g, 2)));
        assert!((40..60).all(|g| *memory.0[&g] == content(g, 1)));
    }

    #[test]
    fn a_link_that_is_closed_is_told_once() {
        let mut out = outgoing();
        out.record(epoch(1, 200));
        assert!(out.pump(PIECE, |_| Err(SendError::Closed)).is_err());
        assert!(!out.is_busy());
        out.pump(PIECE, |_| panic!("nothing waits any more")).unwrap();
    }
}
