//! Unit tests of booting.
