//! Does dirty tracking find every page that changed? After each harvest all of RAM is compared with what it was at the harvest
//! before: a page that differs and was not reported is a lost one. The guest dirties memory on all its vCPUs and keeps every
//! device busy, so that the monitor's own writes and pages given back by the balloon are among the changes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::peer::{Peer, VsockHost};
use common::{NAME, World, busy, can_run};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use steadfast_machine::devices::legacy::{EventSink, GuestEvent, NullSink};
use steadfast_machine::machine::ThreadHooks;
use steadfast_machine::memory::Ram;
use steadfast_machine::vcpu::{VcpuEvent, VcpuEvents};
use steadfast_types::{Gfn, PAGE_SIZE};
use steadfast_vmm::spec::{Boot, Dirty, DiskSpec, NicSpec, NicTarget, VsockSpec};
use steadfast_vmm::{Surroundings, Vm, VmSpec, assemble};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
/// A disk comes to rest within this.
const REST: Duration = Duration::from_secs(10);

/// The guest is to say nothing of itself.
#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl EventSink for Said {
    fn guest_event(&self, event: GuestEvent) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

impl VcpuEvents for Said {
    fn vcpu_event(&self, event: VcpuEvent) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

fn machine(world: &World, load: &Load, said: &Arc<Said>) -> Vm {
    let spec = VmSpec {
        name: NAME.parse().unwrap(),
        vcpus: load.vcpus,
        memory_bytes: load.ram,
        memory: Default::default(),
        cpu: Default::default(),
        boot: Boot::Flat {
            elf: world.at("pulse.elf"),
            cmdline: load.config.to_string(),
        },
        disks: vec![DiskSpec {
            path: world.at("disk.raw"),
            format: Some("raw".into()),
            read_only: false,
            direct: false,
            queues: 0,
            serial: String::new(),
        }],
        nics: vec![NicSpec {
            to: NicTarget::Socket {
                own: world.at("guest.net"),
                peer: world.at("peer.net"),
            },
            mac: None,
            mtu: None,
        }],
        rng: true,
        virtio_console: Some(world.at("console")),
        balloon: true,
        vsock: Some(VsockSpec {
            cid: 3,
            path: world.at("vsock"),
        }),
        cloud_init: None,
        watchdog: true,
        dirty: load.method,
    };
    let around = Surroundings {
        events: Arc::clone(said),
        serial: Box::new(NullSink),
        debugcon: None,
        hooks: ThreadHooks::default(),
        wrap_net: None,
        give_disk: None,
        give_ram: None,
    };
    let vm = assemble(&spec, around).unwrap();
    vm.boot().unwrap();
    vm
}

/// What RAM was when it was last looked at.
struct Shadow {
    bytes: Vec<u8>,
    buffer: Vec<u8>,
}

impl Shadow {
    fn new(ram: &Ram) -> Self {
        Self {
            bytes: vec![0; ram.bytes() as usize],
            buffer: vec![0; MIB as usize],
        }
    }

    /// The pages of `ram` that differ from the shadow, which then is as `ram` is.
    fn take(&mut self, ram: &Ram) -> Vec<Gfn> {
        let page = PAGE_SIZE as usize;
        let mut changed = Vec::new();
        let mut at = 0;
        for region in ram.regions() {
            for offset in (0..region.len).step_by(self.buffer.len()) {
                let n = self.buffer.len().min((region.len - offset) as usize);
                let from = region.start + offset;
                let now = &mut self.buffer[..n];
                ram.memory().read_slice(now, GuestAddress(from)).unwrap();
                let then = &mut self.bytes[at..at + n];
                at += n;
                if then == now {
                    continue;
                }
                for (i, (then, now)) in then.chunks_mut(page).zip(now.chunks(page)).enumerate() {
                    if then != now {
                        changed.push(Gfn(from / PAGE_SIZE + i as u64));
                        then.copy_from_slice(now);
                    }
                }
            }
        }
        changed
    }
}

/// Those of `changed` that are not in `dirty`; both rising.
fn missing(changed: &[Gfn], dirty: &[Gfn]) -> Vec<Gfn> {
    let found = |g: &&Gfn| dirty.binary_search(g).is_err();
    changed.iter().filter(found).copied().collect()
}

struct Load {
    method: Dirty,
    vcpus: u32,
    ram: u64,
    config: pulse::Config,
    rounds: u32,
    /// Longest that the guest runs between two harvests.
    run_us: u64,
}

fn compare(load: &Load) {
    if !can_run() {
        return;
    }
    let world = World::of_one_user();
    let host = VsockHost::listen(&world);
    let said = Arc::new(Said::default());
    let peer = Peer::start(&world);
    let vm = machine(&world, load, &said);
    let ram = vm.machine.ram();
    vm.machine.start_dirty_tracking().unwrap();
    vm.machine.resume();
    peer.fresh();
    let mut shadow = Shadow::new(ram);
    let mut dirty = Vec::new();
    let (mut changes, mut reports, mut largest) = (0, 0, 0);
    // A fixed sequence of times, so that cuts fall everywhere.
    let mut random = 1u64;
    for round in 0..=load.rounds {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((random >> 33) % load.run_us));
        if let (0, Some(balloon)) = (round % 16, &vm.balloon) {
            balloon.set_target((round / 16 % 2) * 256);
        }
        let mut still = vm.machine.quiesce().unwrap();
        if round % 4 == 3 {
            // Waited for, or asked again and again: it comes to the same.
            let polled = Instant::now() + REST;
            while round % 8 == 3 && Instant::now() < polled && still.drain(Duration::ZERO).is_err() {}
            still.drain(REST).unwrap();
        }
        still.harvest(&mut dirty).unwrap();
        let changed = shadow.take(ram);
        assert!(
            round % 8 != 0 || shadow.take(ram).is_empty(),
            "round {round}: memory changes while the machine stands still"
        );
        drop(still);
        // The first look only fills the shadow.
        if round > 0 {
            let lost = missing(&changed, &dirty);
            assert!(
                lost.is_empty(),
                "{:?}, {} vCPUs, round {round}: {} pages changed, {} were reported, {} lost: {:?}...",
                load.method,
                load.vcpus,
                changed.len(),
                dirty.len(),
                lost.len(),
                &lost[..lost.len().min(8)]
            );
            // The comparison itself would find a lost page.
            if let Some(first) = changed.first() {
                dirty.retain(|page| page != first);
                assert_eq!(missing(&changed, &dirty), [*first]);
            }
            changes += changed.len();
            reports += dirty.len();
            largest = largest.max(dirty.len());
        }
        peer.check();
    }
    assert!(changes > load.rounds as usize, "the guest changes nothing");
    peer.finish();
    assert!(host.accepted() > 0, "vsock did nothing");
    let said = said.0.lock().unwrap();
    assert!(said.is_empty(), "{said:?}");
    println!(
        "{:?}, {} vCPUs, {} MiB: {} harvests, {changes} pages changed, {reports} reported (at most {largest} at once), none lost",
        load.method,
        load.vcpus,
        load.ram / MIB,
        load.rounds
    );
}

fn every_number_of_vcpus(method: Dirty, rounds: u32) {
    for vcpus in [1, 2, 4] {
        compare(&Load {
            method,
            vcpus,
            ram: 64 * MIB,
            config: busy(),
            rounds,
            run_us: 3000,
        });
    }
}

/// More pages than a ring has entries: a full ring stops its vCPU, whose thread empties it.
fn full_rings(vcpus: u32, rounds: u32) {
    compare(&Load {
        method: Dirty::Ring,
        vcpus,
        ram: u64::from(vcpus) * 512 * MIB,
        config: busy().dirty(100_000).chunk(1000),
        rounds,
        run_us: 800_000,
    });
}

#[test]
fn pulse_dirty_log() {
    every_number_of_vcpus(Dirty::Log, 50);
}

#[test]
fn pulse_dirty_log_manual() {
    every_number_of_vcpus(Dirty::LogManual, 50);
}

#[test]
fn pulse_dirty_ring() {
    every_number_of_vcpus(Dirty::Ring, 50);
}

#[test]
fn pulse_dirty_full_rings() {
    full_rings(1, 6);
}

#[test]
#[ignore = "many minutes; ./test --full"]
fn long_pulse_dirty_finds_every_change() {
    for method in [Dirty::Log, Dirty::LogManual, Dirty::Ring] {
        every_number_of_vcpus(method, 4000);
    }
    full_rings(1, 100);
    full_rings(2, 50);
}
