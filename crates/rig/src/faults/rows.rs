//! The table of faults that simulated servers are put through.

use super::{Moves, Row, Scene};
use crate::error::Result;
use crate::failover::ensure;
use crate::host::disk_faults::DiskFault;
use crate::switch::Fault;
use std::time::Duration;

/// How long a fault that must change nothing is looked at: several times what a standby waits before it suspects.
const LOOK: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_secs(60);
const REPLICATION: [&str; 2] = ["repl0", "repl1"];

/// All of them. Each begins and ends with a VM that is protected on two of three servers.
pub const ROWS: &[Row] = &[
    Row {
        number: 27,
        what: "one of two replication cables, pulled and plugged three times",
        play: flapping_cable,
        moves: Moves::Never,
    },
    Row {
        number: 21,
        what: "a whole replication switch dies",
        play: switch_dies,
        moves: Moves::Never,
    },
    Row {
        number: 26,
        what: "delay, loss, duplication and reordering on both replication switches",
        play: bad_network,
        moves: Moves::Never,
    },
    Row {
        number: 28,
        what: "the clocks of both servers jump an hour, one ahead, one back",
        play: clocks_jump,
        moves: Moves::Never,
    },
    Row {
        number: 13,
        what: "the primary's disk is a hundred times slower",
        play: slow_disk,
        moves: Moves::Maybe,
    },
    Row {
        number: 30,
        what: "the standby's server is starved of CPU",
        play: starved_standby,
        moves: Moves::Never,
    },
    Row {
        number: 33,
        what: "the store's leader loses its power",
        play: store_leader_dies,
        moves: Moves::Never,
    },
    Row {
        number: 2,
        what: "the standby's server loses its power",
        play: standby_dies,
        moves: Moves::Never,
    },
    Row {
        number: 6,
        what: "the primary's process is killed",
        play: process_killed,
        moves: Moves::Always,
    },
    Row {
        number: 7,
        what: "the primary's process is stopped, and goes on after the takeover",
        play: process_stopped,
        moves: Moves::Always,
    },
    Row {
        number: 4,
        what: "the primary's server freezes, and goes on after the takeover",
        play: server_frozen,
        moves: Moves::Always,
    },
    Row {
        number: 22,
        what: "nothing goes through between the two, both ways",
        play: |s| partition(s, true, true),
        moves: Moves::Maybe,
    },
    Row {
        number: 23,
        what: "nothing goes through from the primary to the standby",
        play: |s| partition(s, true, false),
        moves: Moves::Maybe,
    },
    Row {
        number: 23,
        what: "nothing goes through from the standby to the primary",
        play: |s| partition(s, false, true),
        moves: Moves::Maybe,
    },
    Row {
        number: 41,
        what: "the primary's process is killed in the middle of a planned promote",
        play: killed_in_a_move,
        moves: Moves::Maybe,
    },
    Row {
        number: 12,
        what: "the primary's disk hangs",
        play: |s| broken_disk(s, DiskFault::Hang),
        moves: Moves::Maybe,
    },
    Row {
        number: 11,
        what: "the primary's disk fails, for reads and writes",
        play: |s| broken_disk(s, DiskFault::Fail),
        moves: Moves::Maybe,
    },
    Row {
        number: 1,
        what: "the primary's server loses its power",
        play: primary_dies,
        moves: Moves::Always,
    },
];

fn flapping_cable(s: &mut Scene<'_, '_>) -> Result<()> {
    let name = s.primary().name();
    for _ in 0..3 {
        s.rig.unplug(name, "repl1")?;
        s.look(LOOK / 3)?;
        s.answered()?;
        s.rig.plug(name, "repl1")?;
        s.look(LOOK / 3)?;
    }
    Ok(())
}

fn switch_dies(s: &mut Scene<'_, '_>) -> Result<()> {
    let switch = s.rig.switch("repl1")?;
    switch.set_down(true);
    s.look(LOOK)?;
    s.answered()?;
    switch.set_down(false);
    Ok(())
}

fn bad_network(s: &mut Scene<'_, '_>) -> Result<()> {
    for switch in REPLICATION {
        s.rig.switch(switch)?.set_fault_everywhere(Fault {
            delay_us: 3_000,
            jitter_us: 3_000,
            loss_ppm: 5_000,
            duplicate_ppm: 10_000,
            reorder_ppm: 10_000,
            ..Fault::default()
        });
    }
    s.look(LOOK)?;
    s.answered()?;
    for switch in REPLICATION {
        s.rig.switch(switch)?.set_fault_everywhere(Fault::default());
    }
    Ok(())
}

fn clocks_jump(s: &mut Scene<'_, '_>) -> Result<()> {
    const HOUR_MS: i64 = 3_600_000;
    s.primary().clock_jump(HOUR_MS)?;
    s.standby().clock_jump(-HOUR_MS)?;
    s.look(LOOK)?;
    s.answered()?;
    s.primary().clock_jump(-HOUR_MS)?;
    s.standby().clock_jump(HOUR_MS)
}

fn slow_disk(s: &mut Scene<'_, '_>) -> Result<()> {
    let server = s.primary();
    server.disk_fault(DiskFault::Slow(50))?;
    let slow = s.look(LOOK).and_then(|()| s.answered());
    server.disk_heal()?;
    slow
}

/// A standby that gets a fifth of its CPU time must not believe that its primary is silent.
fn starved_standby(s: &mut Scene<'_, '_>) -> Result<()> {
    let server = s.standby();
    server.starve(20)?;
    let starved = s.look(LOOK).and_then(|()| s.answered());
    server.starve(100)?;
    starved
}

fn store_leader_dies(s: &mut Scene<'_, '_>) -> Result<()> {
    s.store_leader_elsewhere()?;
    let third = s.third();
    third.kill()?;
    s.look(LOOK)?;
    s.answered()?;
    s.power_on(third)
}

fn standby_dies(s: &mut Scene<'_, '_>) -> Result<()> {
    s.store_leader_elsewhere()?;
    let (primary, standby) = (s.primary(), s.standby());
    standby.kill()?;
    s.answered()?;
    // Honest at once (I8).
    s.vm.wait_status(primary, "unprotected, and said so", SHORT, |status| {
        (status["protocol"]["protected"] == false).then_some(())
    })?;
    s.power_on(standby)
}

fn primary_dies(s: &mut Scene<'_, '_>) -> Result<()> {
    s.store_leader_elsewhere()?;
    let server = s.primary();
    server.kill()?;
    s.answered()?;
    s.power_on(server)
}

fn process_killed(s: &mut Scene<'_, '_>) -> Result<()> {
    s.vm.signal(s.primary(), "KILL")?;
    s.answered()
}

fn process_stopped(s: &mut Scene<'_, '_>) -> Result<()> {
    let server = s.primary();
    s.vm.signal(server, "STOP")?;
    let went_on = s.answered();
    s.vm.signal(server, "CONT")?;
    went_on?;
    // Nothing that it held may come out now: clients would see it.
    s.look(LOOK / 2)
}

fn server_frozen(s: &mut Scene<'_, '_>) -> Result<()> {
    s.store_leader_elsewhere()?;
    let server = s.primary();
    server.freeze()?;
    let went_on = s.answered();
    server.thaw()?;
    went_on?;
    s.look(LOOK / 2)
}

fn partition(s: &mut Scene<'_, '_>, there: bool, back: bool) -> Result<()> {
    s.store_leader_elsewhere()?;
    let (primary, standby) = (s.primary().name(), s.standby().name());
    for switch in REPLICATION {
        let switch = s.rig.switch(switch)?;
        if there {
            switch.partition_one_way(primary, standby)?;
        }
        if back {
            switch.partition_one_way(standby, primary)?;
        }
    }
    let survived = s.look(LOOK).and_then(|()| s.answered());
    for switch in REPLICATION {
        s.rig.switch(switch)?.heal();
    }
    survived
}

fn killed_in_a_move(s: &mut Scene<'_, '_>) -> Result<()> {
    let (primary, standby) = (s.primary(), s.standby());
    let ask = format!(
        "steadfast vm hand-over {} {} & kill -9 {}; wait",
        s.vm.plan().name,
        standby.name(),
        s.vm.pid(primary)?
    );
    primary.shell(&ask, SHORT)?;
    s.answered()
}

/// The guest never sees it: the VM is served from the other replica, or moves there. The server itself, whose etcd stands on the
/// same disk, is then taken for repair.
fn broken_disk(s: &mut Scene<'_, '_>, fault: DiskFault) -> Result<()> {
    s.store_leader_elsewhere()?;
    let server = s.primary();
    server.disk_fault(fault)?;
    s.look(LOOK)?;
    s.answered()?;
    if fault == DiskFault::Hang {
        server.disk_heal()?;
        return s.answered();
    }
    let elsewhere =
        s.vm.status(s.standby())?
            .is_some_and(|x| x["protocol"]["role"] == "primary");
    ensure(elsewhere, || {
        format!("the VM stays on {}, whose disk fails", server.name())
    })?;
    server.kill()?;
    s.power_on(server)
}
