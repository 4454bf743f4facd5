//! The fence around third-party parsers: a panic becomes an error.
//!
//! The workspace is built with `panic = "unwind"`, which this relies on. What it cannot stop is an abort (a failed
//! allocation, an overflown stack); so whoever calls through it first checks every size that the image declares.

use crate::error::DiskError;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f`; a panic inside it is returned as [`DiskError::Panicked`], with `what` naming the operation.
///
/// State that `f` was changing may be half-changed afterwards: the caller must not use it again.
///
/// # Errors
/// What `f` returns, or [`DiskError::Panicked`].
pub fn no_panic<T>(what: &str, f: impl FnOnce() -> Result<T, DiskError>) -> Result<T, DiskError> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result,
        Err(payload) => {
            let message = payload
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            // A payload may itself panic when dropped; leaking it is safe and bounded by one per broken image.
            std::mem::forget(payload);
            Err(DiskError::Panicked {
                what: what.to_owned(),
                message,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn panic_becomes_error() {
        let got: Result<(), _> = no_panic("reading", || {
            let empty: &[u8] = std::hint::black_box(&[]);
            let _ = empty[std::hint::black_box(3)];
            Ok(())
        });
        assert!(matches!(got, Err(DiskError::Panicked { .. })), "{got:?}");
        assert_eq!(no_panic("reading", || Ok(7)).unwrap(), 7);
    }
}
