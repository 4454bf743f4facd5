//! From the entry points to the main loop.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::config::{Config, DiskMode, Loop};
use crate::disk::Disk;
use crate::disk_jobs::Jobs;
use crate::extras::Extras;
use crate::net::Net;
use crate::shared::*;
use crate::state::{Every, errors, fail, lane, shared, ticks};
use crate::work::Worker;
use crate::{cpu, get, pci, serial, set};

/// The boot-info page (see the README for its contract).
#[repr(C)]
struct BootInfo {
    magic: u64,
    version: u32,
    ncpus: u32,
    mem_bytes: u64,
    cmdline_len: u32,
    pad: u32,
    cmdline: [u8; CMDLINE_MAX],
}

static mut PVH_INFO: BootInfo = BootInfo {
    magic: 0,
    version: 0,
    ncpus: 0,
    mem_bytes: 0,
    cmdline_len: 0,
    pad: 0,
    cmdline: [0; CMDLINE_MAX],
};

/// The monitor's watchdog: run, reload, period and what is left, in ticks.
const WATCHDOG_PORT: u16 = 0x620;
const WATCHDOG_TICK_MS: u32 = 100;

/// 0: wait, 1: run.
static GO: AtomicU32 = AtomicU32::new(0);
/// 1: `exit_after_loops` was reached.
static STOP: AtomicU32 = AtomicU32::new(0);
static mut CONFIG: Config = Config::DEFAULT;

/// # Safety
/// Called once by the PVH entry with the address of an hvm_start_info.
#[unsafe(no_mangle)]
unsafe extern "C" fn pvh_main(start_info: u64) -> ! {
    // SAFETY: the loader's structure (Xen public/arch-x86/hvm/start_info.h, version 1) is identity-mapped;
    // only this vCPU runs.
    unsafe {
        let w = |off: u64| ((start_info + off) as *const u32).read_unaligned();
        let q = |off: u64| ((start_info + off) as *const u64).read_unaligned();
        let info = &mut *core::ptr::addr_of_mut!(PVH_INFO);
        info.magic = BOOT_INFO_MAGIC;
        info.version = BOOT_INFO_VERSION;
        info.ncpus = 1;
        let cmdline = q(24) as *const u8;
        if !cmdline.is_null() {
            while (info.cmdline_len as usize) < CMDLINE_MAX && *cmdline.add(info.cmdline_len as usize) != 0 {
                info.cmdline[info.cmdline_len as usize] = *cmdline.add(info.cmdline_len as usize);
                info.cmdline_len += 1;
            }
        }
        if w(4) >= 1 {
            let (map, n) = (q(40), w(48).min(128));
            for i in 0..u64::from(n) {
                let e = (map + i * 24) as *const u64;
                let (addr, size, typ) = (
                    e.read_unaligned(),
                    e.add(1).read_unaligned(),
                    e.add(2).read_unaligned() as u32,
                );
                if typ == 1 && addr <= LOAD_GPA && addr + size > LOAD_GPA {
                    info.mem_bytes = addr + size;
                }
            }
        }
        pulse_main(0, info)
    }
}

/// # Safety
/// Called once per vCPU, each on its own stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn pulse_main(cpu: u64, info: *const BootInfo) -> ! {
    if cpu == 0 {
        // SAFETY: the page is mapped; it does not change any more.
        first(unsafe { &*info })
    }
    let l = lane(cpu as usize);
    while GO.load(Ordering::Acquire) == 0 {
        cpu::pause();
    }
    // SAFETY: written before GO, never after.
    let config = unsafe { *core::ptr::addr_of!(CONFIG) };
    if cpu >= get!(shared(), ncpus) || config.dirty_pages() == 0 {
        cpu::halt();
    }
    set!(l, running, 1);
    let mut worker = Worker::new(cpu, &config);
    while STOP.load(Ordering::Relaxed) == 0 {
        if !worker.step() {
            cpu::pause();
        }
        if config.exit_after != 0 && worker.loops() >= config.exit_after {
            break;
        }
    }
    set!(l, stopped, 1);
    cpu::halt()
}

fn stop(message: &str) -> ! {
    serial::text("PULSE ERROR ");
    serial::text(message);
    serial::text("\n");
    cpu::halt()
}

fn first(info: &BootInfo) -> ! {
    serial::init();
    if info.magic != BOOT_INFO_MAGIC || info.version != BOOT_INFO_VERSION {
        stop("no boot info (magic PULSEBI1, version 1) at the address in rsi");
    }
    let config = Config::parse(&info.cmdline[..(info.cmdline_len as usize).min(CMDLINE_MAX)]);
    let mut ncpus = u64::from(info.ncpus).clamp(1, MAX_VCPUS as u64);
    if config.vcpus != 0 {
        ncpus = ncpus.min(config.vcpus);
    }
    // SAFETY: fixed, mapped, 8 KiB in .bss; no other vCPU runs before GO.
    unsafe { (SHARED_GPA as *mut u8).write_bytes(0, 0x2000) };
    let s = shared();
    set!(s, version, 1);
    set!(s, ncpus, ncpus);
    set!(
        s,
        tsc_khz,
        if config.tsc_khz != 0 {
            config.tsc_khz
        } else {
            tsc_khz()
        }
    );
    set!(s, start_tsc, cpu::rdtsc());
    set!(s, counter_inv, !0);
    set!(s, content, config.content);
    place_pages(&config, info.mem_bytes, ncpus);

    let devices = pci::scan();
    let net = if config.net {
        devices.net.and_then(|d| Net::new(d, &config))
    } else {
        None
    };
    let disk = if config.disk == DiskMode::Off {
        None
    } else {
        devices.block.and_then(Disk::new)
    };
    if disk.is_none()
        && (config.disk == DiskMode::Verify || matches!(config.looping, Loop::Flush | Loop::DiskBench))
    {
        stop("the command line asks for a disk, and no virtio block device works");
    }
    let mut guest = Guest {
        cpu: SeenCpu::look(),
        config,
        net,
        disk,
        jobs: Jobs::new(&config),
        extras: Extras::new(&config, &devices),
        watchdog: None,
    };
    if config.watchdog_ms != 0 {
        cpu::outl(WATCHDOG_PORT + 4, config.watchdog_ms as u32 / WATCHDOG_TICK_MS);
        cpu::outb(WATCHDOG_PORT, 1);
        guest.watchdog = Some(Every::new(config.watchdog_ms / 4));
    }
    if let Some(d) = &mut guest.disk {
        d.resume();
        guest.jobs.resume(d);
    }
    // SAFETY: no other vCPU reads it before GO.
    unsafe { *core::ptr::addr_of_mut!(CONFIG) = config };
    set!(s, magic, SHARED_MAGIC);
    GO.store(1, Ordering::Release);
    serial::text("pulse 1 ready cpus=");
    serial::number(ncpus);
    if !config.quiet {
        serial::text(" mem=");
        serial::number(info.mem_bytes);
        serial::text(" pages=");
        serial::number(config.dirty_pages());
        serial::text(" devices=");
        serial::hex(get!(s, devices));
        serial::text(" counter=");
        serial::number(get!(s, counter));
        serial::text(" tsc_khz=");
        serial::number(get!(s, tsc_khz));
    }
    serial::text("\n");
    guest.run()
}

/// The assumed TSC rate: what CPUID says (Intel leaf 0x15, the hypervisor's leaf 0x40000010), or 2.5 GHz. It is used for
/// timers only, so a wrong one makes them early or late, not wrong.
fn tsc_khz() -> u64 {
    let sane = |khz: u64| {
        if (100_000..20_000_000).contains(&khz) {
            Some(khz)
        } else {
            None
        }
    };
    if cpu::cpuid(1)[2] >> 31 & 1 == 1 && cpu::cpuid(0x4000_0000)[0] >= 0x4000_0010 {
        if let Some(khz) = sane(u64::from(cpu::cpuid(0x4000_0010)[0])) {
            return khz;
        }
    }
    if cpu::cpuid(0)[0] >= 0x15 {
        let [den, numer, crystal, _] = cpu::cpuid(0x15);
        if den != 0 && numer != 0 && crystal != 0 {
            if let Some(khz) = sane(u64::from(crystal) / 1000 * u64::from(numer) / u64::from(den)) {
                return khz;
            }
        }
    }
    2_500_000
}

/// Whether an address is mapped by the page tables we run on (only present and size bits are looked at).
fn mapped(gpa: u64) -> bool {
    let mut table = cpu::cr3() & !0xfff;
    for level in (0..4).rev() {
        let index = gpa >> (12 + level * 9) & 511;
        // SAFETY: page tables lie in memory that is itself identity-mapped (boot contract).
        let e = unsafe { ((table + index * 8) as *const u64).read_volatile() };
        if e & 1 == 0 {
            return false;
        }
        if level > 0 && level < 3 && e & 0x80 != 0 {
            return true;
        }
        table = e & 0x000f_ffff_ffff_f000;
    }
    true
}

/// Chooses where each vCPU's pages lie, or stops.
fn place_pages(config: &Config, mem_bytes: u64, ncpus: u64) {
    let s = shared();
    let pages = config.dirty_pages();
    if pages == 0 {
        return;
    }
    let low = mem_bytes.min(LOW_RAM_END).saturating_sub(DIRTY_GPA);
    let room = if config.high {
        mem_bytes.saturating_sub(DIRTY_GPA)
    } else {
        low
    };
    let stride = if config.ram_stride {
        room / (ncpus * pages) & !(PAGE - 1)
    } else {
        config.stride
    };
    if stride < PAGE || pages.saturating_mul(stride).saturating_mul(ncpus) > room {
        stop("the pages do not fit into memory (from 16 MiB; below 3 GiB without high=1)");
    }
    set!(s, pages, pages);
    set!(s, stride, stride);
    set!(s, span, pages * stride);
    set!(s, base, DIRTY_GPA);
    if config.high && mem_bytes > LOW_RAM_END {
        set!(s, hole_at, LOW_RAM_END);
        set!(s, hole_bytes, (1 << 32) - LOW_RAM_END);
    }
    // SAFETY: reads our own page.
    let copy = unsafe { s.read_volatile() };
    if !mapped(page_gpa(&copy, ncpus - 1, pages - 1)) {
        stop("the last page to dirty is not mapped: the monitor maps too little for high=1");
    }
}

/// What the guest was told of its CPU at boot. Whatever host it goes on, it is told the same.
struct SeenCpu([u32; 6]);

impl SeenCpu {
    fn look() -> Self {
        let ([a1, _, c1, d1], [_, b7, c7, _]) = (cpu::cpuid(1), cpu::cpuid(7));
        let [model, ..] = cpu::cpuid(0x8000_0002);
        Self([a1, c1, d1, b7, c7, model])
    }

    fn check(&self) {
        let now = Self::look();
        for (i, (want, found)) in self.0.iter().zip(now.0).enumerate() {
            if *want != found {
                fail(error::CPU, i as u64, u64::from(*want), u64::from(found));
            }
        }
    }
}

/// What vCPU 0 owns.
struct Guest {
    config: Config,
    cpu: SeenCpu,
    net: Option<Net>,
    disk: Option<Disk>,
    jobs: Jobs,
    extras: Extras,
    /// When to feed it.
    watchdog: Option<Every>,
}

impl Guest {
    fn run(&mut self) -> ! {
        let s = shared();
        let mut worker = Worker::new(0, &self.config);
        let working = self.config.dirty_pages() > 0;
        set!(lane(0), running, 1);
        let mut polls = 0u64;
        let mut seen_loops = worker.loops();
        loop {
            polls += 1;
            set!(s, polls, polls);
            if let Some(d) = &mut self.disk {
                d.poll();
                self.jobs.step(d);
            }
            if let Some(n) = &mut self.net {
                n.poll(&mut self.disk);
                if self.jobs.take_report() {
                    n.report();
                }
            }
            if polls & 15 == 0 {
                self.extras.poll();
                if self.watchdog.as_mut().is_some_and(|w| w.due(cpu::rdtsc())) {
                    cpu::outb(WATCHDOG_PORT + 1, 1);
                }
            }
            if polls & 1023 == 0 {
                self.cpu.check();
                errors();
            }
            if !working || !worker.step() {
                cpu::pause();
            }
            let loops = if working { worker.loops() } else { polls };
            if loops != seen_loops {
                seen_loops = loops;
                if self.config.e9 {
                    serial::debug_byte(b'.');
                }
                if self.config.exit_after != 0 && loops >= self.config.exit_after {
                    self.finish(working)
                }
            }
        }
    }

    /// The orderly stop: waits (bounded) for the other vCPUs and the disk, reports, halts.
    fn finish(&mut self, working: bool) -> ! {
        let deadline = cpu::rdtsc().wrapping_add(ticks(60_000));
        if working {
            for cpu in 1..get!(shared(), ncpus) as usize {
                while get!(lane(cpu), stopped) == 0 && cpu::rdtsc() < deadline {
                    cpu::pause();
                }
            }
        }
        STOP.store(1, Ordering::Relaxed);
        if let Some(d) = &mut self.disk {
            d.drain();
        }
        errors();
        set!(shared(), done, 1);
        serial::text("pulse done\n");
        cpu::halt()
    }
}
