//! The pool's decisions, pure: no I/O, no clock, no lock, no thread, no randomness.
//!
//! ```text
//!   records, reports, arbiter's terms          detector: evidence -> class of failure
//!                    \                             /
//!                     v                           v
//!                          Snapshot (model)
//!                                |
//!                             decide  ------> refusals, each with its reason and the shortfall
//!                                |
//!                       ordered, idempotent actions, each with its reason
//!                                |
//!                      node: carries them out, reports, events
//! ```
//! One host, elected through the store, takes a [`model::Snapshot`], calls [`decide()`], and carries out the
//! [`Decisions`]. All is level-triggered: nothing is remembered between two calls, so a new leader goes on where the old one
//! died. On the state in which all actions have been applied, `decide` has nothing further to say until the world moves.
//!
//! Invariants kept here: I7 (nothing is taken from a host that is only suspect; `detector`), I8 (a standby counts only
//! while the arbiter lists it in sync), I10 (each action names the state that it expects). I2 is the arbiter's: an action is a
//! request to try, never a right to run.

pub mod action;
pub mod apply;
pub mod availability;
pub mod decide;
pub mod detector;
pub mod events;
pub mod health;
pub mod lease;
pub mod model;
pub mod sabotage;
pub mod smooth;
pub mod synthetic;

pub use action::{Action, Because, Decision, Decisions, NoHost, Refusal, Wanted};
pub use apply::{apply, settle};
pub use decide::{Placement, admit, decide};
pub use sabotage::Sabotage;
