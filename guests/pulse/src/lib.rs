//! A tiny bare-metal guest for KVM tests and benchmarks.
