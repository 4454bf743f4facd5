//! Disks: the rate of a guest's fsync, and throughput and latency beside QEMU's synchronous mirror.

use super::lab::{BOUND, GUEST_IP, Home, Lab, Setup, new_disk, pulse_header, rate};
use super::qemu::{self, Qemu};
use super::switch::Switch;
use super::{NAME, Section};
use crate::bench::row::{Goal, Row, median};
use anyhow::{Context, Result, bail};
use pulse::client::Client;
use pulse::{Reply, kind};
use serde_json::json;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

const DISK_MIB: u64 = 64;
/// A small write, then a flush, in a loop; a datagram to the client for every 100.
const FLUSH: &str = "loop=flush ip=10.0.0.2 collector=10.0.0.9:9000";

/// Asks the guest for its counters.
fn counters(client: &mut Client<Switch>) -> Result<Reply> {
    let reply = client.ask(kind::READ, BOUND)?;
    if reply.errors != 0 {
        bail!("the guest's own checks failed: {:#x}", reply.errors);
    }
    Ok(reply)
}

fn flushes(lab: &Lab, client: &mut Client<Switch>) -> Result<f64> {
    client.resolve(BOUND)?;
    rate(lab.watch(), || Ok(counters(client)?.flush_loops as f64))
}

/// How many flushes per second the guest sees done.
pub fn fsync(lab: &Lab, out: &mut Section) -> Result<()> {
    let setup = Setup {
        disk_mib: Some(DISK_MIB),
        ..Setup::pulse(FLUSH)
    };
    let (mut alone, mut protected, mut reports) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if lab.quick { 1 } else { 3 } {
        let home = Home::new(lab, setup.clone())?;
        let vm = home.start("u", true)?;
        let mut client = home.client(&["u"])?;
        alone.push(flushes(lab, &mut client).with_context(|| vm.said())?);
        drop(vm);
        let (vm, _standby) = home.pair()?;
        let mut client = home.client(&["a", "b"])?;
        protected.push(flushes(lab, &mut client).with_context(|| vm.said())?);
        // What the client hears of it: a datagram for every 100 flushes, which leaves with its epoch.
        let (mut count, began) = (0, Instant::now());
        while began.elapsed() < lab.watch() / 2 {
            client.datagram(9000, BOUND)?;
            count += 1;
        }
        reports.push(f64::from(count) * 100.0 / began.elapsed().as_secs_f64());
    }
    let case = "512 bytes, then flush, one at a time";
    let (protected, alone) = (median(&mut protected), median(&mut alone));
    out.rows.push(
        Row::new(NAME, "fsync rate", case, protected, "per s")
            .beside("unprotected", alone)
            .goal(Goal::RatioAtLeast(1.0)),
    );
    out.rows.push(Row::new(
        NAME,
        "fsync rate that the client heard of",
        case,
        median(&mut reports),
        "per s",
    ));
    Ok(())
}

/// A job of the guest on its disk.
struct Job {
    case: &'static str,
    cmdline: &'static str,
    depth: f64,
}

const JOBS: [Job; 6] = [
    Job {
        case: "write 64 KiB in order, 4 in flight",
        cmdline: "loop=diskbench op=write bs=65536 qd=4",
        depth: 4.0,
    },
    Job {
        case: "write 4 KiB at random, 1 in flight",
        cmdline: "loop=diskbench op=randwrite bs=4096 qd=1",
        depth: 1.0,
    },
    Job {
        case: "write 4 KiB at random, 16 in flight",
        cmdline: "loop=diskbench op=randwrite bs=4096 qd=16",
        depth: 16.0,
    },
    Job {
        case: "read 64 KiB in order, 4 in flight",
        cmdline: "loop=diskbench op=read bs=65536 qd=4",
        depth: 4.0,
    },
    Job {
        case: "read 4 KiB at random, 1 in flight",
        cmdline: "loop=diskbench op=randread bs=4096 qd=1",
        depth: 1.0,
    },
    Job {
        case: "512 bytes, then flush, 1 in flight",
        cmdline: "loop=flush",
        depth: 1.0,
    },
];

/// Requests per second: reads and writes of the benchmark, or flushes of the flush loop.
fn requests(lab: &Lab, job: &Job, client: &mut Client<Switch>) -> Result<f64> {
    client.resolve(BOUND)?;
    // What the disk and its caches do at first is not what they do for long.
    std::thread::sleep(lab.watch() / 4);
    rate(lab.watch(), || {
        let r = counters(client)?;
        let done = if job.cmdline == "loop=flush" {
            r.flush_loops
        } else {
            r.disk_reads + r.disk_writes
        };
        Ok(done as f64)
    })
}

/// Beside QEMU's mirror.
pub fn mirror(lab: &Lab, out: &mut Section) -> Result<()> {
    let peer = qemu::there();
    let jobs = if lab.quick { &JOBS[1..2] } else { &JOBS[..] };
    for job in jobs {
        let (mut all_ours, mut all_theirs) = (Vec::new(), Vec::new());
        for _ in 0..if lab.quick { 1 } else { 3 } {
            all_ours.push(protected(lab, job).with_context(|| format!("ours, {}", job.case))?);
            if peer {
                all_theirs.push(mirrored(lab, job).with_context(|| format!("QEMU, {}", job.case))?);
            }
        }
        let ours = median(&mut all_ours);
        let latency = |rate: f64| job.depth / rate.max(0.001) * 1e6;
        let mut rows = [
            (Row::new(NAME, "disk requests", job.case, ours, "per s"), true),
            (
                Row::new(NAME, "disk latency", job.case, latency(ours), "us, mean"),
                false,
            ),
        ];
        if peer {
            let theirs = median(&mut all_theirs);
            rows = rows.map(|(row, up)| {
                let row = if up {
                    row.beside("QEMU mirror", theirs).goal(Goal::RatioAtLeast(1.0))
                } else {
                    row.beside("QEMU mirror", latency(theirs))
                        .goal(Goal::RatioAtMost(1.0))
                };
                (row, up)
            });
        }
        out.rows.extend(rows.map(|r| r.0));
    }
    Ok(())
}

fn protected(lab: &Lab, job: &Job) -> Result<f64> {
    let setup = Setup {
        disk_mib: Some(DISK_MIB),
        ..Setup::pulse(format!("{} ip=10.0.0.2", job.cmdline))
    };
    let home = Home::new(lab, setup)?;
    let (vm, _standby) = home.pair()?;
    let mut client = home.client(&["a", "b"])?;
    requests(lab, job, &mut client).with_context(|| vm.said())
}

/// The same guest under QEMU, its disk mirrored to a storage daemon, every write on both sides before it is done.
fn mirrored(lab: &Lab, job: &Job) -> Result<f64> {
    let dir = lab.folder()?;
    let (disk, copy, nbd) = (dir.join("a.raw"), dir.join("b.raw"), dir.join("nbd.sock"));
    new_disk(&disk, DISK_MIB)?;
    new_disk(&copy, DISK_MIB)?;
    let file = |node: &str, path: &Path| format!("driver=file,node-name={node},filename={}", path.display());
    let raw = |node: &str, file: &str| format!("driver=raw,node-name={node},file={file}");
    let args = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let _daemon = Qemu::spawn(
        &dir,
        "daemon",
        "qemu-storage-daemon",
        &args(&[
            "--blockdev",
            &file("f", &copy),
            "--blockdev",
            &raw("r", "f"),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", nbd.display()),
            "--export",
            "type=nbd,id=e,node-name=r,writable=on,name=d",
        ]),
    )?;
    super::lab::wait("the storage daemon listens", || nbd.exists())?;
    let (nic, own) = (dir.join("nic"), dir.join("client"));
    let socket = UnixDatagram::bind(&own)?;
    let network = format!(
        "dgram,id=n,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        nic.display(),
        own.display()
    );
    let mut qemu = Qemu::start(
        &dir,
        "vm",
        &args(&[
            "-M",
            "q35",
            "-m",
            "128",
            "-kernel",
            &lab.pulse().display().to_string(),
            "-append",
            &format!("{} ip={GUEST_IP} quiet=1", job.cmdline),
            "-object",
            "iothread,id=io",
            "-blockdev",
            &file("f0", &disk),
            "-blockdev",
            &raw("d0", "f0"),
            "-device",
            "virtio-blk-pci,disable-legacy=on,drive=d0,iothread=io",
            "-netdev",
            &network,
            "-device",
            "virtio-net-pci,disable-legacy=on,netdev=n,mac=52:54:00:00:00:01",
        ]),
    )?;
    qemu.ask(
        "blockdev-add",
        &json!({"driver": "nbd", "node-name": "n0", "export": "d",
                "server": {"type": "unix", "path": nbd.display().to_string()}}),
    )?;
    qemu.ask(
        "blockdev-mirror",
        &json!({"job-id": "m", "device": "d0", "target": "n0", "sync": "full", "copy-mode": "write-blocking"}),
    )?;
    super::lab::wait("the mirror is complete", || {
        qemu.ask("query-block-jobs", &json!({}))
            .is_ok_and(|jobs| jobs[0]["ready"] == true)
    })?;
    let mut client = Client::new(
        Switch::new(socket, vec![nic], pulse_header::NONE),
        Ipv4Addr::new(10, 0, 0, 9),
        GUEST_IP,
    );
    client.nonces_from(Instant::now().elapsed().as_nanos() as u64 + 1);
    // The firmware takes its time before the guest begins.
    client.resolve(Duration::from_secs(120))?;
    requests(lab, job, &mut client).with_context(|| qemu.log())
}
