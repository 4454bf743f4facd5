//! The engine's part in handing over a VM with shared disks ([`crate::shared`]): they are let go, and known to be the same on the other host,
//! before the guest stands still.

use crate::aside::Aside;
use crate::engine::Engine;
use crate::input::Input;
use crate::shared::Held;
use crate::shared_mark::Mark;
use crate::store::random_u64;
use std::time::{Duration, Instant};
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_types::{Epoch, HostId};
use steadfast_vmm::process::ProcessError;

/// Disks of a VM that was handed over to this host are tried to be had for so long, and so often.
const TAKE_MAX: Duration = Duration::from_secs(5);
const TAKE_AGAIN: Duration = Duration::from_millis(50);
/// Those of one that stays.
const TAKE_BACK_MAX: Duration = Duration::from_secs(60);

/// A frozen cut that waits for the disks, and what is asked of the other host.
#[derive(Default)]
pub(crate) struct Handing {
    cut: Option<(Epoch, Vec<HostId>)>,
    /// The question about the disks that were let go, and whom it was asked.
    asked: Option<(u64, HostId)>,
    /// Who has found them to be the same.
    same: Option<HostId>,
    /// They cannot be had back, since when.
    untaken: Option<Instant>,
    /// Why the last handover came to nothing.
    stays: Option<String>,
}

impl Engine {
    /// Why the last handover of a VM with shared disks came to nothing.
    pub(crate) fn stays(&self) -> Option<&str> {
        self.handing.stays.as_deref()
    }

    /// Begins a handover; the inner error is for who asked.
    pub(crate) fn hand_over(&mut self, to: HostId) -> Result<Result<(), &'static str>, ProcessError> {
        if self.shared.is_empty() {
            self.step(Event::HandOver(to))?;
            return Ok(Ok(()));
        }
        if self.replica.primary().is_none() {
            return Ok(Err("this host does not run the VM; ask the one that does"));
        }
        if self.shared.held() != Held::Here || !self.shared.flush_ahead(to) {
            return Ok(Err(
                "its shared disks are on their way from or to a handover already; try again",
            ));
        }
        self.handing.stays = None;
        Ok(Ok(()))
    }

    /// Most of what the guest wrote is on the shared disks: what is left to flush, while it waits, is little.
    pub(crate) fn hand_over_flushed(
        &mut self,
        to: HostId,
        done: Result<(), String>,
    ) -> Result<(), ProcessError> {
        match done {
            Err(why) => self.call_off(&why),
            Ok(()) if self.may_still(&to) => self.step(Event::HandOver(to)),
            Ok(()) => Ok(()),
        }
    }

    /// Nobody has thought better of it meanwhile.
    fn may_still(&self, to: &HostId) -> bool {
        let wanted = self.peers.get(to).is_some_and(|p| p.wanted && !p.leaving);
        wanted && self.whole && self.shared.held() == Held::Here && self.ending.is_none()
    }

    pub(crate) fn handing_to(&self) -> Option<HostId> {
        match self.replica.status() {
            Status::Primary(p) => p.handing_to,
            Status::Standby(_) => None,
        }
    }

    /// Whether a frozen cut may be made now. If not it is made once the disks have been let go.
    pub(crate) fn may_freeze(&mut self, epoch: Epoch, bases: &[HostId]) -> bool {
        // One that was called off is made all the same, and the guest runs on after it.
        let to = self.handing_to();
        if self.shared.is_empty() || to.is_none() || to == self.handing.same {
            return true;
        }
        self.handing.cut = Some((epoch, bases.to_vec()));
        if self.shared.held() == Held::Here
            && let Err(error) = self.shared.let_go()
        {
            self.note(format!("no thread to let the shared disks go with: {error}"));
            self.events.push_back(Event::CancelHandOver);
        }
        false
    }

    /// The shared disks have been let go, or not all of them.
    pub(crate) fn let_go(&mut self, done: Result<Vec<Mark>, String>) -> Result<(), ProcessError> {
        self.shared.gone();
        let (to, id) = (self.handing_to(), random_u64());
        match (done, to, id) {
            (Ok(marks), Some(to), Ok(id)) => {
                self.aside(&to, &Aside::Shared { id, marks });
                self.handing.asked = Some((id, to));
                Ok(())
            }
            (Err(why), ..) => self.call_off(&why),
            (_, _, Err(error)) => self.call_off(&error.to_string()),
            // It was called off meanwhile.
            (Ok(_), None, _) => self.keep_shared(),
        }
    }

    fn call_off(&mut self, why: &str) -> Result<(), ProcessError> {
        self.note(format!("the VM stays here: {why}"));
        self.handing.stays = Some(why.to_owned());
        self.step(Event::CancelHandOver)?;
        self.keep_shared()
    }

    /// Another host has let its disks go, and asks whether they are those of this host.
    pub(crate) fn heard_shared(&mut self, host: &HostId, id: u64, marks: Vec<Mark>) {
        let of_owner = matches!(self.replica.status(), Status::Standby(s) if s.owner.as_ref() == Some(host));
        if of_owner {
            let host = host.clone();
            self.shared
                .compare(marks, move |same| Input::SharedSeen(host, id, same));
        }
    }

    /// The answer to that.
    pub(crate) fn heard_shared_seen(
        &mut self,
        host: &HostId,
        id: u64,
        why: Option<&str>,
    ) -> Result<(), ProcessError> {
        let ours = |asked: &mut (u64, HostId)| (asked.0, &asked.1) == (id, host);
        let Some((_, to)) = self.handing.asked.take_if(ours) else {
            return Ok(());
        };
        if let Some(why) = why {
            return self.call_off(&format!("{host}: {why}"));
        }
        self.handing.same = Some(to);
        self.freeze_if_waiting()
    }

    fn freeze_if_waiting(&mut self) -> Result<(), ProcessError> {
        match self.handing.cut.take() {
            Some((epoch, bases)) => {
                self.cut(epoch, &bases, true)?;
                self.step(Event::Tick)
            }
            None => Ok(()),
        }
    }

    /// A handover that came to nothing: the guest has its disks again. Call it now and then.
    pub(crate) fn keep_shared(&mut self) -> Result<(), ProcessError> {
        if self.shared.is_empty() || self.replica.primary().is_none() || self.handing_to().is_some() {
            return Ok(());
        }
        self.freeze_if_waiting()?;
        match self.frozen.is_none() {
            true => self.take_shared_back(),
            false => Ok(()),
        }
    }

    /// The guest runs on here, with disks that were let go.
    pub(crate) fn take_shared_back(&mut self) -> Result<(), ProcessError> {
        if self.shared.held() != Held::LetGo {
            return Ok(());
        }
        // Nobody else has had them: what is cached of them is right.
        let Err(why) = self.shared.take(false) else {
            self.handing = Handing {
                stays: self.handing.stays.take(),
                ..Handing::default()
            };
            self.note("the shared disks are taken back".into());
            return Ok(());
        };
        // Somebody else may have opened one for a moment. The guest waits for them, and this is tried again.
        let since = match self.handing.untaken {
            Some(since) => since,
            None => {
                self.note(format!("ALARM: the shared disks cannot be taken back: {why}"));
                *self.handing.untaken.insert(Instant::now())
            }
        };
        match since.elapsed() < TAKE_BACK_MAX {
            true => Ok(()),
            false => Err(ProcessError::DiskFault(why)),
        }
    }

    /// The shared disks are this host's from now on. Nobody else runs the VM: it is worth some tries.
    pub(crate) fn take_shared(&mut self, from_another_host: bool) -> Result<(), ProcessError> {
        let until = Instant::now() + TAKE_MAX;
        loop {
            match self.shared.take(from_another_host) {
                Err(why) if Instant::now() < until => {
                    tracing::warn!(why, "a shared disk cannot be had; tried again");
                    std::thread::sleep(TAKE_AGAIN);
                }
                done => return done.map_err(ProcessError::DiskFault),
            }
        }
    }

    /// This host has handed the VM over.
    pub(crate) fn leave_shared(&mut self) {
        self.handing = Handing::default();
        self.shared.leave();
    }
}
