//! Whether this host is going to fail, by what its kernel says of its parts: memory errors, disks, temperature, fans.
//!
//! | part | read | expected to fail |
//! |---|---|---|
//! | memory | `/sys/devices/system/edac/mc/mc*/{ue,ce}_count` | one error that could not be corrected; [`CORRECTED_MAX`] that could, in a day |
//! | disk | `/sys/fs/ext4/*/errors_count` | one error of a file system |
//! | disk | `/sys/block/md*/md/degraded`, `/sys/block/nvme*/device/state` | an array lacks a disk; a controller is dead |
//! | environment | `/sys/class/hwmon/hwmon*/temp*_{input,crit}`, `fan*_{alarm,fault}` | too hot, or a fan that was well, for a minute |
//!
//! Not `ioerr_cnt` of SCSI disks: it counts every answer that is not plainly good, which disks that are well give to those who ask for their SMART
//! values. Nor fans that were never well: connectors without one say so for ever.
//!
//! Counts from before the daemon's start are not held against the host, but for memory errors that could not be corrected. What is seen holds
//! for as long as it is there, and [`HELD`] longer, so that a host on the edge is not emptied and filled by turns.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use steadfast_cluster::model::{FailingPart, Prediction};

/// Between two looks.
pub const LOOK: Duration = Duration::from_secs(5);
/// Errors count for so long.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Corrected memory errors that are a sign of worse to come.
const CORRECTED_MAX: u64 = 64;
/// What may pass is evidence only after so long.
const LASTS: Duration = Duration::from_secs(60);
/// Evidence that ended is believed for so long.
const HELD: Duration = Duration::from_secs(600);
/// Counters and sensors that are followed at most.
const SOURCES_MAX: usize = 512;

/// A counter and its growth within a day.
#[derive(Debug, Default)]
struct Counter {
    last: Option<u64>,
    grew: VecDeque<(Instant, u64)>,
}

impl Counter {
    /// Takes a reading; how much it grew within a day.
    fn read(&mut self, now: Instant, value: u64) -> u64 {
        let more = value.saturating_sub(self.last.unwrap_or(value));
        self.last = Some(value);
        if more > 0 {
            self.grew.push_back((now, more));
        }
        // A bound: the oldest are put together.
        while self.grew.len() > 64 {
            if let (Some((_, a)), Some(next)) = (self.grew.pop_front(), self.grew.front_mut()) {
                next.1 += a;
            }
        }
        while self
            .grew
            .front()
            .is_some_and(|(at, _)| now.duration_since(*at) >= DAY)
        {
            self.grew.pop_front();
        }
        self.grew.iter().map(|(_, n)| n).sum()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Predict {
    root: PathBuf,
    counters: BTreeMap<PathBuf, Counter>,
    since: BTreeMap<PathBuf, Instant>,
    /// Fans that were well at some time.
    fans: BTreeSet<PathBuf>,
    /// Memory errors that could not be corrected, and that somebody used the host after.
    forgiven: BTreeMap<PathBuf, u64>,
    last: Option<(Prediction, Instant)>,
}

impl Default for Predict {
    /// Of this host; a test puts another `/sys` in its place.
    fn default() -> Self {
        let root = std::env::var_os("STEADFAST_SYS_ROOT").map_or_else(|| "/".into(), PathBuf::from);
        Self::of(&root)
    }
}

impl Predict {
    /// Of the host whose `/sys` is below `root`.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            counters: BTreeMap::new(),
            since: BTreeMap::new(),
            fans: BTreeSet::new(),
            forgiven: BTreeMap::new(),
            last: None,
        }
    }

    /// What is expected, if anything. Sensors can take their time: not for a thread that somebody waits for.
    pub fn look(&mut self, now: Instant) -> Option<Prediction> {
        if let Some((part, evidence)) = self.evidence(now) {
            self.last = Some((Prediction { part, evidence }, now));
        }
        self.last.take_if(|(_, at)| now.duration_since(*at) > HELD);
        self.last.as_ref().map(|(p, _)| p.clone())
    }

    /// People use the host again: what was counted does not hold any more. What is still so is found again.
    pub fn forgive(&mut self) {
        self.last = None;
        self.since.clear();
        for mc in self.entries("sys/devices/system/edac/mc", "mc") {
            let lost = number(&mc.join("ue_count")).unwrap_or(0);
            self.forgiven.insert(mc, lost);
        }
        for counter in self.counters.values_mut() {
            // What comes until the next look is forgiven too.
            *counter = Counter::default();
        }
    }

    /// The first that is found, the worst first.
    fn evidence(&mut self, now: Instant) -> Option<(FailingPart, String)> {
        // All counters are read each time: one that is not looked at loses its growth.
        let found = [
            self.memory(now),
            self.arrays(),
            self.disks(now),
            self.environment(now),
        ];
        found.into_iter().flatten().next()
    }

    fn memory(&mut self, now: Instant) -> Option<(FailingPart, String)> {
        let mut found = None;
        for mc in self.entries("sys/devices/system/edac/mc", "mc") {
            let name = name(&mc);
            let corrected =
                number(&mc.join("ce_count")).map_or(0, |n| self.counter(now, mc.join("ce_count"), n));
            let lost = number(&mc.join("ue_count")).unwrap_or(0);
            let forgiven = self.forgiven.get(&mc).copied().unwrap_or(0);
            if lost > forgiven {
                let text = format!("{lost} memory errors of {name} could not be corrected");
                found.get_or_insert((FailingPart::Memory, text));
            } else if corrected >= CORRECTED_MAX {
                let text = format!("{corrected} corrected memory errors of {name} in a day");
                found.get_or_insert((FailingPart::Memory, text));
            }
        }
        found
    }

    fn arrays(&self) -> Option<(FailingPart, String)> {
        let degraded = self.entries("sys/block", "md").into_iter().find_map(|md| {
            let lacks = number(&md.join("md/degraded")).filter(|n| *n > 0)?;
            Some(format!("array {} lacks {lacks} of its disks", name(&md)))
        });
        let dead = || {
            self.entries("sys/block", "nvme").into_iter().find_map(|disk| {
                let state = fs::read_to_string(disk.join("device/state")).ok()?;
                (state.trim() == "dead").then(|| format!("the controller of {} is dead", name(&disk)))
            })
        };
        degraded.or_else(dead).map(|text| (FailingPart::Disk, text))
    }

    fn disks(&mut self, now: Instant) -> Option<(FailingPart, String)> {
        let mut found = None;
        for system in self.entries("sys/fs/ext4", "") {
            let path = system.join("errors_count");
            let Some(count) = number(&path) else { continue };
            if self.counter(now, path, count) > 0 {
                let text = format!("the file system on {} found errors", name(&system));
                found.get_or_insert((FailingPart::Disk, text));
            }
        }
        found
    }

    fn environment(&mut self, now: Instant) -> Option<(FailingPart, String)> {
        let mut found = None;
        let mut there = Vec::new();
        for chip in self.entries("sys/class/hwmon", "hwmon") {
            let label = fs::read_to_string(chip.join("name")).unwrap_or_default();
            for sensor in entries(&chip, "") {
                let file = name(&sensor);
                let is_on = || number(&sensor).is_some_and(|n| n != 0);
                let what = if let Some(temp) = file.strip_suffix("_input").filter(|f| f.starts_with("temp")) {
                    let limit = number(&chip.join(format!("{temp}_crit"))).filter(|c| *c > 0);
                    let (Some(limit), Some(value)) = (limit, number(&sensor)) else {
                        continue;
                    };
                    (value >= limit).then(|| {
                        format!(
                            "{temp} is at {} degrees, its limit is {}",
                            value / 1000,
                            limit / 1000
                        )
                    })
                } else if file.starts_with("fan") && (file.ends_with("_alarm") || file.ends_with("_fault")) {
                    match is_on() {
                        false => {
                            self.fans.insert(sensor.clone());
                            None
                        }
                        true => self.fans.contains(&sensor).then(|| format!("{file} is on")),
                    }
                } else {
                    None
                };
                let Some(what) = what else { continue };
                there.push(sensor.clone());
                let since = *self.since.entry(sensor).or_insert(now);
                if now.duration_since(since) >= LASTS {
                    let text = format!("sensor {}: {what}", label.trim());
                    found.get_or_insert((FailingPart::Environment, text));
                }
            }
        }
        self.since.retain(|path, _| there.contains(path));
        found
    }

    fn counter(&mut self, now: Instant, path: PathBuf, value: u64) -> u64 {
        if self.counters.len() >= SOURCES_MAX && !self.counters.contains_key(&path) {
            return 0;
        }
        self.counters.entry(path).or_default().read(now, value)
    }

    fn entries(&self, folder: &str, start: &str) -> Vec<PathBuf> {
        entries(&self.root.join(folder), start)
    }
}

/// What is in a folder and begins so, in order.
fn entries(folder: &Path, start: &str) -> Vec<PathBuf> {
    let found = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = found
        .map(|e| e.path())
        .filter(|p| name(p).starts_with(start))
        .take(SOURCES_MAX)
        .collect();
    found.sort();
    found
}

fn name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

/// A number as the kernel writes it, also with 0x. Below zero is zero.
fn number(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse::<i64>().ok().map(|n| n.max(0).cast_unsigned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        root: tempfile::TempDir,
        predict: Predict,
        now: Instant,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let predict = Predict::of(root.path());
            Self {
                predict,
                now: Instant::now(),
                root,
            }
        }

        fn set(&self, path: &str, value: &str) {
            let path = self.root.path().join("sys").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }

        fn after(&mut self, seconds: u64) -> Option<Prediction> {
            self.now += Duration::from_secs(seconds);
            self.predict.look(self.now)
        }
    }

    #[test]
    fn a_host_that_says_nothing_is_well() {
        let mut host = Host::new();
        assert_eq!(host.after(0), None);
        host.set("class/hwmon/hwmon0/fan7_alarm", "1");
        host.set("fs/ext4/sda1/errors_count", "7");
        host.set("devices/system/edac/mc/mc0/ce_count", "99999");
        host.set("devices/system/edac/mc/mc0/ue_count", "0");
        host.set("class/hwmon/hwmon0/name", "coretemp");
        host.set("class/hwmon/hwmon0/temp1_input", "55000");
        host.set("class/hwmon/hwmon0/temp1_crit", "100000");
        host.set("block/md0/md/degraded", "0");
        host.set("block/nvme0n1/device/state", "live");
        for _ in 0..20 {
            assert_eq!(host.after(10), None, "what was before is not held against it");
        }
        // Nonsense of a driver, and a sensor without a limit.
        host.set("class/hwmon/hwmon0/temp2_input", "-5000");
        host.set("class/hwmon/hwmon0/temp2_crit", "0");
        host.set("class/hwmon/hwmon0/temp3_input", "N/A");
        host.set("devices/system/edac/mc/mc0/ue_count", "");
        for _ in 0..20 {
            assert_eq!(host.after(10), None);
        }
    }

    #[test]
    fn memory_and_disks_are_counted_over_a_day() {
        let mut host = Host::new();
        let corrected = |n: u64| n.to_string();
        host.set("devices/system/edac/mc/mc0/ce_count", "0");
        host.after(0);
        // One a quarter of an hour is 96 a day; an hour apart it is 24.
        for n in 1..100 {
            host.set("devices/system/edac/mc/mc0/ce_count", &corrected(n));
            assert_eq!(host.after(3600), None, "{n}");
        }
        host.set("devices/system/edac/mc/mc0/ce_count", &corrected(200));
        let found = host.after(10).unwrap();
        assert_eq!(found.part, FailingPart::Memory);
        assert!(
            found.evidence.contains("corrected memory errors of mc0"),
            "{found:?}"
        );
        host.set("devices/system/edac/mc/mc0/ue_count", "1");
        assert!(
            host.after(10)
                .unwrap()
                .evidence
                .contains("could not be corrected")
        );

        // Somebody used the host again, although: what was is forgiven, more is not.
        host.predict.forgive();
        assert_eq!(host.after(10), None);
        host.set("devices/system/edac/mc/mc0/ue_count", "2");
        assert!(host.after(10).is_some());

        let mut host = Host::new();
        host.set("fs/ext4/sda1/errors_count", "3");
        host.after(0);
        host.set("fs/ext4/sda1/errors_count", "4");
        let found = host.after(10).unwrap();
        assert_eq!(
            (found.part, found.evidence.contains("on sda1")),
            (FailingPart::Disk, true)
        );
        // Nothing new for a day.
        assert!(host.after(24 * 3600 - 20).is_some());
        assert!(host.after(10).is_some());
        assert_eq!(host.after(HELD.as_secs() + 10), None);
    }

    #[test]
    fn heat_and_fans_count_when_they_last() {
        let mut host = Host::new();
        host.set("class/hwmon/hwmon3/name", "coretemp");
        host.set("class/hwmon/hwmon3/temp1_crit", "95000");
        host.set("class/hwmon/hwmon3/temp1_input", "96000");
        for _ in 0..6 {
            assert_eq!(host.after(10), None);
        }
        // A peak that ended.
        host.set("class/hwmon/hwmon3/temp1_input", "94000");
        assert_eq!(host.after(10), None);
        host.set("class/hwmon/hwmon3/temp1_input", "97000");
        for _ in 0..6 {
            assert_eq!(host.after(10), None);
        }
        let found = host.after(10).unwrap();
        assert_eq!(found.part, FailingPart::Environment);
        assert_eq!(
            found.evidence,
            "sensor coretemp: temp1 is at 97 degrees, its limit is 95"
        );
        // It holds for a while, so that the host is not filled at once.
        host.set("class/hwmon/hwmon3/temp1_input", "50000");
        assert!(host.after(10).is_some());
        assert!(host.after(HELD.as_secs() - 10).is_some());
        assert_eq!(host.after(20), None);
        host.set("class/hwmon/hwmon3/fan2_alarm", "0");
        assert_eq!(host.after(10), None);
        host.set("class/hwmon/hwmon3/fan2_alarm", "1");
        assert_eq!(host.after(10), None);
        assert!(host.after(60).unwrap().evidence.contains("fan2_alarm"));
    }

    #[test]
    fn an_array_that_lacks_a_disk_is_told_at_once() {
        let mut host = Host::new();
        host.set("block/md127/md/degraded", "1");
        assert!(host.after(0).unwrap().evidence.contains("md127 lacks 1"));
        let mut host = Host::new();
        host.set("block/nvme0n1/device/state", "dead");
        assert!(host.after(0).unwrap().evidence.contains("nvme0n1 is dead"));
    }
}
