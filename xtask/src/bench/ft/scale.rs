//! Memory of both sides, and how pause and epochs depend on vCPUs and RAM.

use super::lab::{Home, Lab, Setup, Vm};
use super::proc;
use super::{NAME, Section};
use crate::bench::row::{Goal, Row};
use anyhow::{Context, Result};
use std::time::Instant;

const MIB: f64 = 1024.0 * 1024.0;
/// Beyond guest RAM and arena, of each side.
const MEMORY_MIB: f64 = 64.0;
/// What a case leaves to others, in MiB.
const SPARE_MIB: u64 = 3072;

/// Memory beyond the guest's RAM.
pub fn memory(lab: &Lab, out: &mut Section) -> Result<()> {
    let ram_mib = 512;
    let setup = Setup {
        ram_mib,
        disk_mib: Some(64),
        ..Setup::pulse("loop=dirty pages=1000 rate=100 disk=verify ip=10.0.0.2")
    };
    let home = Home::new(lab, setup)?;
    let (primary, standby) = home.pair()?;
    std::thread::sleep(lab.watch());
    let case = "512 MiB, 1,000 pages 100 times a second, disk in use";
    for (name, vm) in [("primary", &primary), ("standby", &standby)] {
        let beyond = proc::memory_beyond_ram(vm.pid(), ram_mib << 20)
            .with_context(|| format!("{name}: {}", vm.said()))?;
        let arena = Vm::number(&vm.status()?, "arena_bytes");
        out.rows.push(
            Row::new(
                NAME,
                &format!("memory of the {name} beyond RAM and arena"),
                case,
                (beyond as f64 - arena) / MIB,
                "MiB",
            )
            .goal(Goal::AtMost(MEMORY_MIB)),
        );
        out.rows.push(Row::new(
            NAME,
            &format!("arena of the {name}"),
            case,
            arena / MIB,
            "MiB",
        ));
    }
    Ok(())
}

fn one(lab: &Lab, out: &mut Section, case: &str, vcpus: u32, ram_mib: u64) -> Result<()> {
    let setup = Setup {
        ram_mib,
        vcpus,
        ..Setup::pulse(format!(
            "loop=dirty pages={} ram_stride=1 check=0 ip=10.0.0.2",
            1000 / vcpus
        ))
    }
    .every(5000);
    let home = Home::new(lab, setup)?;
    let (vm, standby) = home.pair()?;
    std::thread::sleep(lab.watch() / 3);
    let (first, began) = (vm.status()?, Instant::now());
    std::thread::sleep(lab.watch());
    let last = vm.status().with_context(|| standby.said())?;
    let grown = |name: &str| Vm::number(&last, name) - Vm::number(&first, name);
    let epochs = grown("committed") / began.elapsed().as_secs_f64();
    for (metric, value, unit) in [
        ("pause p50", Vm::number(&last, "pause_p50_us"), "us"),
        ("pause p99", Vm::number(&last, "pause_p99_us"), "us"),
        ("epochs committed", epochs, "per s"),
        (
            "pages of an epoch",
            grown("pages") / grown("cuts").max(1.0),
            "pages",
        ),
    ] {
        out.rows.push(Row::new(NAME, metric, case, value, unit));
    }
    Ok(())
}

/// Pause and epochs by vCPUs and RAM.
pub fn run(lab: &Lab, out: &mut Section) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let vcpus: &[u32] = if lab.quick { &[2] } else { &[1, 2, 4, 8, 16] };
    for &vcpus in vcpus {
        let case = format!("1,000 pages, cut every 5 ms at most, {vcpus} vCPUs on {cores} cores, 256 MiB");
        one(lab, out, &case, vcpus, 256).with_context(|| case.clone())?;
    }
    let rams: &[u64] = if lab.quick {
        &[128]
    } else {
        &[128, 512, 2048, 8192]
    };
    for &ram_mib in rams {
        let case = format!("1,000 pages, cut every 5 ms at most, 1 vCPU, {ram_mib} MiB");
        let available = proc::available_mib();
        if available < 2 * ram_mib + SPARE_MIB {
            eprintln!("SKIPPED: {case}: two hosts with {ram_mib} MiB each, {available} MiB are available");
            continue;
        }
        one(lab, out, &case, 1, ram_mib).with_context(|| case.clone())?;
    }
    Ok(())
}
