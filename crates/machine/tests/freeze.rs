//! Stops, saves and restores a machine while its vCPUs write memory and ports: nothing may be lost or repeated.
//!
//! The guest is 16-bit code that counts in memory and writes every count to a port. It needs /dev/kvm, any.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use steadfast_machine::devices::bus::BusDevice;
use steadfast_machine::kvm::{DirtyMethod, Hypervisor};
use steadfast_machine::machine::{Builder, Machine, ThreadHooks};
use steadfast_machine::memory::{Ram, RamBacking};
use steadfast_machine::vcpu::{VcpuEvent, VcpuEvents};
use steadfast_types::Gfn;
use vm_memory::{Bytes, GuestAddress};

/// Counts in the double word at 0x2000 + 4 * vCPU, touches a page of its own, writes the count to port 0x500 + 8 * vCPU.
/// BX is the vCPU.
const GUEST: &[u8] = &[
    0x66, 0xff, 0x87, 0x00, 0x20, // inc dword [bx + 0x2000]
    0x66, 0x8b, 0x87, 0x00, 0x20, // mov eax, [bx + 0x2000]
    0x66, 0x89, 0x04, //             mov [si], eax
    0x66, 0xef, //                   out dx, eax
    0xeb, 0xef, //                   jmp back to the start
];

#[derive(Default)]
struct Port(Vec<u32>);

impl BusDevice for Port {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.push(u32::from_le_bytes(
            data.try_into().expect("the guest writes double words"),
        ));
    }
}

struct NoEvent;
impl VcpuEvents for NoEvent {
    fn vcpu_event(&self, event: VcpuEvent) {
        panic!("the guest must not end: {event:?}");
    }
}

fn hypervisor() -> Option<Hypervisor> {
    match Hypervisor::open() {
        Ok(h) => Some(h),
        Err(e) => {
            println!("SKIPPED: no KVM here: {e}");
            None
        }
    }
}

fn machine(h: &Hypervisor, vcpus: u32, dirty: DirtyMethod, ports: &[Arc<Mutex<Port>>]) -> Machine {
    let ram = Ram::new(64 << 20, &RamBacking::Memfd).unwrap();
    let mut b = Builder::new(h, ram, vcpus, dirty, ThreadHooks::default()).unwrap();
    for (i, port) in (0u16..).zip(ports) {
        b.add_stateless_ports(0x500 + 8 * i, 4, Arc::clone(port) as _)
            .unwrap();
    }
    b.build(Arc::new(NoEvent), |_| Vec::new()).unwrap()
}

fn start(m: &Machine, vcpus: u32) {
    m.ram().memory().write_slice(GUEST, GuestAddress(0x1000)).unwrap();
    for v in 0..vcpus {
        m.set_registers(v, |mut s| {
            s.cs.base = 0;
            s.cs.selector = 0;
            let regs = kvm_bindings::kvm_regs {
                rip: 0x1000,
                rflags: 2,
                rbx: u64::from(v) * 4,
                rdx: 0x500 + 8 * u64::from(v),
                rsi: 0x8000 + 0x1000 * u64::from(v),
                ..Default::default()
            };
            (regs, s)
        })
        .unwrap();
        m.make_runnable(v).unwrap();
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::yield_now();
    }
}

fn rounds(vcpus: u32, dirty: DirtyMethod, rounds: usize) {
    let Some(h) = hypervisor() else { return };
    let ports: Vec<_> = (0..vcpus)
        .map(|_| Arc::new(Mutex::new(Port::default())))
        .collect();
    let mut m = machine(&h, vcpus, dirty, &ports);
    start(&m, vcpus);
    m.start_dirty_tracking().unwrap();
    m.resume();
    for round in 0..rounds {
        let seen: Vec<usize> = ports.iter().map(|p| p.lock().unwrap().0.len()).collect();
        wait_for("every vCPU to write its port", || {
            ports
                .iter()
                .zip(&seen)
                .all(|(p, &n)| p.lock().unwrap().0.len() > n + 3)
        });
        let mut q = m.quiesce().unwrap();
        let state = q.save().unwrap();
        let mut dirty = Vec::new();
        q.harvest(&mut dirty).unwrap();
        for v in 0..u64::from(vcpus) {
            assert!(
                dirty.contains(&Gfn(8 + v)),
                "round {round}: vCPU {v} wrote page {}, dirty: {dirty:?}",
                8 + v
            );
        }
        assert!(
            dirty.contains(&Gfn(2)) && !dirty.contains(&Gfn(0x300)),
            "{dirty:?}"
        );
        let next = machine(&h, vcpus, m.dirty_method(), &ports);
        let mut page = vec![0u8; 0x10000];
        m.ram().memory().read_slice(&mut page, GuestAddress(0)).unwrap();
        next.ram().memory().write_slice(&page, GuestAddress(0)).unwrap();
        next.restore(state).unwrap();
        next.start_dirty_tracking().unwrap();
        q.keep_stopped();
        m = next;
        m.resume();
    }
    drop(m);
    for (v, port) in ports.iter().enumerate() {
        let port = port.lock().unwrap();
        assert!(port.0.len() > rounds * 3);
        for (i, &n) in port.0.iter().enumerate() {
            assert_eq!(n as usize, i + 1, "vCPU {v}: a write was lost or repeated");
        }
    }
}

#[test]
fn nothing_is_lost_or_repeated_with_one_vcpu() {
    rounds(1, DirtyMethod::Auto, 100);
}

#[test]
fn nothing_is_lost_or_repeated_with_four_vcpus() {
    rounds(4, DirtyMethod::Auto, 30);
}

#[test]
fn every_dirty_method_finds_what_was_written() {
    for method in [DirtyMethod::Log, DirtyMethod::LogManual, DirtyMethod::Ring] {
        rounds(2, method, 10);
    }
}

/// A guest that computes and never leaves by itself, on one CPU with who stops it: precedence for its thread before it has been told to
/// stop would let it run on in the stopper's place, until the kernel's limit for real-time threads (0.95 s of each second).
#[test]
fn a_guest_on_the_only_cpu_stops_at_once() {
    // CAP_SYS_NICE
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let has = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
    if u64::from_str_radix(has.trim(), 16).unwrap() & (1 << 23) == 0 {
        println!("SKIPPED: real-time priority is not allowed here, so no stop has precedence");
        return;
    }
    let Some(h) = hypervisor() else { return };
    let mut one = rustix::thread::CpuSet::new();
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    one.set(
        (0..rustix::thread::CpuSet::MAX_CPU)
            .find(|c| all.is_set(*c))
            .unwrap(),
    );
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let m = machine(&h, 1, DirtyMethod::Auto, &[]);
    // jmp to itself.
    m.ram()
        .memory()
        .write_slice(&[0xeb, 0xfe], GuestAddress(0x1000))
        .unwrap();
    m.set_registers(0, |mut s| {
        (s.cs.base, s.cs.selector) = (0, 0);
        let regs = kvm_bindings::kvm_regs {
            rip: 0x1000,
            rflags: 2,
            ..Default::default()
        };
        (regs, s)
    })
    .unwrap();
    m.make_runnable(0).unwrap();
    m.hurry_stops();
    m.resume();
    // What stopping takes of the CPU, the guest's part of it too: who else wants this CPU does not count.
    let worked = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let mut stopping = Duration::ZERO;
    for _ in 0..STOPS {
        std::thread::sleep(Duration::from_millis(5));
        let before = worked();
        drop(m.quiesce().unwrap());
        stopping += worked() - before;
    }
    assert!(
        stopping < Duration::from_millis(50) * STOPS,
        "{STOPS} stops took {stopping:?} of the CPU"
    );
}

const STOPS: u32 = 30;
