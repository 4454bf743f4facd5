//! A tiny bare-metal guest for KVM tests and benchmarks.
pub mod shared;
/// The guest's ELF image.
pub fn elf() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/pulse.elf"))
}
