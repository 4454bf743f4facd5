//! One instance of a VM on one host: a standby or the primary, and the moves between the two.

use crate::Micros;
use crate::arbiter::Instance;
use crate::io::{Action, Event, Notice};
use crate::message::EpochRef;
use crate::policy::PolicySettings;
use crate::primary::{Primary, PrimaryStatus, PrimaryStep};
use crate::settings::Settings;
use crate::standby::{Standby, StandbyStatus, StandbyStep};
use steadfast_types::{HostId, Term};

/// What the replica is now.
#[derive(Clone, Debug)]
pub enum Role {
    /// A standby, perhaps empty.
    Standby(Box<Standby>),
    /// The primary.
    Primary(Box<Primary>),
}

/// What a status page shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// A standby's.
    Standby(StandbyStatus),
    /// The primary's.
    Primary(PrimaryStatus),
}

/// One instance of a VM on one host.
#[derive(Clone, Debug)]
pub struct Replica {
    me: HostId,
    instance: Instance,
    settings: Settings,
    role: Role,
}

impl Replica {
    /// A new instance: an empty standby whose volumes stand at `disk` (zero for none). `instance` must be drawn at
    /// random and never used again. To start a VM, give it [`Event::ColdStart`].
    #[must_use]
    pub fn new(now: Micros, me: HostId, instance: Instance, settings: Settings, disk: EpochRef) -> Self {
        let standby = Standby::new(now, me.clone(), instance, settings.clone(), disk);
        Self {
            me,
            instance,
            settings,
            role: Role::Standby(Box::new(standby)),
        }
    }

    /// Whether outputs wait for their commit, when cuts are made, and how long a silent primary is waited for, from now on. What was let out
    /// before stays so.
    pub fn set_class(&mut self, hold_outputs: bool, policy: &PolicySettings, suspect_us: Micros) {
        let set = |settings: &mut Settings| {
            settings.hold_outputs = hold_outputs;
            settings.policy = *policy;
            settings.suspect_us = suspect_us;
        };
        set(&mut self.settings);
        match &mut self.role {
            Role::Standby(s) => set(&mut s.settings),
            Role::Primary(p) => set(&mut p.settings),
        }
    }

    /// Takes one event at a monotonic time and returns what to do, in order.
    pub fn handle(&mut self, now: Micros, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        if let Event::Message { from, message } = &event
            && !message.is_plausible()
        {
            out.push(Action::Notice(Notice::Implausible(from.clone())));
            return out;
        }
        let blank = |disk| Standby::new(now, self.me.clone(), self.instance, self.settings.clone(), disk);
        let next = match &mut self.role {
            Role::Standby(s) => match s.handle(now, event, &mut out) {
                StandbyStep::Stay => None,
                StandbyStep::Promoted(p) => Some(Role::Primary(p)),
            },
            Role::Primary(p) => match p.handle(now, event, &mut out) {
                PrimaryStep::Stay => None,
                PrimaryStep::Lost { term } => {
                    out.push(Action::StopGuest { keep: false });
                    let disk = p.disk();
                    let mut s = blank(disk);
                    s.seen = term;
                    s.keep_store(p.store());
                    Some(Role::Standby(Box::new(s)))
                }
                PrimaryStep::HandedOver { record, at } => {
                    out.push(Action::StopGuest { keep: true });
                    // All of it has committed, so every flush is fsynced here.
                    let durable = at.epoch;
                    // What it acted under was the term before the new record's.
                    let seen = record.term.prev();
                    let mut s = blank(at).with_state(at, record.owner, seen, durable);
                    s.keep_store(p.store());
                    Some(Role::Standby(Box::new(s)))
                }
            },
        };
        if let Some(role) = next {
            self.role = role;
            // The new role begins at once.
            out.extend(self.handle(now, Event::Tick));
        }
        out
    }

    /// Call [`Replica::handle`] with [`Event::Tick`] at this time at the latest.
    #[must_use]
    pub fn deadline(&self) -> Micros {
        match &self.role {
            Role::Standby(s) => s.deadline(),
            Role::Primary(p) => p.deadline(),
        }
    }

    /// The role, for looking.
    #[must_use]
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// The primary, if this is one.
    #[must_use]
    pub fn primary(&self) -> Option<&Primary> {
        match &self.role {
            Role::Primary(p) => Some(p),
            Role::Standby(_) => None,
        }
    }

    /// The highest term this instance acts under or has seen.
    #[must_use]
    pub fn term(&self) -> Term {
        match &self.role {
            Role::Primary(p) => p.term(),
            Role::Standby(s) => s.seen(),
        }
    }

    /// Everything a status page shows.
    #[must_use]
    pub fn status(&self) -> Status {
        match &self.role {
            Role::Primary(p) => Status::Primary(p.status()),
            Role::Standby(s) => Status::Standby(s.status()),
        }
    }
}
