//! Both servers lose their power (fault 3): nothing that the service acknowledged is lost, whoever comes back first.

use super::{COPY_BOUND, Moves, STATUS_BOUND, Scene, in_sync};
use crate::error::{Result, RigError};
use crate::failover::ensure;
use std::time::Instant;

impl Scene<'_, '_> {
    /// The guest boots again, so connections break, but redis has every write that it answered. One server returns first and
    /// boots the VM from its disk alone; the other one follows it, and is in sync again. That the disks are equal is the audit's: here
    /// clients write.
    pub(super) fn both_lose_power(mut self, standby_first: bool) -> Result<Self> {
        self.store_leader_elsewhere()?;
        let (first, second) = if standby_first {
            (self.standby, self.primary)
        } else {
            (self.primary, self.standby)
        };
        let (primary, standby) = (self.primary(), self.standby());
        self.tell.doing("both servers lose their power");
        let began = Instant::now();
        primary.kill()?;
        standby.kill()?;
        self.vm.lost(primary)?;
        self.vm.lost(standby)?;
        (self.primary, self.standby) = (first, second);
        let (first, second) = (self.primary(), self.standby());
        self.power_on(first)?;
        self.vm.start_again(first)?;
        let now = self.vm.wait_status(first, "running again", STATUS_BOUND, |s| {
            let p = &s["protocol"];
            (p["role"] == "primary").then(|| p["term"].as_u64())?
        })?;
        ensure(now > self.term, || {
            format!("it runs under term {now} after {}", self.term)
        })?;
        let mut writes = 0;
        let mut scene = self.with_new_clients(|load, vm| {
            writes = load.audit_after_loss(COPY_BOUND).map_err(|e| {
                RigError::Unknown(format!("{e}; {}", vm.trouble(first, "the VM", began.elapsed())))
            })?;
            Ok(())
        })?;
        scene.tell.done(&format!(
            "fault  3, both servers lose their power: {} boots it again under term {now}; {writes} redis writes that were \
             answered are there, each once and in order",
            first.name()
        ));
        scene.power_on(second)?;
        scene.vm.follow(second)?;
        scene
            .vm
            .wait_status(first, "protected", COPY_BOUND, |s| in_sync(s, second.name()))?;
        scene.nothing_crashed()?;
        scene.whole_again(Moves::Never)?;
        scene.tell.done(&format!("{} is back and follows", second.name()));
        Ok(scene)
    }
}
