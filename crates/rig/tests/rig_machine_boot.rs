//! Real Linux under our monitor on a simulated server: from kernel and initrd, and from unmodified Debian images; with 1, 2
//! and 4 vCPUs; redis answers; the power button and a reboot from inside do what they should.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use steadfast_rig::inside::mini::Status;
use steadfast_rig::vm::{CPU, mini_arguments};
use steadfast_rig::{Mini, Rig, Vm, tools};

const SHORT: Duration = Duration::from_secs(120);
/// A guest's start, nested in software emulation on a machine that has other work: as long as it says something.
const BOOT: Duration = Duration::from_secs(2400);
/// It says nothing while its initramfs is unpacked, nor while systemd loads its units.
const SILENCE: Duration = Duration::from_secs(240);

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 90, 0, last)
}

fn can_run(test: &str) -> bool {
    // SAFETY: no memory is passed, it cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !tools::qemu_present() {
        println!("SKIPPED: {test}: qemu-system-x86_64 is not installed; run `steadfast-rig setup`");
    } else if !root {
        println!("SKIPPED: {test}: a client on the client switch takes root");
    }
    tools::qemu_present() && root
}

#[test]
#[ignore = "takes minutes; ./test --full"]
fn long_rig_boot_mini() {
    if !can_run("rig_boot_mini") {
        return;
    }
    let rig = Rig::builder().memory_mib(1024).start().unwrap();
    for vcpus in [1, 2, 4] {
        mini_boots(&rig, vcpus);
    }
    // A refused start names the cause and the way out.
    let refused = |arguments: &str| {
        let output = rig
            .server(0)
            .shell(&format!("steadfast vm run {arguments}"), SHORT)
            .unwrap();
        assert!(!output.success(), "{arguments} started");
        output.error_text()
    };
    let no_image = refused("/data/none.raw");
    assert!(no_image.contains("/data/none.raw"), "{no_image}");
    let no_bridge = refused("--kernel /guests/mini/bzImage --nic br77");
    assert!(no_bridge.contains("ip link add br77 type bridge"), "{no_bridge}");
}

/// FAULTS 9: a Linux that hangs does not feed its watchdog, which its own driver found in ACPI's tables; one that panicked stays so. Both are
/// reset in place. One that is well is left alone.
#[test]
fn a_linux_that_hangs_or_panics_is_reset() {
    if !can_run("a_linux_that_hangs_or_panics_is_reset") {
        return;
    }
    let rig = Rig::builder().memory_mib(1024).start().unwrap();
    let at = address(111);
    let arguments = mini_arguments(1, 128, at, "mini.watchdog=10 panic=0");
    let mut vm = Vm::run(
        rig.server(0),
        "guarded",
        &format!("{arguments} --watchdog --reset-panicked"),
    )
    .unwrap();
    vm.wait_start("READY", 1, SILENCE, BOOT).unwrap();
    vm.wait_console("WATCHDOG 10 s", 1, SHORT).unwrap();
    let mini = Mini::new(rig.client().unwrap(), at);
    let well = mini.status(SHORT).unwrap().uptime_ms + 15_000;
    while mini.status(SHORT).unwrap().uptime_ms < well {
        std::thread::sleep(Duration::from_millis(500));
    }
    let mishaps = || vm.control("status", "").unwrap()["mishaps"].clone();
    assert_eq!(mishaps()["watchdog_resets"], 0, "it feeds its watchdog");
    // It may hang before it has answered.
    let _ = mini.command("hang", Duration::from_secs(5));
    vm.wait_start("READY", 2, SILENCE, BOOT).unwrap();
    assert_eq!(mishaps()["watchdog_resets"], 1);
    vm.wait_console("WATCHDOG 10 s", 2, SHORT).unwrap();
    mini.status(SHORT).unwrap();
    let _ = mini.command("panic", Duration::from_secs(5));
    vm.wait_start("READY", 3, SILENCE, BOOT).unwrap();
    let now = mishaps();
    // A guest that panicked does not feed its watchdog either: whichever came first.
    let resets = |name: &str| now[name].as_u64().unwrap();
    assert_eq!(resets("panic_resets") + resets("watchdog_resets"), 2, "{now}");
    assert!(resets("panics") > 0, "{now}");
    assert_eq!(mini.status(SHORT).unwrap().faults, Vec::<String>::new());
    vm.stop().unwrap();
}

fn debian_rig(test: &str) -> Option<Rig> {
    let missing = ["mmdebstrap", "qemu-img"]
        .into_iter()
        .find(|tool| tools::find(tool).is_err());
    if let Some(tool) = missing {
        println!("SKIPPED: {test}: {tool} is not installed; run `steadfast-rig setup`");
        return None;
    }
    can_run(test).then(|| {
        Rig::builder()
            .memory_mib(1280)
            .debian_guest(true)
            .start()
            .unwrap()
    })
}

#[test]
#[ignore = "takes minutes; ./test --full"]
fn long_rig_boot_debian_raw() {
    if let Some(rig) = debian_rig("rig_boot_debian_raw") {
        debian_from_image(&rig, "raw", 1);
    }
}

#[test]
#[ignore = "takes minutes; ./test --full"]
fn long_rig_boot_debian_qcow2() {
    if let Some(rig) = debian_rig("rig_boot_debian_qcow2") {
        debian_from_image(&rig, "qcow2", 2);
    }
}

#[test]
#[ignore = "takes minutes; ./test --full"]
fn long_rig_boot_debian_gpt() {
    if let Some(rig) = debian_rig("rig_boot_debian_gpt") {
        debian_from_image(&rig, "gpt", 1);
    }
}

#[test]
#[ignore = "takes minutes; ./test --full"]
fn long_rig_boot_debian_kernel() {
    if let Some(rig) = debian_rig("rig_boot_debian_kernel") {
        debian_from_kernel(&rig);
    }
}

/// The mini guest from kernel and initrd: all vCPUs, disk, network, console; reset and power button.
fn mini_boots(rig: &Rig, vcpus: u32) {
    let start = Instant::now();
    let server = rig.server(0);
    server.exec("truncate -s 64M /data/mini.raw").unwrap();
    let words = "mini.mem=8 mini.disk=vda mini.disk_mib=8 mini.disk_rate=50";
    let arguments = mini_arguments(vcpus, 256, address(100 + vcpus as u8), words) + " --disk /data/mini.raw";
    let mut vm = Vm::run(server, "mini", &arguments).unwrap();
    let mini = Mini::new(rig.client().unwrap(), address(100 + vcpus as u8));
    let ready = vm.wait_start("READY ", 1, SILENCE, BOOT).unwrap();
    let checked = |since: Option<&Status>| {
        let deadline = Instant::now() + SHORT;
        loop {
            let now = mini.status(SHORT).unwrap();
            assert_eq!(now.faults, Vec::<String>::new());
            let grown = |before: u64, now: u64| now > before + 10;
            let (memory, writes) = since.map_or((0, 0), |s| (s.memory_checked, s.disk_writes));
            if grown(memory, now.memory_checked) && grown(writes, now.disk_writes) && now.disk_reads > 0 {
                return now;
            }
            assert!(
                Instant::now() < deadline,
                "the guest's checks stand still: {now:?}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let first = checked(None);
    checked(Some(&first));
    // Every vCPU came up.
    let cpus = mini.command("cpus", SHORT).unwrap();
    assert_eq!(cpus, format!("ok {vcpus}"));
    let took = start.elapsed();
    // Started anew from inside, in the same process; the disk remembers.
    assert_eq!(mini.counter(SHORT).unwrap().step().unwrap(), 1);
    // It ends before it can answer.
    let _ = mini.command("reboot", Duration::from_secs(3));
    vm.wait_start("READY ", 2, SILENCE, BOOT).unwrap();
    checked(None);
    let console = String::from_utf8_lossy(&vm.console_bytes().unwrap()).into_owned();
    let used: Vec<&str> = console.lines().filter(|line| line.starts_with("DISK ")).collect();
    assert!(
        used.len() == 2 && used[0].contains(", 0 used") && !used[1].contains(", 0 used"),
        "the disk was lost over the reset: {used:?}"
    );
    assert_eq!(vm.control("status", "").unwrap()["guest_resets"], 1);
    vm.control("shutdown", "").unwrap();
    vm.wait_gone(SHORT).unwrap();
    server.exec("rm /data/mini.raw").unwrap();
    println!(
        "mini guest, {vcpus} vCPUs: checks run after {took:.1?} ({})",
        ready.trim()
    );
}

/// An unmodified Debian image: its own kernel, initrd and command line; systemd, redis; reboot; shutdown.
fn debian_from_image(rig: &Rig, kind: &str, vcpus: u32) {
    let server = rig.server(0);
    let (source, image) = match kind {
        "gpt" => ("debian-gpt.raw", "/data/gpt.raw"),
        "qcow2" => ("debian.qcow2", "/data/debian.qcow2"),
        _ => ("debian.raw", "/data/debian.raw"),
    };
    server
        .exec_within(
            &format!("cp --sparse=always /guests/debian/{source} {image}"),
            Duration::from_secs(180),
        )
        .unwrap();
    let arguments =
        format!("{image} --cpus {vcpus} --memory 384MiB --nic br0,mac=52:54:00:00:00:78 --cpu {CPU}");
    debian(rig, kind, vcpus, &arguments, kind == "raw");
    server.exec(&format!("rm {image}")).unwrap();
}

fn debian_from_kernel(rig: &Rig) {
    let server = rig.server(0);
    let copy = "cp --sparse=always /guests/debian/debian.raw /data/kernel.raw";
    server.exec_within(copy, Duration::from_secs(180)).unwrap();
    let arguments = format!(
        "--kernel /guests/debian/vmlinuz --initrd /guests/debian/initrd.img --cmdline \"$(cat /guests/debian/cmdline)\" \
         --disk /data/kernel.raw --cpus 4 --memory 384MiB --nic br0,mac=52:54:00:00:00:78 --cpu {CPU}"
    );
    debian(rig, "kernel and initrd", 4, &arguments, false);
    server.exec("rm /data/kernel.raw").unwrap();
}

fn debian(rig: &Rig, kind: &str, vcpus: u32, arguments: &str, reboot: bool) {
    let start = Instant::now();
    let mut vm = Vm::run(rig.server(0), "debian", arguments).unwrap();
    let up = vm.wait_start("RIG-GUEST-UP", 1, SILENCE, BOOT).unwrap();
    let took = start.elapsed();
    assert_eq!(redis(rig, "PING"), "+PONG");
    assert_eq!(redis(rig, "SET kept yes"), "+OK");
    // A login on the serial line: a command typed there is done. What is typed before the prompt is thrown away by getty.
    vm.wait_console("root@debian-guest:", 1, SHORT).unwrap();
    vm.control("type", "'echo cpus=$(nproc) on $(findmnt -no FSTYPE /)\n'")
        .unwrap();
    vm.wait_console(&format!("cpus={vcpus} on ext4"), 1, SHORT)
        .unwrap();
    if reboot {
        vm.control("type", "'systemctl reboot\n'").unwrap();
        vm.wait_start("RIG-GUEST-UP", 2, SILENCE, BOOT).unwrap();
        assert_eq!(
            redis(rig, "EXISTS kept"),
            ":1",
            "what redis had is lost over a reboot"
        );
        assert_eq!(vm.control("status", "").unwrap()["guest_resets"], 1);
    }
    vm.control("shutdown", "").unwrap();
    vm.wait_gone(Duration::from_secs(600)).unwrap();
    let console = String::from_utf8_lossy(&vm.console_bytes().unwrap()).into_owned();
    assert!(
        console.contains("Power down") || console.contains("Power-Off"),
        "the power button did not end it in order: {}",
        tools::tail(&console, 600)
    );
    println!(
        "Debian from {kind}, {vcpus} vCPUs: up after {took:.1?} ({})",
        up.trim()
    );
}

/// One request to redis in the guest, from the client; its answer's first line.
fn redis(rig: &Rig, request: &str) -> String {
    let to = SocketAddr::from((address(0x78), 6379));
    let mut stream = rig.client().unwrap().tcp_retry(to, SHORT).unwrap();
    stream.set_read_timeout(Some(SHORT)).unwrap();
    stream.write_all(format!("{request}\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim_end().to_string()
}
