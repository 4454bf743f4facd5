//! What ends a guest or starts it anew while it is protected: its own reset, its power-off, an operator's stop.
//!
//! A reset is one more epoch: the new machine stands on the same disks and NICs, and the pages in which its fresh memory
//! differs from the old one are dirty. Its standbys follow; frames that wait for their commit still leave. The thread that
//! builds the new machine seals those pages too, gigabytes of them perhaps: the new machine does not run before its first cut
//! has taken them, and that cut is no longer than any other.
//!
//! An end is told before it happens: what the guest flushed last is committed, then the record names no standby any
//! more, and only then the process ends. So no standby takes it for a failure and runs what was turned off.

use crate::engine::{Engine, MakeVm};
use crate::input::Input;
use crate::primary::disk_failed;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_capture::{SealedPages, seal_anew};
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_epoch::primary::Phase;
use steadfast_machine::cpuid::GuestCpu;
use steadfast_machine::memory::Ram;
use steadfast_types::{Epoch, Gfn, HostId};
use steadfast_vmm::process::{Ended, ProcessError};
use steadfast_vmm::resources::Resources;
use steadfast_vmm::spec::VmSpec;
use steadfast_vmm::{AssembleError, Vm};

/// An end waits no longer for its standbys and the store.
const END_MAX: Duration = Duration::from_secs(5);

/// What a disk does for a guest that resets itself is waited for no longer.
const REST_MAX: Duration = Duration::from_secs(10);

/// What is left of a machine for the one that follows it.
pub struct Remains {
    /// What the VM is.
    pub spec: VmSpec,
    /// What is open of the host.
    pub resources: Arc<Resources>,
    /// The one that follows stands on the same memory, and waits to be given a state ([`crate::former`]); otherwise the guest starts anew.
    pub stays: bool,
    cpu: GuestCpu,
    ram: Ram,
}

impl Remains {
    /// Of this machine.
    pub(crate) fn of(vm: &Vm, stays: bool) -> Self {
        Self {
            spec: vm.spec.clone(),
            resources: Arc::clone(&vm.resources),
            stays,
            cpu: vm.machine.cpu(),
            ram: vm.machine.ram().clone(),
        }
    }

    /// The memory that the one that follows stands on, if it is the same.
    pub(crate) fn memory(&self) -> Option<&File> {
        self.stays.then(|| self.ram.file())
    }
}

/// The machine after a reset.
pub struct Remade {
    /// With the pages in which its memory differs from what was sealed last.
    vm: Result<(Vm, SealedPages), AssembleError>,
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
        if self.replica.primary().is_none() || self.ending.is_some() || self.frozen.is_some() {
            return Ok(());
        }
        let Some(make_vm) = self.make_vm.take() else {
            return Ok(());
        };
        self.note("the guest starts anew".into());
        self.vm
            .machine
            .quiesce()
            .map_err(|e| not_reset(&e))?
            .keep_stopped();
        // Whatever the throttle hears meanwhile, it lets nothing run.
        self.throttle.runs();
        self.resting = Some((make_vm, Instant::now() + REST_MAX));
        self.rest()
    }

    /// Resets a guest that cannot help itself. Its standby would go on with the same memory: that would not help.
    pub(crate) fn look_after_guest(&mut self) -> Result<(), ProcessError> {
        let now = Instant::now();
        let runs = self.replica.primary().is_some()
            && self.ending.is_none()
            && self.frozen.is_none()
            && !self.takes_over()
            && !self.between_machines();
        let fired = self.vm.watchdog_fired(now, runs);
        if runs {
            self.guest.watchdog(now, fired);
        }
        if let Some(why) = self.guest.due(now).filter(|_| runs) {
            self.note(format!("the guest is reset: {why}"));
            self.reset_guest()?;
        }
        Ok(())
    }

    /// The machine that a reset left behind finishes what its disks do for it, which is not waited for: then the next one is
    /// built.
    pub(crate) fn rest(&mut self) -> Result<(), ProcessError> {
        let Some((make_vm, until)) = self.resting.take() else {
            return Ok(());
        };
        let mut dirty = Vec::new();
        {
            let mut still = self.vm.machine.quiesce().map_err(|e| not_reset(&e))?;
            if let Err(error) = still.drain(Duration::ZERO) {
                if Instant::now() < until {
                    still.keep_stopped();
                    self.resting = Some((make_vm, until));
                    return Ok(());
                }
                tracing::warn!(%error, "a device did not come to rest before the reset");
                self.shared.renew();
            }
            if self.whole {
                still.harvest(&mut dirty).map_err(|e| not_reset(&e))?;
            }
            still.keep_stopped();
        }
        self.build_next(make_vm, dirty)
    }

    /// Builds the machine that follows, on a thread of its own.
    fn build_next(&mut self, make_vm: MakeVm, mut dirty: Vec<Gfn>) -> Result<(), ProcessError> {
        // What the old machine changed since the last cut.
        self.carry.append(&mut dirty);
        let remains = Remains::of(&self.vm, false);
        let (inputs, arena) = (self.inputs.clone(), self.capture.arena().clone());
        let (carry, whole) = (std::mem::take(&mut self.carry), self.whole);
        let build = move || {
            let built = make_vm(Some(&remains)).and_then(|vm| {
                // Hosts that stand by for this VM can show it, and were asked for no other.
                vm.machine.set_cpu(&remains.cpu)?;
                vm.boot().map(|()| vm)
            });
            let vm = built.and_then(|vm| {
                if !whole {
                    return Ok((vm, arena.nothing()));
                }
                let ram = vm.machine.ram();
                // RAM in a file is the same file: its comparison does not show what booting wrote.
                let mut also = carry;
                ram.harvest_own_writes(|g| also.push(g));
                let pages = seal_anew(&arena, &remains.ram, ram, also)
                    .map_err(|e| AssembleError::Setting(format!("memory after the reset: {e}")))?;
                Ok((vm, pages))
            });
            inputs.send(Input::Remade(Box::new(Remade { vm, make_vm })));
        };
        let thread = std::thread::Builder::new().name("reset".into()).spawn(build);
        thread.map(drop).map_err(|e| not_reset(&e))
    }

    /// The machine that follows is there. With a standby it runs once its first cut has been made, else at once.
    pub(crate) fn go_on_anew(&mut self, remade: Remade) -> Result<(), ProcessError> {
        self.make_vm = Some(remade.make_vm);
        let (vm, pages) = remade.vm?;
        self.follow(vm)?;
        self.counters.resets += 1;
        self.guest.restarted(Instant::now());
        if self.replica.primary().is_none() {
            return Ok(());
        }
        self.vm.machine.hurry_stops();
        self.tracks = self.whole;
        if self.whole {
            self.vm.machine.start_dirty_tracking()?;
            self.anew = Some(pages);
        } else {
            self.vm.machine.resume();
        }
        if let Some((epoch, bases, freeze)) = self.waiting_cut.take() {
            self.cut(epoch, &bases, freeze)?;
            return self.step(Event::Tick);
        }
        if self.mirrored() {
            return self.step(Event::CutWanted);
        }
        self.run_anew();
        Ok(())
    }

    /// This is the machine from now on. All that the one before has goes, and its threads end, which takes a while.
    pub(crate) fn follow(&mut self, vm: Vm) -> Result<(), ProcessError> {
        self.net_rate.set(&vm.nics);
        let old = std::mem::replace(&mut self.vm, vm);
        let dropped = std::thread::Builder::new()
            .name("former".into())
            .spawn(move || drop(old));
        dropped
            .map(drop)
            .map_err(|e| disk_failed(format!("the former machine is not left: {e}")))
    }

    /// Whether the machine must not be let run: there is none, or its first content was not cut yet.
    pub(crate) fn between_machines(&self) -> bool {
        self.make_vm.is_none() || self.anew.is_some()
    }

    /// A machine that waits for its first cut runs on without: that cut will be as long as its content takes.
    pub(crate) fn run_anew(&mut self) {
        if let Some(pages) = self.anew.take() {
            self.carry.extend_from_slice(pages.gfns());
            self.vm.machine.resume();
        }
    }

    /// Begins to end; `Some` if nobody needs to be told.
    pub(crate) fn begin_end(&mut self, how: Ended) -> Result<Option<Ended>, ProcessError> {
        let Status::Primary(p) = self.replica.status() else {
            return Ok(Some(how));
        };
        if self.ending.is_some() {
            return Ok(None);
        }
        // What ends goes nowhere; a handover that is beyond that is the other host's.
        self.step(Event::CancelHandOver)?;
        let commit = (how == Ended::Shutdown).then(|| p.progress.sealed().next());
        self.ending = Some(Ending {
            how,
            commit,
            until: Instant::now() + END_MAX,
        });
        if commit.is_some() {
            self.step(Event::CutWanted)?;
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

fn not_reset(why: &dyn std::fmt::Display) -> ProcessError {
    disk_failed(format!("the guest cannot be reset: {why}"))
}
