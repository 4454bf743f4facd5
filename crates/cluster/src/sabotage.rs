//! Deliberately broken variants of the decisions. Each proves that a checker of the tests catches what it is there for.
//! They can only be switched on with the crate's feature `sabotage`, by code, never by configuration.

/// What is broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing.
    #[default]
    None,
    /// Placement does not look at anti-affinity.
    IgnoreApart,
    /// Placement does not look at capacity.
    IgnoreCapacity,
    /// Power-on is granted without failover room.
    NoAdmission,
    /// A `restart` VM is started elsewhere before its host is fenced.
    StartBeforeFence,
    /// A VM whose host is only suspect is promoted elsewhere (I7).
    PromoteOnSuspect,
    /// A drain removes the standby before its replacement is in sync.
    DrainUnprotects,
    /// The balancer has no damping: no residence, no settling, no hysteresis.
    BalanceWithoutDamping,
    /// Work under way is forgotten: the same actions are decided again.
    ForgetTasks,
    /// Time in which the observer itself did not run counts as the peer's silence (I7).
    CountOwnStarvation,
    /// The dead host's standbys stay listed, and no new one is made.
    NoReprotection,
}

impl Sabotage {
    /// Whether this variant is switched on: never in a build without the feature.
    pub(crate) const fn is(self, variant: Self) -> bool {
        cfg!(feature = "sabotage") && self as u8 == variant as u8
    }
}
