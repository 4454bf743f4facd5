//! How much of a VM is mirrored: all of it, or its disks only (class `restart`: it is booted where a copy of its disks is).
//!
//! ```text
//! whole       record = pages, machine state, disks     promotion: the guest goes on
//! disks only  record = disks                           promotion: the guest is booted from them, as of the epoch
//! ```
//! Everything else is the same: outputs are held until what they may speak of is safe on the standby, so that nothing that the guest has
//! flushed and then told the world is lost (I1, I5), and the arbiter decides who runs it (I2). A cut of disks stops nothing: no vCPU, no
//! device.
//!
//! What a standby has tells what it is: with machine state it is whole. A primary goes over from one to the other while nobody mirrors it:
//! all its standbys leave, and begin again with a copy by the other measure (I3).

use crate::engine::{Engine, policy};
use crate::peer::Record;
use crate::primary::disk_failed;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_types::{Epoch, HostId, Term};
use steadfast_vmm::process::ProcessError;

/// What could not be tracked for want of memory is tried again after this.
const TRACK_AGAIN: Duration = Duration::from_secs(10);

impl Engine {
    /// Seals epoch `epoch` of a VM of which the disks are mirrored. The guest runs on.
    pub(crate) fn cut_disks(
        &mut self,
        epoch: Epoch,
        term: Term,
        bases: &[HostId],
    ) -> Result<(), ProcessError> {
        let holds = self.nics();
        // Outputs first: what left with this epoch may speak of writes and flushes before it, not after.
        for h in &holds {
            h.cut(epoch.0);
        }
        let boundary = holds.iter().map(|h| h.emitted()).sum();
        let slots: Vec<usize> = bases.iter().filter_map(|b| self.slot(b)).collect();
        let cut = self.disks.seal(epoch, term, &slots).map_err(disk_failed)?;
        for (host, peer) in &mut self.peers {
            if bases.contains(host) && peer.join.take().is_some() {
                peer.fed = true;
            }
        }
        let mut record = Record {
            pages: Some(self.capture.arena().nothing()),
            state: Vec::new(),
            boundary,
            disk: None,
            bases: BTreeMap::new(),
        };
        self.add_disks(&mut record, epoch, &cut, bases);
        self.counters.cut(epoch, 0);
        // The guest has not stood still: there is no pause.
        self.tell_sealed(epoch, record, cut.flush, 0);
        Ok(())
    }

    /// Whether this is a standby that has the disks only.
    pub(crate) fn stands_by_with_disks(&self) -> bool {
        self.replica.primary().is_none() && self.taken_whole == Some(false)
    }

    /// How long this standby waits for a silent primary follows what it has, and what it shall have.
    pub(crate) fn keep_patience(&mut self) {
        let disks_only = !self.spec.memory || self.taken_whole == Some(false);
        let (spec, policy) = (&self.spec, policy(self.spec.max_interval_us));
        let suspect_us = spec.suspect_us(disks_only);
        self.replica.set_class(spec.hold_outputs, &policy, suspect_us);
    }

    /// Goes over to what is wanted, once nobody mirrors this VM any more; sees to it that this comes about. Call it now and then.
    pub(crate) fn keep_extent(&mut self) -> Result<(), ProcessError> {
        let Status::Primary(p) = self.replica.status() else {
            return Ok(());
        };
        let rests =
            self.ending.is_none() && self.frozen.is_none() && !self.takes_over() && !self.between_machines();
        if self.whole == self.spec.memory || !rests {
            if !self.whole && self.tracks && rests {
                // All of it was wanted for a moment. Nobody takes what is tracked, and that is not bounded.
                self.stop_tracking();
            }
            return Ok(());
        }
        if self.spec.memory && !self.track() {
            return Ok(());
        }
        if !p.members.is_empty() {
            let leave = p.members.into_iter().map(|m| Event::RemoveStandby(m.host));
            self.events.extend(leave);
            return self.step(Event::Tick);
        }
        self.whole = self.spec.memory;
        if !self.whole {
            self.stop_tracking();
        }
        self.carry.clear();
        if let Some(audit) = &mut self.audit {
            audit.begin_anew();
        }
        self.note(match self.whole {
            true => "all of the VM is mirrored from now on".into(),
            false => "only the disks of the VM are mirrored from now on".into(),
        });
        for peer in self.peers.values_mut() {
            (peer.join, peer.fed) = (None, false);
        }
        // Not before a cut: nobody who stands where the last one was may go on from there, by the other measure.
        self.add_after_cut = true;
        self.step(Event::CutWanted)
    }

    /// Tracks dirty pages while the disks are mirrored still: after that nothing can fail. May fail for want of memory, and is tried again.
    fn track(&mut self) -> bool {
        if self.tracks {
            return true;
        }
        if self.track_again.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        let machine = &self.vm.machine;
        // The throttle has nothing to hold back.
        self.throttle.runs();
        let tracked = match machine.quiesce() {
            Ok(still) => {
                still.keep_stopped();
                let tracked = machine.start_dirty_tracking();
                machine.resume();
                tracked.map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        self.tracks = tracked.is_ok();
        if let Err(error) = tracked {
            self.track_again = Some(Instant::now() + TRACK_AGAIN);
            self.note(format!("not all of the VM can be mirrored now: {error}"));
        }
        self.tracks
    }

    fn stop_tracking(&mut self) {
        self.tracks = false;
        // The guest's writes are dearer than they need be if it stays.
        if let Err(error) = self.vm.machine.stop_dirty_tracking() {
            self.note(format!("dirty pages are tracked still: {error}"));
        }
    }
}
