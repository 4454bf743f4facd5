//! Deliberately broken variants of the protocol. Each proves that a checker of the simulation catches what it is
//! there for. They can only be switched on with the crate's feature `sabotage`, by code, never by configuration.

/// What is broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing.
    #[default]
    None,
    /// I1: outputs leave when their epoch is sent, not when it has committed.
    ReleaseOnSend,
    /// I1: an epoch commits without the standby's acknowledgement.
    CommitWithoutAck,
    /// I2: a standby takes over as soon as it suspects, without asking the arbiter.
    TakeoverWithoutGrant,
    /// I2: a primary that lost its standby goes on alone without asking the arbiter.
    AloneWithoutGrant,
    /// I2: a refused or unknown compare-and-swap is taken for a grant.
    UnknownMeansGranted,
    /// I2: a restored store's old record is trusted, so terms are used again.
    TrustRestoredStore,
    /// I3: a standby applies what is staged, committed or not.
    ApplyUncommitted,
    /// I3: a standby accepts an epoch that does not follow its tip.
    AcceptGaps,
    /// I3: a standby stages epochs that failed validation.
    AcceptCorrupt,
    /// I4: promotion goes on from the newest epoch known as committed and drops what was acknowledged after it.
    PromoteFromCommitted,
    /// I4: a standby that the record does not list as in sync takes over all the same.
    PromoteOutOfSync,
    /// I4: a standby acknowledges on receipt, before the epoch is staged.
    AckBeforeStage,
    /// I5: a flush epoch commits without waiting for either fsync.
    CommitWithoutFsync,
    /// I7: time during which the standby itself did not run counts as the primary's silence.
    CountOwnStarvation,
    /// I8: a primary calls itself protected as long as the record lists a standby, heard or not.
    AlwaysProtected,
    /// Fault 48: messages of an old term are accepted.
    AcceptOldTerm,
    /// I3: a piece of a copy that waited for its turn is sent also when its session is over: it is dropped over there, and counts as there.
    SendStaleChunks,
    /// Liveness: lost epochs are never sent again, and a standby that waits for them is never given up.
    NeverResend,
}
