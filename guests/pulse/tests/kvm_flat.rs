//! Flat boot on /dev/kvm with the smallest monitor there can be: several vCPUs, no devices, frozen at random instants.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pulse::shared::LOW_RAM_END;
use pulse::{Config, Content, FlatBoot, Summary};

const LONG: Duration = Duration::from_secs(60);

/// What the vCPU threads share with the test.
#[derive(Default)]
struct Board {
    freeze: AtomicBool,
    quit: AtomicBool,
    parked: AtomicUsize,
    halted: AtomicUsize,
    serial: Mutex<Vec<u8>>,
    progress_bytes: AtomicUsize,
    lock: Mutex<()>,
    go: Condvar,
    broken: Mutex<Option<String>>,
}

struct Machine {
    board: Arc<Board>,
    memory: *mut u8,
    mem_bytes: usize,
    threads: Vec<JoinHandle<()>>,
    _vm: VmFd,
}

extern "C" fn nothing(_: libc::c_int) {}

impl Machine {
    fn start(kvm: &Kvm, config: &Config, ncpus: u32, mem_bytes: usize) -> Machine {
        // SAFETY: a handler that does nothing, so that the signal interrupts KVM_RUN.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        }
        // SAFETY: a fresh anonymous mapping.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mem_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(memory, libc::MAP_FAILED);
        let memory = memory.cast::<u8>();
        let boot = FlatBoot::new(config, ncpus, mem_bytes as u64).unwrap();
        for (gpa, bytes) in &boot.writes {
            assert!(*gpa as usize + bytes.len() <= mem_bytes.min(LOW_RAM_END as usize));
            // SAFETY: inside the mapping; no vCPU runs yet.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.add(*gpa as usize), bytes.len()) };
        }
        let vm = kvm.create_vm().unwrap();
        let _ = vm.set_tss_address(0xfffb_d000);
        let low = (mem_bytes as u64).min(LOW_RAM_END);
        for (slot, gpa, offset, size) in [(0, 0, 0, low), (1, 1 << 32, low, mem_bytes as u64 - low)] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: memory as u64 + offset,
            };
            if size > 0 {
                // SAFETY: the mapping outlives the VM (see Drop).
                unsafe { vm.set_user_memory_region(region).unwrap() };
            }
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let board = Arc::new(Board::default());
        let mut threads = Vec::new();
        for index in 0..ncpus {
            let vcpu = vm.create_vcpu(u64::from(index)).unwrap();
            vcpu.set_cpuid2(&cpuid).unwrap();
            set_registers(&vcpu, &boot, index);
            let board = board.clone();
            threads.push(std::thread::spawn(move || run(vcpu, &board)));
        }
        Machine {
            board,
            memory,
            mem_bytes,
            threads,
            _vm: vm,
        }
    }

    fn kick(&self) {
        use std::os::unix::thread::JoinHandleExt;
        for t in &self.threads {
            if !t.is_finished() {
                // SAFETY: the thread is not joined yet, so its id is valid.
                unsafe { libc::pthread_kill(t.as_pthread_t(), libc::SIGUSR1) };
            }
        }
    }

    /// Stops all vCPUs wherever they are and checks memory.
    fn frozen(&self) -> Summary {
        self.board.freeze.store(true, Ordering::SeqCst);
        let start = Instant::now();
        let all = self.threads.len();
        while self.board.parked.load(Ordering::SeqCst) + self.board.halted.load(Ordering::SeqCst) < all {
            self.kick();
            self.healthy();
            assert!(start.elapsed() < LONG, "the vCPUs do not stop");
            std::thread::sleep(Duration::from_micros(50));
        }
        // SAFETY: no vCPU runs; the mapping is that long.
        let memory = unsafe { std::slice::from_raw_parts(self.memory, self.mem_bytes) };
        let summary = pulse::invariants_hold_with(|gpa, out| {
            let at = if gpa >= 1 << 32 {
                gpa - (1 << 32) + LOW_RAM_END
            } else {
                gpa
            } as usize;
            at + out.len() <= memory.len() && {
                out.copy_from_slice(&memory[at..at + out.len()]);
                true
            }
        })
        .unwrap();
        let _guard = self.board.lock.lock().unwrap();
        self.board.freeze.store(false, Ordering::SeqCst);
        self.board.go.notify_all();
        summary
    }

    fn healthy(&self) {
        if let Some(why) = self.board.broken.lock().unwrap().clone() {
            panic!("{why}; serial: {:?}", self.serial());
        }
    }

    fn serial(&self) -> String {
        String::from_utf8_lossy(&self.board.serial.lock().unwrap()).into_owned()
    }

    fn wait_serial(&self, what: &str) {
        let start = Instant::now();
        while !self.serial().contains(what) {
            self.healthy();
            assert!(
                start.elapsed() < LONG,
                "no {what:?} on the serial line: {:?}",
                self.serial()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.board.quit.store(true, Ordering::SeqCst);
        self.board.freeze.store(false, Ordering::SeqCst);
        while self.threads.iter().any(|t| !t.is_finished()) {
            {
                let _guard = self.board.lock.lock();
                self.board.go.notify_all();
            }
            self.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
        // SAFETY: all vCPUs are gone; the VM's descriptor only holds the address.
        unsafe { libc::munmap(self.memory.cast(), self.mem_bytes) };
    }
}

fn set_registers(vcpu: &VcpuFd, boot: &FlatBoot, index: u32) {
    let mut s = vcpu.get_sregs().unwrap();
    let code = kvm_segment {
        limit: !0,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        limit: !0,
        selector: 16,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    s.cs = code;
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    s.cr0 = 0x8000_0033;
    s.cr3 = boot.cr3;
    s.cr4 = 0x20;
    s.efer = 0x500;
    vcpu.set_sregs(&s).unwrap();
    let mut r = vcpu.get_regs().unwrap();
    (r.rip, r.rflags, r.rdi, r.rsi) = (boot.entry, 2, u64::from(index), boot.rsi);
    vcpu.set_regs(&r).unwrap();
}

fn run(mut vcpu: VcpuFd, board: &Board) {
    while !board.quit.load(Ordering::SeqCst) {
        if board.freeze.load(Ordering::SeqCst) {
            let mut guard = board.lock.lock().unwrap();
            board.parked.fetch_add(1, Ordering::SeqCst);
            while board.freeze.load(Ordering::SeqCst) {
                guard = board.go.wait_timeout(guard, Duration::from_millis(50)).unwrap().0;
            }
            board.parked.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x3f8, data)) => board.serial.lock().unwrap().extend_from_slice(data),
            Ok(VcpuExit::IoOut(0xe9, data)) => {
                board.progress_bytes.fetch_add(data.len(), Ordering::SeqCst);
            }
            Ok(VcpuExit::IoOut(..)) => {}
            Ok(VcpuExit::IoIn(0x3fd, data)) => data.fill(0x60),
            Ok(VcpuExit::IoIn(_, data)) => data.fill(0xff),
            // Interrupts are off, so this vCPU is done.
            Ok(VcpuExit::Hlt) => {
                board.halted.fetch_add(1, Ordering::SeqCst);
                return;
            }
            Ok(other) => {
                *board.broken.lock().unwrap() = Some(format!("vCPU exit {other:?}"));
                return;
            }
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => {
                *board.broken.lock().unwrap() = Some(format!("KVM_RUN: {e}"));
                return;
            }
        }
    }
}

fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(k) => Some(k),
        Err(e) => {
            println!("SKIPPED: pulse on KVM: /dev/kvm: {e}");
            eprintln!("SKIPPED: pulse on KVM: /dev/kvm: {e}");
            None
        }
    }
}

fn freezes(config: &Config, ncpus: u32, mem_bytes: usize, times: usize) {
    let Some(kvm) = kvm() else { return };
    let m = Machine::start(&kvm, config, ncpus, mem_bytes);
    m.wait_serial(&format!("pulse 1 ready cpus={ncpus}"));
    let mut seen = std::collections::HashSet::new();
    let mut loops = vec![0; ncpus as usize];
    let start = Instant::now();
    // At least `times` freezes, and on until every vCPU was seen to work, at a quarter as many different instants.
    let mut n = 0;
    while n < times || loops.contains(&0) || seen.len() < times / 4 {
        let s = m.frozen();
        for (before, (now, _)) in loops.iter_mut().zip(&s.progress) {
            assert!(*before <= *now, "a vCPU went back");
            *before = *now;
        }
        seen.insert(s.progress);
        n += 1;
        assert!(
            start.elapsed() < LONG,
            "{n} freezes, {} different, loops {loops:?}",
            seen.len()
        );
        std::thread::sleep(Duration::from_micros(200 + (n as u64 * 37) % 1000));
    }
    println!(
        "{ncpus} vCPUs: {n} freezes, {} different, loops {loops:?}",
        seen.len()
    );
}

#[test]
fn one_vcpu() {
    freezes(&Config::new().dirty(1000), 1, 64 << 20, 100);
}

#[test]
fn four_vcpus_spread_over_all_memory() {
    freezes(&Config::new().dirty(200).ram_stride().chunk(3), 4, 128 << 20, 100);
}

#[test]
fn memory_above_four_gib() {
    let config = Config::new().dirty(64).high().ram_stride();
    freezes(&config, 2, 5 << 30, 50);
}

#[test]
fn whole_pages_of_noise() {
    freezes(
        &Config::new().dirty(3).chunk(1).content(Content::Random),
        2,
        64 << 20,
        60,
    );
}

#[test]
fn unchecked_loop() {
    freezes(
        &Config::new().dirty(1000).content(Content::Unchecked),
        1,
        64 << 20,
        30,
    );
}

/// The end is in order, loop by loop, on every vCPU; the rate is kept.
#[test]
fn rate_and_end() {
    let Some(kvm) = kvm() else { return };
    let config = Config::new()
        .dirty(10)
        .rate(100)
        .exit_after_loops(20)
        .e9()
        .quiet();
    let start = Instant::now();
    let m = Machine::start(&kvm, &config, 3, 64 << 20);
    m.wait_serial("pulse done\n");
    assert_eq!(m.board.progress_bytes.load(Ordering::SeqCst), 20);
    assert_eq!(m.frozen().progress, [(20, 0); 3]);
    assert_eq!(m.serial(), "pulse 1 ready cpus=3\npulse done\n");
    assert!(
        start.elapsed() > Duration::from_millis(20),
        "20 loops at 100 a second took {:?}",
        start.elapsed()
    );
}

/// A word that the guest did not write is found by the guest itself, and by the checker.
#[test]
fn a_flipped_bit_is_found() {
    let Some(kvm) = kvm() else { return };
    let m = Machine::start(&kvm, &Config::new().dirty(50).rate(200), 2, 64 << 20);
    m.wait_serial("pulse 1 ready");
    let shared = m.frozen().shared;
    let at = pulse::shared::page_gpa(&shared, 1, 7) as usize;
    // SAFETY: inside the mapping; the race with the vCPU is the point: it changes the word only once per loop.
    unsafe { (m.memory.add(at) as *mut u64).write_volatile(1 << 40) };
    m.wait_serial("PULSE CORRUPTION memory at ");
    // SAFETY: a racy read is good enough for the error word, which stays.
    let memory = unsafe { std::slice::from_raw_parts(m.memory, m.mem_bytes) };
    assert!(
        pulse::invariants_hold(memory)
            .unwrap_err()
            .contains("found errors")
    );
}

/// A word that the guest does not know stops it.
#[test]
fn unknown_word() {
    let Some(kvm) = kvm() else { return };
    let config = Config::new().stride(4097);
    let m = Machine::start(&kvm, &config, 1, 64 << 20);
    m.wait_serial("PULSE ERROR bad word on the command line: stride=4097\n");
}

/// `vcpus=` leaves the others halted.
#[test]
fn fewer_vcpus() {
    let Some(kvm) = kvm() else { return };
    let m = Machine::start(&kvm, &Config::new().dirty(10).vcpus(2).quiet(), 4, 64 << 20);
    m.wait_serial("pulse 1 ready cpus=2\n");
    let start = Instant::now();
    while m.board.halted.load(Ordering::SeqCst) < 2 || m.frozen().progress.iter().any(|p| p.0 == 0) {
        m.healthy();
        assert!(start.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(m.frozen().progress.len(), 2);
}
