//! The command line: `key=value` words. An unknown key or a bad value stops the guest with a message.

use crate::shared::content;
use crate::{cpu, serial};

/// What vCPU 0 does besides answering.
#[derive(Clone, Copy, PartialEq)]
pub enum Loop {
    Idle,
    Dirty,
    Flush,
    DiskBench,
}

/// `disk=`
#[derive(Clone, Copy, PartialEq)]
pub enum DiskMode {
    Off,
    Counter,
    Verify,
}

/// `op=` of the disk benchmark.
#[derive(Clone, Copy, PartialEq)]
pub enum Op {
    Read,
    Write,
    RandRead,
    RandWrite,
}

#[derive(Clone, Copy)]
pub struct Config {
    pub looping: Loop,
    pub pages: Option<u64>,
    pub stride: u64,
    pub ram_stride: bool,
    pub high: bool,
    pub chunk: u64,
    pub content: u64,
    pub rate: u64,
    pub vcpus: u64,
    pub exit_after: u64,
    pub e9: bool,
    pub quiet: bool,
    pub net: bool,
    pub udp: bool,
    pub tcp: bool,
    pub ip: u32,
    pub collector: (u32, u16),
    pub disk: DiskMode,
    pub ring: u64,
    pub bs: u64,
    pub op: Op,
    pub qd: u64,
    pub tsc_khz: u64,
    pub rng_ms: u64,
    pub console_ms: u64,
    pub vsock_ms: u64,
    pub balloon_ms: u64,
    pub watchdog_ms: u64,
}

impl Config {
    pub const DEFAULT: Config = Config {
        looping: Loop::Idle,
        pages: None,
        stride: 4096,
        ram_stride: false,
        high: false,
        chunk: 256,
        content: content::WORD,
        rate: 0,
        vcpus: 0,
        exit_after: 0,
        e9: false,
        quiet: false,
        net: true,
        udp: true,
        tcp: true,
        ip: 0x0a00_0002,
        collector: (0, 0),
        disk: DiskMode::Counter,
        ring: 64,
        bs: 4096,
        op: Op::Read,
        qd: 1,
        tsc_khz: 0,
        rng_ms: 1000,
        console_ms: 1000,
        vsock_ms: 1000,
        balloon_ms: 100,
        watchdog_ms: 0,
    };

    /// Parses or halts.
    pub fn parse(line: &[u8]) -> Config {
        let mut c = Self::DEFAULT;
        for word in line.split(|b| *b == b' ' || *b == 0) {
            if !word.is_empty() && !c.word(word) {
                serial::text("PULSE ERROR bad word on the command line: ");
                serial::bytes(word);
                serial::text("\n");
                cpu::halt();
            }
        }
        c
    }

    fn word(&mut self, word: &[u8]) -> bool {
        let Some(eq) = word.iter().position(|b| *b == b'=') else {
            return false;
        };
        let (key, v) = (&word[..eq], &word[eq + 1..]);
        match key {
            b"loop" => match v {
                b"idle" => set(&mut self.looping, Some(Loop::Idle)),
                b"dirty" => set(&mut self.looping, Some(Loop::Dirty)),
                b"flush" => set(&mut self.looping, Some(Loop::Flush)),
                b"diskbench" => set(&mut self.looping, Some(Loop::DiskBench)),
                _ => false,
            },
            b"op" => match v {
                b"read" => set(&mut self.op, Some(Op::Read)),
                b"write" => set(&mut self.op, Some(Op::Write)),
                b"randread" => set(&mut self.op, Some(Op::RandRead)),
                b"randwrite" => set(&mut self.op, Some(Op::RandWrite)),
                _ => false,
            },
            b"content" => match v {
                b"word" => set(&mut self.content, Some(content::WORD)),
                b"random" => set(&mut self.content, Some(content::RANDOM)),
                b"text" => set(&mut self.content, Some(content::TEXT)),
                _ => false,
            },
            b"disk" => match v {
                b"0" => set(&mut self.disk, Some(DiskMode::Off)),
                b"1" => set(&mut self.disk, Some(DiskMode::Counter)),
                b"verify" => set(&mut self.disk, Some(DiskMode::Verify)),
                _ => false,
            },
            b"pages" => match num(v, 0, 1 << 23) {
                Some(n) => set(&mut self.pages, Some(Some(n))),
                None => false,
            },
            b"stride" => set(&mut self.stride, num(v, 4096, 1 << 30).filter(|s| s % 4096 == 0)),
            b"ram_stride" => set(&mut self.ram_stride, flag(v)),
            b"high" => set(&mut self.high, flag(v)),
            b"chunk" => set(&mut self.chunk, num(v, 1, 1 << 20)),
            b"check" => match flag(v) {
                Some(false) if self.content == content::WORD => {
                    set(&mut self.content, Some(content::UNCHECKED))
                }
                Some(true) => true,
                _ => false,
            },
            b"rate" => set(&mut self.rate, num(v, 0, 1_000_000)),
            b"vcpus" => set(&mut self.vcpus, num(v, 1, 64)),
            b"exit_after_loops" => set(&mut self.exit_after, num(v, 0, 1 << 39)),
            b"e9" => set(&mut self.e9, flag(v)),
            b"quiet" => set(&mut self.quiet, flag(v)),
            b"net" => set(&mut self.net, flag(v)),
            b"udp" => set(&mut self.udp, flag(v)),
            b"tcp" => set(&mut self.tcp, flag(v)),
            b"ip" => set(&mut self.ip, ipv4(v)),
            b"collector" => {
                let Some(colon) = v.iter().position(|b| *b == b':') else {
                    return false;
                };
                match (ipv4(&v[..colon]), num(&v[colon + 1..], 1, 65535)) {
                    (Some(ip), Some(port)) => set(&mut self.collector, Some((ip, port as u16))),
                    _ => false,
                }
            }
            b"ring" => set(&mut self.ring, num(v, 2, crate::shared::RING_MAX as u64)),
            b"bs" => set(&mut self.bs, num(v, 512, 1 << 20).filter(|b| b % 512 == 0)),
            b"qd" => set(&mut self.qd, num(v, 1, 60)),
            b"tsc_khz" => set(&mut self.tsc_khz, num(v, 1000, 100_000_000)),
            b"rng" => set(&mut self.rng_ms, num(v, 0, 1 << 20)),
            b"console" => set(&mut self.console_ms, num(v, 0, 1 << 20)),
            b"vsock" => set(&mut self.vsock_ms, num(v, 0, 1 << 20)),
            b"balloon" => set(&mut self.balloon_ms, num(v, 0, 1 << 20)),
            b"watchdog" => set(&mut self.watchdog_ms, num(v, 0, 1 << 20)),
            _ => false,
        }
    }

    /// Pages in each vCPU's range.
    pub fn dirty_pages(&self) -> u64 {
        self.pages
            .unwrap_or(if self.looping == Loop::Dirty { 100 } else { 0 })
    }
}

fn set<T>(to: &mut T, v: Option<T>) -> bool {
    match v {
        Some(v) => {
            *to = v;
            true
        }
        None => false,
    }
}

fn flag(v: &[u8]) -> Option<bool> {
    match v {
        b"0" => Some(false),
        b"1" => Some(true),
        _ => None,
    }
}

fn num(v: &[u8], min: u64, max: u64) -> Option<u64> {
    if v.is_empty() || v.len() > 15 {
        return None;
    }
    let mut n = 0u64;
    for b in v {
        if !b.is_ascii_digit() {
            return None;
        }
        n = n * 10 + u64::from(b - b'0');
    }
    if n < min || n > max { None } else { Some(n) }
}

fn ipv4(v: &[u8]) -> Option<u32> {
    let mut ip = 0u32;
    let mut parts = 0;
    for part in v.split(|b| *b == b'.') {
        ip = ip << 8 | num(part, 0, 255)? as u32;
        parts += 1;
    }
    if parts == 4 { Some(ip) } else { None }
}
