//! What a VM may use of its host, as operators write it.

use super::Controller;
use crate::control::NetRate;

/// Less than this is no rate to speak with anybody: one large frame takes seconds.
const NET_RATE_MIN: u64 = 16 << 10;

/// Most CPU time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMax {
    /// All.
    Unlimited,
    /// Percent of one core: 150 is one and a half.
    Percent(u32),
}

/// Most memory, guest RAM and monitor together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMax {
    /// All of the host's.
    Unlimited,
    /// Bytes.
    Bytes(u64),
}

/// Most I/O per second on each disk that holds an image; none: unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoMax {
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Requests to read.
    pub read_ops: Option<u64>,
    /// Requests to write.
    pub write_ops: Option<u64>,
}

/// Limits to set; none leaves what is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Share when CPUs are short, 1 to 10000; 100 is what every other group has.
    pub cpu_weight: Option<u32>,
    /// Most CPU time.
    pub cpu_max: Option<CpuMax>,
    /// Most memory: beyond it the VM's process is ended, rather than the host's.
    pub memory_max: Option<MemoryMax>,
    /// Most I/O.
    pub io_max: Option<IoMax>,
}

/// What a monitor may need beside guest RAM: its own memory, KVM's page tables, page cache in flight, and, while
/// a reset builds the next machine, a kernel and initrd.
#[must_use]
pub fn memory_for(ram_bytes: u64) -> MemoryMax {
    MemoryMax::Bytes(ram_bytes.saturating_add(ram_bytes / 16).saturating_add(512 << 20))
}

impl Limits {
    /// Controllers that are needed.
    pub(super) fn controllers(&self) -> Vec<Controller> {
        let mut needed = Vec::new();
        if self.cpu_weight.is_some() || self.cpu_max.is_some() {
            needed.push(Controller::Cpu);
        }
        if self.memory_max.is_some() {
            needed.push(Controller::Memory);
        }
        if self.io_max.is_some() {
            needed.push(Controller::Io);
        }
        needed
    }

    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Reads a CPU weight.
///
/// # Errors
/// What would be right.
pub fn parse_weight(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|w| (1..=10_000).contains(w))
        .ok_or_else(|| format!("{text:?} is no weight; use 1 to 10000, 100 is normal"))
}

/// Reads `150%` (percent of one core) or `max`.
///
/// # Errors
/// What would be right.
pub fn parse_cpu_max(text: &str) -> Result<CpuMax, String> {
    if text == "max" {
        return Ok(CpuMax::Unlimited);
    }
    text.strip_suffix('%')
        .and_then(|n| n.parse().ok())
        .filter(|p| (1..=102_400).contains(p))
        .map(CpuMax::Percent)
        .ok_or_else(|| format!("{text:?} is no CPU maximum; write percent of one core, as 150%, or max"))
}

/// Reads a size or `max`.
///
/// # Errors
/// What would be right.
pub fn parse_memory_max(text: &str) -> Result<MemoryMax, String> {
    match text {
        "max" => Ok(MemoryMax::Unlimited),
        _ => crate::spec::parse_size(text).map(MemoryMax::Bytes),
    }
}

/// Reads `read=SIZE,write=SIZE,read-ops=N,write-ops=N`, each optional (per second), or `max`.
///
/// # Errors
/// What would be right.
pub fn parse_io_max(text: &str) -> Result<IoMax, String> {
    let mut io = IoMax::default();
    if text == "max" {
        return Ok(io);
    }
    for part in text.split(',') {
        let (to, is_size, value) = match part.split_once('=') {
            Some(("read", v)) => (&mut io.read_bytes, true, v),
            Some(("write", v)) => (&mut io.write_bytes, true, v),
            Some(("read-ops", v)) => (&mut io.read_ops, false, v),
            Some(("write-ops", v)) => (&mut io.write_ops, false, v),
            _ => {
                return Err(format!(
                    "{part:?} is no I/O limit; known: read=SIZE, write=SIZE, read-ops=N, write-ops=N (per second), or max"
                ));
            }
        };
        let number = if is_size {
            crate::spec::parse_size(value)?
        } else {
            value.parse().map_err(|_| format!("{value:?} is no number"))?
        };
        if number == 0 {
            return Err(format!("{part}: a limit of nothing would hang the VM's disks"));
        }
        *to = Some(number);
    }
    Ok(io)
}

/// Reads what a network card carries at most: `in=SIZE,out=SIZE` a second, each optional, or `max`.
///
/// # Errors
/// What would be right.
pub fn parse_net_max(text: &str) -> Result<NetRate, String> {
    let mut rate = NetRate::default();
    if text == "max" {
        return Ok(rate);
    }
    for part in text.split(',') {
        let (to, value) = match part.split_once('=') {
            Some(("in", v)) => (&mut rate.in_bytes_per_s, v),
            Some(("out", v)) => (&mut rate.out_bytes_per_s, v),
            _ => {
                return Err(format!(
                    "{part:?} is no network limit; known: in=SIZE, out=SIZE (bytes per second), or max"
                ));
            }
        };
        *to = crate::spec::parse_size(value)?;
        if *to < NET_RATE_MIN {
            return Err(format!(
                "{part}: less than {NET_RATE_MIN} bytes a second carries nothing in time"
            ));
        }
    }
    Ok(rate)
}
