//! The engine's part in handing over a VM with shared disks ([`crate::shared`]): they are let go, and known to be the same on the other host,
//! before the guest stands still.

use crate::aside::Aside;
use crate::engine::Engine;
use crate::input::Input;
use crate::shared::Held;
use crate::shared_mark::Mark;
use crate::store::random_u64;
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_types::{Epoch, HostId};
use steadfast_vmm::process::ProcessError;

/// A frozen cut that waits for the disks, and what is asked of the other host.
#[derive(Default)]
pub(crate) struct Handing {
    cut: Option<(Epoch, Vec<HostId>)>,
    /// The question about the disks that were let go, and whom it was asked.
    asked: Option<(u64, HostId)>,
    /// Who has found them to be the same.
    same: Option<HostId>,
}

impl Engine {
    /// Whether the shared disks are this host's, if there are any.
    pub(crate) fn has_shared(&self) -> bool {
        self.shared.is_empty() || self.shared.held() == Held::Here
    }

    fn handing_to(&self) -> Option<HostId> {
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
        self.step(Event::CancelHandOver)?;
        self.keep_shared()
    }

    /// Another host has let its disks go, and asks whether they are those of this host.
    pub(crate) fn heard_shared(&mut self, host: &HostId, id: u64, marks: Vec<Mark>) {
        if self.replica.primary().is_none() {
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
        self.handing = Handing::default();
        self.take_shared()?;
        self.note("the shared disks are taken back".into());
        Ok(())
    }

    /// The shared disks are this host's from now on.
    pub(crate) fn take_shared(&mut self) -> Result<(), ProcessError> {
        self.shared.take().map_err(ProcessError::DiskFault)
    }

    /// This host has handed the VM over.
    pub(crate) fn leave_shared(&mut self) {
        self.handing = Handing::default();
        self.shared.leave();
    }
}
