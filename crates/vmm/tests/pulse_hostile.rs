//! A guest that does what no driver does: it storms the devices with notifications, hammers PCI configuration space,
//! BARs and ports with wild accesses, gives devices queues full of nonsense, floods the consoles. The monitor answers
//! its control socket all the while, stays small, and ends when told (rows 50, 51 and 53 of the list of faults).
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{NAME, Process, World, can_run};
use std::fs;
use std::time::{Duration, Instant};
use steadfast_vmm::control::{Request, Then};

const RUN: &str = "run";
/// Where the code is loaded and entered, in 64-bit mode with all of low memory mapped as it is.
const LOAD: u64 = 0x10_0000;
/// How long each guest rages. Errors would show in its first milliseconds; leaks and stalls take longer.
const RAGE: Duration = Duration::from_millis(1500);
/// The monitor answers within this, however loaded the machine is.
const ANSWER: Duration = Duration::from_secs(20);

/// An ELF with one loaded segment: `code` at [`LOAD`].
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |out: &mut Vec<u8>, v: u16| out.extend(v.to_le_bytes());
    let word = |out: &mut Vec<u8>, v: u32| out.extend(v.to_le_bytes());
    let long = |out: &mut Vec<u8>, v: u64| out.extend(v.to_le_bytes());
    half(&mut out, 2); // executable
    half(&mut out, 62); // x86-64
    word(&mut out, 1);
    long(&mut out, LOAD);
    long(&mut out, 64); // program headers
    long(&mut out, 0);
    word(&mut out, 0);
    for v in [64, 56, 1, 0, 0, 0] {
        half(&mut out, v);
    }
    word(&mut out, 1); // PT_LOAD
    word(&mut out, 7);
    long(&mut out, HEADERS);
    long(&mut out, LOAD);
    long(&mut out, LOAD);
    long(&mut out, code.len() as u64);
    long(&mut out, code.len() as u64);
    long(&mut out, 4096);
    out.extend(code);
    out
}

/// Runs `code` on two vCPUs and looks after the monitor while it rages; returns what was left in the folder.
fn rages(what: &str, code: &[u8]) -> Option<World> {
    if !can_run() {
        return None;
    }
    let world = World::new();
    fs::write(world.at("hostile.elf"), elf(code)).unwrap();
    let text = |name: &str| world.at(name).to_str().unwrap().to_owned();
    let nic = format!("socket:{}:{}", text("guest.net"), text("peer.net"));
    let args = [
        "vm",
        "run",
        "--name",
        NAME,
        "--memory",
        "64MiB",
        "--balloon",
        "--cpus",
        "2",
        "--flat",
        &text("hostile.elf"),
        "--disk",
        &text("disk.raw"),
        "--nic",
        &nic,
        "--virtio-console",
        &text("console"),
        "--vsock",
        &format!("3:{}", text("vsock")),
        "--console",
        "/dev/null",
    ];
    let mut process = Process::spawn(&mut world.command(RUN, &args), &world.at("run.log"));
    world.reachable(RUN, &mut process);
    let end = Instant::now() + RAGE;
    let (mut asked, mut worst) = (0u32, Duration::ZERO);
    while Instant::now() < end || asked < 5 {
        for request in [
            Request::Status,
            Request::Pause,
            Request::Resume,
            Request::PowerButton,
        ] {
            let at = Instant::now();
            world
                .ask(RUN, &request)
                .unwrap_or_else(|e| panic!("{what}: {request:?}: {e}"));
            worst = worst.max(at.elapsed());
            asked += 1;
        }
        assert!(
            process.ended().is_none(),
            "{what}: the monitor ended: {}",
            process.said()
        );
    }
    assert!(worst < ANSWER, "{what}: an answer took {worst:?}");
    let status = world.ask(RUN, &Request::Status).unwrap();
    let exits = match &status["exits"] {
        serde_json::Value::Array(each) => each.iter().filter_map(serde_json::Value::as_u64).sum(),
        all => all.as_u64().unwrap_or(0),
    };
    // Its state can be taken and given to another process, like any guest's.
    world.save(RUN, "vm.save", Then::Stop).unwrap();
    assert!(process.wait().success());
    let said = process.said();
    assert!(
        !said.contains("panicked at") && !said.contains("poisoned"),
        "{what}: {said}"
    );
    assert!(said.len() < 256 << 10, "{what}: {} bytes of log", said.len());
    let mut process = world.begin_restore(RUN, "vm.save", false);
    world.reachable(RUN, &mut process);
    world.ask(RUN, &Request::Pause).unwrap();
    let resident = resident(&process);
    assert!(resident < 160 << 20, "{what}: the monitor holds {resident} bytes");
    world.ask(RUN, &Request::Stop).unwrap();
    assert!(process.wait().success(), "{what}: {}", process.said());
    println!(
        "{what}: {asked} requests answered, the slowest in {worst:?}, {exits} exits, {} bytes of log",
        said.len()
    );
    assert!(
        exits > 0,
        "{what}: the guest did nothing that reaches the monitor"
    );
    Some(world)
}

fn resident(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// `mov eax, v`
fn mov_eax(v: u32) -> Vec<u8> {
    [&[0xb8][..], &v.to_le_bytes()].concat()
}

/// `mov dword [address], v`; by way of rdi, so that it reaches all of 4 GiB.
fn store(address: u32, v: u32) -> Vec<u8> {
    let (a, v) = (address.to_le_bytes(), v.to_le_bytes());
    [&[0xbf][..], &a, &[0xc7, 0x07], &v].concat()
}

/// As [`store`], of one byte or two.
fn store_small(address: u32, v: u16, bytes: usize) -> Vec<u8> {
    let a = address.to_le_bytes();
    let v = v.to_le_bytes();
    match bytes {
        1 => [&[0xbf][..], &a, &[0xc6, 0x07, v[0]]].concat(),
        _ => [&[0xbf][..], &a, &[0x66, 0xc7, 0x07], &v].concat(),
    }
}

/// `jmp` back to the start of `body`.
fn for_ever(before: &[u8], body: &[u8]) -> Vec<u8> {
    let back = -(body.len() as i32 + 5);
    [before, body, &[0xe9], &back.to_le_bytes()].concat()
}

fn bar(slot: u32) -> u32 {
    use steadfast_machine::devices::virtio::pci::BAR_BYTES;
    use steadfast_machine::memory::layout::PCI_MMIO_START;
    u32::try_from(PCI_MMIO_START).unwrap() + slot * BAR_BYTES as u32
}

/// Enables memory decoding of all functions, by way of the configuration ports.
fn decode_all() -> Vec<u8> {
    (1..8u32)
        .flat_map(|slot| {
            let select = 0x8000_0000 | slot << 11 | 4;
            [
                mov_eax(select),
                vec![0x66, 0xba, 0xf8, 0x0c, 0xef], // mov dx, 0xcf8; out dx, eax
                mov_eax(6),
                vec![0x66, 0xba, 0xfc, 0x0c, 0xef], // mov dx, 0xcfc; out dx, eax
            ]
            .concat()
        })
        .collect()
}

/// Gives every queue of a device the same nonsense: rings in RAM, with a descriptor that points at itself and one that
/// lies beyond RAM; the driver says that it has made `index` chains available.
fn broken_queues(slot: u32, index: u16) -> Vec<u8> {
    const DESC: u32 = 0x40_0000;
    const AVAIL: u32 = 0x41_0000;
    const USED: u32 = 0x42_0000;
    let common = bar(slot);
    let mut code = Vec::new();
    // Descriptor 0: 16 bytes at 0x50_0000, NEXT | WRITE, next = 0; descriptor 1: 4 GiB - 1 long, beyond RAM.
    for (at, v) in [
        (0, 0x50_0000),
        (4, 0),
        (8, 16),
        (12, 3),
        (16, 0xf000_0000),
        (20, 0xffff_ffff),
        (24, 0xffff_ffff),
        (28, 3),
    ] {
        code.extend(store(DESC + at, v));
    }
    // The ring: heads 0, 1, and one beyond the table.
    code.extend(store(AVAIL, u32::from(index) << 16));
    code.extend(store(AVAIL + 4, 0x0001_0000));
    code.extend(store(AVAIL + 8, 0xffff_ffff));
    code.extend(store_small(common + 20, 0, 1)); // reset
    code.extend(store_small(common + 20, 3, 1));
    code.extend(store(common + 8, 1));
    code.extend(store(common + 12, 1)); // VERSION_1
    code.extend(store_small(common + 20, 11, 1));
    for q in 0..4u16 {
        code.extend(store_small(common + 22, q, 2));
        for (at, v) in [(32, DESC), (36, 0), (40, AVAIL), (44, 0), (48, USED), (52, 0)] {
            code.extend(store(common + at, v));
        }
        code.extend(store_small(common + 28, 1, 2)); // enable
    }
    code.extend(store_small(common + 20, 15, 1)); // DRIVER_OK
    for q in 0..4 {
        code.extend(store(common + 0x3000 + 4 * q, q));
    }
    code
}

#[test]
fn pulse_hostile_queues_and_notifications() {
    // Loops, descriptors out of bounds, heads out of bounds; an index that jumps.
    for (what, index) in [
        ("queues of nonsense", 3),
        ("an available index that jumps", 0x7fff),
    ] {
        let body: Vec<u8> = (1..7).flat_map(|slot| broken_queues(slot, index)).collect();
        rages(what, &for_ever(&decode_all(), &body));
    }
    // Queues that are right and empty, so that the devices keep listening, and every bell is rung.
    let once = [
        decode_all(),
        (1..7).flat_map(|slot| broken_queues(slot, 0)).collect(),
    ]
    .concat();
    let bells: Vec<u8> = (1..7u32)
        .flat_map(|slot| (0..5u32).flat_map(move |q| store(bar(slot) + 0x3000 + 4 * q, 0xffff_ffff)))
        .collect();
    rages("a storm of notifications", &for_ever(&once, &bells));
}

#[test]
fn pulse_hostile_mmio_and_configuration() {
    // rbx runs over all BARs and what lies behind them, eax is a random word: every register, every width.
    let walk = [
        &[0x69, 0xc0, 0x6d, 0x4e, 0xc6, 0x41][..], // imul eax, eax, 0x41c64e6d
        &[0x05, 0x39, 0x30, 0, 0],                 // add eax, 12345
        &[0x89, 0x03],                             // mov [rbx], eax
        &[0x88, 0x43, 0x05],                       // mov [rbx + 5], al
        &[0x66, 0x89, 0x43, 0x07],                 // mov [rbx + 7], ax
        &[0x8b, 0x4b, 0x02],                       // mov ecx, [rbx + 2]
        &[0x83, 0xc3, 0x04],                       // add ebx, 4
        &[0x81, 0xe3, 0xfc, 0xff, 0x07, 0],        // and ebx, 0x7fffc
        &[0x81, 0xcb],                             // or ebx, BARs
        &bar(0).to_le_bytes(),
    ]
    .concat();
    let start = [decode_all(), vec![0xbb], bar(0).to_le_bytes().to_vec()].concat();
    rages("wild MMIO", &for_ever(&start, &walk));
    // Configuration space by way of the ports: random address, random data, all widths.
    let config = [
        &[0x69, 0xdb, 0x6d, 0x4e, 0xc6, 0x41][..], // imul ebx, ebx, 0x41c64e6d
        &[0x81, 0xc3, 0x39, 0x30, 0, 0],           // add ebx, 12345
        &[0x89, 0xd8, 0x25, 0xff, 0x3f, 0, 0],     // mov eax, ebx; and eax, 0x3fff: bus 0, slots 0 to 7
        &[0x0d, 0, 0, 0, 0x80],                    // or eax, 0x80000000
        &[0x66, 0xba, 0xf8, 0x0c, 0xef],           // out 0xcf8, eax
        &[0x89, 0xd8],                             // mov eax, ebx
        &[0x66, 0xba, 0xfc, 0x0c, 0xef],           // out 0xcfc, eax
        &[0x66, 0xba, 0xfd, 0x0c, 0xee],           // out 0xcfd, al
        &[0x66, 0xba, 0xfe, 0x0c, 0x66, 0xef],     // out 0xcfe, ax
        &[0xed],                                   // in eax, dx
    ]
    .concat();
    rages("wild PCI configuration", &for_ever(&[0xbb, 1, 0, 0, 0], &config));
}

#[test]
fn pulse_hostile_console_flood() {
    // Serial port and debug port: bytes as fast as they go.
    let body = [
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee][..], // mov dx, 0x3f8; mov al, '!'; out dx, al
        &[0x66, 0xba, 0xe9, 0x00, 0xee],                 // mov dx, 0xe9; out dx, al
    ]
    .concat();
    rages("a console flood", &for_ever(&[], &body));
    // Panic events and power-offs that are none: each is noted, none may fill anything.
    let body = [0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee]; // mov dx, 0x505; mov al, 1; out dx, al
    rages("a flood of guest panics", &for_ever(&[], &body));
}
