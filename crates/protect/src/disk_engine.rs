//! The engine's part in the care for disks: messages beside the protocol, the answer to faults, the pace of copies.

use crate::aside::{self, Aside};
use crate::ask::Question;
use crate::config::COPY_RATE_MIN;
use crate::crowd::Crowd;
use crate::disk_care::Trouble;
use crate::disks::CHUNK_BYTES;
use crate::engine::Engine;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use steadfast_disk::resync::RateLimit;
use steadfast_disk::scrub::PeerError;
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_epoch::message::{EpochRef, Message, Welcome};
use steadfast_types::{Epoch, HostId, PAGE_SIZE};
use steadfast_vmm::process::ProcessError;
use steadfast_wire::Frame;

/// Disks are looked at so often.
const LOOK: Duration = Duration::from_millis(50);
/// What is held durably is told so often, when it moved.
const TELL: Duration = Duration::from_millis(500);
/// A handover that did not come about is tried again after this.
const HAND_OVER_AGAIN: Duration = Duration::from_secs(2);
/// Copies of this instance that are remembered.
const JOINS_KEPT: usize = 64;

/// A piece of a copy that waits for its turn.
pub struct WaitingChunk {
    to: HostId,
    message: Message,
    join: u64,
    seq: u64,
    have: EpochRef,
}

/// A cut that waits for room in a journal.
pub type WaitingCut = (Epoch, Vec<HostId>, bool);

/// The engine's own state for all this.
pub struct Care {
    rate: u64,
    pace: RateLimit,
    due_us: u64,
    crowd: Crowd,
    /// What copies took of this thread since the last piece was asked for.
    worked: Duration,
    chunks: VecDeque<WaitingChunk>,
    pub cut: Option<WaitingCut>,
    looked: Instant,
    told: (Instant, Option<EpochRef>),
    handed: Option<Instant>,
    trouble: Option<Trouble>,
    waits: Option<String>,
    /// Numbers of the copies that this instance began.
    joins: VecDeque<u64>,
    handovers: u64,
}

impl Care {
    pub fn new(copy_bytes_per_s: u64) -> Self {
        let now = Instant::now();
        Self {
            rate: copy_bytes_per_s,
            pace: RateLimit::new(copy_bytes_per_s),
            due_us: 0,
            crowd: Crowd::new(),
            worked: Duration::ZERO,
            chunks: VecDeque::new(),
            cut: None,
            looked: now,
            told: (now, None),
            handed: None,
            trouble: None,
            waits: None,
            joins: VecDeque::new(),
            handovers: 0,
        }
    }

    /// Bytes of pages and of disks, each, in one piece of a copy: a twentieth of a second's worth.
    pub fn piece_bytes(&self) -> u64 {
        let most = match Crowd::rests(self.crowd.last_percent()) {
            0 => CHUNK_BYTES,
            // What waits for a CPU meanwhile shall not wait for long.
            _ => CHUNK_BYTES / 8,
        };
        match self.rate {
            0 => most,
            rate => (rate / 40).clamp(64 << 10, most),
        }
    }

    /// Pages of one piece.
    pub fn piece_pages(&self) -> usize {
        (self.piece_bytes() / PAGE_SIZE) as usize
    }

    /// Notes what was sent.
    pub fn sent(&mut self, now_us: u64, bytes: u64) {
        self.due_us = self.due_us.max(now_us + self.pace.spend(now_us, bytes));
    }

    /// Notes what a copy took of this thread.
    pub fn worked(&mut self, took: Duration) {
        self.worked += took;
    }

    /// The next piece of a copy comes later where the host's CPUs are wanted by others.
    fn give_way(&mut self, now_us: u64) {
        let rest = std::mem::take(&mut self.worked) * Crowd::rests(self.crowd.percent(Instant::now()));
        self.due_us = self.due_us.max(now_us + rest.as_micros() as u64);
    }

    /// Nothing that waits is of use any more: this host runs the VM no more.
    pub fn step_down(&mut self) {
        self.chunks.clear();
        (self.cut, self.handed) = (None, None);
    }

    /// Something waits for its time.
    pub fn waits(&self) -> bool {
        !self.chunks.is_empty() || self.cut.is_some()
    }
}

impl Engine {
    pub(crate) fn aside(&mut self, to: &HostId, message: &Aside) {
        let frame = Frame::control(self.vm_hash, self.replica.term(), aside::encode(message));
        if let Some(peer) = self.peers.get_mut(to) {
            peer.out.message(frame);
            peer.flush();
        }
    }

    /// A message beside the protocol.
    pub(crate) fn heard_aside(&mut self, host: &HostId, message: Option<Aside>) -> Result<(), ProcessError> {
        match message {
            None => self.note(format!(
                "{host} sent a message beside the protocol that does not parse"
            )),
            Some(Aside::Read {
                id,
                volume,
                offset,
                len,
            }) => {
                let question = self.disks.shelf(volume).map(|from| Question {
                    host: host.clone(),
                    id,
                    from,
                    offset,
                    len,
                });
                let taken = question.is_some_and(|q| self.disks.serve.try_send(q).is_ok());
                if !taken {
                    let got = Err(PeerError::Failed("this host does not answer now".into()));
                    self.aside(host, &Aside::Block { id, got });
                }
            }
            Some(Aside::Block { id, got }) => self.disks.asks.answer(id, got),
            Some(Aside::Holds(at)) => {
                if let Some(slot) = self.peers.get(host).map(|p| p.slot) {
                    self.disks.peer_holds(slot, at);
                }
            }
            Some(Aside::Stands(copy)) => {
                if let Some(peer) = self.peers.get_mut(host) {
                    peer.unfinished = copy;
                }
            }
            Some(Aside::Cpu(cpu)) => self.heard_cpu(host, cpu),
            Some(Aside::Unfit(why)) => self.heard_unfit(host, why),
            Some(Aside::Shared { id, marks }) => self.heard_shared(host, id, marks),
            Some(Aside::SharedSeen { id, why }) => {
                return self.heard_shared_seen(host, id, why.as_deref());
            }
        }
        Ok(())
    }

    /// A thread asks for a block: of the primary by a standby, of a standby in sync by the primary.
    pub(crate) fn disk_ask(&mut self, id: u64, volume: u16, offset: u64, len: u32) {
        let to = match self.replica.status() {
            Status::Primary(p) => p
                .members
                .into_iter()
                .find(|m| m.in_sync && !m.lost)
                .map(|m| m.host),
            Status::Standby(s) => s.owner,
        };
        match to.filter(|h| self.peers.get(h).is_some_and(|p| p.connected)) {
            Some(to) => self.aside(
                &to,
                &Aside::Read {
                    id,
                    volume,
                    offset,
                    len,
                },
            ),
            None => self.disks.asks.answer(id, Err(PeerError::Absent)),
        }
    }

    /// Completes a Welcome with what the disks are right now. False: with this disk here no state can be kept, or not on this CPU, and
    /// the greeting goes unanswered until that is different.
    pub(crate) fn welcome(&mut self, to: &HostId, welcome: &mut Welcome) -> bool {
        if !self.fits(to) {
            return false;
        }
        if self.disks.is_empty() {
            return true;
        }
        self.disks.reopen();
        if let Some(trouble) = self.disks.trouble() {
            self.in_trouble(Some(trouble));
            return false;
        }
        let unfinished = self.disks.unfinished();
        self.aside(to, &Aside::Stands(unfinished));
        welcome.disk = self.disks.have();
        true
    }

    /// From which epoch on the disks of `host` lack changes, for the copy `join` that begins. What its Welcome said; or,
    /// where an unfinished copy of this very instance stands there, the epoch below that.
    pub(crate) fn copy_from(&mut self, host: &HostId, join: u64, have: EpochRef) -> EpochRef {
        let unfinished = self.peers.get_mut(host).and_then(|p| p.unfinished.take());
        let ours = unfinished.filter(|(old, _)| self.care.joins.contains(old));
        if self.care.joins.len() == JOINS_KEPT {
            self.care.joins.pop_front();
        }
        self.care.joins.push_back(join);
        match ours {
            Some((_, at)) if have == EpochRef::ZERO => at,
            _ => have,
        }
    }

    /// A piece of a copy is to be sent: now, or when it is its turn.
    pub(crate) fn pace_chunk(
        &mut self,
        to: HostId,
        message: Message,
        join: u64,
        seq: u64,
        have: EpochRef,
    ) -> Result<(), ProcessError> {
        self.care.give_way(self.now());
        if self.care.chunks.is_empty() && self.now() >= self.care.due_us {
            return self.send_chunk(&to, message, join, seq, have);
        }
        self.care.chunks.push_back(WaitingChunk {
            to,
            message,
            join,
            seq,
            have,
        });
        Ok(())
    }

    /// What waited for its turn, and whose turn it is.
    fn due_chunks(&mut self) -> Result<(), ProcessError> {
        while self.now() >= self.care.due_us {
            let Some(c) = self.care.chunks.pop_front() else {
                break;
            };
            self.send_chunk(&c.to, c.message, c.join, c.seq, c.have)?;
            self.step(Event::Tick)?;
        }
        Ok(())
    }

    /// The rate of copies, from now on.
    pub(crate) fn set_copy_rate(&mut self, bytes_per_s: u64) -> Result<(), String> {
        if bytes_per_s != 0 && bytes_per_s < COPY_RATE_MIN {
            return Err(format!(
                "a copy cannot be slower than {COPY_RATE_MIN} bytes a second (0: as fast as the link)"
            ));
        }
        self.care.rate = bytes_per_s;
        self.care.pace = RateLimit::new(bytes_per_s);
        self.care.due_us = 0;
        self.note(format!("copies go at {bytes_per_s} bytes a second (0: no limit)"));
        Ok(())
    }

    /// Looks after disks; called often.
    pub(crate) fn care(&mut self) -> Result<(), ProcessError> {
        if !self.care.chunks.is_empty() {
            self.due_chunks()?;
        }
        if self.disks.is_empty() {
            return Ok(());
        }
        if self.care.cut.is_some()
            && self.disks.can_seal()
            && let Some((epoch, bases, freeze)) = self.care.cut.take()
        {
            self.cut(epoch, &bases, freeze)?;
            self.step(Event::Tick)?;
        }
        if self.care.looked.elapsed() < LOOK {
            return Ok(());
        }
        self.care.looked = Instant::now();
        self.tell_durable();
        self.care.waits = self.disks.waits();
        let trouble = self.disks.trouble();
        self.in_trouble(trouble.clone());
        match trouble {
            Some(trouble) => self.answer(&trouble),
            None => Ok(()),
        }
    }

    fn tell_durable(&mut self) {
        let (at, last) = self.care.told;
        if at.elapsed() < TELL {
            return;
        }
        let now = self.disks.durable();
        self.care.told = (Instant::now(), now);
        if let Some(holds) = now.filter(|_| now != last) {
            let peers: Vec<_> = self
                .peers
                .values()
                .filter(|p| p.connected)
                .map(|p| p.host.clone())
                .collect();
            for host in peers {
                self.aside(&host, &Aside::Holds(holds));
            }
        }
    }

    fn in_trouble(&mut self, trouble: Option<Trouble>) {
        let kind = |t: &Option<Trouble>| t.as_ref().map(std::mem::discriminant);
        if kind(&trouble) != kind(&self.care.trouble) {
            match &trouble {
                Some(t) => self.note(format!("ALARM: {}", t.text())),
                None => self.note("the disks work again".into()),
            }
        }
        self.care.trouble = trouble;
    }

    fn answer(&mut self, trouble: &Trouble) -> Result<(), ProcessError> {
        let p = match self.replica.status() {
            Status::Primary(p) => p,
            Status::Standby(_) if self.memory.is_some() || self.applying.is_busy() => {
                // Its next copy begins when the disk works again.
                self.forget_memory();
                self.note(format!("this standby's state is given up: {}", trouble.text()));
                return self.step(Event::StateLost);
            }
            Status::Standby(_) => return Ok(()),
        };
        // Nobody else can go on: the guest's requests wait here.
        let Some(to) = p
            .members
            .into_iter()
            .find(|m| m.in_sync && !m.lost)
            .map(|m| m.host)
        else {
            return Ok(());
        };
        match trouble {
            Trouble::Journal(why) => {
                self.abandoned = true;
                Err(ProcessError::DiskFault(format!("{why}; {to} goes on")))
            }
            // Whoever goes on boots the guest in any case.
            Trouble::Image(why) if !self.whole => {
                self.abandoned = true;
                Err(ProcessError::DiskFault(format!("{why}; {to} boots the guest")))
            }
            Trouble::Image(why) => {
                if self.care.handed.is_none_or(|at| at.elapsed() >= HAND_OVER_AGAIN) {
                    self.care.handed = Some(Instant::now());
                    self.care.handovers += 1;
                    self.note(format!("handed over to {to}: {why}"));
                    return self.step(Event::HandOver(to));
                }
                Ok(())
            }
        }
    }

    /// For the status.
    pub(crate) fn disk_status(&self) -> Value {
        let mut status = self.disks.status();
        status["alarm"] = json!(
            self.care
                .trouble
                .as_ref()
                .map(|t| t.text().to_owned())
                .or_else(|| self.care.waits.clone())
        );
        status["copy_bytes_per_s"] = json!(self.care.rate);
        status["shared"] = self.shared.status();
        status["copies"] = self
            .peers
            .values()
            .map(|p| (p.host.to_string(), self.disks.copy_status(p.slot)))
            .collect::<serde_json::Map<_, _>>()
            .into();
        status
    }
}
