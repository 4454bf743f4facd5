//! See the module above.

use super::rng::Rng;
use crate::storage::{SECTOR, Storage, StorageFile};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What an operation of the storage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes, zeroes, allocates.
    Write,
    /// Syncs.
    Sync,
}

/// A fault to come.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Which file; `None`: any.
    pub file: Option<String>,
    /// Which operations count.
    pub kind: Kind,
    /// How many of them pass first.
    pub after: u64,
    /// How many then fail.
    pub count: u64,
    /// Instead of failing, a write goes this many bytes further on and reports success.
    pub misdirect: Option<u64>,
}

impl Fault {
    /// The `n`-th operation of this kind on `file` fails with EIO, once.
    #[must_use]
    pub fn eio(file: &str, kind: Kind, n: u64) -> Self {
        Self {
            file: Some(file.to_owned()),
            kind,
            after: n,
            count: 1,
            misdirect: None,
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
    Len(u64),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Data(at, data) => {
                let end = *at as usize + data.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*at as usize..end].copy_from_slice(data);
            }
            Self::Zero(at, len) => {
                let end = (*at + *len).min(bytes.len() as u64);
                if *at < end {
                    bytes[*at as usize..end as usize].fill(0);
                }
            }
            Self::Len(len) => {
                if (bytes.len() as u64) < *len {
                    bytes.resize(*len as usize, 0);
                }
            }
        }
    }

    /// Keeps each sector of the change or not.
    fn tear(&self, rng: &mut Rng) -> Vec<Self> {
        let (at, len) = match self {
            Self::Data(at, data) => (*at, data.len() as u64),
            Self::Zero(at, len) => (*at, *len),
            Self::Len(_) => return vec![self.clone()],
        };
        let mut kept = Vec::new();
        let mut from = at;
        while from < at + len {
            let to = ((from / SECTOR as u64 + 1) * SECTOR as u64).min(at + len);
            if rng.one_in(2) {
                kept.push(match self {
                    Self::Data(_, data) => {
                        Self::Data(from, data[(from - at) as usize..(to - at) as usize].to_vec())
                    }
                    _ => Self::Zero(from, to - from),
                });
            }
            from = to;
        }
        kept
    }
}

#[derive(Debug, Default)]
struct Content {
    durable: Vec<u8>,
    cached: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Debug)]
struct Disk {
    files: BTreeMap<String, Content>,
    rng: Rng,
    /// Writes and syncs so far.
    steps: u64,
    cut_at: Option<u64>,
    off: bool,
    life: u64,
    faults: Vec<Fault>,
    space: u64,
}

/// A directory in memory. Clones are the same directory.
#[derive(Clone, Debug)]
pub struct FaultStorage {
    disk: Arc<Mutex<Disk>>,
}

struct File {
    name: String,
    disk: Arc<Mutex<Disk>>,
    /// A handle from before a power cut is dead.
    life: u64,
}

fn power_off() -> io::Error {
    io::Error::other("the power is off")
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FaultStorage {
    /// An empty directory.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let disk = Disk {
            files: BTreeMap::new(),
            rng: Rng::new(seed),
            steps: 0,
            cut_at: None,
            off: false,
            life: 0,
            faults: Vec::new(),
            space: u64::MAX,
        };
        Self {
            disk: Arc::new(Mutex::new(disk)),
        }
    }

    /// Writes and syncs so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        lock(&self.disk).steps
    }

    /// The power goes at this write or sync (counted from 0 at creation): it may or may not have an effect.
    pub fn cut_power_at(&self, step: u64) {
        lock(&self.disk).cut_at = Some(step);
    }

    /// Cuts the power now.
    pub fn cut_power(&self) {
        lock(&self.disk).off = true;
    }

    /// Whether the power is off.
    #[must_use]
    pub fn is_off(&self) -> bool {
        lock(&self.disk).off
    }

    /// Powers up again with what survived; files must be opened anew.
    pub fn reboot(&self) {
        let mut guard = lock(&self.disk);
        let disk = &mut *guard;
        for content in disk.files.values_mut() {
            // Sometimes everything or nothing survives; mostly each write has its own fate.
            let all = disk.rng.below(8);
            for change in std::mem::take(&mut content.unsynced) {
                let fate = if all < 2 { all } else { disk.rng.below(3) };
                match fate {
                    0 => {}
                    1 => change.apply(&mut content.durable),
                    _ => change
                        .tear(&mut disk.rng)
                        .iter()
                        .for_each(|c| c.apply(&mut content.durable)),
                }
            }
            content.cached.clone_from(&content.durable);
        }
        disk.off = false;
        disk.cut_at = None;
        disk.faults.clear();
        disk.life += 1;
    }

    /// The process died but the power stayed: what was written is still there, not yet durable.
    pub fn crash_process(&self) {
        lock(&self.disk).life += 1;
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        lock(&self.disk).faults.push(fault);
    }

    /// All faults are over, the disk is roomy again.
    pub fn heal(&self) {
        let mut disk = lock(&self.disk);
        disk.faults.clear();
        disk.space = u64::MAX;
    }

    /// Only this many bytes in all files together.
    pub fn limit_space(&self, bytes: u64) {
        lock(&self.disk).space = bytes;
    }

    /// Flips one bit at rest.
    ///
    /// # Panics
    /// If there is no such byte.
    pub fn flip_bit(&self, file: &str, byte: u64, bit: u8) {
        let mut disk = lock(&self.disk);
        let content = disk
            .files
            .get_mut(file)
            .unwrap_or_else(|| unreachable!("no file {file}"));
        content.durable[byte as usize] ^= 1 << bit;
        content.cached[byte as usize] ^= 1 << bit;
    }

    /// What a file reads as now.
    #[must_use]
    pub fn contents(&self, file: &str) -> Vec<u8> {
        lock(&self.disk)
            .files
            .get(file)
            .map_or_else(Vec::new, |c| c.cached.clone())
    }

    fn handle(&self, name: &str) -> Arc<dyn StorageFile> {
        let life = lock(&self.disk).life;
        Arc::new(File {
            name: name.to_owned(),
            disk: self.disk.clone(),
            life,
        })
    }
}

/// What to do with an operation.
enum Verdict {
    Do,
    /// Do it, then the power is off.
    Last,
    Shift(u64),
}

impl Disk {
    fn judge(&mut self, life: u64, file: &str, kind: Kind) -> io::Result<Verdict> {
        if self.off || life != self.life {
            return Err(power_off());
        }
        let step = self.steps;
        if kind != Kind::Read {
            self.steps += 1;
            if self.cut_at == Some(step) {
                self.off = true;
                return Ok(Verdict::Last);
            }
        }
        for fault in &mut self.faults {
            if fault.kind != kind || fault.file.as_deref().is_some_and(|f| f != file) || fault.count == 0 {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
                continue;
            }
            fault.count -= 1;
            return match fault.misdirect {
                Some(by) => Ok(Verdict::Shift(by)),
                None => Err(io::Error::from_raw_os_error(libc::EIO)),
            };
        }
        Ok(Verdict::Do)
    }

    fn used(&self) -> u64 {
        self.files.values().map(|c| c.cached.len() as u64).sum()
    }
}

impl File {
    fn change(&self, mut change: Change) -> io::Result<()> {
        let mut guard = lock(&self.disk);
        let disk = &mut *guard;
        let verdict = disk.judge(self.life, &self.name, Kind::Write)?;
        if let (Verdict::Shift(by), Change::Data(at, _)) = (&verdict, &mut change) {
            *at += by;
        }
        let used = disk.used();
        let content = disk.files.entry(self.name.clone()).or_default();
        let end = match &change {
            Change::Data(at, data) => at + data.len() as u64,
            Change::Zero(..) => 0,
            Change::Len(len) => *len,
        };
        if used + end.saturating_sub(content.cached.len() as u64) > disk.space {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        change.apply(&mut content.cached);
        content.unsynced.push(change);
        if matches!(verdict, Verdict::Last) {
            Err(power_off())
        } else {
            Ok(())
        }
    }
}

impl StorageFile for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        disk.judge(self.life, &self.name, Kind::Read)?;
        let content = disk.files.get(&self.name).ok_or(io::ErrorKind::NotFound)?;
        let from = content.cached.get(offset as usize..offset as usize + buf.len());
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_parts(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.change(Change::Data(offset, parts.concat()))
    }

    fn zero(&self, offset: u64, len: u64, _free: bool) -> io::Result<()> {
        self.change(Change::Zero(offset, len))
    }

    fn sync(&self) -> io::Result<()> {
        let mut guard = lock(&self.disk);
        let disk = &mut *guard;
        let verdict = match disk.judge(self.life, &self.name, Kind::Sync) {
            Ok(verdict) => verdict,
            Err(e) => {
                // A failed sync may lose what was written before: the cache still shows it, the disk never will.
                if !disk.off
                    && disk.life == self.life
                    && let Some(content) = disk.files.get_mut(&self.name)
                {
                    for change in std::mem::take(&mut content.unsynced) {
                        change
                            .tear(&mut disk.rng)
                            .iter()
                            .for_each(|c| c.apply(&mut content.durable));
                    }
                }
                return Err(e);
            }
        };
        if matches!(verdict, Verdict::Last) {
            // The power went during the sync: as if it had not happened yet; each write has its own fate.
            return Err(power_off());
        }
        if let Some(content) = disk.files.get_mut(&self.name) {
            for change in std::mem::take(&mut content.unsynced) {
                change.apply(&mut content.durable);
            }
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let mut disk = lock(&self.disk);
        disk.judge(self.life, &self.name, Kind::Read)?;
        Ok(disk.files.get(&self.name).map_or(0, |c| c.cached.len() as u64))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.change(Change::Len(len))
    }
}

impl Storage for FaultStorage {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn StorageFile>> {
        {
            let mut disk = lock(&self.disk);
            if disk.off {
                return Err(power_off());
            }
            if create {
                disk.files.entry(name.to_owned()).or_default();
            } else if !disk.files.contains_key(name) {
                return Err(io::ErrorKind::NotFound.into());
            }
        }
        Ok(self.handle(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        let content = disk.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.files.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        lock(&self.disk).files.remove(name);
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        if lock(&self.disk).off {
            Err(power_off())
        } else {
            Ok(())
        }
    }
}
