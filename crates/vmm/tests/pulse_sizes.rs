//! The ends of what a VM may be: 64 vCPUs; RAM in a file; RAM on huge pages. Each runs, is saved, and goes on in a new process.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::peer::Peer;
use common::{GUEST, World, busy, can_run, wait_for};
use pulse::Config;
use std::os::unix::fs::MetadataExt;
use steadfast_vmm::control::Then;

const RUN: &str = "run";

/// Two rounds of save and restore; the vCPUs that the guest then has.
fn goes_on(world: &World, config: &Config, cpus: u32, look: impl Fn(u32)) -> u64 {
    let mut process = world.boot(RUN, config, cpus);
    let peer = Peer::start(world);
    let mut found = 0;
    for _ in 0..2 {
        peer.fresh();
        look(process.id());
        world.save(RUN, "vm.save", Then::Stop).unwrap();
        assert!(process.wait().success());
        found = world.check_save("vm.save").summary.shared.ncpus;
        process = world.restore(RUN, "vm.save");
    }
    peer.fresh();
    look(process.id());
    peer.finish();
    world.serial_is_clean();
    found
}

/// The most vCPUs. Each counts loops of its own; all of them must go on after each restore.
#[test]
fn pulse_64_vcpus() {
    if !can_run() {
        return;
    }
    let world = World::new();
    // 64 vCPUs on the host's few CPUs: what each does in a turn is little, so that the first gets to answer.
    let config = busy().dirty(2).chunk(2).rate(20);
    assert_eq!(goes_on(&world, &config, 64, |_| {}), 64);
    let refused = world.verb("other", &["vm", "run", "--cpus", "65", "--flat", "/dev/null"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("64"), "{said}");
}

/// RAM in a file: what the guest wrote is in it, and a saved VM does not need it.
#[test]
fn pulse_memory_in_a_file() {
    if !can_run() {
        return;
    }
    let mut world = World::new();
    let file = world.at("ram");
    world.extra = vec!["--memory-file".into(), file.to_str().unwrap().into()];
    let config = busy();
    let held = || std::fs::metadata(&file).map_or((0, 0), |m| (m.len(), m.blocks() * 512));
    let mut process = world.boot(RUN, &config, 2);
    let peer = Peer::start(&world);
    peer.fresh();
    let (bytes, used) = held();
    assert_eq!(bytes, 64 << 20, "the file is as large as RAM");
    assert!(used > 1 << 20, "the guest's pages are in the file: {used} bytes");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.id())).unwrap();
    assert!(
        maps.contains(file.to_str().unwrap()),
        "the VM's RAM is that file:\n{maps}"
    );
    world.save(RUN, "vm.save", Then::Stop).unwrap();
    assert!(process.wait().success());
    world.check_save("vm.save");
    process = world.restore(RUN, "vm.save");
    peer.fresh();
    peer.finish();
    drop(process);
    // A file that cannot be had is refused by name.
    let refused = world.verb(
        "other",
        &[
            "vm",
            "run",
            "--memory-file",
            "/dev/null/ram",
            "--flat",
            world.at("pulse.elf").to_str().unwrap(),
        ],
    );
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("/dev/null/ram"),
        "{said}"
    );
}

/// RAM on huge pages, where the host's settings give them to shared memory.
#[test]
fn pulse_huge_pages() {
    if !can_run() {
        return;
    }
    let mut world = World::new();
    world.extra = vec!["--huge-pages".into()];
    let setting =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let given = ["[always]", "[advise]", "[within_size]", "[force]"]
        .iter()
        .any(|s| setting.contains(s));
    if !given {
        println!(
            "SKIPPED: whether pages are huge: this host gives none to shared memory ({})",
            setting.trim()
        );
    }
    let config = Config::new().ip(GUEST).dirty(2048).extras(0, 0, 0, 0);
    let mut process = world.boot(RUN, &config, 1);
    let peer = Peer::start(&world);
    peer.fresh();
    let maps = || std::fs::read_to_string(format!("/proc/{}/smaps", process.id())).unwrap();
    let advised = maps()
        .lines()
        .any(|l| l.starts_with("VmFlags:") && l.split(' ').any(|f| f == "hg"));
    assert!(advised, "the kernel was asked for huge pages");
    if given {
        wait_for("a huge page", || {
            maps()
                .lines()
                .any(|l| l.starts_with("ShmemPmdMapped:") && !l.ends_with(" 0 kB"))
        });
    }
    world.save(RUN, "vm.save", Then::Stop).unwrap();
    assert!(process.wait().success());
    world.memory("vm.save");
    process = world.restore(RUN, "vm.save");
    peer.fresh();
    peer.finish();
    drop(process);
}
