//! The crash-at-every-step table: either side is killed after each message of a conversation that goes through warm-up,
//! streaming with flushes, takeover and handover; and each message is lost, doubled or replayed later.
//!
//! After every single case: what was released is contained in what goes on, and the VM is served and protected again.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
use common::*;
use steadfast_epoch::*;
use steadfast_types::Term;

/// A fixed story of about a hundred messages; `step` says how far it got.
fn story(w: &mut World) {
    w.give("a", Event::ColdStart);
    w.give("a", Event::AddStandby(host("b")));
    w.run(60);
    for i in 0..6 {
        w.flush = i % 2 == 0;
        for h in ["a", "b"] {
            if w.is_primary(h) {
                w.give(h, Event::Output);
            }
        }
        w.run(2);
    }
    if w.is_primary("a") {
        w.give("a", Event::HandOver(host("b")));
    }
    w.run(40);
}

/// Starts dead hosts, gives the owner a standby, and sees that outputs flow and the VM is protected.
fn recovers(w: &mut World, what: &str) {
    let before = w.released();
    for h in ["a", "b"] {
        if !w.node(h).up {
            w.start(h);
        }
    }
    for _ in 0..40 {
        w.run(100);
        let running: Vec<_> = ["a", "b"].into_iter().filter(|h| w.is_primary(h)).collect();
        let listed = |h: &&str| w.record.in_sync.contains(&host(h)) || w.record.handover.is_some();
        if running.is_empty()
            && ["a", "b"]
                .iter()
                .all(|h| !listed(h) || w.node(h).replica.status_is_empty())
        {
            // No memory left anywhere: the pool starts it from disk.
            let owner = w.record.owner.clone();
            w.give(owner.as_str(), Event::ColdStart);
        }
        for h in running {
            if w.primary(h).status().members.is_empty() {
                let other = if h == "a" { "b" } else { "a" };
                w.give(h, Event::AddStandby(host(other)));
            }
            w.give(h, Event::Output);
        }
        let owner = w.record.owner.clone();
        if w.is_primary(owner.as_str())
            && w.primary(owner.as_str()).phase() == Phase::Protected
            && w.released() > before
        {
            return;
        }
    }
    panic!(
        "{what}: not served and protected again: {:?} {:?}",
        w.record,
        w.nodes
            .keys()
            .map(|h| w.node(h.as_str()).replica.status())
            .collect::<Vec<_>>()
    );
}

trait Empty {
    fn status_is_empty(&self) -> bool;
}

impl Empty for Replica {
    fn status_is_empty(&self) -> bool {
        matches!(self.status(), Status::Standby(s) if s.staged.is_none())
    }
}

fn promoted_contains_released(w: &World, what: &str) {
    for n in w.nodes.values() {
        if let Some((term, at)) = n.seen.promoted {
            let out = w
                .nodes
                .values()
                .flat_map(|n| &n.seen.released)
                .filter(|(t, _)| *t < term);
            let out = out.map(|(_, e)| *e).max().unwrap_or(0);
            assert!(
                at.epoch.0 >= out,
                "{what}: goes on from {at}, but {out} was released before term {term}"
            );
        }
    }
}

fn length() -> u64 {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    story(&mut w);
    assert!(w.is_primary("b"), "the story ends with a handover");
    w.delivered
}

#[test]
fn either_side_killed_after_each_message() {
    let n = length();
    assert!(n > 60, "{n} messages");
    for victim in ["a", "b"] {
        for roll_back in [false, true] {
            for at in 1..=n {
                let what = format!("{victim} killed after message {at}, roll back {roll_back}");
                let settings = Settings {
                    can_roll_back: roll_back,
                    ..Settings::default()
                };
                let mut w = World::new(settings, &["a", "b"]);
                w.rollback_ok = roll_back;
                w.kill_at = Some((at, host(victim)));
                story(&mut w);
                promoted_contains_released(&w, &what);
                w.run(600);
                promoted_contains_released(&w, &what);
                recovers(&mut w, &what);
            }
        }
    }
}

#[test]
fn each_message_lost_doubled_or_late() {
    let n = length();
    for at in 1..=n {
        for (how, name) in [
            (Fate::Lost, "lost"),
            (Fate::Doubled, "doubled"),
            (Fate::Late, "late"),
        ] {
            let what = format!("message {at} {name}");
            let mut w = World::new(Settings::default(), &["a", "b"]);
            w.tamper = Some((at, how));
            story(&mut w);
            w.run(300);
            promoted_contains_released(&w, &what);
            recovers(&mut w, &what);
        }
    }
}

#[test]
fn every_compare_and_swap_unknown() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.cas_unknown = true;
    story(&mut w);
    w.run(2_000);
    recovers(&mut w, "all answers lost");
}

#[test]
fn frames_of_an_old_term_are_refused() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.record_frames = true;
    w.protected();
    w.output("a");
    let old: Vec<_> = w.recorded.clone();
    w.record_frames = false;
    w.kill("a");
    w.run(500);
    assert!(w.is_primary("b"));
    w.start("a");
    w.give("b", Event::AddStandby(host("a")));
    w.run(500);
    let term = w.record.term;
    let applied = w.node("a").seen.applied;
    let truncated = w.node("a").seen.truncated.len();
    assert_eq!(w.record.in_sync, vec![host("a")]);
    // Everything the first primary ever said, once more, to both.
    for (from, _, m) in old {
        assert!(m.term < term);
        for to in ["a", "b"] {
            w.give(
                to,
                Event::Message {
                    from: from.clone(),
                    message: m.clone(),
                },
            );
        }
    }
    w.settle();
    w.run(200);
    assert_eq!((w.record.term, &w.record.owner), (term, &host("b")));
    assert!(w.is_primary("b"));
    assert!(w.node("a").seen.applied >= applied);
    assert_eq!(w.node("a").seen.truncated.len(), truncated);
    assert_eq!(w.primary("b").phase(), Phase::Protected);
    assert!(
        w.node("b")
            .seen
            .notices
            .iter()
            .any(|n| matches!(n, Notice::Stale(_)))
    );
}

#[test]
fn events_that_make_no_sense_are_ignored_in_every_role() {
    use steadfast_types::Epoch;
    let e = EpochRef::new(7, 3);
    let nonsense = || {
        vec![
            Event::Sealed(SealedEpoch {
                epoch: Epoch(99),
                bytes: 1,
                flush: true,
                pause_us: 1,
                whole: true,
            }),
            Event::JournalSynced {
                through: Epoch(u64::MAX),
            },
            Event::Staged { epoch: e },
            Event::Applied {
                through: Epoch(u64::MAX),
            },
            Event::SpeculationDiscarded { intact: false },
            Event::ChunkSent {
                to: host("x"),
                join: 9,
                seq: u64::MAX,
                remaining: 0,
            },
            Event::Corrupt { from: host("x") },
            Event::PeerDied(host("x")),
            Event::Connected(host("x")),
            Event::Disconnected(host("x")),
            Event::RemoveStandby(host("x")),
            Event::CancelHandOver,
            Event::HandOver(host("x")),
            Event::AddStandby(host("a")),
            Event::Output,
            Event::Flush,
            Event::CutWanted,
            Event::Dirty { bytes: u64::MAX },
            Event::Store(StoreReply::Failed { id: u64::MAX }),
            Event::Store(StoreReply::Cas {
                id: 0,
                outcome: CasOutcome::Done,
            }),
        ]
    };
    let bodies = |s| {
        let c = Cursors {
            sent: Epoch(u64::MAX),
            committed: Epoch(u64::MAX),
            released: Epoch(5),
            stable: Epoch(9),
        };
        let h = EpochHeader {
            epoch: e,
            prev: e,
            flush: true,
            bytes: u64::MAX,
            base: None,
            cursors: c,
        };
        let bodies = vec![
            Body::Hello,
            Body::Resume { after: e },
            Body::Join {
                join: 1,
                next: u64::MAX,
            },
            Body::Chunk {
                join: 1,
                seq: u64::MAX,
            },
            Body::Epoch(h),
            Body::Epoch(EpochHeader {
                base: Some(Base { join: 1, chunks: 0 }),
                ..h
            }),
            Body::Heartbeat {
                seq: u64::MAX,
                cursors: c,
                rank: Some(255),
            },
            Body::Handover {
                at: e,
                released: Epoch(u64::MAX),
            },
            Body::Welcome(Welcome {
                staged: Some(e),
                applied: e,
                durable: Epoch(u64::MAX),
                ..Welcome::default()
            }),
            Body::Ack {
                staged: e,
                durable: Epoch(u64::MAX),
                echo: u64::MAX,
                top: Term(0),
            },
            Body::ChunkAck {
                join: 1,
                next: u64::MAX,
                echo: u64::MAX,
            },
            Body::Alive { heard: u64::MAX },
            Body::Resend { after: e },
            Body::NoSession,
            Body::Poll,
            Body::PollReply {
                staged: e,
                promised: true,
            },
        ];
        bodies.into_iter().map(move |body| Message {
            term: Term(2),
            session: s,
            body,
        })
    };
    for role in ["a", "b", "c"] {
        let mut w = World::new(Settings::default(), &["a", "b", "c"]);
        w.give("a", Event::ColdStart);
        w.give("a", Event::AddStandby(host("b")));
        w.run(100);
        for e in nonsense() {
            w.give(role, e);
        }
        for session in [0, 1, (1 << 24) + 1, (1 << 24) + 2, u64::MAX - 1] {
            for from in ["a", "b", "x"] {
                for m in bodies(session) {
                    w.give(
                        role,
                        Event::Message {
                            from: host(from),
                            message: m,
                        },
                    );
                }
            }
        }
        w.settle();
        w.run(50);
    }
}
