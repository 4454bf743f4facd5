//! What a standby does at the protocol's word: stage, apply, promote.

use crate::applying::Applying;
use crate::engine::Engine;
use crate::primary::machine_failed;
use std::sync::PoisonError;
use std::time::Instant;
use steadfast_epoch::io::Event;
use steadfast_epoch::message::EpochRef;
use steadfast_machine::machine::MachineError;
use steadfast_machine::memory::Ram;
use steadfast_machine::state::{MachineState, StateError};
use steadfast_net::announcement;
use steadfast_types::{Epoch, Gfn, PAGE_SIZE, Term};
use steadfast_vmm::process::ProcessError;
use steadfast_vmm::spec::{made_mac, parse_mac};
use steadfast_wire::PageSink;
use vm_memory::{Bytes, GuestAddress};

/// Guest RAM of a machine that does not run, as the place where records are applied.
pub(crate) struct RamSink<'a>(pub &'a Ram);

impl PageSink for RamSink<'_> {
    fn update(&mut self, gfn: Gfn, change: &mut dyn FnMut(&mut [u8; 4096])) -> bool {
        let at = GuestAddress(gfn.address());
        let mut page = [0; 4096];
        if self.0.memory().read_slice(&mut page, at).is_err() {
            return false;
        }
        change(&mut page);
        self.0.memory().write_slice(&page, at).is_ok()
    }
}

impl Engine {
    pub(crate) fn begin_join(&mut self, join: u64) {
        self.spoil_copy("the standby is filled anew");
        self.note(format!("full copy {join} begins"));
        self.counters.fills += 1;
        self.staged.clear();
        self.state.clear();
        self.forget_memory();
        self.base = (None, true);
        self.taken_whole = None;
        self.follow_cpu();
        self.keep_patience();
        self.await_given_back();
        self.disks.begin_copy(join);
    }

    /// Memory of a standby that has disks only: whatever was there before is gone before a guest is booted on it.
    fn give_memory_back(&mut self) {
        self.await_given_back();
        let ram = self.vm.machine.ram().clone();
        let work = move || {
            for r in ram.regions() {
                ram.give_back(Gfn(r.start / PAGE_SIZE), r.len / PAGE_SIZE);
            }
        };
        let thread = std::thread::Builder::new().name("give-back".into());
        match thread.spawn(work.clone()) {
            Ok(handle) => self.gives_back = Some(handle),
            Err(_) => work(),
        }
    }

    /// Nothing may be written there before.
    fn await_given_back(&mut self) {
        if let Some(thread) = self.gives_back.take() {
            let _ = thread.join();
        }
    }

    pub(crate) fn store_chunk(&mut self, join: u64, seq: u64) {
        let Some(record) = self.arrived.take() else { return };
        if let Err(error) = record.apply(&mut RamSink(self.vm.machine.ram())) {
            self.note(format!("chunk {seq} of copy {join}: {error}"));
            self.disks.copy_failed = true;
            self.events.push_back(Event::StateLost);
        }
        if let Err(error) = self.disks.store_chunk(join, &record) {
            self.note(format!("chunk {seq} of copy {join}: {error}"));
            self.disks.copy_failed = true;
        }
    }

    /// Keeps the record that just arrived; applies nothing.
    pub(crate) fn stage(&mut self, epoch: EpochRef, flush: bool) {
        let Some(record) = self.arrived.take() else {
            self.note(format!("epoch {epoch} should be staged but is not here"));
            return;
        };
        let whole = !record.device().is_empty();
        if std::mem::take(&mut self.base.1) {
            self.base.0 = Some(epoch.epoch);
            self.taken_whole = Some(whole);
            self.keep_patience();
            if !whole {
                self.give_memory_back();
            }
        }
        if self.taken_whole != Some(whole) {
            // I3: what began as a copy of the disks has no memory, and what began as a whole one stays whole. Not acknowledged.
            self.note(format!(
                "epoch {epoch} is of another extent: this standby begins anew"
            ));
            self.events.push_back(Event::StateLost);
            return;
        }
        if !self.disks.is_empty() {
            match self.disks.stage(epoch, flush, &record) {
                Ok(events) => self.events.extend(events),
                Err(error) => {
                    self.note(format!("epoch {epoch}: {error}"));
                    self.events.push_back(Event::StateLost);
                }
            }
            self.staged.insert(epoch.epoch, record);
            return;
        }
        self.staged.insert(epoch.epoch, record);
        self.events.push_back(Event::Staged { epoch });
        if flush {
            self.events
                .push_back(Event::JournalSynced { through: epoch.epoch });
        }
    }

    pub(crate) fn compare(&mut self, epoch: Epoch, term: Term) {
        let Some(audit) = &self.audit else { return };
        let Some(stale) = audit.compare(self.vm.machine.ram(), epoch.0, term.0) else {
            return;
        };
        self.audited.0 += stale.len() as u64;
        self.audited.1 += 1;
        if !stale.is_empty() {
            self.note(format!(
                "AUDIT: epoch {epoch} of term {term}: {} stale pages: {:?}",
                stale.len(),
                &stale[..stale.len().min(8)]
            ));
        }
    }

    pub(crate) fn truncate(&mut self, after: EpochRef) {
        let _dropped = self.staged.split_off(&after.epoch.next());
        if let Err(error) = self.disks.truncate(after.epoch) {
            self.note(format!("what follows epoch {after} cannot be dropped: {error}"));
            self.events.push_back(Event::StateLost);
        }
        // What is sent again refers to nothing before it.
        for peer in self.peers.values_mut() {
            peer.stager.forget();
        }
    }

    /// This instance is the primary now: the machine goes on from exactly epoch `at`.
    pub(crate) fn promote(&mut self, term: Term, at: EpochRef, released: Epoch) -> Result<(), ProcessError> {
        let began = Instant::now();
        self.await_built()?;
        self.await_given_back();
        self.spoil_copy("the standby took over");
        let _never = self.staged.split_off(&at.epoch.next());
        let whole = self.apply_memory(at.epoch, None);
        // I3: better no guest than one whose memory is of two instants.
        whole.map_err(|why| machine_failed(MachineError::State(StateError::Refused(why))))?;
        self.applying = Applying::default();
        // The protocol stands beyond these reports.
        self.events.clear();
        // What is here tells how much of the VM is.
        self.whole = !self.state.is_empty();
        let state = self
            .whole
            .then(|| postcard::from_bytes::<MachineState>(&self.state));
        let state = state.transpose().map_err(|e| {
            let why = format!("the state of epoch {at} does not parse: {e}");
            machine_failed(MachineError::State(StateError::Refused(why)))
        })?;
        // Before the devices begin: what waits at a NIC was for the former primary, and what they send is held.
        self.set_holds(self.hold_mode());
        // Before the devices: they issue again what was in flight at the cut.
        self.disks
            .promote(at, term)
            .map_err(crate::primary::disk_failed)?;
        self.take_shared(true)?;
        self.reached("load");
        match state {
            Some(state) => {
                // Requests that were in flight may come to their end at once, into memory that other standbys must hear of.
                self.vm.machine.start_dirty_tracking()?;
                self.tracks = true;
                if let Some(cpu) = &self.guest_cpu {
                    self.vm.machine.set_cpu(cpu).map_err(machine_failed)?;
                }
                self.vm.machine.restore(state).map_err(machine_failed)?;
            }
            None => {
                self.note("only its disks are here: the guest is booted".into());
                self.vm.boot()?;
            }
        }
        self.staged.clear();
        for peer in self.peers.values_mut() {
            peer.join = None;
            peer.fed = !peer.dead;
            peer.reset_stream();
        }
        self.run_on()?;
        self.reached("resume");
        // Switches learn the new place at once, from the monitor; neighbours from the guest, when it gets to it.
        self.announce();
        for nic in &self.vm.nics {
            nic.announce();
        }
        self.reached("announce");
        self.timeline.running(self.now());
        let took = began.elapsed().as_micros() as u64;
        self.counters.promote_us = Some(took);
        self.note(format!(
            "promoted under term {term} at epoch {at}, released {released}, in {took} us"
        ));
        Ok(())
    }

    fn announce(&self) {
        let spec = &self.vm.spec;
        let holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, (nic, hold)) in spec.nics.iter().zip(holds.iter()).enumerate() {
            let mac = nic
                .mac
                .as_deref()
                .map_or_else(|| Ok(made_mac(&spec.name, index)), parse_mac);
            // A frame that cannot leave is one that the guest's own announcement makes up for.
            if let Ok(mac) = mac {
                let _ = hold.inject(&announcement(mac));
            }
        }
    }
}
