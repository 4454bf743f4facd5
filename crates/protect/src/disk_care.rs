//! How the disks of a VM do, and what they hold: for status, for the answer to a fault, for a copy of changes.
//!
//! | fault on the primary | answer |
//! |---|---|
//! | a block cannot be read, or is wrong | it comes from the other host's replica, and is written anew |
//! | the image takes nothing, or a read hangs | planned promote to a standby in sync |
//! | the journal takes nothing, or hangs | this instance ends: what waits for its journal could never drain |
//! | any of these, and no standby | the guest's request waits, with an alarm; tried again for ever |
//!
//! A standby whose disk fails gives up its state and answers no greeting until the disk works again.

use crate::block::LateBlock;
use crate::disks::{Disk, Disks, SLOTS};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use steadfast_disk::journal::State;
use steadfast_disk::volume::Volume;
use steadfast_epoch::message::EpochRef;
use steadfast_types::{Epoch, Term};

/// A replica that could not be opened because of its disk is tried again so often.
const REOPEN: Duration = Duration::from_secs(1);
/// A request of the guest that waits so long is worth an alarm.
const LONG_WAIT: Duration = Duration::from_secs(2);
/// An end in order waits so long for the disks below.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// A copy to a standby, in bytes of disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// At least one disk is sent whole.
    pub full: bool,
    /// To be sent, when it began.
    pub planned: u64,
    /// Sent, with what the guest changed meanwhile; without what went with the last epoch of the copy.
    pub sent: u64,
}

/// What is wrong with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Epochs with a flush cannot become durable here any more.
    Journal(String),
    /// Journals work, but something below them does not.
    Image(String),
}

impl Trouble {
    /// What, on which disk.
    pub fn text(&self) -> &str {
        match self {
            Self::Journal(text) | Self::Image(text) => text,
        }
    }
}

/// After a crash one disk may know of a later commit than another: what is committed on one is committed on all.
pub fn stand_equal(list: &[Disk]) {
    let replicas = || list.iter().filter_map(|d| d.replica.as_ref().ok());
    let Some(most) = replicas().map(|r| r.progress().committed).max() else {
        return;
    };
    for r in replicas() {
        let p = r.progress();
        if p.committed < most
            && p.tip >= most
            && let Err(error) = r.commit(most)
        {
            tracing::warn!(%error, "a disk stays behind the others");
        }
    }
}

fn all_equal(volumes: impl Iterator<Item = Volume>, which: usize) -> Option<EpochRef> {
    let mut at: Option<(Epoch, Term)> = None;
    for v in volumes {
        let here = v.committed()[which];
        if matches!(v.progress().state, State::Copying { .. }) || at.is_some_and(|a| a != here) {
            return None;
        }
        at = Some(here);
    }
    at.map(|(epoch, term)| EpochRef { epoch, term })
}

impl Disks {
    /// Why a disk cannot be used, if one cannot.
    pub fn unusable(&self) -> Option<String> {
        self.list.iter().find_map(|d| d.replica.as_ref().err().cloned())
    }

    /// The epoch that all disks hold as committed; zero if they do not stand at one, or are not whole.
    pub fn have(&self) -> EpochRef {
        if self.list.iter().any(|d| d.replica.is_err()) {
            return EpochRef::ZERO;
        }
        all_equal(self.volumes(), 0).unwrap_or(EpochRef::ZERO)
    }

    /// An epoch that all disks will still hold as committed after power loss.
    pub fn durable(&self) -> Option<EpochRef> {
        let whole = |v: &Volume| !matches!(v.progress().state, State::Copying { .. });
        if !self.volumes().all(|v| whole(&v)) || self.list.iter().any(|d| d.replica.is_err()) {
            return None;
        }
        let least = self.volumes().map(|v| v.committed()[1]).min()?;
        (least.0 > Epoch::ZERO).then_some(EpochRef {
            epoch: least.0,
            term: least.1,
        })
    }

    /// The copy of which the disks are an unfinished one, and the epoch below it.
    pub fn unfinished(&self) -> Option<(u64, EpochRef)> {
        let mut found = None;
        for v in self.volumes() {
            let State::Copying { join } = v.progress().state else {
                return None;
            };
            let (epoch, term) = v.committed()[0];
            let here = (join, EpochRef { epoch, term });
            if found.is_some_and(|f| f != here) {
                return None;
            }
            found = Some(here);
        }
        found.filter(|(_, at)| at.epoch > Epoch::ZERO)
    }

    /// Where a start from these disks goes on: after the highest epoch that one of them has. No instance's memory stands at
    /// it, so it has no term.
    pub fn boot_at(&self) -> EpochRef {
        let tip = self.volumes().map(|v| v.progress().tip).max().unwrap_or_default();
        EpochRef {
            epoch: tip,
            term: Term::ZERO,
        }
    }

    /// The standby in `slot` holds this epoch for good: what it changed need not be kept account of.
    pub fn peer_holds(&self, slot: usize, at: EpochRef) {
        for v in self.volumes().filter(|v| v.holds(at.epoch, at.term)) {
            if let Err(error) = v.peer_durable(slot, at.epoch) {
                tracing::warn!(%error, "what a standby holds");
            }
        }
    }

    /// Size of all disks in bytes.
    pub fn capacity(&self) -> u64 {
        self.volumes().map(|v| v.capacity()).sum()
    }

    /// Whether an epoch can be sealed now.
    pub fn can_seal(&self) -> bool {
        self.volumes().all(|v| v.can_seal())
    }

    /// This host's machine stands still for good, after exactly epoch `at`: its volumes are a standby's. The next machine stands on other
    /// blocks, so that no request of this one reaches a volume that is the primary's again by then.
    ///
    /// # Errors
    /// The disk that does not stand there.
    pub fn leave(&mut self, at: Epoch) -> Result<(), String> {
        for d in &mut self.list {
            d.late.close_for_good();
            let replica = d.replica()?;
            replica.discard_after(at).map_err(d.text())?;
            let tip = replica.progress().tip;
            if tip != at {
                return Err(format!(
                    "disk {} stands at epoch {tip}, not at {at}",
                    d.path.display()
                ));
            }
            let late = LateBlock::new(d.late.index, d.image.info(), self.inputs.clone());
            d.late = Arc::new(late);
            let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
            blocks.insert(d.late.index, Arc::clone(&d.late));
        }
        Ok(())
    }

    /// Nothing of the guest waits for a disk any more: the machine ends.
    pub fn close(&self) {
        self.list.iter().for_each(|d| d.late.close());
    }

    /// At an end in order: what was sealed or staged here does not depend on the kernel's caches. An end by force is a loss of power.
    pub fn settle(&self) {
        for d in &self.list {
            let Ok(replica) = &d.replica else { continue };
            if let Err(error) = replica.wait_synced(replica.progress().tip, SETTLE_MAX) {
                tracing::warn!(disk = %d.path.display(), %error, "the journal is not known to be on the disk at the end");
            }
        }
    }

    /// Something hangs that would hold up the end of this process's threads.
    pub fn hung(&self) -> bool {
        let stuck = |d: &Disk| {
            let Ok(r) = &d.replica else { return false };
            let h = r.common().health();
            h.journal_job.max(h.image_job).max(d.late.reads().0) > Duration::from_millis(500)
        };
        self.list.iter().any(stuck)
    }

    /// The worst that is wrong with the disks now.
    pub fn trouble(&self) -> Option<Trouble> {
        let mut image = None;
        for d in &self.list {
            let path = d.path.display();
            let replica = match &d.replica {
                Ok(replica) => replica,
                Err(why) if d.unreadable => return Some(Trouble::Journal(why.clone())),
                Err(_) => continue,
            };
            let h = replica.common().health();
            if let Some(why) = h.journal_fault {
                return Some(Trouble::Journal(format!("journal of disk {path}: {why}")));
            }
            if h.journal_job >= self.hang {
                return Some(Trouble::Journal(format!("journal of disk {path} hangs")));
            }
            if let Some(why) = h.image_fault {
                image.get_or_insert(format!("disk {path}: {why}"));
            }
            let (read, why) = d.late.reads();
            if h.image_job >= self.hang || read >= self.hang && why.is_none() {
                image.get_or_insert(format!("disk {path} hangs"));
            }
        }
        image.map(Trouble::Image)
    }

    /// What an operator should know, beyond [`Disks::trouble`]: requests of the guest that wait, and why.
    pub fn waits(&self) -> Option<String> {
        self.list.iter().find_map(|d| {
            let (read, write) = (d.late.reads(), d.late.writes());
            let long = read.1.filter(|_| read.0 >= LONG_WAIT);
            let why = long.or_else(|| write.1.filter(|_| write.0 >= LONG_WAIT))?;
            let secs = read.0.max(write.0).as_secs();
            Some(format!(
                "disk {}: a request of the guest waits for {secs} s: {why}",
                d.path.display()
            ))
        })
    }

    /// Replicas that could not be opened because of their disk are tried again.
    pub fn reopen(&mut self) {
        if self.reopened.is_some_and(|at| at.elapsed() < REOPEN) {
            return;
        }
        self.reopened = Some(Instant::now());
        self.list.iter_mut().filter(|d| d.unreadable).for_each(Disk::open);
    }

    /// For the status.
    pub fn status(&self) -> Value {
        let disks = self.list.iter().map(|d| {
            let Ok(replica) = &d.replica else {
                return json!({"path": d.path, "error": d.replica.as_ref().err()});
            };
            let (v, p) = (replica.common(), replica.progress());
            let h = v.health();
            json!({
                "path": d.path,
                "state": match p.state {
                    State::Consistent => "consistent",
                    State::Copying { .. } => "copying",
                    State::Verifying { .. } => "verifying",
                },
                "tip": p.tip, "synced": p.synced, "committed": p.committed, "applied": p.applied,
                "journal_used_bytes": p.journal_used, "journal_bytes": p.journal_size, "memory_bytes": p.memory_bytes,
                "journal_fault": h.journal_fault, "image_fault": h.image_fault,
                "journal_job_ms": h.journal_job.as_millis() as u64, "image_job_ms": h.image_job.as_millis() as u64,
                "bad_blocks": h.bad, "repaired_blocks": h.repaired, "served_blocks": h.served,
                "copies": (0..SLOTS).map(|s| v.resync_remaining(s)).collect::<Vec<_>>(),
            })
        });
        let found = &self.scrubber.found;
        json!({
            "list": disks.collect::<Vec<_>>(),
            "scrub": {
                "walks": found.walks.load(Ordering::Relaxed), "blocks": found.blocks.load(Ordering::Relaxed),
                "bad": found.bad.load(Ordering::Relaxed), "repaired": found.repaired.load(Ordering::Relaxed),
            },
        })
    }

    /// The copy to the standby in `slot`, for the status.
    pub fn copy_status(&self, slot: usize) -> Value {
        let c = self.copied.get(slot).copied().unwrap_or_default();
        json!({"full": c.full, "planned_bytes": c.planned, "sent_bytes": c.sent, "remaining_bytes": self.remaining(slot)})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ProtectSpec;
    use crate::input::Inputs;
    use std::sync::mpsc::channel;
    use steadfast_disk::DiskError;
    use steadfast_disk::image::BlockIo;
    use steadfast_types::HostId;
    use steadfast_vmm::spec::VmSpec;

    /// A guest writes the header of a qcow2 image into its raw disk, which is not declared to be raw: it is not taken for one.
    #[test]
    fn a_guest_does_not_choose_the_format_of_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        steadfast_disk::image::create::create_qcow2(&image, 12 << 20).unwrap();
        let before = std::fs::read(&image).unwrap();
        let open = |format: serde_json::Value| {
            let spec = json!({
                "name": "p", "vcpus": 1, "memory_bytes": 64 << 20, "boot": {"flat": {"elf": "/none", "cmdline": ""}},
                "disks": [{"path": image, "format": format}],
            });
            let spec: VmSpec = serde_json::from_value(spec).unwrap();
            let store = serde_json::from_value(json!(dir.path().join("store"))).unwrap();
            let protect = ProtectSpec::new(HostId::new("a").unwrap(), store);
            Disks::open(&spec, &protect, &Inputs::new(channel().0)).map(|disks| disks.capacity())
        };
        let why = open(json!(null)).unwrap_err();
        assert!(
            why.contains("format=qcow2") && why.contains("format=raw"),
            "{why}"
        );
        assert_eq!(std::fs::read(&image).unwrap(), before, "nor written");
        assert_eq!(open(json!("qcow2")), Ok(12 << 20));
    }

    /// A request that is on its way when the VM is handed over reaches no volume, also not once this host runs the VM again.
    #[test]
    fn nothing_of_the_machine_that_ran_comes_late() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image.raw");
        std::fs::write(&image, vec![0; 12 << 20]).unwrap();
        let spec = json!({
            "name": "p", "vcpus": 1, "memory_bytes": 64 << 20, "boot": {"flat": {"elf": "/none", "cmdline": ""}},
            "disks": [{"path": image, "format": "raw"}],
        });
        let spec: VmSpec = serde_json::from_value(spec).unwrap();
        let store = serde_json::from_value(json!(dir.path().join("store"))).unwrap();
        let protect = ProtectSpec::new(HostId::new("a").unwrap(), store);
        let (queue, _heard) = channel();
        let mut disks = Disks::open(&spec, &protect, &Inputs::new(queue)).unwrap();
        let block = |disks: &Disks| Arc::clone(&disks.blocks().lock().unwrap()[&0]);
        let at = |epoch, term| EpochRef {
            epoch: Epoch(epoch),
            term: Term(term),
        };
        disks.boot(at(0, 0), Term(1)).unwrap();
        let old = block(&disks);
        old.write_at(0, &[1; 4096]).unwrap();
        disks.seal(Epoch(1), Term(1), &[]).unwrap();
        // After the cut: in the open epoch; and one that waits for room in it.
        old.write_at(4096, &[2; 4096]).unwrap();
        let waits = Arc::clone(&old);
        let waits = std::thread::spawn(move || waits.write_at(0, &vec![3; 8 << 20]));
        let until = Instant::now() + Duration::from_secs(10);
        while old.writes().0.is_zero() {
            assert!(Instant::now() < until, "it was to wait for room");
            std::thread::yield_now();
        }
        disks.leave(Epoch(1)).unwrap();
        let closed = |r| matches!(r, Err(DiskError::Closed));
        assert!(closed(waits.join().unwrap()));
        disks.promote(at(1, 1), Term(2)).unwrap();
        assert!(closed(old.write_at(8192, &[4; 4096])));
        assert!(closed(old.flush()));
        assert!(matches!(old.write_at_once(8192, &[4; 4096]), Some(Err(_))));
        let new = block(&disks);
        let mut bytes = [9; 12288];
        new.read_at(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[4096], bytes[8192]), (1, 0, 0));
        new.write_at(4096, &[5; 4096]).unwrap();
        new.read_at(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[4096], bytes[8192]), (1, 5, 0));
        assert!(!disks.seal(Epoch(2), Term(2), &[]).unwrap().flush);
    }
}
