//! The protocol end to end in a perfect world, one fault at a time.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;
use common::*;
use steadfast_epoch::*;
use steadfast_types::{Epoch, Term};

#[test]
fn starts_copies_and_protects() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    assert_eq!(w.node("a").seen.booted, Some(Term(1)));
    assert!(
        (2..10).contains(&w.node("b").seen.chunks),
        "a copy of 10 chunks ends once little remains"
    );
    let before = w.primary("a").progress().released();
    w.output("a");
    assert!(w.primary("a").progress().released() > before);
    w.run(20);
    assert_eq!(w.node("b").seen.applied, w.primary("a").progress().committed().0);
}

#[test]
fn the_standby_takes_over_from_what_it_acknowledged() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.output("a");
    let released = w.released();
    w.kill("a");
    w.run(400);
    assert!(w.is_primary("b"));
    let (term, at) = w.node("b").seen.promoted.unwrap();
    assert!(at.epoch.0 >= released && term == w.record.term);
    assert_eq!(w.record.owner, host("b"));
    w.output("b");
    assert!(w.released() > at.epoch.0);
    // A new standby on the old host: protected again.
    w.start("a");
    w.give("b", Event::AddStandby(host("a")));
    w.run(400);
    assert_eq!(w.record.in_sync, vec![host("a")]);
    w.kill("b");
    w.run(400);
    assert!(w.is_primary("a"));
}

#[test]
fn proof_of_death_is_faster_than_silence() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.kill("a");
    w.give("b", Event::PeerDied(host("a")));
    w.settle();
    assert!(w.is_primary("b"));
}

#[test]
fn the_primary_goes_on_alone_only_when_granted() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.store_up = false;
    w.kill("b");
    let released = w.released();
    w.output("a");
    w.run(1_000);
    assert_eq!(w.primary("a").phase(), Phase::Holding);
    assert_eq!(
        w.released(),
        released,
        "held while neither standby nor store answers"
    );
    w.store_up = true;
    w.run(3_000);
    assert!(w.record.in_sync.is_empty());
    assert!(w.released() > released);
    assert_eq!(w.primary("a").phase(), Phase::WarmUp);
}

#[test]
fn store_lost_and_standby_visible_runs_on() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.store_up = false;
    w.run(5_000);
    let before = w.released();
    w.output("a");
    assert!(w.released() > before);
    assert_eq!(w.primary("a").phase(), Phase::Protected);
}

#[test]
fn in_a_partition_one_wins_and_the_loser_stops() {
    for one_way in [None, Some(true), Some(false)] {
        let mut w = World::new(Settings::default(), &["a", "b"]);
        w.protected();
        let (ab, ba) = ((host("a"), host("b")), (host("b"), host("a")));
        w.cut_off = match one_way {
            None => vec![ab, ba],
            Some(true) => vec![ab],
            Some(false) => vec![ba],
        };
        w.run(1_000);
        assert_eq!(usize::from(w.is_primary("a")) + usize::from(w.is_primary("b")), 1);
        let winner = w.record.owner.clone();
        assert!(w.is_primary(winner.as_str()));
        w.cut_off.clear();
        w.run(1_000);
        w.output(winner.as_str());
        assert_eq!(w.record.owner, winner);
    }
}

#[test]
fn an_unknown_swap_is_read_back() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.cas_unknown = true;
    w.kill("a");
    w.run(1_000);
    assert!(w.is_primary("b"));
    assert_eq!(w.record.owner, host("b"));
}

#[test]
fn a_restored_store_grants_nothing_until_confirmed() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.give("a", Event::ColdStart);
    w.give("a", Event::AddStandby(host("b")));
    w.run(300);
    let snapshot = w.record.clone();
    // The standby is dropped from the set and the VM goes on alone.
    w.kill("b");
    w.run(500);
    assert!(w.record.in_sync.is_empty());
    let term = w.record.term;
    // The old record, which lists the standby, comes back under a new identity.
    w.record = snapshot;
    w.store_id = StoreId(2);
    w.run(4_000);
    assert!(
        w.record.term > term,
        "confirmed above every term used: {:?}",
        w.record
    );
    assert_eq!((&w.record.owner, w.record.store), (&host("a"), StoreId(2)));
}

#[test]
fn handover_moves_the_vm_and_keeps_it_protected() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.give("a", Event::HandOver(host("b")));
    w.run(300);
    assert!(w.is_primary("b") && !w.is_primary("a"));
    assert_eq!(w.record.owner, host("b"));
    assert_eq!(w.record.in_sync, vec![host("a")]);
    assert_eq!(w.primary("b").phase(), Phase::Protected);
    let chunks = w.node("a").seen.chunks;
    assert_eq!(chunks, 0, "the old primary follows without a copy");
    w.output("b");
    w.kill("b");
    w.run(400);
    assert!(w.is_primary("a"));
}

fn planned_only() -> World {
    let settings = Settings {
        planned_only: true,
        speculate: false,
        ..Settings::default()
    };
    let mut w = World::new(settings, &["a", "b"]);
    w.protected();
    w
}

#[test]
fn who_goes_on_by_a_handover_only_never_takes_over() {
    for died in [false, true] {
        let mut w = planned_only();
        let before = w.record.clone();
        w.kill("a");
        if died {
            w.give("b", Event::PeerDied(host("a")));
        }
        w.run(3000);
        assert!(!w.is_primary("b"));
        assert_eq!(w.record, before);
    }
}

#[test]
fn who_goes_on_by_a_handover_only_does_so_there_and_back() {
    let mut w = planned_only();
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        w.give(from, Event::HandOver(host(to)));
        w.run(300);
        assert!(w.is_primary(to) && !w.is_primary(from));
        w.output(to);
    }
    w.kill("b");
    w.run(3000);
    assert!(!w.is_primary("a"), "it was not handed back");
    assert_eq!(w.record.owner, host("b"));
}

/// The word that it was handed over is lost with the host that said it: the record tells.
#[test]
fn what_was_handed_over_is_found_in_the_record() {
    let mut lost_at = None;
    for _ in 0..2 {
        let mut w = planned_only();
        w.record_frames = true;
        let before = w.delivered;
        w.tamper = lost_at.map(|n| (n, Fate::Lost));
        w.give("a", Event::HandOver(host("b")));
        let is_word = |(_, _, m): &(_, _, Message)| matches!(m.body, Body::Handover { .. });
        while w.record.owner != host("b") {
            w.run(1);
        }
        match lost_at {
            None => {
                let n = w.recorded.iter().position(is_word).unwrap();
                lost_at = Some(before + n as u64 + 1);
            }
            Some(_) => {
                assert!(!w.is_primary("b"), "it was told");
                w.kill("a");
                w.run(1000);
                assert!(w.is_primary("b"));
            }
        }
    }
}

/// Who was left half filled in the first life of a primary must not go on from there in its second.
#[test]
fn a_copy_has_a_number_of_its_own_in_each_life_of_a_primary() {
    let mut w = World::new(Settings::default(), &["a", "b", "c"]);
    w.record_frames = true;
    w.protected();
    for (from, to) in [("a", "b"), ("b", "a")] {
        w.give(from, Event::HandOver(host(to)));
        w.run(300);
        assert!(w.is_primary(to));
    }
    w.kill("c");
    w.run(300);
    w.start("c");
    w.give("a", Event::AddStandby(host("c")));
    w.run(400);
    assert_eq!(w.record.in_sync, vec![host("b"), host("c")]);
    let mut joins = std::collections::BTreeSet::new();
    for (from, to, m) in &w.recorded {
        if let Body::Join { join, .. } = m.body
            && (from, to) == (&host("a"), &host("c"))
        {
            joins.insert(join);
        }
    }
    assert_eq!(joins.len(), 2, "{joins:?}");
}

#[test]
fn flush_epochs_wait_for_both_fsyncs() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.flush = true;
    w.protected();
    let e = w.output("a");
    assert!(w.primary("a").progress().committed() >= e);
}

#[test]
fn three_standbys_and_two_deaths() {
    let mut w = World::new(Settings::default(), &["a", "b", "c", "d"]);
    w.protected();
    w.kill("a");
    w.run(500);
    let owner = w.record.owner.clone();
    assert_ne!(owner, host("a"));
    assert_eq!(
        w.record.in_sync.len(),
        2,
        "the others stay in sync: {:?}",
        w.record
    );
    w.output(owner.as_str());
    w.kill(owner.as_str());
    w.run(800);
    let next = w.record.owner.clone();
    assert!(w.is_primary(next.as_str()));
    w.output(next.as_str());
    assert!(w.primary(next.as_str()).progress().released() > Epoch(0));
}

#[test]
fn one_of_two_acknowledgements_and_the_poll() {
    let settings = Settings {
        acks_required: 1,
        ..Settings::default()
    };
    let mut w = World::new(settings, &["a", "b", "c"]);
    w.protected();
    assert_eq!(w.record.acks, 1);
    // c hears nothing any more: b alone carries the commits.
    w.cut_off = vec![(host("a"), host("c"))];
    w.give("a", Event::Output);
    w.run(5);
    let released = w.released();
    w.kill("a");
    w.run(1_000);
    assert!(w.is_primary("b"), "only the one that has everything may go on");
    assert!(w.node("b").seen.promoted.unwrap().1.epoch.0 >= released);
}

/// A VM that has run for years has epochs beyond any that a loop over numbers could walk through.
#[test]
fn an_old_vm_gets_a_new_standby() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    let old = EpochRef::new(1 << 50, 1);
    w.start_with_disk("a", old);
    w.protected();
    assert!(w.primary("a").progress().committed() > old.epoch);
    w.output("a");
    w.kill("a");
    w.run(400);
    assert!(w.is_primary("b"));
    w.start("a");
    w.give("b", Event::AddStandby(host("a")));
    w.run(400);
    assert_eq!(w.record.in_sync, vec![host("a")]);
}

/// Numbers that would saturate: refused whole, and nothing is believed of them.
#[test]
fn numbers_that_no_vm_reaches_are_refused() {
    let mut w = World::new(Settings::default(), &["a", "b"]);
    w.protected();
    w.record_frames = true;
    w.output("a");
    w.run(20);
    let recorded = std::mem::take(&mut w.recorded);
    let before = w.node("b").replica.status();
    let mut refused = 0;
    for (from, _, m) in recorded.into_iter().filter(|(from, ..)| *from == host("a")) {
        let mut forged = vec![Message {
            term: Term::LIMIT,
            ..m.clone()
        }];
        if let Body::Epoch(h) = m.body {
            let epoch = |epoch, term| EpochRef { epoch, term };
            let limit = epoch(Epoch::LIMIT, h.epoch.term);
            for (at, prev) in [
                (limit, epoch(Epoch::LIMIT.prev(), h.epoch.term)),
                (h.epoch, h.epoch),
                (h.epoch, limit),
                (h.epoch, epoch(h.prev.epoch, h.epoch.term.next())),
            ] {
                let body = Body::Epoch(EpochHeader { epoch: at, prev, ..h });
                forged.push(Message { body, ..m.clone() });
            }
        }
        for message in forged {
            let from = from.clone();
            let out = w.nodes.get_mut(&host("b")).unwrap().replica.handle(
                w.now,
                Event::Message {
                    from: from.clone(),
                    message,
                },
            );
            assert_eq!(out, vec![Action::Notice(Notice::Implausible(from))]);
            refused += 1;
        }
    }
    assert!(refused > 2, "epochs and heartbeats were recorded: {refused}");
    assert_eq!(w.node("b").replica.status(), before);
}
