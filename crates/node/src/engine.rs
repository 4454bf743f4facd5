//! Which VMs run with the engine of protection, and how a VM that runs without gets it: its guest stands still for a moment and goes on
//! in another process of the same host.
//!
//! ```text
//! new process   gets ready: maps the memory of the old one, opens disks, links and the store, takes the VM's term
//! old process   stands still; lets its disks and sockets go; its state goes to RUN/NAME.MS.state, its memory stays where it is
//! new process   takes the state, renames it to RUN/NAME.MS.taken: from here on the VM is its own, and it runs
//! old process   ends
//! ```
//! Who renames the state first has the VM: the new process, or this daemon (to `.void`) when the new one ended or took too long; then
//! the old one goes on. So the guest runs in one of them, never in both, and a daemon that ends anywhere in between finds in
//! RUN/NAME.change what it had begun, and brings it to an end. Files are named by the run folder, which does not survive the host.

use crate::config::{NodeConfig, StoreChoice};
use crate::error::{IoContext, NodeError, Result, refused};
use crate::guard;
use crate::instances::{How, Instances, LINKS, Meta, PROTECTED_MAX, write_json};
use crate::pool::{Pool, PoolVm};
use crate::procs;
use crate::records::{StoredVm, now_ms};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use steadfast_cluster::model::DiskPlace;
use steadfast_protect::{Mapped, TakeOver, is_laid_out};
use steadfast_types::{Term, VmId};
use steadfast_vmm::control::{self, Request, ask};
use steadfast_vmm::resources::remove_aside;
use steadfast_vmm::spec::NicTarget;

/// How long the new process may take until it is ready. The guest runs meanwhile.
const READY_BOUND: Duration = Duration::from_secs(120);
/// How long the old process may take to stand still: a disk may take that long to come to rest.
const STILL_BOUND: Duration = Duration::from_secs(15);
/// How long the new process, which is ready, may take until the VM is its own.
const TAKE_BOUND: Duration = Duration::from_secs(10);
/// How long a process may take to answer, and to end.
const END_BOUND: Duration = Duration::from_secs(10);
const ANSWER_BOUND: Duration = Duration::from_secs(3);

/// Why a VM cannot run with the engine, as its class wants it to or for a move.
///
/// # Errors
/// The reason, and the way out.
pub fn possible(config: &NodeConfig, pool: &Pool, stored: &StoredVm) -> Result<()> {
    let id = &stored.record.id;
    if config.store == StoreChoice::Embedded {
        return refused(format!(
            "VM {id}: this takes a second host, and the store in etcd; let one join first (`steadfast pool token`)"
        ));
    }
    fits(pool, stored)?;
    match stored.record.disks.iter().find(|d| d.place != DiskPlace::Local) {
        Some(disk) if stored.record.standbys_wanted() > 0 => refused(format!(
            "VM {id}: its disk {} is on a storage that several hosts reach; only disks of a host's own are mirrored. Class `restart` boots \
             such a VM elsewhere, and it can be moved while it runs",
            disk.name
        )),
        _ => Ok(()),
    }
}

/// Why the engine has no place for a VM in this pool, as far as that is not about its store. A VM with disks that several hosts reach can
/// be moved, though not protected.
///
/// # Errors
/// The reason, and the way out.
pub fn fits(pool: &Pool, stored: &StoredVm) -> Result<()> {
    let id = &stored.record.id;
    if stored.index >= PROTECTED_MAX {
        return refused(format!(
            "VM {id}: this pool has no ports left for replication links; it can hold {PROTECTED_MAX} protected VMs"
        ));
    }
    if pool.hosts.len() > usize::from(LINKS) {
        return refused(format!(
            "VM {id}: VMs can be mirrored in pools of up to {LINKS} hosts as yet"
        ));
    }
    Ok(())
}

/// A change of process that has begun.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Change {
    /// What was written down about the instance before.
    before: Meta,
    /// Its process.
    pid: u32,
    /// When that began, as the kernel counts: numbers of processes come back.
    started: u64,
    state: PathBuf,
    /// Folders that the new process makes: what the old one then writes is not in them.
    journals: Vec<PathBuf>,
    /// What is to be written down about the instance once it is the new process's.
    #[serde(default)]
    after: Option<Meta>,
    /// Names of its sockets.
    #[serde(default)]
    sockets: Vec<PathBuf>,
}

impl Change {
    fn taken(&self) -> PathBuf {
        TakeOver::taken(&self.state)
    }

    fn void(&self) -> PathBuf {
        self.state.with_extension("void")
    }

    /// Removes what a process left that was killed before the VM was its own.
    fn tidy(&self, pid: u32) {
        self.sockets.iter().for_each(|socket| remove_aside(socket, pid));
    }

    /// The state before it is left to the new process.
    fn still(&self) -> PathBuf {
        self.state.with_extension("still")
    }

    fn memory(&self, said: &serde_json::Value) -> Result<PathBuf> {
        let Some(fd) = said["ram_fd"].as_i64() else {
            return refused(format!(
                "process {} does not say where its memory is: it is of another version; stop the VM and start it again",
                self.pid
            ));
        };
        Ok(PathBuf::from(format!("/proc/{}/fd/{fd}", self.pid)))
    }
}

/// How a change came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// The VM runs with the engine now.
    Through,
    /// It runs as before.
    Back,
    /// Neither process is left.
    Lost,
}

impl Instances {
    fn change_path(&self, vm: &VmId) -> PathBuf {
        self.socket(vm).with_extension("change")
    }

    /// The old process's control socket when the new one has its name.
    fn former_socket(&self, vm: &VmId) -> PathBuf {
        self.socket(vm).with_extension("former")
    }

    /// The new process's control socket while the old one has the name.
    fn next_socket(&self, vm: &VmId) -> PathBuf {
        self.socket(vm).with_extension("next")
    }

    /// Whether a change of process has begun and not ended.
    #[must_use]
    pub fn changing(&self, vm: &VmId) -> bool {
        self.change_path(vm).exists()
    }

    /// Whether part of what its disks hold is in journals here, which only the engine reads.
    #[must_use]
    pub fn has_journals(&self, vm: &StoredVm) -> bool {
        self.journals(vm).iter().any(|folder| is_laid_out(folder))
    }

    /// Where the journals of its disks would be.
    fn journals(&self, vm: &StoredVm) -> Vec<PathBuf> {
        let Ok(machine) = self.machine(&self.config(), vm) else {
            return Vec::new();
        };
        let shared = vm.shared_disks();
        let own = |(n, d): &(usize, &steadfast_vmm::spec::DiskSpec)| !d.read_only && !shared.contains(n);
        let mirrored = machine.disks.iter().enumerate().filter(own).map(|(_, d)| d);
        let beside = |disk: &steadfast_vmm::spec::DiskSpec| {
            let mut name = disk.path.clone().into_os_string();
            name.push(".sfj");
            PathBuf::from(name)
        };
        mirrored.map(beside).collect()
    }

    /// Lets a VM that runs here without the engine go on in a process that has it; for how long its guest stood still. Blocks for a
    /// bounded time.
    ///
    /// # Errors
    /// Why not; the VM goes on as before, or [`Instances::end_change`] is to be asked again.
    pub fn give_engine(
        &self,
        id: &VmId,
        entry: &PoolVm,
        pool: &Pool,
        owned: impl Fn() -> Result<Option<Term>>,
    ) -> Result<(Came, Duration)> {
        possible(&self.config(), pool, &entry.stored)?;
        self.ready_disks(id, &entry.stored)?;
        let (Some(before), Some(pid)) = (self.meta(id), self.pid(id)) else {
            return refused(format!("VM {id} does not run here"));
        };
        let Some(started) = procs::started(pid) else {
            return refused(format!("VM {id}: its process {pid} has ended"));
        };
        let machine = self.machine(&self.config(), &entry.stored)?;
        let cards = machine.nics.iter().filter_map(|nic| match &nic.to {
            NicTarget::Socket { own, .. } => Some(own.clone()),
            NicTarget::Bridge(_) | NicTarget::Tap(_) => None,
        });
        let mut change = Change {
            state: self.socket(id).with_extension(format!("{}.state", now_ms())),
            after: None,
            before,
            pid,
            started,
            journals: self
                .journals(&entry.stored)
                .into_iter()
                .filter(|j| !is_laid_out(j))
                .collect(),
            sockets: cards.chain(machine.vsock.map(|v| v.path)).collect(),
        };
        // What a daemon left that ended at the wrong moment.
        for left in [self.former_socket(id), self.next_socket(id)] {
            let _ = fs::remove_file(left);
        }
        self.given_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
        write_json(&self.change_path(id), &change)?;
        let ready = self.make_ready(id, entry, pool, &mut change);
        let began = Instant::now();
        let begun = ready.and_then(|memory| self.leave(id, &change, &memory));
        let (came, taken) = self.end_change(id, owned)?;
        match (begun, came) {
            (_, Came::Through) => Ok((came, taken.saturating_duration_since(began))),
            (Err(error), _) => Err(error),
            (Ok(()), Came::Back) => refused(format!(
                "VM {id}: the process with the engine did not take it over; its log says why: {}",
                self.folder(id).join("log").display()
            )),
            (Ok(()), Came::Lost) => refused(format!("VM {id}: its process ended while it was taken over")),
        }
    }

    /// What would keep the new process from its disks is found while the guest runs; and what they have to write is written now, so
    /// that the guest does not stand still for it.
    fn ready_disks(&self, id: &VmId, vm: &StoredVm) -> Result<()> {
        if self.has_journals(vm) {
            return refused(format!(
                "VM {id}: there are journals of an earlier protection beside its disks (*.sfj), which do not know what it has written since. \
                 Stop it, move them away, and protect it again"
            ));
        }
        let machine = self.machine(&self.config(), vm)?;
        for disk in machine.disks.iter().filter(|d| !d.read_only) {
            let named = || format!("disk {}", disk.path.display());
            let image = File::open(&disk.path).what(named)?;
            image.sync_all().what(named)?;
        }
        Ok(())
    }

    /// Processes of this VM, but for the one before the change.
    fn others(&self, id: &VmId, change: &Change) -> Vec<(u32, u64)> {
        let runs = |pid: u32| Some((pid, procs::started(pid).filter(|at| procs::runs(pid, *at))?));
        let folder = self.folder(id);
        let ours = |pid: &u32| guard::is_vmm_in(*pid, &folder);
        // One that has just begun may have no words yet.
        let noted = self.meta(id).into_iter().flat_map(|now| [now.pid, now.next]);
        let noted = noted
            .flatten()
            .filter(|pid| ours(pid) || guard::has_no_words(*pid));
        let all = procs::all().into_iter().filter(ours);
        let all: BTreeSet<u32> = all.chain(noted).filter(|pid| *pid != change.pid).collect();
        all.into_iter().filter_map(runs).collect()
    }

    /// Starts the new process and waits until it could take the VM over at once; what it has mapped. The guest runs on.
    fn make_ready(&self, id: &VmId, entry: &PoolVm, pool: &Pool, change: &mut Change) -> Result<Mapped> {
        // Of a try whose daemon ended.
        for (pid, started) in self.others(id, change) {
            kill(pid);
            ended(id, pid, started)?;
            change.tidy(pid);
        }
        let wanted = TakeOver::wanted(&change.state);
        fs::write(&wanted, b"").what(|| format!("write {}", wanted.display()))?;
        let from = TakeOver {
            state: change.state.clone(),
            memory: change.memory(&self.ask(id, &Request::Status, ANSWER_BOUND)?)?,
            control: self.next_socket(id),
        };
        let memory = Mapped::of(&fs::metadata(&from.memory).what(|| format!("VM {id}"))?);
        let after = self.begin(id, entry, &How::Primary(entry.term()), pool, Some(from))?;
        let (pid, leased) = (after.pid, after.leased);
        // The guard is to know of it before it could run anything.
        self.edit_meta(id, |meta| {
            (meta.next, meta.leased) = (pid, meta.leased || leased);
        })?;
        change.after = Some(after);
        write_json(&self.change_path(id), change)?;
        let runs = |pid: Option<u32>| pid.is_some_and(|pid| procs::started(pid).is_some());
        let until = Instant::now() + READY_BOUND;
        loop {
            if let Ok(text) = fs::read(TakeOver::ready(&change.state)) {
                let mapped: Mapped = serde_json::from_slice(&text).map_err(|e| {
                    NodeError::Refused(format!("VM {id}: what its new process has mapped: {e}"))
                })?;
                return Ok(mapped);
            }
            if !runs(pid) {
                return refused(format!(
                    "VM {id}: the process with the engine ended before it was ready; its log says why: {}",
                    self.folder(id).join("log").display()
                ));
            }
            self.may_change(id, change, &memory)?;
            if Instant::now() > until {
                return refused(format!(
                    "VM {id}: the process with the engine was not ready after {} s; is this host short of CPU?",
                    READY_BOUND.as_secs()
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether there is still a reason to wait for the new process.
    fn may_change(&self, id: &VmId, change: &Change, mapped: &Mapped) -> Result<()> {
        if !procs::runs(change.pid, change.started) {
            return refused(format!("VM {id}: its process has ended"));
        }
        let given_up = self
            .given_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
        if given_up || self.meta(id).is_some_and(|now| now.stopping.is_some()) {
            return refused(format!("VM {id} shall end"));
        }
        // One that does not answer now may be asked again.
        if let Ok(said) = self.ask(id, &Request::Status, ANSWER_BOUND) {
            return self.same_memory(id, change, &said, mapped);
        }
        Ok(())
    }

    /// A guest that has started anew has another memory than the new process has mapped.
    fn same_memory(
        &self,
        id: &VmId,
        change: &Change,
        said: &serde_json::Value,
        mapped: &Mapped,
    ) -> Result<()> {
        let file = fs::metadata(change.memory(said)?).what(|| format!("VM {id}"))?;
        match Mapped::of(&file) == *mapped {
            true => Ok(()),
            false => refused(format!("VM {id}: its guest has started anew meanwhile")),
        }
    }

    /// The old process stands still and leaves the VM.
    fn leave(&self, id: &VmId, change: &Change, mapped: &Mapped) -> Result<()> {
        self.may_change(id, change, mapped)?;
        let (socket, named) = (self.socket(id), || format!("VM {id}"));
        let answer = control::save_state(&socket, &change.still(), STILL_BOUND).what(named)?;
        self.same_memory(id, change, &answer, mapped)?;
        fs::hard_link(&socket, self.former_socket(id)).what(named)?;
        // Whoever looks for the process of this VM finds either: so does a guard of an older version.
        self.edit_meta(id, |meta| {
            if let Some(next) = meta.next.replace(change.pid) {
                meta.pid = Some(next);
            }
        })?;
        fs::rename(change.still(), &change.state).what(named)
    }

    /// Brings a change that has begun to its end, and when the VM changed hands if it did. Blocks for a bounded time. `owned` says under
    /// which term the VM is this host's now; none: it is another's, or nobody's, and must not run here.
    ///
    /// # Errors
    /// A process does not end or does not answer, or the store does not; it is to be tried again.
    pub fn end_change(&self, id: &VmId, owned: impl Fn() -> Result<Option<Term>>) -> Result<(Came, Instant)> {
        let path = self.change_path(id);
        let text = fs::read(&path).what(|| format!("read {}", path.display()))?;
        let change: Change = serde_json::from_slice(&text)
            .map_err(|e| NodeError::Refused(format!("{}: {e}", path.display())))?;
        let (until, others) = (Instant::now() + TAKE_BOUND, self.others(id, &change));
        let run = || others.iter().any(|(pid, started)| procs::runs(*pid, *started));
        while change.state.exists() && Instant::now() < until && run() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let taken = Instant::now();
        let back = match fs::rename(&change.state, change.void()) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => !change.taken().exists(),
            Err(e) => return Err(e).what(|| format!("rename {}", change.state.display())),
        };
        let old = Some(change.pid).filter(|pid| procs::runs(*pid, change.started));
        let came = if back {
            self.go_back(id, &change, old, owned)?
        } else {
            self.go_on(id, &change, old)?;
            Came::Through
        };
        // First: without what follows the change would look as if it had come to nothing.
        fs::remove_file(&path).what(|| format!("remove {}", path.display()))?;
        for left in [
            &self.former_socket(id),
            &self.next_socket(id),
            &TakeOver::wanted(&change.state),
            &TakeOver::ready(&change.state),
            &TakeOver::draft(&change.state),
            &change.still(),
            &change.state,
            &change.taken(),
            &change.void(),
        ] {
            let _ = fs::remove_file(left);
        }
        Ok((came, taken))
    }

    /// The VM is the new process's; the old one ends.
    fn go_on(&self, id: &VmId, change: &Change, old: Option<u32>) -> Result<()> {
        if let Some(after) = &change.after {
            self.edit_meta(id, |meta| {
                *meta = Meta {
                    stopping: meta.stopping,
                    leased: meta.leased || after.leased,
                    ..after.clone()
                };
            })?;
            self.forget_ends(id, after.pid);
        }
        // The process does that itself; it may be about to.
        let next = self.next_socket(id);
        match fs::rename(&next, self.socket(id)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).what(|| format!("rename {}", next.display()));
            }
            _ => {}
        }
        if let Some(pid) = old {
            let _ = ask(&self.former_socket(id), &Request::Stop, ANSWER_BOUND);
            ended(id, pid, change.started)?;
        }
        Ok(())
    }

    /// The new process ends, and the old one goes on.
    fn go_back(
        &self,
        id: &VmId,
        change: &Change,
        old: Option<u32>,
        owned: impl Fn() -> Result<Option<Term>>,
    ) -> Result<Came> {
        // First: one that is only being started finds that it is not wanted.
        let wanted = TakeOver::wanted(&change.state);
        match fs::remove_file(&wanted) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).what(|| format!("remove {}", wanted.display()));
            }
            _ => {}
        }
        for (pid, started) in self.others(id, change) {
            kill(pid);
            ended(id, pid, started)?;
            change.tidy(pid);
        }
        if let Some(pid) = change.after.as_ref().and_then(|after| after.pid) {
            change.tidy(pid);
        }
        for folder in change.journals.iter().filter(|j| j.exists()) {
            fs::remove_dir_all(folder).what(|| format!("remove {}", folder.display()))?;
        }
        let former = self.former_socket(id);
        let serves = |path: &PathBuf| control::served_by(path).ok() == Some(change.pid);
        if !serves(&self.socket(id)) && serves(&former) {
            fs::rename(&former, self.socket(id)).what(|| format!("VM {id}"))?;
        }
        // The new process may have taken a term before it failed.
        let leased = change.before.leased || self.meta(id).is_some_and(|now| now.leased);
        let owned = match owned() {
            // Nobody boots it elsewhere: its guest need not stand still for the store.
            Err(error) if !leased => {
                tracing::warn!(vm = %id, %error, "it goes on without the store");
                Some(change.before.term)
            }
            owned => owned?,
        };
        self.edit_meta(id, |meta| {
            *meta = Meta {
                stopping: meta.stopping.or(change.before.stopping),
                leased: meta.leased,
                term: owned.unwrap_or(change.before.term),
                ..change.before.clone()
            };
        })?;
        self.forget_ends(id, Some(change.pid));
        let Some(pid) = old else {
            return Ok(Came::Lost);
        };
        if owned.is_none() {
            kill(pid);
            ended(id, pid, change.started)?;
            return Ok(Came::Lost);
        }
        self.ask(id, &Request::Resume, STILL_BOUND)?;
        Ok(Came::Back)
    }
}

fn kill(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Waits until a process has ended; kills it when it does not.
fn ended(id: &VmId, pid: u32, started: u64) -> Result<()> {
    let begun = Instant::now();
    while procs::runs(pid, started) {
        if begun.elapsed() > ANSWER_BOUND {
            kill(pid);
        }
        if begun.elapsed() > END_BOUND {
            return refused(format!(
                "VM {id}: process {pid} does not end, even killed; its disk or memory hangs in the kernel"
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
