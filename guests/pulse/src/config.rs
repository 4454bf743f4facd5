//! The guest's command line as a builder. Every key the guest knows has a method; the guest refuses unknown ones.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

/// `loop=`: what vCPU 0 does besides answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// Polls, with `pause` between.
    Idle,
    /// Dirties memory (so do all other vCPUs).
    Dirty,
    /// Small write, flush, and again.
    Flush,
    /// Disk throughput, see [`Config::disk_bench`].
    DiskBench,
}

/// `content=`: how a page changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Its first word, checked before it is changed.
    Word,
    /// Its first word, not checked: the cheapest loop.
    Unchecked,
    /// All of it, pseudo-random.
    Random,
    /// All of it, words of text.
    Text,
}

/// `disk=`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskMode {
    /// Not touched.
    Off,
    /// The counter's block only (the default).
    Counter,
    /// Also a ring of 4 KiB blocks, written and read back all the time.
    Verify,
}

/// `op=` of the disk benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
}

/// Builds a command line; `to_string()` gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    words: Vec<(&'static str, String)>,
}

impl Config {
    /// All defaults: idle, answering UDP and TCP as 10.0.0.2, counter on the disk if there is one.
    pub fn new() -> Self {
        Self::default()
    }

    fn set(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.words.retain(|(k, _)| *k != key);
        self.words.push((key, value.to_string()));
        self
    }

    /// What vCPU 0 does.
    pub fn looping(self, l: Loop) -> Self {
        let v = match l {
            Loop::Idle => "idle",
            Loop::Dirty => "dirty",
            Loop::Flush => "flush",
            Loop::DiskBench => "diskbench",
        };
        self.set("loop", v)
    }

    /// Dirties `pages` pages per vCPU and loop (also beside another kind of loop, if called after it with that kind set).
    pub fn dirty(self, pages: u64) -> Self {
        self.looping(Loop::Dirty).pages(pages)
    }

    /// Pages in each vCPU's range; 0: none.
    pub fn pages(self, pages: u64) -> Self {
        self.set("pages", pages)
    }

    /// Bytes from one page to the next, a multiple of 4096.
    pub fn stride(self, bytes: u64) -> Self {
        self.set("stride", bytes)
    }

    /// Spreads the pages evenly over all memory below 3 GiB.
    pub fn ram_stride(self) -> Self {
        self.set("ram_stride", 1)
    }

    /// Uses memory above 4 GiB too (it must be mapped, see the boot contract).
    pub fn high(self) -> Self {
        self.set("high", 1)
    }

    /// Pages between two polls of the devices.
    pub fn chunk(self, pages: u64) -> Self {
        self.set("chunk", pages)
    }

    /// How pages change.
    pub fn content(self, c: Content) -> Self {
        match c {
            Content::Word => self.set("content", "word"),
            Content::Random => self.set("content", "random"),
            Content::Text => self.set("content", "text"),
            Content::Unchecked => self.set("content", "word").set("check", 0),
        }
    }

    /// At most this many loops per second and vCPU; 0: no limit.
    pub fn rate(self, loops_per_second: u64) -> Self {
        self.set("rate", loops_per_second)
    }

    /// Use at most this many of the vCPUs.
    pub fn vcpus(self, n: u64) -> Self {
        self.set("vcpus", n)
    }

    /// Print `pulse done` and halt after this many loops (of polls, if no pages are dirtied).
    pub fn exit_after_loops(self, loops: u64) -> Self {
        self.set("exit_after_loops", loops)
    }

    /// One byte to port 0xe9 per loop of vCPU 0.
    pub fn e9(self) -> Self {
        self.set("e9", 1)
    }

    /// A banner without details.
    pub fn quiet(self) -> Self {
        self.set("quiet", 1)
    }

    /// Whether to use the network device, UDP, TCP.
    pub fn network(self, net: bool, udp: bool, tcp: bool) -> Self {
        self.set("net", u8::from(net))
            .set("udp", u8::from(udp))
            .set("tcp", u8::from(tcp))
    }

    /// The guest's address.
    pub fn ip(self, ip: Ipv4Addr) -> Self {
        self.set("ip", ip)
    }

    /// Where `loop=flush` reports every 100 flushes.
    pub fn collector(self, to: SocketAddrV4) -> Self {
        self.set("collector", to)
    }

    /// What the disk is used for.
    pub fn disk(self, m: DiskMode) -> Self {
        let v = match m {
            DiskMode::Off => "0",
            DiskMode::Counter => "1",
            DiskMode::Verify => "verify",
        };
        self.set("disk", v)
    }

    /// Blocks in the ring of [`DiskMode::Verify`], 2 to 1024.
    pub fn ring(self, blocks: u64) -> Self {
        self.set("ring", blocks)
    }

    /// The disk benchmark: operation, bytes per request (512 to 1 MiB), requests in flight (1 to 60, and at most 8 MiB).
    pub fn disk_bench(self, op: DiskOp, bytes: u64, depth: u64) -> Self {
        let v = match op {
            DiskOp::Read => "read",
            DiskOp::Write => "write",
            DiskOp::RandRead => "randread",
            DiskOp::RandWrite => "randwrite",
        };
        self.looping(Loop::DiskBench)
            .set("op", v)
            .set("bs", bytes)
            .set("qd", depth)
    }

    /// The TSC's rate, for timers (otherwise from CPUID, or assumed to be 2.5 GHz).
    pub fn tsc_khz(self, khz: u64) -> Self {
        self.set("tsc_khz", khz)
    }

    /// The watchdog's period in milliseconds; 0: not used.
    pub fn watchdog(self, ms: u64) -> Self {
        self.set("watchdog", ms)
    }

    /// Milliseconds between exchanges with rng, console, vsock and balloon; 0: leave the device alone.
    pub fn extras(self, rng: u64, console: u64, vsock: u64, balloon: u64) -> Self {
        self.set("rng", rng)
            .set("console", console)
            .set("vsock", vsock)
            .set("balloon", balloon)
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (k, v)) in self.words.iter().enumerate() {
            write!(f, "{}{k}={v}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}
