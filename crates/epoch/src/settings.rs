//! The knobs of the protocol: times in microseconds, sizes in bytes, with the defaults of a fast local network.

use crate::Micros;
use crate::policy::PolicySettings;
use crate::sabotage::Sabotage;

/// Settings of one replica. All replicas of a VM should have the same ones; safety does not depend on it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Interval of the primary's heartbeats.
    pub heartbeat_us: Micros,
    /// Silence after which the primary counts a standby as lost. Less than `suspect_us`, so that in a symmetric cut
    /// the primary asks first and no failover is needed.
    pub standby_lost_us: Micros,
    /// A standby that answers but acknowledges no epoch for so long (a hung disk) is dropped from the in-sync set.
    pub ack_timeout_us: Micros,
    /// Silence after which a standby suspects its primary.
    pub suspect_us: Micros,
    /// Longest step of time that counts as the other side's silence. A larger step means that this host itself was
    /// starved or frozen, which says nothing about the peer (I7).
    pub step_cap_us: Micros,
    /// Least time between two requests to send again.
    pub resend_us: Micros,
    /// Interval between Hello messages to a standby that does not answer.
    pub hello_retry_us: Micros,
    /// How long an answer of the store is awaited before the record is read back; doubles up to 16 times this.
    pub store_timeout_us: Micros,
    /// Interval at which the primary reads its record in the background, to notice a lost right or a restored store.
    pub record_check_us: Micros,
    /// Most epochs sealed and not yet acknowledged by all streaming standbys.
    pub window_epochs: usize,
    /// Most bytes of such epochs.
    pub window_bytes: u64,
    /// Most chunks of a full copy in flight.
    pub chunk_window: u64,
    /// A full copy is completed by an epoch once so few bytes remain.
    pub base_threshold_bytes: u64,
    /// A full copy that does not converge is completed by an epoch after this many chunks all the same.
    pub max_chunks: u64,
    /// Outputs wait for the commit (`ft`), or leave at once (`checkpoint`, `restart`).
    pub hold_outputs: bool,
    /// How many standbys must acknowledge an epoch (1 to 3); fewer when fewer are in sync. 0 is taken as "all".
    pub acks_required: u8,
    /// Run the guest, outputs held, while the grant is awaited.
    pub speculate: bool,
    /// A standby goes on only with a VM that was handed over to it, and never because its primary is silent: where the VM has disks that both
    /// hosts reach, and no copy of them, a primary that is only cut off could still write there.
    pub planned_only: bool,
    /// The runtime can undo a speculative run and stand exactly where it was. Then the run begins with the suspicion;
    /// without it only when the store has answered that a takeover is allowed, since a standby that has begun does not go
    /// back to following before the store has decided.
    pub can_roll_back: bool,
    /// The runtime can send epochs that it received as a standby on to another standby after a takeover. Without it one
    /// that is behind is filled anew.
    pub resend_inherited: bool,
    /// A handover whose last epoch is not acknowledged within this time is cancelled and the guest runs on.
    pub handover_timeout_us: Micros,
    /// When to cut.
    pub policy: PolicySettings,
    /// A deliberately broken variant; has an effect only with the crate's feature `sabotage`.
    pub sabotage: Sabotage,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat_us: 10_000,
            standby_lost_us: 120_000,
            ack_timeout_us: 1_000_000,
            suspect_us: 160_000,
            step_cap_us: 20_000,
            resend_us: 20_000,
            hello_retry_us: 50_000,
            store_timeout_us: 100_000,
            record_check_us: 2_000_000,
            window_epochs: 32,
            window_bytes: 256 << 20,
            chunk_window: 8,
            base_threshold_bytes: 8 << 20,
            max_chunks: 100_000,
            hold_outputs: true,
            acks_required: 0,
            speculate: true,
            planned_only: false,
            can_roll_back: false,
            resend_inherited: true,
            handover_timeout_us: 5_000_000,
            policy: PolicySettings::default(),
            sabotage: Sabotage::None,
        }
    }
}

impl Settings {
    pub(crate) fn broken(&self, sabotage: Sabotage) -> bool {
        cfg!(feature = "sabotage") && self.sabotage == sabotage
    }

    /// Acknowledgements that a record with so many in-sync standbys demands.
    #[must_use]
    pub fn acks_for(&self, in_sync: usize) -> u8 {
        let all = u8::try_from(in_sync).unwrap_or(u8::MAX);
        if self.acks_required == 0 {
            all
        } else {
            self.acks_required.min(all)
        }
    }
}
