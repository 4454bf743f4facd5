//! The epoch protocol as pure state machines: events in, actions out; no I/O, no clock, no lock, no thread.
//!
//! A [`Replica`] is one instance of a VM on one host. It is a standby (it may be empty) or the primary, and it moves
//! between the two. The runtime that owns it
//!
//! 1. turns what happens (a message, a sealed epoch, a reply of the store, time passing) into an [`Event`],
//! 2. calls [`Replica::handle`] with the monotonic time in microseconds,
//! 3. carries out the returned [`Action`]s in order,
//! 4. calls again with [`Event::Tick`] at [`Replica::deadline`] at the latest.
//!
//! Bulk data never passes through here: an epoch is an [`EpochRef`], the runtime holds its sealed record until
//! [`Action::Forget`].
//!
//! ```text
//!           grant (store CAS)                 lost the right / handed over
//!   Standby ------------------> Primary --------------------------------> Standby
//!   empty, joining,             warm-up, protected, holding,              (empty, or with the exact
//!   following, asking           alone, handing over                        state it handed over)
//! ```
//!
//! Invariants kept here (numbers as in `docs/invariants.md`): I1, I2, I3, I4, I5, I6 and I7; where each is asserted
//! is listed in [`invariants`]. Every transition is total: an event that makes no sense in the present state is
//! ignored or refused with a [`Notice`]; the only panics are the assertions of the invariants.
//!
//! The protocol, with its argument and its crash-at-every-step table, is in `docs/protocol.md`.

pub mod arbiter;
pub mod invariants;
pub mod io;
pub mod message;
pub mod policy;
pub mod primary;
pub mod progress;
mod replica;
pub mod sabotage;
pub mod settings;
pub mod standby;
pub mod takeover;

pub use arbiter::{CasOutcome, Instance, Nonce, StoreId, StoreReply, VmRecord};
pub use io::{Action, Event, Notice, SealedEpoch};
pub use message::{Base, Body, Cursors, EpochHeader, EpochRef, Message, Welcome};
pub use primary::{MemberStatus, Phase, Primary, PrimaryStatus};
pub use progress::Progress;
pub use replica::{Replica, Role, Status};
pub use sabotage::Sabotage;
pub use settings::Settings;
pub use standby::{Standby, StandbyMode, StandbyStatus};

/// Monotonic time in microseconds, from any origin. It never goes back within one instance; a value that does is
/// taken as "no time has passed".
pub type Micros = u64;
