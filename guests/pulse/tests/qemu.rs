//! Runs the guest under QEMU (PVH entry), with the test as its network peer and a raw disk, under software emulation and,
//! where it works, KVM: counter, TCP, frozen memory, disk, and a restart after SIGKILL.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pulse::client::{Client, Wire};
use pulse::shared::{BENCH_LBA, COUNTER_LBA, PAGE, RING_LBA};
use pulse::{Config, Content, DiskMode, DiskOp, Loop, Reply, Summary, check, frames, kind, status};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const ME: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const LONG: Duration = Duration::from_secs(60);
const MEMORY: u64 = 64 << 20;
const RING: u64 = 32;

/// Frames over a unix datagram socket; can lose, double and reorder them, by a fixed sequence.
struct Cable {
    socket: UnixDatagram,
    to: PathBuf,
    /// Of 100 frames, how many suffer each fate.
    harm: u64,
    random: u64,
    late: Option<Vec<u8>>,
}

impl Cable {
    fn fate(&mut self) -> u64 {
        self.random = pulse::shared::page_next(self.random);
        (self.random >> 33) % 100
    }

    fn put(&self, f: &[u8]) -> io::Result<()> {
        for _ in 0..1000 {
            match self.socket.send_to(f, &self.to) {
                // QEMU's queue is full, or QEMU is (re)starting: as on a real cable, the frame may be lost.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_micros(200))
                }
                _ => break,
            }
        }
        Ok(())
    }
}

impl Wire for Cable {
    fn send(&mut self, f: &[u8]) -> io::Result<()> {
        let fate = self.fate();
        if fate < self.harm {
            return Ok(());
        }
        if fate < 2 * self.harm {
            self.put(f)?;
        } else if fate < 3 * self.harm && self.late.is_none() {
            self.late = Some(f.to_vec());
            return Ok(());
        }
        self.put(f)?;
        if let Some(late) = self.late.take() {
            self.put(&late)?;
        }
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        let mut buf = [0u8; 4096];
        // The kernel rounds a timeout up to a tick, so "do not wait" must be said in another way.
        self.socket.set_nonblocking(timeout.is_zero())?;
        if !timeout.is_zero() {
            self.socket.set_read_timeout(Some(timeout))?;
        }
        loop {
            match self.socket.recv(&mut buf) {
                Ok(_) if self.fate() < self.harm => continue,
                Ok(n) => return Ok(Some(buf[..n].to_vec())),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
        }
    }
}

struct Vm {
    child: Child,
    dir: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    fn start(dir: &Path, accel: &str, config: &Config, extra: &[&str]) -> Vm {
        let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        fs::write(at("pulse.elf"), pulse::elf()).unwrap();
        if !dir.join("disk").exists() {
            File::create(at("disk"))
                .unwrap()
                .set_len((BENCH_LBA + 16384) * 512)
                .unwrap();
        }
        let _ = fs::remove_file(at("ram"));
        let _ = fs::remove_file(at("guest.sock"));
        let mut command = Command::new("qemu-system-x86_64");
        // SAFETY: prctl is safe between fork and exec; QEMU must not outlive a test that is killed.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            })
        };
        let child = command
            .args([
                "-M",
                "q35,memory-backend=ram",
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-accel", accel, "-m", &format!("{}M", MEMORY >> 20)])
            .args([
                "-object",
                &format!(
                    "memory-backend-file,id=ram,size={MEMORY},mem-path={},share=on",
                    at("ram")
                ),
            ])
            .args(["-kernel", &at("pulse.elf"), "-append", &config.to_string()])
            .args([
                "-serial",
                &format!("file:{}", at("serial")),
                "-debugcon",
                &format!("file:{}", at("e9")),
            ])
            .args([
                "-netdev",
                &format!(
                    "dgram,id=n,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                    at("guest.sock"),
                    at("host.sock")
                ),
            ])
            .args([
                "-device",
                "virtio-net-pci,disable-legacy=on,netdev=n,mac=02:00:00:00:00:07",
            ])
            .args(["-drive", &format!("if=none,id=d,file={},format=raw", at("disk"))])
            .args(["-device", "virtio-blk-pci,disable-legacy=on,drive=d"])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(at("stderr")).unwrap())
            .spawn()
            .unwrap();
        Vm {
            child,
            dir: dir.to_owned(),
        }
    }

    fn cable(dir: &Path) -> Cable {
        let mine = dir.join("host.sock");
        let _ = fs::remove_file(&mine);
        let socket = UnixDatagram::bind(&mine).unwrap();
        // Without a bound a full queue of QEMU would block the test.
        socket.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        Cable {
            socket,
            to: dir.join("guest.sock"),
            harm: 0,
            random: 7,
            late: None,
        }
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join(name)).unwrap_or_default()).into_owned()
    }

    fn wait_serial(&mut self, what: &str) -> String {
        let start = Instant::now();
        loop {
            let text = self.text("serial");
            if text.contains(what) {
                return text;
            }
            let exit = self.child.try_wait().unwrap();
            if start.elapsed() > LONG || exit.is_some() {
                panic!(
                    "no {what:?} on the serial line ({exit:?}): {text:?}, {:?}",
                    self.text("stderr")
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, n: i32) {
        // SAFETY: our own child, not yet reaped, so the id is its.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, n) }, 0);
    }

    /// Freezes QEMU between two instructions, wherever it is, and checks memory and disk.
    fn frozen(&mut self) -> Summary {
        let pid = self.child.id();
        self.signal(libc::SIGSTOP);
        let start = Instant::now();
        let stopped = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_none_or(|s| s.starts_with('T'))
        };
        while !fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .all(|t| stopped(t.unwrap()))
        {
            assert!(start.elapsed() < LONG, "QEMU does not stop");
            std::thread::yield_now();
        }
        let memory = fs::read(self.dir.join("ram")).unwrap();
        let summary = pulse::invariants_hold(&memory).unwrap();
        summary.agrees_with_disk(&self.sectors(COUNTER_LBA, 512)).unwrap();
        self.signal(libc::SIGCONT);
        summary
    }

    fn sectors(&self, lba: u64, bytes: usize) -> Vec<u8> {
        let mut f = File::open(self.dir.join("disk")).unwrap();
        f.seek(SeekFrom::Start(lba * 512)).unwrap();
        let mut out = vec![0; bytes];
        f.read_exact(&mut out).unwrap();
        out
    }
}

/// Whether QEMU with this accelerator can run here; says loudly if not.
fn can_run(accel: &str) -> bool {
    let skip = |why: &str| {
        println!("SKIPPED: pulse under QEMU with accel={accel}: {why}");
        eprintln!("SKIPPED: pulse under QEMU with accel={accel}: {why}");
        false
    };
    if Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        return skip("qemu-system-x86_64 is not installed");
    }
    if accel == "kvm" && File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return skip("/dev/kvm cannot be opened");
    }
    true
}

fn good(r: &Reply) {
    assert_eq!((r.errors, r.status), (0, status::OK), "{r:?}");
}

fn whole_story(accel: &str) {
    if !can_run(accel) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cable = Vm::cable(dir.path());
    let config = Config::new()
        .dirty(300)
        .chunk(7)
        .disk(DiskMode::Verify)
        .ring(RING)
        .ip(GUEST)
        .e9();
    let mut vm = Vm::start(dir.path(), accel, &config, &[]);
    vm.wait_serial("pulse 1 ready cpus=1");
    let mut c = Client::new(cable, ME, GUEST);

    assert_eq!(c.resolve(LONG).unwrap(), [2, 0, 0, 0, 0, 7]);
    for len in [4, 57, 1472] {
        let data: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        assert!(
            c.ping(&data, LONG).unwrap() && c.echo(&data, LONG).unwrap(),
            "echo of {len} bytes"
        );
    }

    // The counter: every request counts once, also one that is sent three times.
    for n in 1..=20 {
        let r = c.ask(kind::INC, LONG).unwrap();
        good(&r);
        assert_eq!((r.counter, r.inc_ops), (n, n));
    }
    let e = frames::Ends {
        src: ([2, 0x43, 10, 0, 0, 1], ME),
        dst: ([2, 0, 0, 0, 0, 7], GUEST),
    };
    let again = frames::udp(
        e,
        7777,
        9,
        &pulse::Request {
            kind: kind::INC,
            nonce: 99,
        }
        .to_bytes(),
    );
    for _ in 0..3 {
        c.wire().send(&again).unwrap();
        let reply = c.datagram(7777, LONG).unwrap();
        assert_eq!(Reply::from_bytes(&reply).unwrap().counter, 21);
    }
    for n in 22..=25 {
        let r = c.ask(kind::FLUSH_INC, LONG).unwrap();
        good(&r);
        assert_eq!((r.counter, r.disk_counter, r.disk_seq), (n, n, n - 21));
        let on_disk = check::disk_counter(&vm.sectors(COUNTER_LBA, 512))
            .unwrap()
            .unwrap();
        assert_eq!(on_disk.counter, n);
    }
    assert_eq!(c.ask(0x77, LONG).unwrap().status, status::BAD_REQUEST);

    // Frozen at many instants, memory agrees with itself, with the last reply and with the disk.
    let freezes = if accel == "kvm" { 15 } else { 40 };
    let mut last = c.ask(kind::READ, LONG).unwrap();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..freezes {
        c.tell(kind::INC).unwrap();
        let s = vm.frozen();
        s.covers(&last).unwrap();
        seen.insert(s.progress[0]);
        last = c.ask(kind::READ, LONG).unwrap();
        good(&last);
    }
    assert!(seen.len() > freezes / 2, "the guest stands still: {seen:?}");

    // TCP: a clean megabyte, then a cable that loses, doubles and reorders, with several connections at once.
    // An emulated CPU works through about half a megabyte a second, so there it gets less.
    let (whole, part, rough) = if accel == "kvm" {
        (1 << 18, 60_000, 20_000)
    } else {
        (1 << 20, 200_000, 100_000)
    };
    let data: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let first = c.connect(7, LONG).unwrap();
    let begun = Instant::now();
    c.echo_stream(first, &data[..whole], LONG).unwrap();
    println!("{accel}: TCP echo of {whole} bytes in {:?}", begun.elapsed());
    let begun = Instant::now();
    for _ in 0..50 {
        c.ask(kind::READ, LONG).unwrap();
    }
    println!("{accel}: UDP request and reply in {:?}", begun.elapsed() / 50);
    // Frozen for a second and a half amid a stream, while the client sends again and again.
    let mut half = data[..part].iter().copied();
    let mut back = Vec::new();
    let begun = Instant::now();
    let mut halt = true;
    while back.len() < part {
        assert!(begun.elapsed() < LONG, "{} bytes came back", back.len());
        let piece: Vec<u8> = half.by_ref().take(8192).collect();
        assert_eq!(c.write(first, &piece).unwrap(), piece.len());
        c.pump().unwrap();
        back.extend(c.read(first).unwrap());
        if halt && back.len() > 20_000 {
            let at = Instant::now();
            vm.signal(libc::SIGSTOP);
            while at.elapsed() < Duration::from_millis(1500) {
                c.pump().unwrap();
            }
            vm.signal(libc::SIGCONT);
            halt = false;
        }
    }
    assert!(back == data[..part] && !halt);
    let others: Vec<_> = (0..7).map(|_| c.connect(9, LONG).unwrap()).collect();
    c.wire().harm = 5;
    // Which frames suffer depends on time. A few streams may get by without one that the guest has to send again.
    let begun = Instant::now();
    while c.ask(kind::READ, LONG).unwrap().tcp_resent == 0 {
        assert!(
            begun.elapsed() < LONG,
            "on a bad cable the guest never sends again"
        );
        c.echo_stream(first, &data[..rough], LONG).unwrap();
    }
    for (i, conn) in others.iter().enumerate() {
        let r = c
            .ask_stream(*conn, if i % 2 == 0 { kind::INC } else { kind::FLUSH_INC }, LONG)
            .unwrap();
        good(&r);
        assert_eq!(r.counter, last.counter + 1 + i as u64);
    }
    c.wire().harm = 0;
    for conn in others.iter().chain([&first]) {
        c.close(*conn, LONG).unwrap();
    }
    let refused = c.connect(80, LONG).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    last = c.ask(kind::READ, LONG).unwrap();
    good(&last);
    assert!(
        last.tcp_resent > 0 && last.verify_seq > 0 && last.loops > 0,
        "{last:?}"
    );
    vm.frozen().covers(&last).unwrap();

    // Killed and started again on the same disk.
    drop(vm);
    let mut vm = Vm::start(dir.path(), accel, &config, &[]);
    vm.wait_serial("pulse 1 ready cpus=1");
    let on_disk = check::disk_counter(&vm.sectors(COUNTER_LBA, 512))
        .unwrap()
        .unwrap();
    assert_eq!((on_disk.counter, on_disk.seq), (last.disk_counter, last.disk_seq));
    let r = c.ask(kind::FLUSH_INC, LONG).unwrap();
    good(&r);
    assert_eq!(
        (r.boot_counter, r.counter, r.disk_seq),
        (last.disk_counter, last.disk_counter + 1, last.disk_seq + 1)
    );
    let start = Instant::now();
    while c.ask(kind::READ, LONG).unwrap().verify_seq <= last.verify_seq + RING {
        assert!(start.elapsed() < LONG, "the ring does not go on");
    }
    drop(vm.frozen());
    let serial = vm.text("serial");
    drop(vm);
    let bytes = {
        let mut f = File::open(dir.path().join("disk")).unwrap();
        f.seek(SeekFrom::Start(RING_LBA * 512)).unwrap();
        let mut b = vec![0; (RING * PAGE) as usize];
        f.read_exact(&mut b).unwrap();
        b
    };
    assert!(check::ring_holds(&bytes).unwrap() > last.verify_seq);
    assert!(!serial.contains("PULSE"), "{serial}");
}

#[test]
fn whole_story_tcg() {
    whole_story("tcg");
}

#[test]
fn whole_story_kvm() {
    whole_story("kvm");
}

/// A guest that finds its ring damaged says so on the serial line and in every reply.
#[test]
fn damage_on_disk_is_found() {
    if !can_run("tcg") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cable = Vm::cable(dir.path());
    let mut disk = vec![0u8; (BENCH_LBA as usize + 16384) * 512];
    disk[RING_LBA as usize * 512 + 100] = 1;
    disk[RING_LBA as usize * 512] = 1;
    fs::write(dir.path().join("disk"), &disk).unwrap();
    let config = Config::new().disk(DiskMode::Verify).ring(8).ip(GUEST);
    let mut vm = Vm::start(dir.path(), "tcg", &config, &[]);
    vm.wait_serial("PULSE CORRUPTION disk sector ");
    let mut c = Client::new(cable, ME, GUEST);
    assert_eq!(
        c.ask(kind::STATUS, LONG).unwrap().errors,
        pulse::shared::error::DISK_CONTENT
    );
    let memory = fs::read(dir.path().join("ram")).unwrap();
    assert!(
        pulse::invariants_hold(&memory)
            .unwrap_err()
            .contains("the guest found errors")
    );
}

/// The flush loop reports to the collector, beside pages whose whole content changes; other devices answer.
#[test]
fn flush_loop_and_other_devices() {
    if !can_run("tcg") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cable = Vm::cable(dir.path());
    let config = Config::new()
        .looping(Loop::Flush)
        .pages(5)
        .content(Content::Text)
        .collector(SocketAddrV4::new(ME, 9100))
        .ip(GUEST)
        .extras(20, 20, 0, 20);
    let console = format!("file,id=c,path={}", dir.path().join("console").display());
    let extra = [
        "-device",
        "virtio-rng-pci,disable-legacy=on",
        "-device",
        "virtio-serial-pci,disable-legacy=on",
        "-chardev",
        &console,
        "-device",
        "virtconsole,chardev=c",
        "-device",
        "virtio-balloon-pci,disable-legacy=on",
    ];
    let mut vm = Vm::start(dir.path(), "tcg", &config, &extra);
    vm.wait_serial("pulse 1 ready");
    let mut c = Client::new(cable, ME, GUEST);
    let mut before = 0;
    for _ in 0..5 {
        let r = Reply::from_bytes(&c.datagram(9100, LONG).unwrap()).unwrap();
        good(&r);
        assert!(
            r.is_valid() && r.kind() == kind::EVENT && r.flush_loops > before,
            "{r:?}"
        );
        before = r.flush_loops;
    }
    let start = Instant::now();
    loop {
        let s = vm.frozen().shared;
        if s.console_lines >= 5 && s.rng_reads >= 5 && s.devices == 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5
        {
            break;
        }
        assert!(start.elapsed() < LONG, "{s:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(vm.frozen());
    let lines = vm.text("console");
    for (i, line) in lines.lines().enumerate() {
        if i + 1 < lines.lines().count() {
            assert_eq!(line, format!("pulse console {}", i + 1));
        }
    }
}

/// An unknown word stops the guest with a message; an orderly end is announced.
#[test]
fn command_line_and_end() {
    if !can_run("tcg") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _cable = Vm::cable(dir.path());
    let config = Config::new().dirty(10).exit_after_loops(50).e9();
    let mut vm = Vm::start(dir.path(), "tcg", &config, &[]);
    vm.wait_serial("pulse done\n");
    assert_eq!(vm.text("e9").len(), 50);
    drop(vm);
    let mut vm = Vm::start(dir.path(), "tcg", &Config::new().dirty(MEMORY / PAGE), &[]);
    vm.wait_serial("PULSE ERROR the pages do not fit into memory");
    drop(vm);
}

fn exits(vm: &mut Vm) {
    let start = Instant::now();
    while vm.child.try_wait().unwrap().is_none() {
        assert!(
            start.elapsed() < LONG,
            "QEMU goes on; serial: {:?}",
            vm.text("serial")
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The three ways in which a guest can be told to fail.
fn failures(accel: &str) {
    if !can_run(accel) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new().dirty(20).ip(GUEST);
    let pvpanic = ["-device", "pvpanic", "-action", "panic=shutdown"];
    for kind in [kind::PANIC, kind::PVPANIC, kind::HANG] {
        let cable = Vm::cable(dir.path());
        let mut vm = Vm::start(dir.path(), accel, &config, &pvpanic);
        vm.wait_serial("pulse 1 ready");
        let mut c = Client::new(cable, ME, GUEST);
        good(&c.ask(kind::READ, LONG).unwrap());
        c.tell(kind).unwrap();
        if kind != kind::HANG {
            exits(&mut vm);
            continue;
        }
        // It is hung once nothing moves any more; memory stays consistent.
        let start = Instant::now();
        loop {
            let before = vm.frozen();
            std::thread::sleep(Duration::from_millis(100));
            if before == vm.frozen() {
                break;
            }
            assert!(start.elapsed() < LONG, "HANG does not hang");
        }
        assert_eq!(
            c.ask(kind::READ, Duration::from_secs(1)).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
    }
}

#[test]
fn failures_tcg() {
    failures("tcg");
}

#[test]
fn failures_kvm() {
    failures("kvm");
}

/// No instruction of the guest's own code uses SSE; `core`'s formatting, which only a panic's message would use, may.
#[test]
fn no_sse() {
    let dir = tempfile::tempdir().unwrap();
    let elf = dir.path().join("pulse.elf");
    fs::write(&elf, pulse::elf()).unwrap();
    let out = match Command::new("objdump")
        .args(["-d", "--no-show-raw-insn"])
        .arg(&elf)
        .output()
    {
        Ok(out) => String::from_utf8(out.stdout).unwrap(),
        Err(e) => {
            println!("SKIPPED: search for SSE in the guest: objdump: {e}");
            eprintln!("SKIPPED: search for SSE in the guest: objdump: {e}");
            return;
        }
    };
    let (mut function, mut functions) = ("", 0);
    for line in out.lines() {
        if line.ends_with(">:") {
            function = line;
            functions += 1;
        }
        let formatting = function.contains("core3fmt") || function.contains("core3str5count");
        assert!(formatting || !line.contains("%xmm"), "{function}: {line}");
        assert!(!line.contains("mfence"), "{function}: {line}");
    }
    assert!(functions > 30, "objdump found {functions} functions");
}

/// The disk benchmark does what it is told, with several requests in flight.
#[test]
fn disk_benchmark() {
    if !can_run("tcg") {
        return;
    }
    let cases = [
        (DiskOp::Read, 1 << 20, 4),
        (DiskOp::Write, 65536, 60),
        (DiskOp::RandRead, 4096, 16),
        (DiskOp::RandWrite, 512, 1),
    ];
    for (op, bytes, depth) in cases {
        let dir = tempfile::tempdir().unwrap();
        let cable = Vm::cable(dir.path());
        let mut vm = Vm::start(
            dir.path(),
            "tcg",
            &Config::new().disk_bench(op, bytes, depth).ip(GUEST),
            &[],
        );
        vm.wait_serial("pulse 1 ready");
        let mut c = Client::new(cable, ME, GUEST);
        let start = Instant::now();
        let r = loop {
            let r = c.ask(kind::STATUS, LONG).unwrap();
            good(&r);
            if r.disk_reads + r.disk_writes > 200 {
                break r;
            }
            assert!(start.elapsed() < LONG, "{r:?}");
        };
        let writes = matches!(op, DiskOp::Write | DiskOp::RandWrite);
        // One read at boot: the counter's block.
        assert_eq!((r.disk_reads > 1, r.disk_writes > 0), (!writes, writes), "{r:?}");
        assert_eq!((r.disk_bytes - 512) % bytes, 0);
        let s = vm.sectors(BENCH_LBA, 16384 * 512);
        assert_eq!(s.iter().any(|b| *b != 0), writes, "{op:?}");
    }
}

/// Nonsense on the wire, with right checksums and with wrong ones, neither stops nor confuses the guest.
#[test]
fn nonsense_is_endured() {
    if !can_run("tcg") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cable = Vm::cable(dir.path());
    let mut vm = Vm::start(dir.path(), "tcg", &Config::new().dirty(20).ip(GUEST), &[]);
    vm.wait_serial("pulse 1 ready");
    let mut c = Client::new(cable, ME, GUEST);
    let guest = c.resolve(LONG).unwrap();
    // Another host, so that the resets it earns are not taken for ours.
    let e = frames::Ends {
        src: ([2, 9, 9, 9, 9, 9], Ipv4Addr::new(10, 0, 0, 9)),
        dst: (guest, GUEST),
    };
    let stream = c.connect(7, LONG).unwrap();
    let mut x = 12345;
    let mut random = |n: u64| {
        x = pulse::shared::page_next(x);
        (x >> 33) % n
    };
    for round in 0..4000 {
        let data: Vec<u8> = (0..random(1461)).map(|_| random(256) as u8).collect();
        let sport = 1000 + random(20) as u16;
        let dport = [7, 9, 9, 80][random(4) as usize];
        let mut f = match random(4) {
            0 => frames::udp(e, sport, dport, &data),
            1 => frames::ping(e, &data),
            2 => frames::arp(random(4) as u16, e),
            _ => frames::tcp(
                e,
                &frames::Segment {
                    sport,
                    dport,
                    seq: random(4) as u32 * 700,
                    ack: random(1 << 32) as u32,
                    flags: random(64) as u8,
                    window: random(65536) as u16,
                    data,
                },
            ),
        };
        match random(6) {
            0 => {
                let at = random(f.len() as u64) as usize;
                f[at] ^= 1 << random(8);
            }
            // Not to nothing: QEMU takes an empty datagram for the end of the connection.
            1 => f.truncate(random(f.len() as u64) as usize + 1),
            _ => {}
        }
        c.wire().send(&f).unwrap();
        // The socket holds ten frames; unread answers would stop QEMU, then the guest, then us.
        while c.wire().receive(Duration::ZERO).unwrap().is_some() {}
        if round % 200 == 0 {
            good(&c.ask(kind::READ, LONG).unwrap());
            c.echo_stream(stream, &[round as u8; 3000], LONG).unwrap();
        }
    }
    c.close(stream, LONG).unwrap();
    good(&c.ask(kind::INC, LONG).unwrap());
    drop(vm.frozen());
    assert!(!vm.text("serial").contains("PULSE"), "{}", vm.text("serial"));
}
