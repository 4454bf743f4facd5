//! Both servers lose their power (fault 3): nothing that the service acknowledged is lost, whoever comes back first.

use super::{COPY_BOUND, STATUS_BOUND, Scene, equal_disks, in_sync};
use crate::error::{Result, RigError};
use crate::etcd;
use crate::failover::ensure;
use std::time::Instant;

impl Scene<'_, '_> {
    /// The last row: the guest boots again, so connections break, but redis has every write that it answered. The standby's
    /// server returns first and boots the VM; the former primary's server follows it.
    pub(super) fn both_lose_power(self) -> Result<()> {
        self.store_leader_elsewhere()?;
        let (primary, standby) = (self.primary(), self.standby());
        self.tell.doing("both servers lose their power");
        let began = Instant::now();
        primary.kill()?;
        standby.kill()?;
        let Scene {
            rig,
            mut vm,
            load,
            tell,
            term,
            ..
        } = self;
        vm.lost(primary)?;
        vm.lost(standby)?;
        // Its disk alone decides now; a member of the store is back with the server.
        standby.start()?;
        etcd::start_member(standby, rig.servers())?;
        etcd::wait_ready(standby, etcd::READY_BOUND)?;
        vm.start_again(standby)?;
        let now = vm.wait_status(standby, "running again", STATUS_BOUND, |s| {
            let p = &s["protocol"];
            (p["role"] == "primary").then(|| p["term"].as_u64())?
        })?;
        ensure(now > term, || format!("it runs under term {now} after {term}"))?;
        let audited = load.audit_after_loss(COPY_BOUND).map_err(|e| {
            RigError::Unknown(format!("{e}; {}", vm.trouble(standby, "the VM", began.elapsed())))
        })?;
        tell.done(&format!(
            "fault  3, both servers lose their power: {} boots it again under term {now}; {audited} redis writes that were \
             answered are there, each once and in order",
            standby.name()
        ));
        primary.start()?;
        etcd::start_member(primary, rig.servers())?;
        vm.follow(primary)?;
        vm.wait_status(standby, "protected", COPY_BOUND, |s| in_sync(s, primary.name()))?;
        equal_disks(&vm, standby, primary)?;
        tell.done("the other one is back and follows; the disks are equal");
        for server in [primary, standby] {
            vm.stop(server)?;
        }
        Ok(())
    }
}
