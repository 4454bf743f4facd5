//! The counter service: what UDP and TCP port 9 do with a request.
//!
//! The order of stores is part of the contract with the host's checker: `counter`, `counter_inv`, then the count of
//! operations. `disk_counter` moves only after the device has completed the flush.

use crate::cpu::{outb, rdtsc, triple_fault};
use crate::disk::Disk;
use crate::shared::*;
use crate::state::{errors, fail, lane, shared};
use crate::{count, get, set};

fn increment(flush: bool) {
    let s = shared();
    let old = get!(s, counter);
    if get!(s, counter_inv) != !old {
        fail(error::COUNTER, SHARED_GPA, !old, get!(s, counter_inv));
    }
    set!(s, counter, old.wrapping_add(1));
    set!(s, counter_inv, !old.wrapping_add(1));
    if flush {
        count!(flush_ops, 1);
    } else {
        count!(inc_ops, 1);
    }
    let sum = get!(s, boot_counter)
        .wrapping_add(get!(s, inc_ops))
        .wrapping_add(get!(s, flush_ops));
    if sum != get!(s, counter) {
        fail(error::COUNTER, SHARED_GPA, sum, get!(s, counter));
    }
}

/// Does what is asked and says how it went.
pub fn serve(req: Request, disk: &mut Option<Disk>) -> Reply {
    let mut result = status::OK;
    match req.kind {
        kind::INC => increment(false),
        kind::FLUSH_INC => match disk {
            None => result = status::NO_DISK,
            Some(d) => {
                increment(true);
                if !d.save_counter() {
                    result = status::IO_ERROR;
                }
            }
        },
        kind::READ | kind::STATUS => {}
        kind::PANIC => triple_fault(),
        kind::HANG => loop {
            crate::cpu::pause();
        },
        kind::PVPANIC => outb(0x505, 1),
        _ => result = status::BAD_REQUEST,
    }
    let r = reply(req.kind, req.nonce, result);
    count!(replies, 1);
    r
}

/// The state of now as a reply.
pub fn reply(kind: u32, nonce: u64, status: u64) -> Reply {
    let s = shared();
    let loops = |cpu: u64| get!(lane(cpu as usize), progress) >> 24;
    Reply {
        head: 0,
        nonce,
        status,
        counter: get!(s, counter),
        disk_counter: get!(s, disk_counter),
        disk_seq: get!(s, disk_seq),
        loops: loops(0),
        loops_all: (0..get!(s, ncpus)).map(loops).fold(0, u64::wrapping_add),
        uptime_ticks: rdtsc().wrapping_sub(get!(s, start_tsc)),
        tsc_khz: get!(s, tsc_khz),
        errors: errors(),
        boot_counter: get!(s, boot_counter),
        inc_ops: get!(s, inc_ops),
        flush_ops: get!(s, flush_ops),
        replies: get!(s, replies),
        flush_loops: get!(s, flush_loops),
        verify_seq: get!(s, verify_seq),
        disk_reads: get!(s, disk_reads),
        disk_writes: get!(s, disk_writes),
        disk_flushes: get!(s, disk_flushes),
        disk_bytes: get!(s, disk_bytes),
        rx_frames: get!(s, rx_frames),
        tx_frames: get!(s, tx_frames),
        tx_dropped: get!(s, tx_dropped),
        tcp_resent: get!(s, tcp_resent),
        console_lines: get!(s, console_lines),
        check: 0,
    }
    .seal(kind)
}
