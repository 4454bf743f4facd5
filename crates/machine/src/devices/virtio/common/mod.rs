//! What all virtio devices share: descriptor chains, queue service, registrations, rate limits.
//!
//! Everything a guest can put into a ring is hostile. The rules are kept here once: a chain is read completely and
//! checked (bounds, order, length, loops) before a device sees it; the work of one call is bounded, and a device
//! that stops early arms its [`Kick`] so that it is called again.

pub mod chain;
pub mod limiter;
pub mod service;
#[doc(hidden)]
pub mod testkit;

pub use chain::{Chain, chain_at};
pub use limiter::{Rate, RateHandle, RateLimiter};
pub use service::{
    Kick, Registration, Timer, disable, enable, next_chain, signal, signal_since, used, used_together,
};

use super::DeviceError;

/// A protocol error of the driver.
pub(crate) fn driver_error(device: &str, why: impl std::fmt::Display) -> DeviceError {
    DeviceError::Driver {
        device: device.to_owned(),
        why: why.to_string(),
    }
}

/// An error of the host.
pub(crate) fn host_error(device: &str, what: &str, source: std::io::Error) -> DeviceError {
    DeviceError::Host {
        device: device.to_owned(),
        what: what.to_owned(),
        source,
    }
}

/// Fills `data` from `config` at `offset`; bytes past the end read as zero.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = start
            .checked_add(i)
            .and_then(|at| config.get(at))
            .copied()
            .unwrap_or(0);
    }
}

/// Puts `bytes` into `config` at `at`; parts outside are dropped.
pub(crate) fn put(config: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = config.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Adds to a statistics counter.
pub(crate) fn count(counter: &std::sync::atomic::AtomicU64, n: u64) {
    counter.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
}

/// Refuses the record of another kind of device.
pub(crate) fn expect_kind(
    record: &crate::state::StateRecord,
    kind: crate::state::StateKind,
) -> Result<(), crate::state::StateError> {
    if record.kind == kind {
        Ok(())
    } else {
        Err(crate::state::StateError::Refused(format!(
            "state of {:?}#{} given to a {kind:?}",
            record.kind, record.instance
        )))
    }
}
