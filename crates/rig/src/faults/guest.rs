//! The guest's kernel panics (fault 9): it starts anew where it is, and nobody takes that for the death of its server.

use super::{COPY_BOUND, Moves, STATUS_BOUND, Scene};
use crate::error::{Result, RigError};
use crate::failover::ensure;
use crate::vm::Mini;
use std::time::{Duration, Instant};

/// A guest that panics does not answer; one that answers within this has not panicked.
const NO_ANSWER: Duration = Duration::from_secs(5);

impl Scene<'_, '_> {
    /// Connections break, as with any machine that starts anew; what redis has answered is there, under the same owner and term.
    pub(super) fn guest_panics(self) -> Result<Self> {
        self.tell.doing("the guest's kernel panics");
        let (term, primary, standby) = (self.term, self.primary(), self.standby());
        let guest = Mini::new(self.rig.client()?, self.vm.plan().address);
        let began = Instant::now();
        if let Ok(answer) = guest.command("panic", NO_ANSWER)
            && !answer.is_empty()
        {
            return Err(RigError::Unknown(format!(
                "asked to panic, the guest said {answer}"
            )));
        }
        let mut writes = 0;
        let mut scene = self.with_new_clients(|load, vm| {
            writes = load.audit_after_loss(COPY_BOUND).map_err(|e| {
                let says = |on| vm.trouble(on, "the VM", began.elapsed());
                RigError::Unknown(format!("{e}; {}; {}", says(primary), says(standby)))
            })?;
            Ok(())
        })?;
        let up = Duration::from_millis(guest.status(STATUS_BOUND)?.uptime_ms);
        ensure(up < began.elapsed(), || {
            format!("the guest did not start anew: it has been up for {up:.1?}")
        })?;
        scene.nothing_crashed()?;
        scene.whole_again(Moves::Never)?;
        ensure(scene.term == term, || {
            format!("the panic changed the term from {term} to {}", scene.term)
        })?;
        scene.tell.done(&format!(
            "fault  9, the guest's kernel panics: it starts anew on {} under the same term; {writes} redis writes that were \
             answered are there, each once and in order",
            primary.name()
        ));
        Ok(scene)
    }
}
