//! Our monitor beside Debian's QEMU (`-M microvm` and `-M q35`, both with KVM), in one run on one simulated server, with
//! the same guest: kernel, initrd, memory, disk, network card.
//!
//! The guest is the rig's mini guest; disk and bulk numbers are its own ([`steadfast_rig::inside::mini::bench`]), time to
//! userspace is the server's clock from the start of the monitor to the guest's line on its serial port. Monitors take turns,
//! so that a machine that becomes slower or faster meets all of them.

use super::row::{Goal, Row, median};
use super::{Bench, Report, build_programs};
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::time::Duration;
use steadfast_rig::{Mini, Rig, Server};

const NAME: &str = "machine";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 150);
const MAC: &str = "52:54:00:00:00:96";
const MEMORY_MIB: u64 = 128;
const DISK: &str = "/data/bench.raw";
const DISK_MIB: u64 = 128;
/// Goal: a quarter of QEMU's memory.
const MEMORY_RATIO: f64 = 0.25;
const BOUND: Duration = Duration::from_secs(300);

/// The benchmark's entry in the list.
pub fn bench() -> Bench {
    Bench {
        name: NAME,
        what: "our monitor beside QEMU microvm and q35, on one simulated server with the same guest",
        run,
    }
}

/// A monitor under test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Ours,
    Microvm,
    Q35,
}

impl Monitor {
    const ALL: [Monitor; 3] = [Monitor::Ours, Monitor::Microvm, Monitor::Q35];

    fn name(self) -> &'static str {
        match self {
            Monitor::Ours => "steadfast",
            Monitor::Microvm => "qemu-microvm",
            Monitor::Q35 => "qemu-q35",
        }
    }

    /// The command that runs the guest with its serial port on standard output.
    fn command(self) -> String {
        let cmdline = format!("\"$(cat /guests/mini/cmdline) mini.ip={ADDRESS}/24 mini.tick_ms=0\"");
        let machine = match self {
            Monitor::Ours => {
                return format!(
                    "steadfast vm run --kernel /guests/mini/bzImage --initrd /guests/mini/initrd --cmdline {cmdline} \
                     --memory {MEMORY_MIB}MiB --cpu x86-64-v2 --disk {DISK} --nic tap:bench0,mac={MAC} --name bench"
                );
            }
            // With PCI and ACPI: Debian's kernel takes no virtio-mmio devices from its command line.
            Monitor::Microvm => "microvm,pcie=on,acpi=on,rtc=off,pit=off,pic=off",
            Monitor::Q35 => "q35",
        };
        format!(
            "qemu-system-x86_64 -M {machine},accel=kvm -cpu host -m {MEMORY_MIB} -smp 1 -nodefaults -no-user-config \
             -display none -serial stdio -kernel /guests/mini/bzImage -initrd /guests/mini/initrd -append {cmdline} \
             -object iothread,id=io0 \
             -blockdev driver=file,node-name=f0,filename={DISK},aio=io_uring -blockdev driver=raw,node-name=d0,file=f0 \
             -device virtio-blk-pci,drive=d0,iothread=io0 -device virtio-rng-pci \
             -netdev tap,id=n0,ifname=bench0,script=no,downscript=no -device virtio-net-pci,netdev=n0,mac={MAC},romfile="
        )
    }
}

/// What one run of one monitor gave; all of one unit, named in [`METRICS`].
type Numbers = [f64; METRICS.len()];

/// Metric, unit, and whether more is better.
const METRICS: [(&str, &str, bool); 7] = [
    ("time to userspace", "ms", false),
    ("monitor memory beyond guest RAM", "KiB", false),
    ("block random read 4 KiB", "IOPS", true),
    ("block sequential read 1 MiB", "MiB/s", true),
    ("network to the guest", "Mbit/s", true),
    ("network from the guest", "Mbit/s", true),
    ("network round trip", "us", false),
];

fn run(extent: &super::Extent<'_>) -> Result<Report> {
    let quick = extent.quick;
    build_programs()?;
    let rig = Rig::builder()
        .memory_mib(1280)
        .packages(&["qemu-system-x86"])
        .start()
        .context("start a simulated server with QEMU in it")?;
    let server = rig.server(0);
    prepare(server)?;
    let rounds = if quick { 1 } else { 3 };
    let mut found: Vec<(Monitor, Vec<Numbers>)> = Monitor::ALL.map(|m| (m, Vec::new())).into();
    for round in 0..rounds {
        for (monitor, numbers) in &mut found {
            eprintln!("round {} of {rounds}: {}", round + 1, monitor.name());
            let one =
                measure(&rig, *monitor, quick).with_context(|| format!("measure {}", monitor.name()))?;
            numbers.push(one);
        }
    }
    let middle = |monitor: Monitor, metric: usize| {
        let all = found.iter().find(|(m, _)| *m == monitor).map(|(_, n)| n);
        let mut values: Vec<f64> = all.into_iter().flatten().map(|n| n[metric]).collect();
        median(&mut values)
    };
    let mut rows = Vec::new();
    for (index, (metric, unit, more)) in METRICS.iter().enumerate() {
        for peer in [Monitor::Microvm, Monitor::Q35] {
            let goal = match (index, more) {
                (1, _) => Goal::RatioAtMost(MEMORY_RATIO),
                (_, true) => Goal::RatioAtLeast(1.0),
                (_, false) => Goal::RatioAtMost(1.0),
            };
            let case = format!(
                "beside {} vcpus=1 ram={MEMORY_MIB}MiB rounds={rounds}",
                peer.name()
            );
            let row = Row::new(NAME, metric, &case, middle(Monitor::Ours, index), unit)
                .beside(peer.name(), middle(peer, index))
                .goal(goal);
            rows.push(row);
        }
    }
    Ok(Report {
        rows,
        pictures: Vec::new(),
        notes: NOTES.to_string(),
    })
}

const NOTES: &str = "Nested in software emulation: ratios count, not numbers. All three run the same kernel, initrd, memory (128 MiB), raw disk \
(cached by the server) and TAP. QEMU has an iothread, io_uring and no emulated devices that the guest does not need; its \
network is its own, without vhost. Memory is Pss of the process and its children without the mapping that is guest RAM. Values are medians.";

/// A script that starts a monitor and notes when the guest was there, and a disk with contents in the server's cache.
fn prepare(server: &Server) -> Result<()> {
    let script = "#!/bin/bash\n\
        # NAME COMMAND: runs it, notes its start, its number, and when the guest has said READY.\n\
        name=$1; shift\n\
        watch() { while IFS= read -r line; do\n\
          case $line in *READY*) date +%s%N > /run/$name.ready.tmp; mv /run/$name.ready.tmp /run/$name.ready;; esac\n\
          echo \"$line\" >> /run/$name.console; done; }\n\
        date +%s%N > /run/$name.start\n\
        bash -c \"exec $*\" > >(watch) 2> /run/$name.log < /dev/null &\n\
        echo $! > /run/$name.pid\n\
        wait $!\n";
    server.put_bytes(script.as_bytes(), "/run/measure.sh", 0o755)?;
    server.exec_within(
        &format!("head -c {DISK_MIB}M /dev/urandom > {DISK}; sync; cat {DISK} > /dev/null"),
        BOUND,
    )?;
    Ok(())
}

fn measure(rig: &Rig, monitor: Monitor, quick: bool) -> Result<Numbers> {
    let server = rig.server(0);
    // Nothing of the round before may be taken for this one's.
    server.exec("rm -f /run/bench.*; ip link del bench0 2>/dev/null; ip tuntap add bench0 mode tap vnet_hdr && ip link set bench0 master br0 up")?;
    let command = monitor.command().replace('"', "\\\"").replace('$', "\\$");
    server.spawn(&format!("/run/measure.sh bench \"{command}\""), "/run/bench.out")?;
    let ready = server.wait_for(
        "test -e /run/bench.ready || { test -s /run/bench.pid && ! kill -0 $(cat /run/bench.pid) && touch /run/bench.ready; exit 1; }",
        BOUND,
    );
    let said = || {
        server
            .exec("cat /run/bench.log; tail -n 5 /run/bench.console; cat /run/bench.out")
            .unwrap_or_default()
    };
    if let Err(e) = ready {
        bail!("{e}: {}", said());
    }
    let numbers = of_running_guest(rig, monitor, quick).with_context(said);
    server.exec("kill -9 $(cat /run/bench.pid); while kill -0 $(cat /run/bench.pid) 2>/dev/null; do sleep 0.05; done; rm -f /run/steadfast/bench.sock")?;
    numbers
}

fn of_running_guest(rig: &Rig, monitor: Monitor, quick: bool) -> Result<Numbers> {
    let server = rig.server(0);
    let number = |text: &str| -> Result<f64> {
        text.trim()
            .parse()
            .with_context(|| format!("no number: {text:?}"))
    };
    let to_userspace =
        number(&server.exec("echo $(( ($(cat /run/bench.ready) - $(cat /run/bench.start)) / 1000 ))")?)?
            / 1000.0;
    // Our monitor has a second process, which tidies up after it; its pages count too.
    // The guest's RAM is named in ours, where the kernel may have split it; in QEMU it is the one mapping of its size (rounded
    // up a little).
    let ram_kib = MEMORY_MIB * 1024;
    let memory = format!(
        "awk '/^[0-9a-f]+-[0-9a-f]+ / {{ named = /guest-ram/ }} /^Size:/ {{ ram = named || $2 >= {ram_kib} && $2 <= {ram_kib} + 4096 }} /^Pss:/ {{ if (ram) guest += $2; else own += $2 }} \
         END {{ print own, guest+0 }}' $(p=$(cat /run/bench.pid); for i in $p $(pgrep -P $p); do echo /proc/$i/smaps; done)"
    );
    let memory = server.exec(&memory)?;
    let (own, guest) = memory.split_once(' ').unwrap_or((&memory, "0"));
    if number(guest)? < 16.0 * 1024.0 {
        bail!(
            "guest RAM was not found among the mappings of {}: {memory}",
            monitor.name()
        );
    }
    let mini = Mini::new(rig.client()?, ADDRESS);
    let ms = if quick { 1000 } else { 4000 };
    let per_second = |how: &str| -> Result<f64> {
        let answer = mini.command(&format!("disk_bench {how} vda {ms}"), BOUND)?;
        let words: Vec<&str> = answer.split(' ').collect();
        match words[..] {
            ["ok", operations, us] => Ok(number(operations)? / (number(us)? / 1e6)),
            _ => bail!("the guest says {answer:?}"),
        }
    };
    let (random, sequential) = (per_second("random")?, per_second("sequential")?);
    let bytes: u64 = if quick { 16 << 20 } else { 64 << 20 };
    let mbit = |us: f64| bytes as f64 * 8.0 / us;
    let take =
        format!("(echo take {bytes}; head -c {bytes} /dev/zero) | socat -t 120 -b 262144 - TCP:{ADDRESS}:11");
    let answer = server.exec_within(&take, BOUND)?;
    let to_guest = match answer.split(' ').collect::<Vec<_>>()[..] {
        ["ok", taken, us] if taken == bytes.to_string() => mbit(number(us)?),
        _ => bail!("the guest took {answer:?} of {bytes} bytes"),
    };
    let give = format!(
        "s=$(date +%s%N); n=$(echo give {bytes} | socat -t 120 -b 262144 - TCP:{ADDRESS}:11 | wc -c); \
         echo $n $(( ($(date +%s%N) - s) / 1000 ))"
    );
    let answer = server.exec_within(&give, BOUND)?;
    let from_guest = match answer.split(' ').collect::<Vec<_>>()[..] {
        [given, us] if given == bytes.to_string() => mbit(number(us)?),
        _ => bail!("the guest gave {answer:?} of {bytes} bytes"),
    };
    let pings = if quick { 50 } else { 200 };
    let ping = server.exec(&format!(
        "ping -q -c {pings} -i 0.02 {ADDRESS} | sed -n 's|.*= [^/]*/\\([^/]*\\)/.*|\\1|p'"
    ))?;
    let round_trip = number(&ping)? * 1000.0;
    Ok([
        to_userspace,
        number(own)?,
        random,
        sequential,
        to_guest,
        from_guest,
        round_trip,
    ])
}
