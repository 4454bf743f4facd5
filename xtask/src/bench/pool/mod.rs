//! Our pool beside Pacemaker with corosync, each on three simulated servers with the same guest: from the kill of a server to the
//! answer of the service that ran there.

mod ours;
mod pacemaker;

use super::row::{Goal, Row, median};
use super::{Bench, Extent, Report, build_programs};
use anyhow::{Context, Result, bail};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use steadfast_rig::host::qemu::DiskCache;
use steadfast_rig::vm::COUNT_PORT;
use steadfast_rig::{Client, Rig, RigBuilder, Server};

const NAME: &str = "pool";
const MEMORY_MIB: u64 = 96;
const BOUND: Duration = Duration::from_secs(300);
/// How long a request may take before the next is made.
const TRY: Duration = Duration::from_millis(500);

/// The benchmark's entry in the list.
pub fn bench() -> Bench {
    Bench {
        name: NAME,
        what: "a server is killed: until the service answers, beside Pacemaker with corosync",
        run,
    }
}

fn run(extent: &Extent<'_>) -> Result<Report> {
    build_programs()?;
    let rounds = if extent.quick { 1 } else { 3 };
    let mut peer = Vec::new();
    if !extent.case.starts_with("ours") {
        peer = pacemaker::measure(rounds).context("Pacemaker")?;
    }
    let mut ours = [const { Vec::new() }; 3];
    if !extent.case.starts_with("pacemaker") {
        ours = ours::measure(rounds).context("our pool")?;
    }
    let lease = format!("lease={}ms", ours::LEASE.as_millis());
    let suspect = format!("suspect={}ms", ours::SUSPECT.as_millis());
    let mut rows = Vec::new();
    let on_disk = format!("disk=16MiB,mirrored {lease}");
    let cases = [("restart", lease), ("restart", on_disk), ("ft", suspect)];
    for ((class, setting), values) in cases.into_iter().zip(&mut ours) {
        if values.is_empty() {
            continue;
        }
        let case = format!("class={class} servers=3 ram={MEMORY_MIB}MiB {setting} rounds={rounds}");
        let mut row = Row::new(NAME, "kill of a server to answer", &case, median(values), "s");
        if !peer.is_empty() {
            row = row
                .beside("pacemaker", median(&mut peer))
                .goal(Goal::RatioAtMost(1.0));
        }
        rows.push(row);
    }
    Ok(Report {
        rows,
        pictures: Vec::new(),
        notes: NOTES.to_string(),
    })
}

const NOTES: &str = "Nested in software emulation: ratios count, not numbers. Both on three simulated servers with two networks between them, the same kernel, \
initrd and memory; the guest is booted from its kernel. Pacemaker 2.1 and corosync 3.1 as Debian has them, with their defaults (token \
3650 ms with three hosts, consensus 1.2 times that, both rings), quorum, and **without fencing**, which makes it faster than anybody may run it: with a watchdog it waits for that \
as well (10 s by default). Its VM is QEMU q35 with KVM under a resource agent of a few lines. Our `restart` is fenced: without disks, or with shared ones, it waits until the \
host's lease has ended, here 3 s instead of the default 10 s, plus 2 s; with a disk of each host's own, which is mirrored, the arbiter decides as soon as the host counts as dead (3 s here). \
Values are medians.";

fn servers(builder: RigBuilder) -> Result<Rig> {
    builder
        .servers(3)
        .memory_mib(1200)
        .mini_guest(true)
        .data_cache(DiskCache::Unsafe)
        .start()
        .context("start three simulated servers")
}

/// Kills a server; seconds until the guest at `address`, which ran there, answers a request made after that.
fn kill(rig: &Rig, server: &Server, address: Ipv4Addr) -> Result<f64> {
    let client = rig.client()?;
    until_answer(client, address, Instant::now()).context("before the kill")?;
    let began = Instant::now();
    server.kill()?;
    until_answer(client, address, began)?;
    Ok(began.elapsed().as_secs_f64())
}

fn until_answer(client: &Client, address: Ipv4Addr, began: Instant) -> Result<()> {
    while answers(client, address).is_err() {
        if began.elapsed() > BOUND {
            bail!("the service at {address} did not answer within {BOUND:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// One request to the guest's service, on a connection of its own.
fn answers(client: &Client, address: Ipv4Addr) -> Result<()> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = client.tcp(SocketAddr::from((address, COUNT_PORT)), TRY)?;
    stream.set_read_timeout(Some(TRY))?;
    stream.write_all(b"next\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        bail!("no answer");
    }
    Ok(())
}
