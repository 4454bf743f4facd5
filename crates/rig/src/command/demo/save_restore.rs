//! `steadfast-rig demo --save-restore`: a Linux that runs under our monitor moves into another process, and neither it nor its client
//! notices. Each step prints what happened and how long it took; the exit code tells whether all held.

use super::story::Story;
use std::net::Ipv4Addr;
use std::time::Duration;
use steadfast_rig::error::IoContext;
use steadfast_rig::inside::mini::Status;
use steadfast_rig::vm::mini_arguments;
use steadfast_rig::{Counting, Mini, Result, Rig, RigError, Server, Vm};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 101);
const BOUND: Duration = Duration::from_secs(120);
/// How long the guest does its work before and after.
const WORK: Duration = Duration::from_secs(3);
const MEMORY_MIB: u32 = 128;
const SAVED: &str = "/dev/shm/guest.saved";

/// What it shows.
pub const TITLE: &str = "Steadfast: a running Linux moves into another process and does not notice";

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(RigError::Unknown(otherwise()))
    }
}

/// Plays it.
///
/// # Errors
/// Whatever did not hold.
pub fn play(story: &mut Story) -> Result<()> {
    story.doing("a simulated server starts");
    let rig = Rig::builder().memory_mib(1024).start()?;
    let server = rig.server(0);
    story.done(&format!(
        "a simulated server is up: Debian's kernel with its own /dev/kvm ({:.1} s)",
        story.took()
    ));
    story.doing("a Linux guest boots under our monitor");
    server.exec("truncate -s 64M /data/guest.raw")?;
    let words = "mini.mem=16 mini.mem_rate=1000 mini.disk=vda mini.disk_mib=16 mini.disk_rate=50";
    let arguments = mini_arguments(1, MEMORY_MIB, ADDRESS, words) + " --disk /data/guest.raw";
    let mut vm = Vm::run(server, "guest", &arguments)?;
    vm.wait_console("READY ", 1, BOUND)?;
    story.done(&format!(
        "Linux runs under our monitor there, with a disk and a network card ({:.1} s to userland)",
        story.took()
    ));
    story.doing("a client connects");
    let mini = Mini::new(rig.client()?, ADDRESS);
    let counting = mini
        .counter(BOUND)?
        .go_on(Duration::from_millis(20))
        .what(|| "count over TCP".to_string())?;
    let counted = |steps: u64| counting.wait_steps(steps, BOUND);
    counted(10).what(|| "the guest's counter".to_string())?;
    std::thread::sleep(WORK);
    let before = checked(&mini)?;
    story.done(&format!(
        "a client counts over one TCP connection: {} steps so far, one every 20 ms",
        counting.steps()
    ));
    story.more(&format!(
        "meanwhile the guest checks itself: {} pages of memory, {} disk blocks written, nothing wrong",
        before.memory_checked, before.disk_writes
    ));
    let after = move_it(story, server, &mut vm, &mini, &counting, &before)?;
    let longest = counting.take_longest();
    let steps = counting.steps();
    counting
        .stop()
        .what(|| "the TCP connection over the move".to_string())?;
    let ticks = console_is_whole(&vm.console_bytes()?)?;
    story.done(&format!(
        "the same connection is at step {steps}; none lost, none twice; the longest took {:.1} s",
        longest.as_secs_f64()
    ));
    story.done(&format!(
        "the guest's checks are clean: {} pages, {} disk blocks, clocks without a jump",
        after.memory_checked, after.disk_writes
    ));
    story.done(&format!(
        "its console is whole: {ticks} numbered lines, each once"
    ));
    story.doing("the power button is pressed");
    vm.control("shutdown", "")?;
    vm.wait_gone(BOUND)?;
    story.done(&format!(
        "the power button shut it down in order ({:.1} s)",
        story.took()
    ));
    Ok(())
}

/// Save, end, restore; gives the guest's own state some time later.
fn move_it(
    story: &mut Story,
    server: &Server,
    vm: &mut Vm,
    mini: &Mini,
    counting: &Counting,
    before: &Status,
) -> Result<Status> {
    counting.take_longest();
    let first = vm.pid().unwrap_or(0);
    story.doing("the guest is stopped and saved");
    let said = vm.save(SAVED)?;
    let size = server.exec(&format!("stat -c %s {SAVED}"))?;
    let mib = size.parse::<u64>().unwrap_or(0) >> 20;
    story.done(&format!(
        "stopped at one instant and saved: CPU and device state in {:.1} ms, {mib} MiB written after {:.1} s",
        said["state_us"].as_f64().unwrap_or(0.0) / 1e3,
        said["pause_us"].as_f64().unwrap_or(0.0) / 1e6
    ));
    ensure(!vm.is_alive()?, || {
        format!("process {first} is still there after the save")
    })?;
    story.done(&format!(
        "its process {first} is gone; nothing runs the guest now"
    ));
    story.doing("another process goes on with it");
    let steps = counting.steps();
    vm.restore(SAVED)?;
    counting
        .wait_steps(steps + 2, BOUND)
        .what(|| "the connection after the restore".to_string())?;
    story.done(&format!(
        "process {} goes on with it: the client has its next answer after {:.1} s",
        vm.pid().unwrap_or(0),
        story.took()
    ));
    ensure(vm.pid() != Some(first), || {
        "the same process runs it still".to_string()
    })?;
    std::thread::sleep(WORK);
    let after = checked(mini)?;
    ensure(
        after.uptime_ms > before.uptime_ms
            && after.memory_checked > before.memory_checked
            && after.disk_writes > before.disk_writes,
        || format!("the guest did not go on from where it was: {before:?}, then {after:?}"),
    )?;
    Ok(after)
}

/// The guest's state; what it has found wrong is an error.
fn checked(mini: &Mini) -> Result<Status> {
    let status = mini.status(BOUND)?;
    ensure(status.faults.is_empty() && status.clock_jumps == 0, || {
        format!(
            "the guest found {} clock jumps and: {}",
            status.clock_jumps,
            status.faults.join("; ")
        )
    })?;
    Ok(status)
}

/// The numbered lines of the console follow each other; gives how many there are.
fn console_is_whole(bytes: &[u8]) -> Result<u64> {
    let text = String::from_utf8_lossy(bytes);
    let mut count = 0;
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let Some(rest) = line.strip_prefix("TICK ") else {
            continue;
        };
        count += 1;
        let number = rest.split(' ').next().and_then(|word| word.parse().ok());
        ensure(number == Some(count), || {
            format!("the console has {line:?} where line {count} should be")
        })?;
    }
    ensure(count > 0, || "the console has no numbered line".to_string())?;
    Ok(count)
}
