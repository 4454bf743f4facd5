//! The CPU that the guest sees: the same one wherever it goes on.
//!
//! ```text
//! primary   Cpu, Hello ─>   standby: can this host show it?   yes: Welcome (and the guest will see this CPU here)
//!                                                             no:  Unfit, with what is missing, and no Welcome
//! ```
//! So a host that could not go on with the guest never counts as a standby of it, and nothing is copied to it. A guest keeps its CPU over
//! moves, failovers and its own resets; one that is booted anew from its disks elsewhere gets that host's, and any host will do.
//!
//! Messages of a session stay in order: a Hello without a Cpu before it is of a primary of an older version, which is answered as ever.

use crate::aside::Aside;
use crate::engine::Engine;
use steadfast_epoch::Status;
use steadfast_epoch::standby::StandbyStatus;
use steadfast_machine::cpuid::GuestCpu;
use steadfast_types::HostId;

impl Engine {
    /// Before each Hello.
    pub(crate) fn show_cpu(&mut self, to: &HostId) {
        let cpu = self.whole.then(|| self.vm.machine.cpu());
        if let Some(peer) = self.peers.get_mut(to).filter(|_| cpu.is_none()) {
            peer.unfit = None;
        }
        self.aside(to, &Aside::Cpu(cpu));
    }

    pub(crate) fn heard_cpu(&mut self, host: &HostId, cpu: Option<GuestCpu>) {
        let fits = cpu.map(|cpu| self.can_show(cpu));
        if let Some(Err(why)) = &fits {
            self.aside(host, &Aside::Unfit(why.clone()));
        }
        let Some(peer) = self.peers.get_mut(host) else {
            return;
        };
        let before = std::mem::replace(&mut peer.cpu, fits);
        if let Some(Err(why)) = &peer.cpu
            && before != peer.cpu
        {
            let note = format!("this host cannot stand in for {host}: {why}");
            self.note(note);
        }
    }

    fn can_show(&self, cpu: GuestCpu) -> Result<GuestCpu, String> {
        self.vm.can_show(&cpu).map_err(|why| why.to_string())?;
        if !self.spec.cpu_without.is_empty() {
            let lacks: Vec<String> = cpu
                .names()
                .into_iter()
                .filter(|n| self.spec.cpu_without.contains(n))
                .collect();
            if !lacks.is_empty() {
                return Err(format!("this host counts as one without {}", lacks.join(", ")));
            }
        }
        Ok(cpu)
    }

    /// Whether the greeting of this primary may be answered.
    pub(crate) fn fits(&self, host: &HostId) -> bool {
        self.peers
            .get(host)
            .is_some_and(|p| !matches!(p.cpu, Some(Err(_))))
    }

    pub(crate) fn heard_unfit(&mut self, host: &HostId, why: String) {
        let Some(peer) = self.peers.get_mut(host) else {
            return;
        };
        if peer.unfit.as_ref() == Some(&why) {
            return;
        }
        peer.unfit = Some(why.clone());
        self.note(format!("{host} cannot be a standby: {why}"));
    }

    /// A copy of its primary's guest begins: the CPU of that one is what goes on here.
    pub(crate) fn follow_cpu(&mut self) {
        let Status::Standby(StandbyStatus {
            owner: Some(owner), ..
        }) = self.replica.status()
        else {
            return;
        };
        let of_owner = self.peers.get(&owner).and_then(|p| p.cpu.clone());
        self.guest_cpu = of_owner.and_then(Result::ok);
    }
}
