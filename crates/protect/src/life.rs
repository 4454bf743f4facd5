//! What ends a guest or starts it anew while it is protected: its own reset, its power-off, an operator's stop.
//!
//! A reset is one more epoch: the new machine stands on the same disks and NICs, and the pages in which its fresh memory
//! differs from the old one are dirty. Its standbys follow; frames that wait for their commit still leave.
//!
//! An end is told before it happens: what the guest flushed last is committed, then the record names no standby any
//! more, and only then the process ends. So no standby takes it for a failure and runs what was turned off.

use crate::engine::{Engine, MakeVm};
use crate::input::Input;
use crate::primary::disk_failed;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_epoch::primary::Phase;
use steadfast_machine::memory::Ram;
use steadfast_types::{Epoch, Gfn, HostId, PAGE_SIZE};
use steadfast_vmm::process::{Ended, ProcessError};
use steadfast_vmm::resources::Resources;
use steadfast_vmm::spec::VmSpec;
use steadfast_vmm::{AssembleError, Vm};
use vm_memory::{Bytes, GuestAddress};

/// An end waits no longer for its standbys and the store.
const END_MAX: Duration = Duration::from_secs(5);

/// What is left of a machine for the one that follows it.
pub struct Remains {
    /// What the VM is.
    pub spec: VmSpec,
    /// What is open of the host.
    pub resources: Arc<Resources>,
    ram: Ram,
}

/// The machine after a reset.
pub struct Remade {
    vm: Result<Vm, AssembleError>,
    /// Pages in which its memory differs from the old one's.
    changed: Vec<Gfn>,
    make_vm: MakeVm,
}

/// A cut as it was asked for: number, bases, whether to freeze.
pub type WaitingCut = (Epoch, Vec<HostId>, bool);

/// An end under way.
pub struct Ending {
    how: Ended,
    /// What must commit first; none once it has.
    commit: Option<Epoch>,
    until: Instant,
}

impl Engine {
    /// The guest asked for a reset, or its CPU gave up: power-on again, in this process and under this term. The new
    /// machine is built on a thread of its own; this one goes on to speak to its standbys, and a cut waits.
    pub(crate) fn reset_guest(&mut self) -> Result<(), ProcessError> {
        if self.replica.primary().is_none() || self.ending.is_some() || self.frozen {
            return Ok(());
        }
        let Some(make_vm) = self.make_vm.take() else {
            return Ok(());
        };
        self.note("the guest starts anew".into());
        let failed = |e: &dyn std::fmt::Display| disk_failed(format!("the guest cannot be reset: {e}"));
        let mut dirty = Vec::new();
        {
            let mut still = self.vm.machine.quiesce().map_err(|e| failed(&e))?;
            if let Err(error) = still.drain() {
                tracing::warn!(%error, "a device did not come to rest before the reset");
            }
            still.harvest(&mut dirty).map_err(|e| failed(&e))?;
            still.keep_stopped();
        }
        // What the old machine changed since the last cut.
        self.carry.append(&mut dirty);
        let remains = Remains {
            spec: self.vm.spec.clone(),
            resources: Arc::clone(&self.vm.resources),
            ram: self.vm.machine.ram().clone(),
        };
        let inputs = self.inputs.clone();
        let build = move || {
            let vm = make_vm(Some(&remains)).and_then(|vm| vm.boot().map(|()| vm));
            let mut changed = Vec::new();
            if let Ok(vm) = &vm {
                differing(&remains.ram, vm.machine.ram(), &mut changed);
            }
            inputs.send(Input::Remade(Box::new(Remade { vm, changed, make_vm })));
        };
        let thread = std::thread::Builder::new().name("reset".into()).spawn(build);
        thread.map(drop).map_err(|e| failed(&e))
    }

    /// The machine that follows is there.
    pub(crate) fn go_on_anew(&mut self, mut remade: Remade) -> Result<(), ProcessError> {
        self.make_vm = Some(remade.make_vm);
        self.vm = remade.vm?;
        self.carry.append(&mut remade.changed);
        self.carry.sort_unstable();
        self.carry.dedup();
        self.counters.resets += 1;
        if self.replica.primary().is_none() {
            return Ok(());
        }
        self.vm.machine.start_dirty_tracking()?;
        self.vm.machine.hurry_stops();
        self.vm.machine.resume();
        if let Some((epoch, bases, freeze)) = self.waiting_cut.take() {
            self.cut(epoch, &bases, freeze)?;
            self.step(Event::Tick)?;
        }
        Ok(())
    }

    /// Begins to end; `Some` if nobody needs to be told.
    pub(crate) fn begin_end(&mut self, how: Ended) -> Result<Option<Ended>, ProcessError> {
        let Status::Primary(p) = self.replica.status() else {
            return Ok(Some(how));
        };
        if self.ending.is_some() {
            return Ok(None);
        }
        let commit = (how == Ended::Shutdown).then(|| p.progress.sealed().next());
        self.ending = Some(Ending {
            how,
            commit,
            until: Instant::now() + END_MAX,
        });
        if commit.is_some() {
            self.step(Event::Flush)?;
        }
        self.end_step()
    }

    /// Goes on with an end that has begun.
    pub(crate) fn end_step(&mut self) -> Result<Option<Ended>, ProcessError> {
        let Some(ending) = &mut self.ending else {
            return Ok(None);
        };
        let Status::Primary(p) = self.replica.status() else {
            return Ok(Some(ending.how));
        };
        let (how, late) = (ending.how, Instant::now() >= ending.until);
        if late {
            self.note(
                "ends though a standby may still be listed: the store or the standby did not answer".into(),
            );
            return Ok(Some(how));
        }
        if ending.commit.is_some_and(|e| p.progress.committed() < e) {
            return Ok(None);
        }
        ending.commit = None;
        if p.phase == Phase::Alone {
            return Ok(Some(how));
        }
        let hosts: Vec<HostId> = p.members.into_iter().map(|m| m.host).collect();
        for host in hosts {
            self.step(Event::RemoveStandby(host))?;
        }
        Ok(None)
    }
}

/// Adds the pages in which two memories of one size differ.
fn differing(old: &Ram, new: &Ram, pages: &mut Vec<Gfn>) {
    const LEN: usize = PAGE_SIZE as usize;
    let (mut a, mut b) = ([0u8; LEN], [0u8; LEN]);
    for region in new.regions() {
        for gfn in region.start / PAGE_SIZE..(region.start + region.len) / PAGE_SIZE {
            let at = GuestAddress(gfn * PAGE_SIZE);
            let read = old
                .memory()
                .read_slice(&mut a, at)
                .and_then(|()| new.memory().read_slice(&mut b, at));
            if read.is_err() || a != b {
                pages.push(Gfn(gfn));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use steadfast_machine::memory::RamBacking;

    #[test]
    fn pages_that_differ_are_found() {
        let ram = || Ram::new(64 << 20, &RamBacking::Memfd).unwrap();
        let (old, new) = (ram(), ram());
        old.memory()
            .write_slice(&[1], GuestAddress(5 * PAGE_SIZE + 9))
            .unwrap();
        new.memory()
            .write_slice(&[1], GuestAddress(7 * PAGE_SIZE))
            .unwrap();
        for ram in [&old, &new] {
            ram.memory()
                .write_slice(&[3; 99], GuestAddress(9 * PAGE_SIZE))
                .unwrap();
        }
        let mut pages = Vec::new();
        differing(&old, &new, &mut pages);
        assert_eq!(pages, [Gfn(5), Gfn(7)]);
    }
}
