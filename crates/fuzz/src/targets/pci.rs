//! PCI configuration by port and ECAM, and the registers of real virtio functions on a real KVM VM.
//!
//! The input is a program of 12-byte steps: operation, function, offset (u16), value (u64). Besides random accesses
//! there are steps that do what a driver does, so that inputs reach live queues; and one that takes the state of a
//! function and gives it back.

use super::Target;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use steadfast_machine::devices::bus::{Bus, BusDevice};
use steadfast_machine::devices::io_thread::{IoTarget, IoThread};
use steadfast_machine::devices::pci::PciRoot;
use steadfast_machine::devices::pci::root::{ConfigPorts, Ecam};
use steadfast_machine::devices::virtio::VirtioDevice;
use steadfast_machine::devices::virtio::common::RateHandle;
use steadfast_machine::devices::virtio::console::Console;
use steadfast_machine::devices::virtio::pci::{BAR_BYTES, VirtioPci};
use steadfast_machine::devices::virtio::rng::Rng;
use steadfast_machine::kvm::{DirtyMethod, Hypervisor, KvmVm};
use steadfast_machine::memory::{Ram, RamBacking, layout};
use steadfast_machine::state::MachineState;
use vm_memory::{Bytes, GuestAddress};

pub(super) fn target() -> Target {
    Target {
        name: "pci",
        what: "PCI configuration and virtio-pci registers, on KVM",
        run,
        seeds,
        dictionary: &[
            &[9],
            &[0x11],
            &[0xf8, 0x0c],
            &[0, 0x40],
            &[0, 0x30],
            &[1, 0, 0, 0, 0, 0, 0, 0],
        ],
        cannot_run: || Hypervisor::open().err().map(|e| e.to_string()),
    }
}

const STEP_BYTES: usize = 12;
const STEPS_MAX: usize = 256;
const RAM_BYTES: u64 = 64 << 20;
/// Queues of function f, queue q lie here.
const RINGS: u64 = 0x10_0000;

struct World {
    mmio: Bus,
    ports: ConfigPorts,
    ecam: Ecam,
    functions: Vec<Arc<Mutex<VirtioPci>>>,
    ram: Ram,
    _io: IoThread,
    _vm: KvmVm,
}

fn bar(slot: u8) -> u64 {
    layout::PCI_MMIO_START + u64::from(slot) * BAR_BYTES
}

impl World {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let ram = Ram::new(RAM_BYTES, &RamBacking::Memfd)?;
        let vm = KvmVm::new(&Hypervisor::open()?, ram.clone(), 1, DirtyMethod::Log)?;
        let io = IoThread::start("fuzz-io", || {})?;
        let mut root = PciRoot::default();
        let mut mmio = Bus::default();
        let mut functions = Vec::new();
        let devices: Vec<Box<dyn VirtioDevice>> = vec![
            Box::new(Rng::new("rng", RateHandle::default())?),
            Box::new(Console::new(
                "console",
                Box::new(steadfast_machine::devices::virtio::console::ring(1000).0),
            )?),
        ];
        for (slot, device) in (1u8..).zip(devices) {
            let function = Arc::new(Mutex::new(VirtioPci::new(&vm, slot, bar(slot), device)?));
            let target: Arc<Mutex<dyn IoTarget>> = Arc::clone(&function) as _;
            let weak: Weak<Mutex<dyn IoTarget>> = Arc::downgrade(&target);
            lock(&function).attach(io.registrar(weak));
            mmio.add(bar(slot), BAR_BYTES, Arc::clone(&function) as _)?;
            assert!(root.add(slot, Arc::clone(&function) as _));
            functions.push(function);
        }
        let root = Arc::new(Mutex::new(root));
        Ok(Self {
            mmio,
            ports: ConfigPorts(Arc::clone(&root)),
            ecam: Ecam(root),
            functions,
            ram,
            _io: io,
            _vm: vm,
        })
    }

    fn common(&self, slot: u8, offset: u64, bytes: &[u8]) {
        self.mmio.write(bar(slot) + offset, bytes);
    }

    /// Negotiates and enables queue 0 (and 1) as a driver does; the flags say which steps are left out or twisted.
    fn bring_up(&self, slot: u8, flags: u64) {
        let w32 = |o: u64, v: u32| self.common(slot, o, &v.to_le_bytes());
        let w16 = |o: u64, v: u16| self.common(slot, o, &v.to_le_bytes());
        let w8 = |o: u64, v: u8| self.common(slot, o, &[v]);
        if flags & 1 == 0 {
            w8(0x14, 0);
        }
        w8(0x14, 3);
        w32(8, 1);
        w32(12, 1);
        w8(0x14, 11);
        for q in 0..2u16 {
            w16(0x16, q);
            if flags & 2 != 0 {
                w16(0x18, (flags >> 16) as u16);
            }
            w16(0x1a, q + 1);
            let at = RINGS + (u64::from(slot) * 2 + u64::from(q)) * 0x1_0000;
            for (o, a) in [(0x20, at), (0x28, at + 0x8000), (0x30, at + 0xc000)] {
                let a = if flags & 4 == 0 { a } else { a ^ (flags >> 8) };
                w32(o, a as u32);
                w32(o + 4, (a >> 32) as u32);
            }
            w16(0x1c, 1);
        }
        if flags & 8 == 0 {
            w8(0x14, 15);
        }
    }

    /// Puts a descriptor and an available entry into a queue and notifies through the register.
    fn offer(&self, slot: u8, offset: u16, value: u64) {
        let queue = u64::from(offset & 1);
        let at = RINGS + (u64::from(slot) * 2 + queue) * 0x1_0000;
        let memory = self.ram.memory();
        let index = u64::from(offset >> 1 & 0xff);
        let descriptor = [value & 0xffff_ffff, value >> 32];
        for (i, w) in descriptor.iter().enumerate() {
            let _ = memory.write_obj(*w, GuestAddress(at + index * 16 + i as u64 * 8));
        }
        let _ = memory.write_obj((value >> 7) as u16, GuestAddress(at + 0x8002));
        let _ = memory.write_obj(index as u16, GuestAddress(at + 0x8004 + (value & 0xff) * 2));
        self.mmio
            .write(bar(slot) + 0x3000 + queue * 4, &(queue as u16).to_le_bytes());
    }

    fn step(&mut self, step: &[u8; STEP_BYTES]) {
        let [op, which, o0, o1, v @ ..] = *step;
        let value = u64::from_le_bytes(v);
        let offset = u16::from_le_bytes([o0, o1]);
        let slot = 1 + which % self.functions.len() as u8;
        let width = 1usize << (which >> 6);
        let bytes = value.to_le_bytes();
        let mut into = [0u8; 8];
        match op % 12 {
            0 => self.ports.write(u64::from(offset & 7), &bytes[..width.min(4)]),
            1 => self.ports.read(u64::from(offset & 7), &mut into[..width.min(4)]),
            2 => {
                let address = 0x8000_0000u32 | u32::from(slot) << 11 | u32::from(offset & 0xfc);
                self.ports.write(0, &address.to_le_bytes());
                self.ports
                    .write(4 + u64::from(offset & 3), &bytes[..width.min(4)]);
            }
            3 => self
                .ecam
                .write(u64::from(slot) << 15 | u64::from(offset & 0xfff), &bytes[..width]),
            4 => self.ecam.read(value & 0xf_ffff, &mut into[..width]),
            5 => self
                .mmio
                .write(bar(slot) + u64::from(offset) % BAR_BYTES, &bytes[..width]),
            6 => self
                .mmio
                .read(bar(slot) + u64::from(offset) % BAR_BYTES, &mut into[..width]),
            7 => self.common(slot, u64::from(offset & 0x3f), &bytes[..width]),
            8 => self.bring_up(slot, value),
            9 => self.offer(slot, offset, value),
            10 => {
                let _ = self
                    .ram
                    .memory()
                    .write_slice(&bytes, GuestAddress(RINGS + u64::from(offset) * 8));
            }
            _ => self.save_and_restore(slot),
        }
    }

    /// What was saved must be taken back by the same function.
    fn save_and_restore(&self, slot: u8) {
        let mut function = lock(&self.functions[usize::from(slot) - 1]);
        let mut state = MachineState::default();
        if function.save(&mut state).is_ok() {
            function.power_on_reset();
            let taken = function.restore(&mut state);
            assert!(taken.is_ok(), "a function refuses its own state: {taken:?}");
            let left = state.finish();
            assert!(left.is_ok(), "state left over: {left:?}");
            function.kick();
        }
    }

    /// What no write can change, and everything at rest again.
    fn check_and_reset(&mut self) {
        for slot in 1..=self.functions.len() as u8 {
            let mut id = [0; 4];
            self.ecam.read(u64::from(slot) << 15, &mut id);
            assert_eq!(id[..2], [0xf4, 0x1a], "the vendor of slot {slot} changed");
            let mut header = [0; 1];
            self.ecam.read(u64::from(slot) << 15 | 0x0e, &mut header);
            assert_eq!(header, [0], "the header type of slot {slot} changed");
            lock(&self.functions[usize::from(slot) - 1]).power_on_reset();
        }
        self.ports.write(0, &[0; 4]);
    }
}

fn lock(f: &Mutex<VirtioPci>) -> std::sync::MutexGuard<'_, VirtioPci> {
    f.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(data: &[u8]) {
    static WORLD: Mutex<Option<World>> = Mutex::new(None);
    let mut guard = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    if guard.is_none() {
        let made = World::new();
        assert!(made.is_ok(), "no VM to fuzz: {:?}", made.err());
        *guard = made.ok();
    }
    let Some(world) = guard.as_mut() else { return };
    for step in data.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
        if let Ok(step) = step.try_into() {
            world.step(step);
        }
    }
    world.check_and_reset();
}

fn seeds() -> Vec<Vec<u8>> {
    let step = |op: u8, which: u8, offset: u16, value: u64| {
        let mut s = vec![op, which];
        s.extend(offset.to_le_bytes());
        s.extend(value.to_le_bytes());
        s
    };
    let driver = |which: u8| {
        [
            step(8, which, 0, 0),
            step(3, which, 0x04, 6),
            step(5, which | 0x80, 0x4000, 0xfee0_0000),
            step(5, which | 0x80, 0x4008, 0x41),
            step(5, which | 0x80, 0x400c, 0),
            step(9, which, 0, 64 << 32 | 0x20_0000),
            step(9, which, 3, 16 << 32 | 0x20_1000),
            step(11, which, 0, 0),
            step(9, which, 5, 4096 << 32 | 0x20_2000),
            step(6, which, 0x1000, 0),
        ]
        .concat()
    };
    let window: Vec<u8> = (0x40..0xc0u16)
        .step_by(4)
        .flat_map(|o| step(2, 0x80, o, 0x0102_0304_0506_0708))
        .collect();
    // Features that are not offered, written but never agreed: found that the state was refused.
    let wild = [step(7, 0x80, 0x0c, u64::MAX), step(11, 0, 0, 0)].concat();
    vec![driver(0), driver(1), window, wild]
}
