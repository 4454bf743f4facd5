//! Fault tolerance, measured: two processes of the real binary protect a flat guest on this machine's KVM.
//!
//! ```text
//! colo      pause and progress beside QEMU COLO      traffic   round trips, epochs, wire, CPU
//! disks     fsync, throughput beside QEMU's mirror   failover  kill -9, silence
//! scale     memory, vCPUs, RAM
//! lab       folders, processes, clients              loop_guest, qemu, switch, proc: what these stand on
//! ```
//! Everything is measured in one run. What differs between the two sides of a ratio takes turns where it can.

mod colo;
mod disks;
mod failover;
mod lab;
mod loop_guest;
mod proc;
mod qemu;
mod scale;
mod switch;
mod traffic;

use super::row::{Goal, Row};
use super::svg::{Bar, Chart};
use super::{Bench, Extent, Report};
use anyhow::Result;
use lab::Lab;
use std::time::Instant;

const NAME: &str = "ft";

/// The benchmark's entry in the list.
pub fn bench() -> Bench {
    Bench {
        name: NAME,
        what: "a protected VM: beside QEMU COLO and QEMU's mirror, round trips, epochs, wire, fsync, failover, memory",
        run,
    }
}

/// What has been found so far.
#[derive(Default)]
pub struct Section {
    rows: Vec<Row>,
    bars: Vec<Bar>,
}

type Measure = fn(&Lab, &mut Section) -> Result<()>;

/// In this order; `--case` picks those whose name contains it.
const SECTIONS: [(&str, Measure); 9] = [
    ("colo", colo::run),
    ("round-trips", traffic::round_trips),
    ("epochs", traffic::epochs),
    ("contents", traffic::contents),
    ("fsync", disks::fsync),
    ("mirror", disks::mirror),
    ("failover", failover::run),
    ("memory", scale::memory),
    ("scale", scale::run),
];

fn run(extent: &Extent) -> Result<Report> {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        anyhow::bail!("/dev/kvm cannot be opened: this benchmark needs KVM");
    }
    let lab = Lab::new(extent.quick)?;
    let mut out = Section::default();
    for (name, measure) in SECTIONS.iter().filter(|(n, _)| n.contains(extent.case)) {
        let began = Instant::now();
        if let Err(error) = measure(&lab, &mut out) {
            // The others still tell something; this one fails the run by its goal.
            eprintln!("{name}: {error:#}");
            out.rows
                .push(Row::new(NAME, "failed", name, 1.0, "sections").goal(Goal::AtMost(0.0)));
        }
        eprintln!("{name}: {:.0} s", began.elapsed().as_secs_f64());
    }
    let chart = Chart {
        title: "Pause of a checkpoint every 20 ms, same guest, 128 MiB",
        unit: "us, median",
        parts: &["stop", "harvest", "copy", "state", "whole (QEMU)"],
        bars: out.bars,
    };
    Ok(Report {
        rows: out.rows,
        pictures: vec![("ft.svg".into(), chart.svg())],
        notes: NOTES.into(),
    })
}

const NOTES: &str = "\
Two processes of the real binary on one machine, linked by TCP over the loopback interface, share its cores with their \
guest, its client and whatever else runs there: numbers are upper bounds, ratios are what counts. The loop guest adds one \
to the first word of each of N pages and writes a byte to port 0xe9, over and over; its very bytes run under QEMU. `progress` \
is the rate of those bytes over the rate without protection. COLO has no network and no disk to compare or to replicate, its \
best case. `wire` is what the connection carried over 4096 bytes for each dirty page. `failover` is from the signal to the \
first reply of the promoted guest at a client that asks every millisecond. Disks of all sides are files on one disk; QEMU's \
mirror (`blockdev-mirror`, `write-blocking`) copies to a storage daemon over a unix socket.";
