//! Fault 48: what an old term says is answered at most, never acted on.

use crate::world::World;
use steadfast_epoch::{Action, Body, Message};
use steadfast_types::Term;

/// A host that had seen `term` before has taken a message.
pub fn acted(w: &mut World, h: usize, term: Term, message: &Message, actions: &[Action]) {
    let says = matches!(
        message.body,
        Body::Epoch(_) | Body::Join { .. } | Body::Resume { .. } | Body::Chunk { .. }
    );
    let acts = |a: &Action| {
        matches!(
            a,
            Action::Stage { .. }
                | Action::Apply { .. }
                | Action::Truncate { .. }
                | Action::BeginJoin { .. }
                | Action::StoreChunk { .. }
        )
    };
    if says && message.term < term && actions.iter().any(acts) {
        let how = format!("{} has seen term {term} and acts on {message:?}", w.hosts[h].id);
        w.checks.fail("fault 48", how);
    }
}
