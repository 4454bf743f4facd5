//! What VMs and their host use, measured, for placement and balancing: rates from counters, smoothed (`cluster::smooth`).
//!
//! | of | read |
//! |---|---|
//! | a VM's CPU, memory | its process: `/proc/PID/stat`, `statm`; the engine of a protected VM is part of it |
//! | a VM's dirty rate, network | what its process says: pages that were captured, bytes of its cards |
//! | the host's CPU, memory | `/proc/stat`, `/proc/meminfo` |
//! | the host's network | `/sys/class/net/*/statistics` of cards with a device, the busier direction; only where the record says how fast its link is |

use crate::measure;
use crate::procs;
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use steadfast_cluster::model::{BalanceSettings, HostLoad, HostRecord, VmLoad};
use steadfast_cluster::smooth::{HostSmoother, VmSmoother};
use steadfast_types::{PAGE_SIZE, VmId};

const HALF_LIFE_MS: u64 = 30_000;
/// One tick of `/proc`.
const TICK_MILLI_MS: u64 = 10_000;

/// Counters, all growing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    ticks: u64,
    dirty_bytes: u64,
    net_bytes: u64,
}

/// Counters as rates per second; the first sample has none.
#[derive(Debug, Default)]
struct Rates {
    last: Option<(Instant, Counters)>,
}

impl Rates {
    /// What grew since the last sample, per second; CPU in thousandths of one.
    fn sample(&mut self, now: Instant, counters: Counters) -> Option<Counters> {
        let (at, before) = self.last.replace((now, counters))?;
        let ms = now.saturating_duration_since(at).as_millis().max(1) as u64;
        // A counter that went back is another process's.
        let grew = |f: fn(Counters) -> u64| f(counters).checked_sub(f(before));
        Some(Counters {
            ticks: grew(|c| c.ticks)?.saturating_mul(TICK_MILLI_MS) / ms,
            dirty_bytes: grew(|c| c.dirty_bytes)?.saturating_mul(1000) / ms,
            net_bytes: grew(|c| c.net_bytes)?.saturating_mul(1000) / ms,
        })
    }
}

struct Watched {
    pid: u32,
    began: Instant,
    rates: Rates,
    smooth: VmSmoother,
    mean: VmLoad,
}

/// Of the VMs of this host.
#[derive(Default)]
pub struct VmLoads(Mutex<HashMap<VmId, Watched>>);

impl VmLoads {
    /// Takes what the process of a VM says of itself; its load, smoothed.
    pub fn sample(&self, vm: &VmId, pid: u32, status: &Value, now: Instant) -> VmLoad {
        let of_cards = |name: &str| -> u64 {
            let cards = status["nics"].as_array().into_iter().flatten();
            cards.filter_map(|n| n[name].as_u64()).sum()
        };
        let counters = Counters {
            ticks: procs::cpu_ticks(pid),
            dirty_bytes: status["pages"].as_u64().unwrap_or(0).saturating_mul(PAGE_SIZE),
            net_bytes: of_cards("tx_bytes").saturating_add(of_cards("rx_bytes")),
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Watched {
            pid,
            began: now,
            rates: Rates::default(),
            smooth: VmSmoother::new(HALF_LIFE_MS),
            mean: VmLoad::default(),
        };
        let watched = all.entry(vm.clone()).or_insert_with(new);
        if watched.pid != pid {
            *watched = new();
        }
        if let Some(rates) = watched.rates.sample(now, counters) {
            let load = VmLoad {
                cpu_milli: rates.ticks,
                memory_bytes: resident(pid),
                dirty_bytes_per_s: rates.dirty_bytes,
                net_bytes_per_s: rates.net_bytes,
            };
            let ms = now.saturating_duration_since(watched.began).as_millis() as u64;
            watched.mean = watched.smooth.sample(ms, &load);
        }
        watched.mean
    }

    /// Only these are left.
    pub fn keep(&self, wanted: impl Fn(&VmId) -> bool) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|vm, _| wanted(vm));
    }
}

/// What a process has of memory, the guest's part included.
fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|f| f.parse::<u64>().ok());
    pages.unwrap_or(0).saturating_mul(PAGE_SIZE)
}

/// Of this host.
pub struct Load {
    rates: Rates,
    smooth: HostSmoother,
    mean: HostLoad,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            rates: Rates::default(),
            smooth: HostSmoother::new(HALF_LIFE_MS),
            mean: HostLoad::default(),
        }
    }
}

impl Load {
    /// Now. `wall_ms`: pool time. Without its record, and the balancer's settings, a host is never hot.
    pub fn sample(
        &mut self,
        now: Instant,
        wall_ms: u64,
        of: Option<(&HostRecord, &BalanceSettings)>,
    ) -> HostLoad {
        let counters = Counters {
            ticks: measure::busy_ticks().unwrap_or(0),
            dirty_bytes: 0,
            net_bytes: match of {
                Some((record, _)) if record.link_bytes_per_s > 0 => traffic(Path::new("/sys/class/net")),
                _ => 0,
            },
        };
        let memory_bytes = measure::memory().map_or(0, |(total, free)| total.saturating_sub(free));
        if let Some(rates) = self.rates.sample(now, counters) {
            let load = HostLoad {
                cpu_milli: rates.ticks,
                memory_bytes,
                net_bytes_per_s: rates.net_bytes,
                hot_since_ms: None,
            };
            self.mean = match of {
                Some((record, settings)) => self.smooth.sample(wall_ms, &load, record, settings),
                None => load,
            };
        }
        self.mean
    }
}

/// Cards that are no mere software.
fn real(cards: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(cards).into_iter().flatten().flatten();
    all.map(|e| e.path())
        .filter(|p| p.join("device").exists())
        .collect()
}

/// What all cards whose traffic counts carry together, bytes a second; zero where none says how fast its link is (virtual ones do not).
pub(crate) fn speed(cards: &Path) -> u64 {
    const MBIT: u64 = 125_000;
    let of = |p: &PathBuf| {
        let text = fs::read_to_string(p.join("speed")).ok()?;
        // -1: it has no link, or does not know.
        text.trim().parse::<u64>().ok()
    };
    real(cards)
        .iter()
        .filter_map(of)
        .fold(0_u64, |sum, mbit| sum.saturating_add(mbit.saturating_mul(MBIT)))
}

/// Bytes of all cards that are no mere software, in the busier direction: what goes through a bridge or a TAP goes through one of them
/// too, or stays here.
fn traffic(cards: &Path) -> u64 {
    let real = real(cards);
    let way = |file: &str| {
        let bytes = |p: &PathBuf| {
            let text = fs::read_to_string(p.join("statistics").join(file)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        real.iter().filter_map(bytes).fold(0, u64::saturating_add)
    };
    way("rx_bytes").max(way("tx_bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    #[test]
    fn a_host_is_as_fast_as_its_real_cards_together() {
        let folder = tempfile::tempdir().unwrap();
        let card = |name: &str, device: bool, speed: &str| {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            if device {
                fs::create_dir(path.join("device")).unwrap();
            }
            fs::write(path.join("speed"), speed).unwrap();
        };
        assert_eq!(speed(folder.path()), 0);
        card("virtio", true, "-1\n");
        card("br0", false, "10000\n");
        assert_eq!(speed(folder.path()), 0);
        card("eth0", true, "10000\n");
        card("eth1", true, "1000\n");
        assert_eq!(speed(folder.path()), 1_375_000_000);
    }

    #[test]
    fn counters_become_rates() {
        let (mut rates, t) = (Rates::default(), Instant::now());
        let counters = |ticks, dirty_bytes, net_bytes| Counters {
            ticks,
            dirty_bytes,
            net_bytes,
        };
        assert_eq!(rates.sample(t, counters(100, 0, 7)), None);
        // Half a second, 25 ticks of 10 ms: half a CPU.
        let half = t + Duration::from_millis(500);
        assert_eq!(
            rates.sample(half, counters(125, 4096, 7)),
            Some(counters(500, 8192, 0))
        );
        assert_eq!(rates.sample(half, counters(3, 0, 0)), None, "another process");
        assert!(rates.sample(half, counters(3, 0, 0)).is_some(), "no time passed");
    }

    #[test]
    fn a_busy_process_is_seen_to_be_busy() {
        let (loads, vm) = (VmLoads::default(), VmId::new("v").unwrap());
        let pid = std::process::id();
        let status = |bytes: u64| json!({ "pages": 10, "nics": [{ "tx_bytes": bytes, "rx_bytes": 1 }, {}] });
        let began = Instant::now();
        assert_eq!(loads.sample(&vm, pid, &status(0), began), VmLoad::default());
        let until = began + Duration::from_millis(300);
        while Instant::now() < until {
            std::hint::black_box(0);
        }
        let load = loads.sample(&vm, pid, &status(1 << 20), Instant::now());
        assert!(load.cpu_milli > 0 && load.memory_bytes > 1 << 20, "{load:?}");
        assert!(
            load.net_bytes_per_s > 1 << 20 && load.dirty_bytes_per_s == 0,
            "{load:?}"
        );
        loads.keep(|_| false);
        assert_eq!(
            loads.sample(&vm, pid, &status(0), Instant::now()),
            VmLoad::default()
        );
    }

    #[test]
    fn only_real_cards_count() {
        let folder = tempfile::tempdir().unwrap();
        let card = |name: &str, real: bool| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.join("statistics")).unwrap();
            if real {
                fs::create_dir(path.join("device")).unwrap();
            }
            fs::write(path.join("statistics/rx_bytes"), "100\n").unwrap();
            fs::write(path.join("statistics/tx_bytes"), "11\n").unwrap();
        };
        card("eth0", true);
        card("br0", false);
        assert_eq!(traffic(folder.path()), 100);
    }
}
