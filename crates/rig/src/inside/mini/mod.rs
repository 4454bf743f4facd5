//! The mini guest: a small Linux under our monitor that watches itself while it is saved, restored and moved.
//!
//! Told by words on its kernel command line (all but the first may be missing):
//!
//! | word | meaning |
//! |---|---|
//! | `rig.mini` | be the mini guest |
//! | `mini.ip=10.90.0.101/24` | the address of the first NIC |
//! | `mini.mem=64` | check so many MiB of memory, all the time |
//! | `mini.mem_rate=2000` | rewrite so many pages a second (0: as fast as it goes) |
//! | `mini.disk=vda` | check this disk, all the time (its contents are lost, except those of an earlier mini guest) |
//! | `mini.disk_mib=64` | so many MiB of it |
//! | `mini.disk_rate=200` | so many reads and writes a second (0: as fast as it goes) |
//! | `mini.tick_ms=100` | a counted line on the console so often (0: none) |
//! | `mini.clock_ms=5` | look at the clocks so often |
//! | `mini.watchdog=10` | starts the watchdog with so many seconds, and feeds it |
//! | `mini.hvc` | the counted line on /dev/hvc0 too |
//! | `mini.root=vda` | run the service on this disk (see [`service`]) |
//!
//! | port | service |
//! |---|---|
//! | TCP 7, UDP 7, vsock 7 | echo |
//! | vsock 9999 | an agent that runs commands: see [`agent`] |
//! | TCP 8 | for each line: `COUNT <over all connections> <in this connection>` |
//! | TCP 9 | one line of JSON, [`Status`] |
//! | TCP 10 | a command a line, answered by `ok` or `error ...`: see [`control`] |
//! | TCP 11 | bytes in bulk: see [`bench`] |
//!
//! Invariant: what it has found wrong stays in [`Status::faults`] and was printed on the console as a line `CORRUPT ...` or
//! `JUMP ...`; a test that sees neither may believe that all is well, as far as it went.

pub mod agent;
pub mod bench;
pub mod clock;
pub mod control;
pub mod disk;
pub mod memory;
pub mod service;
pub mod services;
pub mod vsock;
pub mod watchdog;

use super::{modules, server, sys};
use crate::link::mux::lock;
use crate::netif;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The word on the kernel command line that makes this program the mini guest.
pub const WORD: &str = "rig.mini";
/// Modules of the mini guest's initramfs.
pub const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "pvpanic_pci",
    "pvpanic_mmio",
    "wdat_wdt",
    "button",
    "evdev",
];

/// What the mini guest knows about itself: the answer of TCP port 9.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Milliseconds since it started, by its monotonic clock.
    pub uptime_ms: u64,
    /// Its wall clock, milliseconds since 1970.
    pub wall_ms: u64,
    /// Lines written to the console.
    pub ticks: u64,
    /// Pages of memory under check.
    pub memory_pages: u64,
    /// Pages checked, since the start.
    pub memory_checked: u64,
    /// Disk blocks written.
    pub disk_writes: u64,
    /// Disk blocks read and compared.
    pub disk_reads: u64,
    /// Disk flushes done.
    pub disk_flushes: u64,
    /// Lines counted by TCP port 8.
    pub count: u64,
    /// Times that a clock went back, or the wall clock and the monotonic clock moved apart by more than 5 ms.
    pub clock_jumps: u64,
    /// The longest time between two looks at the clock (every 5 ms) since the last `reset_gap`, in microseconds.
    pub gap_max_us: u64,
    /// How often the agent restarted the service.
    #[serde(default)]
    pub service_restarts: u64,
    /// Everything found wrong, the first 16.
    pub faults: Vec<String>,
}

/// The guest's state, shared by its threads.
#[derive(Debug, Default)]
pub struct Guest {
    pub(crate) ticks: AtomicU64,
    pub(crate) tick_ms: AtomicU64,
    pub(crate) memory_pages: AtomicU64,
    pub(crate) memory_rate: AtomicU64,
    pub(crate) memory_checked: AtomicU64,
    pub(crate) disk_rate: AtomicU64,
    pub(crate) disk_writes: AtomicU64,
    pub(crate) disk_reads: AtomicU64,
    pub(crate) disk_flushes: AtomicU64,
    pub(crate) count: AtomicU64,
    pub(crate) clock_jumps: AtomicU64,
    pub(crate) gap_max_us: AtomicU64,
    pub(crate) service_ill: AtomicBool,
    pub(crate) service_restarts: AtomicU64,
    pub(crate) faults: Mutex<Vec<String>>,
    /// It is on its way down: the kernel takes its devices away, and what they say from now on is no fault.
    pub(crate) ending: AtomicBool,
}

impl Guest {
    /// Writes a line on the console, as one write.
    pub(crate) fn say(&self, line: &str) {
        if let Ok(mut console) = std::fs::OpenOptions::new().write(true).open("/dev/console") {
            // A console that takes nothing is the monitor's matter, and a test sees the missing line.
            let _ = console.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// Something is wrong: kept, and printed.
    pub(crate) fn fault(&self, text: String) {
        self.say(&text);
        let mut faults = lock(&self.faults);
        if faults.len() < 16 {
            faults.push(text);
        }
    }

    /// Ends the machine in order.
    pub(crate) fn power_off(&self) {
        self.ending.store(true, Ordering::Release);
        sys::power_off();
    }

    /// Starts the machine anew.
    pub(crate) fn restart(&self) {
        self.ending.store(true, Ordering::Release);
        sys::restart_machine();
    }

    /// The state as it is now.
    pub fn status(&self) -> Status {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Status {
            uptime_ms: clock::read(libc::CLOCK_MONOTONIC) / 1_000_000,
            wall_ms: clock::read(libc::CLOCK_REALTIME) / 1_000_000,
            ticks: get(&self.ticks),
            memory_pages: get(&self.memory_pages),
            memory_checked: get(&self.memory_checked),
            disk_writes: get(&self.disk_writes),
            disk_reads: get(&self.disk_reads),
            disk_flushes: get(&self.disk_flushes),
            count: get(&self.count),
            clock_jumps: get(&self.clock_jumps),
            gap_max_us: get(&self.gap_max_us),
            service_restarts: get(&self.service_restarts),
            faults: lock(&self.faults).clone(),
        }
    }
}

/// The words of the kernel command line.
#[derive(Debug, Default)]
pub struct Words(Vec<(String, String)>);

impl Words {
    /// Takes a command line apart.
    pub fn parse(line: &str) -> Words {
        let pair = |word: &str| match word.split_once('=') {
            Some((name, value)) => (name.to_string(), value.to_string()),
            None => (word.to_string(), String::new()),
        };
        Words(line.split_whitespace().map(pair).collect())
    }

    /// The value of a word (empty for a word without `=`).
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, value)| value.as_str())
    }

    /// The value as a number, or `default`.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        self.get(name)
            .and_then(|value| value.parse().ok())
            .unwrap_or(default)
    }
}

/// Gives the first NIC its address.
fn network(address: &str) -> Result<(), String> {
    let (ip, prefix) = address.split_once('/').unwrap_or((address, "24"));
    let ip: Ipv4Addr = ip.parse().map_err(|e| format!("mini.ip={address}: {e}"))?;
    let prefix: u8 = prefix.parse().map_err(|e| format!("mini.ip={address}: {e}"))?;
    let entries = std::fs::read_dir("/sys/class/net").map_err(|e| e.to_string())?;
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.retain(|name| name != "lo");
    names.sort();
    let name = names.first().ok_or("there is no NIC")?;
    netif::set_address(name, ip, prefix)
        .and_then(|()| netif::up(name))
        .map_err(|e| format!("{name}: {e}"))
}

/// Process 1 of the mini guest. Never returns.
pub fn run() -> ! {
    let mut troubles = Vec::new();
    if let Err(e) = server::early_mounts() {
        troubles.push(format!("early mounts: {e}"));
    }
    let words = Words::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default());
    troubles.extend(modules::load(MODULES));
    if let Err(e) = netif::up("lo") {
        troubles.push(format!("lo: {e}"));
    }
    if let Some(address) = words.get("mini.ip")
        && let Err(e) = network(address)
    {
        troubles.push(format!("network: {e}"));
    }
    let guest: &'static Guest = Box::leak(Box::default());
    for trouble in troubles {
        guest.fault(format!("TROUBLE {trouble}"));
    }
    guest
        .tick_ms
        .store(words.number("mini.tick_ms", 100), Ordering::Relaxed);
    guest
        .memory_rate
        .store(words.number("mini.mem_rate", 2000), Ordering::Relaxed);
    guest
        .disk_rate
        .store(words.number("mini.disk_rate", 200), Ordering::Relaxed);
    let start = |name: &str, job: Box<dyn FnOnce() + Send>| {
        if let Err(e) = std::thread::Builder::new().name(name.to_string()).spawn(job) {
            guest.fault(format!("TROUBLE thread {name}: {e}"));
        }
    };
    services::start(guest, &start);
    let clock_every = Duration::from_millis(words.number("mini.clock_ms", 5).max(1));
    start("clock", Box::new(move || clock::watch(guest, clock_every)));
    let watchdog_s = words.number("mini.watchdog", 0);
    if watchdog_s > 0 {
        start("watchdog", Box::new(move || watchdog::feed(guest, watchdog_s)));
    }
    let memory_mib = words.number("mini.mem", 0);
    if memory_mib > 0 {
        start("memory", Box::new(move || memory::check(guest, memory_mib)));
    }
    if let Some(disk) = words.get("mini.disk").map(str::to_string) {
        let mib = words.number("mini.disk_mib", 64);
        start("disk", Box::new(move || disk::check(guest, &disk, mib)));
    }
    if let Some(disk) = words.get("mini.root").map(str::to_string) {
        start("service", Box::new(move || service::run(guest, &disk)));
    }
    guest.say(&format!("READY {} ms", sys::uptime_ms()));
    let hvc = words.get("mini.hvc").is_some();
    tick(guest, hvc)
}

/// The console counter: `TICK n monotonic_ms wall_ms`. A reader sees a byte lost, repeated or out of order.
fn tick(guest: &'static Guest, hvc: bool) -> ! {
    let mut second = if hvc {
        std::fs::OpenOptions::new().write(true).open("/dev/hvc0").ok()
    } else {
        None
    };
    loop {
        let tick_ms = guest.tick_ms.load(Ordering::Relaxed);
        if tick_ms == 0 {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        let number = guest.ticks.fetch_add(1, Ordering::Relaxed) + 1;
        let (mono, wall) = (
            clock::read(libc::CLOCK_MONOTONIC),
            clock::read(libc::CLOCK_REALTIME),
        );
        let line = format!("TICK {number} {} {}", mono / 1_000_000, wall / 1_000_000);
        guest.say(&line);
        if let Some(console) = &mut second {
            // As above.
            let _ = console.write_all(format!("{line}\n").as_bytes());
        }
        std::thread::sleep(Duration::from_millis(tick_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command_line() {
        let words = Words::parse("quiet rig.mini mini.ip=10.0.0.1/24 mini.mem=32 mini.disk_rate=fast");
        assert_eq!(words.get(WORD), Some(""));
        assert_eq!(words.get("mini.ip"), Some("10.0.0.1/24"));
        assert_eq!(
            (words.number("mini.mem", 1), words.number("mini.disk_rate", 7)),
            (32, 7)
        );
        assert_eq!(words.get("mini"), None);
    }
}
