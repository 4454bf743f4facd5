//! Unit tests of the legacy devices.
