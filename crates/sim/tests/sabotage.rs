//! Every checker is proven by a deliberately broken variant of the protocol that it catches; and the same seeds pass
//! with the protocol as it is (`seeds.rs`).
#![allow(clippy::panic, missing_docs)]

use steadfast_epoch::Sabotage;
use steadfast_sim::batch;

/// What is broken, and which checkers may be the first to notice: a broken rule often shows in more than one way.
const VARIANTS: [(Sabotage, &[&str]); 18] = [
    (Sabotage::ReleaseOnSend, &["I1", "I6"]),
    (Sabotage::CommitWithoutAck, &["I1", "I4"]),
    (Sabotage::TakeoverWithoutGrant, &["I2"]),
    (Sabotage::AloneWithoutGrant, &["I1", "I2", "I4"]),
    (Sabotage::UnknownMeansGranted, &["I2"]),
    (Sabotage::TrustRestoredStore, &["I2"]),
    (Sabotage::ApplyUncommitted, &["I3"]),
    (Sabotage::AcceptGaps, &["I3"]),
    (Sabotage::AcceptCorrupt, &["I3"]),
    (Sabotage::PromoteFromCommitted, &["I4"]),
    (Sabotage::PromoteOutOfSync, &["I4"]),
    (Sabotage::AckBeforeStage, &["I1"]),
    (Sabotage::CommitWithoutFsync, &["I5"]),
    (Sabotage::CountOwnStarvation, &["I7"]),
    (Sabotage::AlwaysProtected, &["I8"]),
    (Sabotage::AcceptOldTerm, &["fault 48", "I3"]),
    (Sabotage::SendStaleChunks, &["I3"]),
    (Sabotage::NeverResend, &["liveness"]),
];

#[test]
fn every_broken_variant_is_caught() {
    let mut missed = Vec::new();
    for (sabotage, by) in VARIANTS {
        let total = batch::run_with(0, 6_000, 1, sabotage);
        let first = total
            .failures
            .first()
            .and_then(|r| r.violation.clone().map(|v| (r.seed, v)));
        match first {
            Some((seed, v)) => {
                println!("{sabotage:?}: seed {seed} breaks {}: {:.160}", v.what, v.how);
                if !by.contains(&v.what.as_str()) {
                    missed.push(format!(
                        "{sabotage:?} was caught as {} ({}), not as {by:?}",
                        v.what, v.how
                    ));
                }
            }
            None => missed.push(format!("{sabotage:?} was not caught in {} runs", total.runs)),
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
