//! pulse: a bare-metal guest that exercises a monitor and checks itself.
//!
//! vCPU 0 polls the devices and, between two polls, dirties a chunk of its pages; the others only dirty pages. There are
//! no interrupts, no heap, no floats and no SSE. Every word that the outside may look at (see `shared.rs`) is written
//! with one store, so the state is consistent at any instruction at which the monitor may freeze the guest.
//!
//! ```text
//! _start64 (every vCPU) ─┐
//! _start32 (PVH, one)  ──┴─ pulse_main ── vCPU 0: config, PCI, devices, GO ── loop { poll devices; dirty a chunk }
//!                                     └── others: wait for GO ─────────────── loop { dirty a chunk }
//! ```
#![no_std]
#![no_main]
#![allow(clippy::missing_safety_doc)]

mod boot;
mod config;
mod counter;
mod cpu;
mod disk;
mod disk_jobs;
mod extras;
mod link;
mod net;
mod pci;
mod serial;
#[path = "../src/shared.rs"]
#[allow(dead_code)]
mod shared;
mod state;
mod tcp;
mod virtio;
mod work;

core::arch::global_asm!(include_str!("boot.s"));

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    // The message would need the formatting code of `core`, which uses SSE; the place is enough.
    serial::text("PULSE PANIC ");
    if let Some(l) = info.location() {
        serial::text(l.file());
        serial::text(":");
        serial::number(u64::from(l.line()));
    }
    serial::text("\n");
    cpu::halt()
}

// `core` was built to unwind and refers to this; with panic=abort nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
