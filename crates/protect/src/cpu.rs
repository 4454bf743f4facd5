//! The CPU that the guest sees: the same one wherever it goes on.
//!
//! ```text
//! primary   Cpu, Hello ─>   standby: can this host show it?   yes: Welcome (and the guest will see this CPU here)
//!                                                             no:  Unfit, with what is missing, and no Welcome
//! ```
//! So a host that could not go on with the guest never counts as a standby of it, and nothing is copied to it. A guest keeps its CPU over
//! moves, failovers and its own resets; one that is booted anew from its disks elsewhere gets that host's.

use crate::aside::Aside;
use crate::engine::Engine;
use steadfast_epoch::Status;
use steadfast_epoch::standby::StandbyStatus;
use steadfast_machine::cpuid::GuestCpu;
use steadfast_types::HostId;

impl Engine {
    /// Before each Hello.
    pub(crate) fn show_cpu(&mut self, to: &HostId) {
        let cpu = self.vm.machine.cpu();
        self.aside(to, &Aside::Cpu(cpu));
    }

    pub(crate) fn heard_cpu(&mut self, host: &HostId, cpu: GuestCpu) {
        let known = self.peers.get(host).and_then(|p| p.cpu.as_ref());
        if known.is_some_and(|k| k.as_ref() == Ok(&cpu)) {
            return;
        }
        let lacks: Vec<String> = match self.spec.cpu_without.is_empty() {
            true => Vec::new(),
            false => cpu
                .names()
                .into_iter()
                .filter(|n| self.spec.cpu_without.contains(n))
                .collect(),
        };
        let fits = match self.vm.can_show(&cpu) {
            Err(why) => Err(why.to_string()),
            Ok(()) if lacks.is_empty() => Ok(cpu),
            Ok(()) => Err(format!("this host counts as one without {}", lacks.join(", "))),
        };
        if let Err(why) = &fits {
            self.aside(host, &Aside::Unfit(why.clone()));
        }
        let Some(peer) = self.peers.get_mut(host) else {
            return;
        };
        let before = peer.cpu.replace(fits.clone());
        if let Err(why) = fits
            && before != Some(Err(why.clone()))
        {
            self.note(format!("this host cannot stand in for {host}: {why}"));
        }
    }

    /// Whether the greeting of this primary may be answered.
    pub(crate) fn fits(&self, host: &HostId) -> bool {
        self.peers.get(host).is_some_and(|p| matches!(p.cpu, Some(Ok(_))))
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
        if let Some(Some(Ok(cpu))) = self.peers.get(&owner).map(|p| &p.cpu) {
            self.guest_cpu = Some(cpu.clone());
        }
    }
}
