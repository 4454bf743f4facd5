//! What an operator, or a host's daemon, asks of a protected VM through its control socket, and what it answers.

use crate::config::PeerSpec;
use crate::disks::SLOTS;
use crate::engine::Engine;
use crate::peer::Peer;
use crate::store::Ask;
use serde_json::{Value, json};
use std::sync::PoisonError;
use std::time::Duration;
use steadfast_epoch::Status;
use steadfast_epoch::io::Event;
use steadfast_epoch::primary::Phase;
use steadfast_machine::memory::layout::ram_regions;
use steadfast_types::HostId;
use steadfast_vmm::control::{Call, Request, failure};
use steadfast_vmm::process::{Ended, ProcessError};

impl Engine {
    pub(crate) fn control(&mut self, call: Call) -> Result<Option<Ended>, ProcessError> {
        let mut ended = None;
        let answer = match &call.request {
            Request::Status => self.status(),
            Request::Stop => {
                ended = self.begin_end(Ended::Stopped)?;
                json!({"ok": true})
            }
            _ if self.takes_over() => {
                failure(&"the guest still runs in another process of this host; try again")
            }
            Request::PowerButton => {
                self.vm
                    .power
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .press_power_button();
                json!({"ok": true})
            }
            Request::Reset if self.replica.primary().is_none() => {
                failure(&"this host does not run the VM; ask the one that does")
            }
            Request::Reset => {
                self.reset_guest()?;
                json!({"ok": true})
            }
            Request::Type { text } => {
                let mut serial = self.vm.serial.lock().unwrap_or_else(PoisonError::into_inner);
                json!({"ok": true, "taken": serial.enqueue_input(text.as_bytes())})
            }
            Request::HandOver { .. } if !self.whole => failure(
                &"only the disks of this VM are mirrored: it cannot go on elsewhere, only be booted there",
            ),
            Request::HandOver { .. } if self.ending.is_some() => failure(&"the VM is about to end"),
            Request::HandOver { to } => match self.hand_over(to.clone())? {
                Ok(()) => json!({"ok": true}),
                Err(why) => failure(&why),
            },
            Request::AddPeer { host, paths, standby } => {
                let peer = PeerSpec {
                    host: host.clone(),
                    paths: paths.clone(),
                    standby: *standby,
                };
                match self.add_peer(&peer)? {
                    Ok(()) => json!({"ok": true}),
                    Err(why) => failure(&why),
                }
            }
            Request::RemovePeer { host } => {
                let known = self.remove_peer(&host.clone())?;
                json!({"ok": true, "was_peer": known})
            }
            Request::StoreEndpoints { endpoints } => {
                self.set_store_endpoints(endpoints.clone());
                json!({"ok": true})
            }
            Request::NetRate(rate) => {
                self.net_rate = *rate;
                rate.set(&self.vm.nics);
                json!({"ok": true})
            }
            Request::Class {
                hold_outputs,
                max_interval_us,
                memory,
            } => match self.set_class(*hold_outputs, *max_interval_us, *memory) {
                Ok(()) => {
                    self.step(Event::Tick)?;
                    json!({"ok": true})
                }
                Err(why) => failure(&why),
            },
            // Answered when it is done.
            Request::CopyState { folder } => {
                self.copy_state(&folder.clone(), &call.answer);
                return Ok(None);
            }
            Request::CopyRate { bytes_per_s } => match self.set_copy_rate(*bytes_per_s) {
                Ok(()) => json!({"ok": true}),
                Err(why) => failure(&why),
            },
            _ => failure(&"a protected VM cannot do this; unprotect it first"),
        };
        let _ = call.answer.send(answer);
        Ok(ended)
    }

    fn set_class(
        &mut self,
        hold_outputs: bool,
        max_interval_us: Option<u64>,
        memory: bool,
    ) -> Result<(), &'static str> {
        if !memory && self.disks.is_empty() {
            return Err(
                "a VM without a writable disk has no disks to mirror: all of it is mirrored, or nothing",
            );
        }
        if !hold_outputs && !self.disks.is_empty() {
            return Err(
                "outputs of a VM with writable disks are held: what the guest has flushed could be lost",
            );
        }
        (self.spec.hold_outputs, self.spec.max_interval_us) = (hold_outputs, max_interval_us);
        self.spec.memory = memory;
        self.keep_patience();
        if self.replica.primary().is_some() {
            self.set_holds(self.hold_mode());
            if self.whole == memory {
                // They may have been told to leave, for another extent that is not wanted any more.
                self.add_wanted();
            }
        }
        self.note(format!("outputs are held from now on: {hold_outputs}"));
        Ok(())
    }

    fn set_store_endpoints(&mut self, endpoints: Vec<String>) {
        self.note(format!("the store is at {} from now on", endpoints.join(", ")));
        // The thread ends with the engine.
        let _ = self.store.send(Ask::Endpoints(endpoints));
    }

    /// Opens a link to one more host; the inner error is for who asked.
    fn add_peer(&mut self, peer: &PeerSpec) -> Result<Result<(), String>, ProcessError> {
        if let Some(known) = self.peers.get_mut(&peer.host) {
            let back = std::mem::take(&mut known.leaving);
            known.wanted = peer.standby;
            if back && peer.standby && self.replica.primary().is_some() {
                self.step(Event::AddStandby(peer.host.clone()))?;
            }
            return Ok(Ok(()));
        }
        if peer.host == self.spec.host {
            return Ok(Err("a VM cannot be mirrored to its own host".into()));
        }
        let Some(slot) = (0..SLOTS).find(|s| self.peers.values().all(|p| p.slot != *s)) else {
            return Ok(Err(format!(
                "a VM has at most {SLOTS} other hosts; remove one first"
            )));
        };
        let pages = ram_regions(self.ram_bytes);
        match Peer::open(&self.name, &self.spec, peer, slot, pages, &self.inputs) {
            Ok(opened) => drop(self.peers.insert(peer.host.clone(), opened)),
            Err(error) => return Ok(Err(format!("link to {}: {error}", peer.host))),
        }
        self.note(format!("{} is a peer from now on", peer.host));
        if peer.standby && self.replica.primary().is_some() {
            self.step(Event::AddStandby(peer.host.clone()))?;
        }
        Ok(Ok(()))
    }

    /// Mirrors to a host no more; whether it was a peer. Its link is closed when the record no longer lists it.
    fn remove_peer(&mut self, host: &HostId) -> Result<bool, ProcessError> {
        let Some(peer) = self.peers.get_mut(host) else {
            return Ok(false);
        };
        (peer.leaving, peer.wanted) = (true, false);
        if self.handing_to().as_ref() == Some(host) {
            // Whoever asked for it does not want it any more.
            self.step(Event::CancelHandOver)?;
        }
        self.step(Event::RemoveStandby(host.clone()))?;
        self.close_links();
        Ok(true)
    }

    /// Closes links to hosts that are no peers any more.
    pub(crate) fn close_links(&mut self) {
        let members = match self.replica.status() {
            Status::Primary(p) => p.members,
            Status::Standby(_) => Vec::new(),
        };
        let gone = |p: &Peer| p.leaving && members.iter().all(|m| m.host != p.host);
        let hosts: Vec<HostId> = self
            .peers
            .values()
            .filter(|p| gone(p))
            .map(|p| p.host.clone())
            .collect();
        for host in hosts {
            self.peers.remove(&host);
            self.note(format!("{host} is no peer any more"));
        }
    }

    fn status(&self) -> Value {
        let c = &self.counters;
        let us = |d: Duration| d.as_micros() as u64;
        let [pause_p50, pause_p99] = c.pauses.percentiles([50, 99]);
        let [commit_p50, commit_p99] = c.commits.percentiles([50, 99]);
        let paths = self.peers.values().flat_map(|p| p.link.stats().paths);
        let bytes = paths.fold((0, 0), |(i, o), p| (i + p.bytes_in, o + p.bytes_out));
        let protocol = match self.replica.status() {
            Status::Primary(p) => json!({
                "role": "primary",
                "phase": format!("{:?}", p.phase),
                // I8: protected only while it could survive the loss of this host right now.
                "protected": p.phase == Phase::Protected
                    && self.whole == self.spec.memory && self.shared.is_empty(),
                "term": p.term,
                "sealed": p.progress.sealed(), "sent": p.progress.sent(),
                "committed": p.progress.committed(), "released": p.progress.released(),
                "lag_epochs": p.progress.sealed().0 - p.progress.committed().0,
                "lag_bytes": p.bytes_in_flight,
                "stays": self.stays(),
                "unfit": self.peers.values().filter_map(|p| Some((p.host.to_string(), p.unfit.clone()?)))
                    .collect::<std::collections::BTreeMap<_, _>>(),
                "members": p.members.iter().map(|m| json!({
                    "host": m.host, "in_sync": m.in_sync, "lost": m.lost, "staged": m.staged,
                    "copying_bytes": m.copying.map(|(_, left)| left),
                })).collect::<Vec<_>>(),
            }),
            Status::Standby(s) => json!({
                "role": "standby",
                "mode": format!("{:?}", s.mode),
                "term": s.term,
                "owner": s.owner,
                "staged": s.staged.map(|r| r.epoch),
                "applied": s.applied.epoch,
            }),
        };
        json!({
            "ok": true,
            "name": self.vm.spec.name,
            "protocol": protocol,
            "takes_over": self.takes_over(),
            "whole": match self.replica.primary() {
                Some(_) => self.whole,
                None => !self.state.is_empty(),
            },
            "nics": self.vm.nics.iter().map(|n| json!(n.stats())).collect::<Vec<_>>(),
            "cuts": c.cuts,
            "pages": c.pages,
            "pause_mean_us": c.pause_us.0.checked_div(c.cuts).unwrap_or(0),
            "pause_max_us": c.pause_us.1,
            "pause_p50_us": pause_p50,
            "pause_p99_us": pause_p99,
            "commit_p50_us": commit_p50,
            "commit_p99_us": commit_p99,
            "wire_bytes_in": bytes.0,
            "wire_bytes_out": bytes.1,
            "arena_bytes": self.capture.arena_bytes(),
            "last_pause_us": us(c.last.pause),
            "last_stop_us": us(c.last.stop),
            "last_harvest_us": us(c.last.harvest),
            "last_copy_us": us(c.last.copy),
            "last_state_us": us(c.last.state),
            "frames_released": c.released,
            "promote_us": c.promote_us,
            "guest_resets": c.resets,
            "fills": c.fills,
            "mishaps": self.guest.mishaps(),
            "throttle_percent": self.throttle.percent(),
            "throttle_most_percent": self.throttle.most(),
            "timeline": self.timeline.status(self.now()),
            "audit_stale_pages": self.audited.0,
            "audit_epochs": self.audited.1,
            "disks": self.disk_status(),
            "net_rate": self.net_rate,
            "log": self.log,
        })
    }
}
