//! Measurements of this crate.
