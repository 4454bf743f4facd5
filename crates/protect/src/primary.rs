//! What a primary does at the protocol's word: cut, copy, release.

use crate::disks::Cut;
use crate::engine::Engine;
use crate::former::Frozen;
use crate::outgoing::{Job, copy_record};
use crate::peer::{Join, Record};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use steadfast_capture::Beside;
use steadfast_epoch::io::{Event, SealedEpoch};
use steadfast_epoch::message::{EpochRef, Message};
use steadfast_epoch::{Primary, Status};
use steadfast_machine::machine::MachineError;
use steadfast_net::{Hold, HoldMode};
use steadfast_types::{Epoch, Gfn, HostId, Term};
use steadfast_vmm::process::ProcessError;
use steadfast_wire::{Frame, RecordId};

/// Times that a full copy looks again for what was dirtied meanwhile, before its base epoch takes the rest.
const COPY_ROUNDS: u32 = 4;
/// Rounds end early when this little is dirty.
const COPY_ENOUGH_PAGES: usize = 512;
/// A cut that fails so often in a row ends this instance: its standby is better off.
const CUT_FAILURES_MAX: u32 = 5;

impl Engine {
    /// Whether any host mirrors this VM, is being filled, or may come to be in sync by the epochs that are cut now: from the
    /// base of its copy on every epoch must be whole. Who only waits to be greeted begins with a copy.
    pub(crate) fn mirrored(&self) -> bool {
        match self.replica.status() {
            Status::Primary(p) => {
                p.members.iter().any(|m| m.in_sync) || self.peers.values().any(|p| p.join.is_some() || p.fed)
            }
            Status::Standby(_) => false,
        }
    }

    /// Cuts: seals epoch `epoch`, with all that the hosts in `bases` still miss.
    pub(crate) fn cut(&mut self, epoch: Epoch, bases: &[HostId], freeze: bool) -> Result<(), ProcessError> {
        if self.make_vm.is_none() {
            self.waiting_cut = Some((epoch, bases.to_vec(), freeze));
            return Ok(());
        }
        let holds = self.nics();
        let boundary = || holds.iter().map(|h| h.emitted()).sum();
        let term = match self.replica.status() {
            Status::Primary(p) => p.term,
            Status::Standby(_) => return Ok(()),
        };
        if freeze && !self.may_freeze(epoch, bases) {
            return Ok(());
        }
        if !self.disks.can_seal() {
            // The guest's writes wait, and so does the end of their epoch; the disk's trouble is looked at elsewhere.
            self.care.cut = Some((epoch, bases.to_vec(), freeze));
            return Ok(());
        }
        if !self.mirrored() && bases.is_empty() && !freeze {
            // Nobody needs the record: only the boundary of the outputs is marked. Dirty pages stay with KVM, and a
            // standby that comes later is filled from the start.
            self.run_anew();
            for h in &holds {
                h.cut(epoch.0);
            }
            // After the outputs: what left with this epoch may speak of writes and flushes before it, not after.
            let disks = self.disks.seal(epoch, term, &[]).map_err(disk_failed)?;
            tracing::debug!(at_us = self.now(), %epoch, flush = disks.flush, "cut, for nobody");
            let record = Record {
                pages: None,
                state: Vec::new(),
                boundary: boundary(),
                disk: Some(Vec::new()),
                bases: BTreeMap::new(),
            };
            self.sealed.push_back((epoch, Arc::new(record)));
            self.events.push_back(Event::Sealed(SealedEpoch {
                epoch,
                bytes: 0,
                flush: disks.flush,
                pause_us: 0,
                whole: false,
            }));
            if std::mem::take(&mut self.add_after_cut) {
                self.add_wanted();
            }
            return Ok(());
        }
        if !self.whole {
            return self.cut_disks(epoch, term, bases);
        }
        let mut extra: Vec<Gfn> = Vec::new();
        for base in bases {
            if let Some(join) = self.peers.get_mut(base).and_then(|p| p.join.as_mut()) {
                extra.extend(join.take_all());
            }
        }
        let mut carry = std::mem::take(&mut self.carry);
        extra.extend_from_slice(&carry);
        extra.sort_unstable();
        extra.dedup();
        let anew = self.anew.take();
        let mut beside = Beside { extra, anew };
        let slots: Vec<usize> = bases.iter().filter_map(|b| self.slot(b)).collect();
        let mut emitted = 0;
        let mut disks = None;
        let volumes = &mut self.disks;
        let (audit, ram) = (&mut self.audit, self.vm.machine.ram());
        let (failpoint, replica) = (&mut self.failpoint, &self.replica);
        let sealed = self
            .capture
            .cut(&self.vm.machine, &mut beside, freeze, |_, pages| {
                failpoint.at("pause", || replica.status());
                if let Some(audit) = audit {
                    audit.cut(ram, epoch.0, term.0, pages.gfns());
                }
                for h in &holds {
                    h.cut(epoch.0);
                }
                emitted = boundary();
                disks = Some(volumes.seal(epoch, term, &slots));
            });
        let sealed = match sealed {
            Ok(sealed) => sealed,
            Err(error) => {
                self.cut_failures += 1;
                if let Some(anew) = beside.anew {
                    carry.extend_from_slice(anew.gfns());
                }
                self.carry = carry;
                // Pages that were not dirty and yet missing there: nobody else remembers them.
                for base in bases {
                    if let Some(join) = self.peers.get_mut(base).and_then(|p| p.join.as_mut()) {
                        beside.extra.iter().for_each(|g| join.add(*g));
                    }
                }
                self.note(format!("cut {epoch} failed: {error}"));
                if self.cut_failures >= CUT_FAILURES_MAX {
                    return Err(ProcessError::Assemble(steadfast_vmm::AssembleError::Setting(
                        format!("{CUT_FAILURES_MAX} cuts in a row failed: {error}"),
                    )));
                }
                return self.cut(epoch, bases, freeze);
            }
        };
        self.reached("capture");
        self.cut_failures = 0;
        if freeze {
            let state = sealed.state.clone();
            self.frozen = Some(Frozen { at: epoch, state });
        }
        self.throttle.runs();
        let disks = disks.transpose().map_err(disk_failed)?;
        for (host, peer) in &mut self.peers {
            match &mut peer.join {
                Some(_) if bases.contains(host) => {
                    peer.join = None;
                    peer.fed = true;
                }
                Some(join) => sealed.pages.gfns().iter().for_each(|g| join.add(*g)),
                None => {}
            }
        }
        let pause_us = sealed.times.pause.as_micros() as u64;
        self.counters.cut(epoch, sealed.pages.gfns().len());
        let c = &mut self.counters;
        c.pause_us = (c.pause_us.0 + pause_us, c.pause_us.1.max(pause_us));
        c.last = sealed.times;
        c.pauses.add(pause_us);
        self.slow_pause(sealed.times);
        let mut record = Record {
            pages: Some(sealed.pages),
            state: sealed.state,
            boundary: emitted,
            disk: None,
            bases: BTreeMap::new(),
        };
        let flush = disks.as_ref().is_some_and(|d| d.flush);
        if let Some(disks) = &disks {
            self.add_disks(&mut record, epoch, disks, bases);
        }
        self.tell_sealed(epoch, record, flush, pause_us);
        if freeze {
            self.reached("freeze");
        }
        Ok(())
    }

    /// Adds what the cut sealed on the disks, and what completes the copies of `bases`: now, while the epoch cannot be committed; after that
    /// the journal may use the place of its bytes again.
    pub(crate) fn add_disks(&mut self, record: &mut Record, epoch: Epoch, cut: &Cut, bases: &[HostId]) {
        match self.disks.writes(cut) {
            Ok(ops) => record.disk = Some(ops),
            Err(error) => self.note(format!("epoch {epoch}: {error}")),
        }
        for (n, base) in bases.iter().enumerate() {
            match self.disks.residue(cut, n) {
                Ok(ops) => drop(record.bases.insert(base.clone(), ops)),
                Err(error) => self.note(format!("end of the copy to {base}: {error}")),
            }
        }
    }

    /// The protocol hears of an epoch that was cut.
    pub(crate) fn tell_sealed(&mut self, epoch: Epoch, record: Record, flush: bool, pause_us: u64) {
        let bytes = record.bytes();
        tracing::debug!(at_us = self.now(), %epoch, bytes, flush, pause_us, "cut");
        self.reached("seal");
        let whole = record.disk.is_some();
        self.sealed.push_back((epoch, Arc::new(record)));
        self.events.push_back(Event::Sealed(SealedEpoch {
            epoch,
            bytes,
            flush,
            pause_us,
            whole,
        }));
    }

    /// Sends one chunk of a full copy, read while the guest runs: what it writes meanwhile is dirty and comes again.
    pub(crate) fn send_chunk(
        &mut self,
        to: &HostId,
        message: Message,
        join: u64,
        seq: u64,
        have: EpochRef,
    ) -> Result<(), ProcessError> {
        let began = Instant::now();
        let wanted = |p: &Primary| p.wants_chunk(to, message.session, join, seq);
        if !self.replica.primary().is_some_and(wanted) {
            // It waited for its turn, and a new session has begun meanwhile: that has its own.
            return Ok(());
        }
        let mirrored_by_others = match self.replica.status() {
            Status::Primary(p) => p.members.iter().any(|m| m.in_sync) || self.peers.values().any(|p| p.fed),
            Status::Standby(_) => return Ok(()),
        };
        // Not while a reset is under way: looking lets the guest run on.
        let may_look = self.whole && !mirrored_by_others && !self.between_machines();
        let regions = self.vm.machine.ram().regions();
        let regions: Vec<_> = regions
            .iter()
            .filter(|_| self.whole)
            .map(|r| (r.start, r.len))
            .collect();
        let Some(slot) = self.slot(to) else { return Ok(()) };
        let (bytes, most) = (self.care.piece_bytes(), self.care.piece_pages());
        let mut failed = None;
        let copy = self.peers.get(to).and_then(|p| p.join.as_ref());
        if copy.is_none_or(|j| j.join != join) {
            let from = self.copy_from(to, join, have);
            failed = self.disks.begin_resync(slot, from).err();
            self.note(format!(
                "disks of {to} stand at {from}: {}",
                self.disks.copy_status(slot)
            ));
            if may_look {
                // All that is dirty now comes with the copy: the first cut beside it is no longer than any other, however
                // long the guest ran without a standby.
                self.look_for_dirty();
            }
        }
        let Some(peer) = self.peers.get_mut(to) else {
            return Ok(());
        };
        let state = match &mut peer.join {
            Some(j) if j.join == join => j,
            other => other.insert(Join::new(join, &regions)),
        };
        for (_, lost) in state.sent_disk.split_off(&seq) {
            self.disks.chunk_lost(slot, lost);
        }
        let disk = self.disks.next_chunk(slot, bytes);
        if let Ok(Some((number, op))) = &disk {
            let (offset, len) = op.range();
            state.sent_disk.insert(seq, (*number, offset, len));
        }
        failed = failed.or(disk.as_ref().err().cloned());
        let disk: Vec<_> = disk.ok().flatten().into_iter().collect();
        let pages = state.chunk(seq, most);
        if state.remaining() == 0 && state.rounds < COPY_ROUNDS && may_look {
            state.rounds += 1;
            let found = self.look_for_dirty();
            if found.is_some_and(|n| n <= COPY_ENOUGH_PAGES)
                && let Some(join) = self.peers.get_mut(to).and_then(|p| p.join.as_mut())
            {
                join.rounds = COPY_ROUNDS;
            }
        }
        let Some(peer) = self.peers.get_mut(to) else {
            return Ok(());
        };
        let missing = peer.join.as_ref().map_or(0, Join::remaining);
        let remaining = missing + self.disks.remaining(slot);
        match self.capture.copy_live(&self.vm.machine, &pages) {
            Ok(pages) => {
                let header = Frame::control(self.vm_hash, message.term, crate::codec::encode(&message));
                // What it takes of the link or of the disks, whichever is more.
                let cost = disk.iter().map(|(_, op)| op.range().1).sum();
                let record = Arc::new(copy_record(pages, disk));
                let mut job = Job::new(header, message.term, RecordId::Copy { join, seq }, record);
                job.cost = cost;
                peer.out.record(job);
                peer.flush();
                self.count_copied();
            }
            Err(error) => self.note(format!("chunk {seq} for {to}: {error}")),
        }
        if let Some(error) = failed {
            self.note(format!("disks in chunk {seq} for {to}: {error}"));
        }
        self.care.worked(began.elapsed());
        self.events.push_back(Event::ChunkSent {
            to: to.clone(),
            join,
            seq,
            remaining,
        });
        Ok(())
    }

    /// Looks for what the guest has changed; how many pages. What KVM gives up here is missing in every copy that is under way.
    fn look_for_dirty(&mut self) -> Option<usize> {
        let mut dirty = Vec::new();
        if let Err(error) = self.capture.harvest_only(&self.vm.machine, &mut dirty) {
            tracing::warn!(%error, "what is dirty could not be told; its pages come with the next cut");
            return None;
        }
        let joins = self.peers.values_mut().filter_map(|p| p.join.as_mut());
        joins.for_each(|j| dirty.iter().for_each(|g| j.add(*g)));
        Some(dirty.len())
    }

    /// Lets the outputs of committed epochs out.
    pub(crate) fn release(&mut self, through: Epoch) {
        let before = self.counters.released;
        for h in self.nics() {
            self.counters.released += h.release(through.0);
        }
        if self.counters.released > before {
            self.timeline.released(self.now());
        }
    }

    /// Drops records that nobody will ask for.
    pub(crate) fn forget(&mut self, through: Epoch) {
        while self.sealed.front().is_some_and(|(e, _)| *e <= through) {
            self.sealed.pop_front();
        }
    }

    /// Powers the VM on here.
    pub(crate) fn cold_boot(&mut self, term: Term, at: EpochRef) -> Result<(), ProcessError> {
        self.note(format!("boots here under term {term}, after epoch {at}"));
        self.disks.boot(at, term).map_err(disk_failed)?;
        let Some(from) = self.spec.takes_over.take() else {
            self.take_shared(true)?;
            self.vm.boot()?;
            return self.go_live();
        };
        self.wait_for_state(from)
    }

    /// Makes this machine the running one: outputs held, dirty pages tracked.
    pub(crate) fn go_live(&mut self) -> Result<(), ProcessError> {
        if self.whole {
            self.vm.machine.start_dirty_tracking()?;
            self.tracks = true;
        }
        self.run_on()
    }

    /// The same, of one whose dirty pages are tracked already.
    pub(crate) fn run_on(&mut self) -> Result<(), ProcessError> {
        self.set_holds(self.hold_mode());
        self.vm.machine.hurry_stops();
        self.vm.machine.resume();
        self.add_wanted();
        Ok(())
    }

    /// Mirrors to every host that it shall be mirrored to.
    pub(crate) fn add_wanted(&mut self) {
        let wanted = self.peers.values().filter(|p| p.wanted);
        self.events
            .extend(wanted.map(|p| Event::AddStandby(p.host.clone())));
    }

    /// The present NICs' queues.
    pub(crate) fn nics(&self) -> Vec<Arc<Hold>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where volumes keep account of what this host lacks.
    pub(crate) fn slot(&self, host: &HostId) -> Option<usize> {
        self.peers.get(host).map(|p| p.slot)
    }

    /// What becomes of frames while this instance runs the VM.
    pub(crate) fn hold_mode(&self) -> HoldMode {
        if self.takes_over() {
            return HoldMode::Mute;
        }
        match self.spec.hold_outputs || self.silent {
            true => HoldMode::Hold,
            false => HoldMode::Pass,
        }
    }

    pub(crate) fn set_holds(&self, mode: HoldMode) {
        for h in self.holds.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            h.set_mode(mode);
        }
    }
}

/// A disk that cannot be used ends this instance: its standby is better off.
pub(crate) fn disk_failed(why: String) -> ProcessError {
    ProcessError::Assemble(steadfast_vmm::AssembleError::Setting(why))
}

/// What a machine error means to this process.
pub(crate) fn machine_failed(error: MachineError) -> ProcessError {
    ProcessError::Restore(error)
}
