//! The pool's part, as far as a run needs it: start the VM, give it standbys, boot it from disk when no memory is left.
//!
//! It sees everything, like an operator with all the time in the world: a cold boot is only ordered when no process
//! anywhere holds a state that could go on. So every lost memory state in a run is the protocol's fault.

use crate::invariants::i8;
use crate::world::World;
use steadfast_epoch::{EpochRef, Event, Role};

impl World {
    /// Looks around and orders what is missing.
    pub fn manage(&mut self) {
        i8::look(self);
        let owner = self.index(&self.store.record.owner);
        let record = self.store.record.clone();
        let alive = |h: usize| {
            let host = &self.hosts[h];
            host.up
                && host.replica.as_ref().is_some_and(|r| {
                    r.primary().is_some_and(|p| p.record().nonce == record.nonce || self.hosts[h].id == record.owner)
                })
        };
        let confirmed = record.store == self.store.id;
        // The operator's part of fault 37: where nobody can confirm the record, he writes what was true.
        self.unconfirmed = if confirmed || !self.healing { 0 } else { self.unconfirmed + 1 };
        if self.unconfirmed >= 20
            && let Some(mut r) = self.store.last_true.clone()
        {
            r.store = self.store.id;
            self.log(|| format!("operator confirms {r:?}"));
            self.store.record = r;
            self.operators += 1;
            return;
        }
        if alive(owner) {
            self.manager_idle = 0;
            self.mirror(owner);
            return;
        }
        // Somebody may be on the way: the owner by handover, or enough in-sync standbys with state to know everything
        // that was committed.
        let holds = |h: usize| {
            let host = &self.hosts[h];
            let has = match host.replica.as_ref().map(|r| r.role()) {
                Some(Role::Standby(s)) => s.status().staged,
                Some(Role::Primary(p)) => (p.term() >= record.term).then_some(EpochRef::ZERO),
                None => None,
            };
            has.filter(|_| host.up)
        };
        let handed = record.handover.is_some() && holds(owner) == record.handover;
        let held = record.in_sync.iter().filter(|s| holds(self.index(s)).is_some()).count();
        let hot = handed || held > record.polls_needed();
        if self.store.down || (hot && (confirmed || !self.healing)) {
            self.manager_idle = 0;
            return;
        }
        self.manager_idle += 1;
        if self.manager_idle < 4 {
            return;
        }
        if !confirmed {
            return;
        }
        let may = |h: usize| self.hosts[h].up && self.hosts[h].frozen_until <= self.now;
        let who = if may(owner) {
            Some(owner)
        } else {
            let full = record.polls_needed() == 0;
            record.in_sync.iter().map(|s| self.index(s)).find(|&s| full && may(s))
        };
        if let Some(h) = who {
            self.log(|| format!("manager: cold start on {}", self.hosts[h].id));
            self.give(h, Event::ColdStart);
        }
    }

    fn mirror(&mut self, owner: usize) {
        let Some(p) = self.hosts[owner].replica.as_ref().and_then(|r| r.primary()) else { return };
        let members = p.status().members;
        let mut todo = Vec::new();
        let good = members.iter().filter(|m| !m.lost && self.hosts[self.index(&m.host)].up).count();
        // A standby that is gone for longer gives its place to a spare.
        if good < self.want
            && let Some(m) = members.iter().find(|m| m.lost && !m.in_sync)
            && members.len() >= self.want
        {
            todo.push(Event::RemoveStandby(m.host.clone()));
        }
        if members.len() - todo.len() < self.want {
            let spare = (0..self.hosts.len())
                .filter(|&h| h != owner && self.hosts[h].up)
                .find(|&h| members.iter().all(|m| m.host != self.hosts[h].id));
            if let Some(h) = spare {
                todo.push(Event::AddStandby(self.hosts[h].id.clone()));
            }
        }
        if self.hosts[owner].frozen_until > self.now {
            return;
        }
        for e in todo {
            self.give(owner, e);
        }
    }
}
