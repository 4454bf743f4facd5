//! What the pool knows, as plain data for the store and the API (serde).
//!
//! A record (`HostRecord`, `VmSpecRecord`, `PoolSettings`) is kept in the store and changed by people or by actions. A state or
//! status is what the arbiter holds and the hosts report. A [`Snapshot`] is all of it at one instant.
//! New fields carry `serde(default)`, so that a host of the previous version can be read during a rolling upgrade.

mod health;
mod host;
mod pool;
mod resources;
mod vm;

pub use crate::detector::FailureClass;
pub use health::{Check, HealthPolicy, Remedy, Rung};
pub use host::{
    DrainWhy, FailingPart, Host, HostAdmin, HostHealth, HostLoad, HostRecord, HostStatus, Network,
    Prediction, Versions,
};
pub use pool::{
    AlarmKey, AppRecord, BalanceSettings, GroupRule, Keep, Limits, MoveCause, PoolSettings, Snapshot, Task,
};
pub use resources::{Resources, size};
pub use vm::{
    DiskPlace, DiskRecord, Home, Instance, Phase, Power, Protection, SiteRules, Standby, StandbyMemory,
    StartFailures, Vm, VmLoad, VmSpecRecord, VmState,
};
