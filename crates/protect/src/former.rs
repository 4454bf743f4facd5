//! A primary that has handed its VM over: it stays, as a standby in sync.
//!
//! ```text
//! frozen cut -> committed -> handed over -> outputs mute, volumes a standby's; memory and state are those of that cut
//!                                        -> a thread builds the next machine on the same memory -> it takes the place of the one that ran
//! ```
//! So the VM is protected from the moment at which it goes on over there, and has not to be copied back. Why another machine: a state can
//! only be given to one that has never run, and a request of the guest that is still on its way to a disk belongs to the one that did.
//! Epochs of the new primary are staged and applied meanwhile; only a promotion waits for it.
//!
//! Invariants: I2 (nothing of the machine that ran reaches memory, volumes or network after the word to stop: its vCPUs are parked, its
//! devices are not called, its blocks are closed), I3 (memory, state and volumes stand at exactly the epoch that was handed over).

use crate::engine::{Engine, MakeVm};
use crate::input::Input;
use crate::life::Remains;
use crate::primary::disk_failed;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::Duration;
use steadfast_machine::quiesce::Quiesced;
use steadfast_net::HoldMode;
use steadfast_types::Epoch;
use steadfast_vmm::process::ProcessError;
use steadfast_vmm::{AssembleError, Vm};

/// A promotion waits for its machine no longer: it has the right to run the VM by then, and nobody else has its memory.
const BUILT_MAX: Duration = Duration::from_secs(60);

/// What a cut left that stopped the machine for good, unless the protocol lets it run on.
pub(crate) struct Frozen {
    /// Its epoch.
    pub at: Epoch,
    /// Machine state at it.
    pub state: Vec<u8>,
}

/// The machine that follows, or why there is none.
pub(crate) struct Built {
    vm: Result<Vm, AssembleError>,
    make_vm: MakeVm,
}

impl Engine {
    /// This instance has lost the right to run, or has handed it over: its machine stops here and now, and nothing that
    /// waits gets out. One that has lost it ends, and a new process begins as an empty standby; one that has handed it over
    /// stays, if it can.
    pub(crate) fn stop_guest(&mut self, keep: bool) -> Result<(), ProcessError> {
        self.set_holds(HoldMode::Mute);
        self.note(format!("the guest stops here (handed over: {keep})"));
        let frozen = self.frozen.take().filter(|_| keep);
        if let Err(error) = self.vm.machine.quiesce().map(Quiesced::keep_stopped) {
            tracing::error!(%error, "the machine does not stop; it ends with its process");
            return Err(ProcessError::Fenced);
        }
        let Some(frozen) = frozen else {
            return Err(ProcessError::Fenced);
        };
        self.stay(frozen).map_err(|why| {
            self.note(format!("it does not stay as a standby: {why}"));
            ProcessError::Fenced
        })
    }

    fn stay(&mut self, frozen: Frozen) -> Result<(), String> {
        if self.ending.is_some() {
            return Err("the VM was to end".into());
        }
        if let Some(trouble) = self.disks.trouble() {
            return Err(trouble.text().to_owned());
        }
        let make_vm = self.make_vm.take().ok_or("its guest was starting anew")?;
        self.disks.leave(frozen.at)?;
        self.leave_shared();
        // I3: all three stand there.
        (self.memory, self.state) = (Some(frozen.at), frozen.state);
        self.guest_cpu = Some(self.vm.machine.cpu());
        self.base = (None, false);
        (self.taken_whole, self.tracks, self.add_after_cut) = (Some(true), false, false);
        self.staged.clear();
        // What a primary remembers.
        self.sealed.clear();
        self.carry.clear();
        self.counters.cut_at.clear();
        (self.anew, self.waiting_cut, self.silent) = (None, None, false);
        self.care.step_down();
        self.throttle.step_down();
        self.guest.left();
        if let Some(audit) = &mut self.audit {
            audit.begin_anew();
        }
        for peer in self.peers.values_mut() {
            peer.step_down();
        }
        self.build_to_stay(make_vm)
    }

    /// Builds the machine that waits, on a thread of its own.
    fn build_to_stay(&mut self, make_vm: MakeVm) -> Result<(), String> {
        let remains = Remains::of(&self.vm, true);
        let (built, next) = sync_channel(1);
        // One that was only moved is needed for its disks in a moment.
        let (inputs, stays) = (self.inputs.clone(), self.spec.memory);
        let build = move || {
            let vm = make_vm(Some(&remains));
            let ram = vm.as_ref().ok().map(|vm| vm.machine.ram().clone());
            let _ = built.send(Built { vm, make_vm });
            inputs.send(Input::Built);
            // Nobody waits for this, and the guest would pay for it page by page.
            if let Some(ram) = ram.filter(|_| stays) {
                ram.prefault();
            }
        };
        let thread = std::thread::Builder::new()
            .name("next-machine".into())
            .spawn(build);
        thread.map_err(|e| format!("a thread for its machine: {e}"))?;
        self.next = Some(next);
        Ok(())
    }

    /// The machine that follows takes its place if it is there.
    pub(crate) fn built(&mut self) -> Result<(), ProcessError> {
        match self.next.as_ref().map(Receiver::try_recv) {
            Some(Ok(built)) => self.stand_by(built),
            Some(Err(TryRecvError::Disconnected)) => Err(not_built(&"its thread has ended")),
            Some(Err(TryRecvError::Empty)) | None => Ok(()),
        }
    }

    /// Waits for it: this instance is to run the VM.
    pub(crate) fn await_built(&mut self) -> Result<(), ProcessError> {
        match self.next.as_ref().map(|next| next.recv_timeout(BUILT_MAX)) {
            Some(built) => self.stand_by(built.map_err(|e| not_built(&e))?),
            None => Ok(()),
        }
    }

    fn stand_by(&mut self, built: Built) -> Result<(), ProcessError> {
        self.next = None;
        self.make_vm = Some(built.make_vm);
        self.follow(built.vm?)
    }
}

fn not_built(why: &dyn std::fmt::Display) -> ProcessError {
    disk_failed(format!("this standby has no machine: {why}"))
}
