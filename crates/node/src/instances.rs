//! The VM processes of this host: started, found again after a restart of the daemon, asked, stopped.
//!
//! A process is a child in a process group of its own that outlives the daemon. What runs here is written down in
//! `RUN/NAME.meta` before it is started; its control socket is `RUN/NAME.sock`. Its files are in `DATA/vm/NAME/`. The run folder
//! does not survive a restart of the host, and neither do the processes.

use crate::config::{Folders, NodeConfig, write_file};
use crate::error::{IoContext, NodeError, Result};
use crate::guard;
use crate::heard::Heard;
use crate::limits::{self, VmLimits};
use crate::loads::VmLoads;
use crate::pool::{Pool, PoolVm};
use crate::procs;
use crate::records::{HostInfo, InstanceReport, StoredVm, Takeover, now_ms};
use crate::words;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_cluster::model::{FailureClass, Phase, Protection, VmLoad};
use steadfast_disk::image::{self, ImageFormat, create};
use steadfast_protect::{PeerSpec, ProtectSpec, StoreSpec, TakeOver, TlsSpec};
use steadfast_types::{HostId, Term, VmId};
use steadfast_vmm::control::{Request, ask, served_by};
use steadfast_vmm::guest_care::Mishaps;
use steadfast_vmm::isolation::cgroup;
use steadfast_vmm::process::{DISK_FAULT_EXIT, FENCED_EXIT};
use steadfast_vmm::spec::VmSpec;

/// First port of replication links. A link of VM number v to host number h uses `FIRST + v * LINKS + h`.
const FIRST_PORT: u32 = 20_000;
/// Links of one VM on one host, so many at most; and so the most hosts of a pool with protected VMs.
pub const LINKS: u16 = 16;
/// Number of VMs beyond which there are no ports for links.
pub const PROTECTED_MAX: u16 = 798;
/// How long a status is awaited.
const STATUS_BOUND: Duration = Duration::from_millis(500);
/// How long an instance may take to open or close a link.
const PEER_BOUND: Duration = Duration::from_secs(3);
/// How long it may take to set the rate of its network cards.
const NET_BOUND: Duration = Duration::from_millis(300);
/// How long a process may take to end when told to.
const END_BOUND: Duration = Duration::from_secs(10);
/// A log longer than this is begun anew at the next start, bytes.
const LOG_MAX: u64 = 4 << 20;

/// What was started here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Under which term; for protected instances the one when they were started.
    pub term: Term,
    /// It has the engine of protection.
    pub hot: bool,
    /// Its process may run only while the host has its lease.
    pub leased: bool,
    /// It was started as the one that boots the guest.
    pub start: bool,
    /// When, wall clock, ms.
    pub started_ms: u64,
    /// It shall end, in order or not, since this wall-clock time, ms.
    pub stopping: Option<(u64, bool)>,
    /// Its process.
    pub pid: Option<u32>,
    /// The limits that were set for it.
    #[serde(default)]
    pub limits: VmLimits,
    /// What its process was told that its network cards carry at most.
    #[serde(default)]
    pub net_max: Option<String>,
    /// A process that is about to take it over from that one.
    #[serde(default)]
    pub next: Option<u32>,
}

/// How an instance is begun.
pub enum How {
    /// Boots without protection, under this term.
    Plain(Term),
    /// With the engine of protection: boots the guest if the store lets it.
    Primary(Term),
    /// With the engine: stands by.
    Standby(Term),
}

/// See the module.
pub struct Instances {
    folders: Folders,
    config: Mutex<NodeConfig>,
    program: PathBuf,
    /// How processes ended that were this daemon's children: of each VM those that matter still.
    ended: Arc<Mutex<HashMap<VmId, BTreeMap<u32, Ended>>>>,
    heard: Heard,
    loads: VmLoads,
    /// What is written down about an instance is changed by one at a time.
    edits: Mutex<()>,
    /// VMs that shall end though their process is being changed.
    pub(crate) given_up: Mutex<BTreeSet<VmId>>,
}

struct Ended {
    exit: Exit,
    /// Its last words were asked for.
    told: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, its guest shut down.
    Clean,
    /// With this code or signal.
    Failed(Option<i32>, Option<i32>),
}

impl Instances {
    /// For this host. `program` is the `steadfast` binary.
    #[must_use]
    pub fn new(folders: Folders, config: NodeConfig, program: PathBuf) -> Self {
        Self {
            folders,
            config: Mutex::new(config),
            program,
            ended: Arc::default(),
            heard: Heard::default(),
            loads: VmLoads::default(),
            edits: Mutex::default(),
            given_up: Mutex::default(),
        }
    }

    /// Later instances are started with these settings.
    pub fn set_config(&self, config: NodeConfig) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
    }

    pub(crate) fn config(&self) -> NodeConfig {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A VM's files on this host.
    #[must_use]
    pub fn folder(&self, vm: &VmId) -> PathBuf {
        self.folders.data.join("vm").join(vm.as_str())
    }

    pub(crate) fn socket(&self, vm: &VmId) -> PathBuf {
        self.folders.run.join(format!("{vm}.sock"))
    }

    fn meta_path(&self, vm: &VmId) -> PathBuf {
        self.folders.run.join(format!("{vm}.meta"))
    }

    /// What was started here, running or not.
    #[must_use]
    pub fn all(&self) -> BTreeMap<VmId, Meta> {
        let Ok(dir) = fs::read_dir(&self.folders.run) else {
            return BTreeMap::new();
        };
        dir.flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let vm = VmId::new(name.to_str()?.strip_suffix(".meta")?).ok()?;
                let meta = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
                Some((vm, meta))
            })
            .collect()
    }

    /// What was started here under this name.
    #[must_use]
    pub fn meta(&self, vm: &VmId) -> Option<Meta> {
        read_meta(&self.meta_path(vm))
    }

    /// Changes what is written down about an instance, if anything is.
    pub(crate) fn edit_meta(&self, vm: &VmId, edit: impl FnOnce(&mut Meta)) -> Result<()> {
        let _one = self.edits.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = self.meta(vm) else {
            return Ok(());
        };
        let mut meta = before.clone();
        edit(&mut meta);
        match meta == before {
            true => Ok(()),
            false => self.write_meta(vm, &meta),
        }
    }

    /// Nothing is told any more of processes of this VM that ended, but for this one.
    pub(crate) fn forget_ends(&self, vm: &VmId, but: Option<u32>) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_vm) = ended.get_mut(vm) {
            of_vm.retain(|pid, _| Some(*pid) == but);
        }
    }

    fn write_meta(&self, vm: &VmId, meta: &Meta) -> Result<()> {
        let text = serde_json::to_vec(meta).map_err(|e| NodeError::Refused(e.to_string()))?;
        write_file(&self.meta_path(vm), &text)
    }

    /// The process of an instance, if it lives.
    #[must_use]
    pub fn pid(&self, vm: &VmId) -> Option<u32> {
        served_by(&self.socket(vm))
            .ok()
            .or_else(|| self.meta(vm)?.pid.filter(|pid| guard::is_vmm(*pid, vm)))
    }

    /// Starts an instance. One that runs is left alone.
    ///
    /// # Errors
    /// Files cannot be written, the process cannot be started.
    pub fn start(&self, id: &VmId, entry: &PoolVm, how: &How, pool: &Pool) -> Result<()> {
        if self.pid(id).is_some() {
            return Ok(());
        }
        if self.changing(id) {
            return Err(NodeError::Refused(format!(
                "VM {id}: its process is being changed"
            )));
        }
        self.begin(id, entry, how, pool, None).map(drop)
    }

    /// Starts an instance, whatever runs here. One that is to take the VM over from another process is not written down: the VM is the
    /// other's until then.
    pub(crate) fn begin(
        &self,
        id: &VmId,
        entry: &PoolVm,
        how: &How,
        pool: &Pool,
        takes_over: Option<TakeOver>,
    ) -> Result<Meta> {
        let waits = takes_over.is_some();
        let vm = &entry.stored;
        let (hot, start, term) = match how {
            How::Plain(term) => (false, true, *term),
            How::Primary(term) => (true, true, *term),
            How::Standby(term) => (true, false, *term),
        };
        let folder = self.folder(id);
        fs::create_dir_all(&folder).what(|| format!("make {}", folder.display()))?;
        let config = self.config();
        let machine = self.machine(&config, vm)?;
        if !start {
            empty_disks(vm, &machine)?;
        }
        let spec = folder.join("spec.json");
        write_json(&spec, &machine)?;
        let mut command = Command::new(&self.program);
        command.arg("vmm").arg("--spec").arg(&spec);
        if hot {
            let protect = folder.join("protect.json");
            let mut settings = self.protection(&config, entry, pool)?;
            settings.start = start;
            settings.takes_over = takes_over;
            write_json(&protect, &settings)?;
            command.arg("--protect").arg(&protect);
        }
        command.arg("--console").arg(folder.join("console"));
        command.arg("--debugcon").arg(folder.join("debugcon"));
        command.arg("--reset-panicked");
        command.args(&config.vmm_args);
        command.env("STEADFAST_RUN_DIR", &self.folders.run);
        if hot && !config.vmm_args.iter().any(|a| a == "--cgroup=off") {
            // Not from here: once its threads have real-time priority, some kernels let it into no group any more.
            command.env(cgroup::OF_POOL, cgroup::PARENT);
        }
        let log = open_log(&folder.join("log"))?;
        let log_too = log.try_clone().what(|| "the instance's log".into())?;
        command.stdin(Stdio::null()).stdout(log_too).stderr(log);
        command.process_group(0);
        let mut meta = Meta {
            term,
            hot,
            leased: entry.boots_anywhere() && (start || vm.record.protection == Protection::Restart),
            start,
            started_ms: now_ms(),
            stopping: None,
            pid: None,
            limits: VmLimits::default(),
            net_max: None,
            next: None,
        };
        if !waits {
            // Before the process: whoever finds one knows what it is, and the guard knows whom to end.
            self.write_meta(id, &meta)?;
            self.forget_ends(id, None);
        }
        let mut child = match crate::precedence::without(|| command.spawn())? {
            Ok(child) => child,
            Err(source) => {
                let what = format!("start {}", self.program.display());
                return Err(NodeError::Io { what, source });
            }
        };
        meta.pid = Some(child.id());
        if !waits {
            self.write_meta(id, &meta)?;
        }
        let (ended, name, pid) = (Arc::clone(&self.ended), id.clone(), child.id());
        // Of an earlier process with this number.
        if let Some(of_vm) = ended.lock().unwrap_or_else(PoisonError::into_inner).get_mut(id) {
            of_vm.remove(&pid);
        }
        let waiter = move || {
            if let Ok(status) = child.wait() {
                let exit = match status.success() {
                    true => Exit::Clean,
                    false => Exit::Failed(status.code(), status.signal()),
                };
                tracing::info!(vm = %name, pid, ?exit, "an instance ended");
                let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
                let of_vm = ended.entry(name).or_default();
                of_vm.insert(pid, Ended { exit, told: false });
            }
        };
        let spawned = std::thread::Builder::new().name("vmm-wait".into()).spawn(waiter);
        spawned
            .map(|_| meta)
            .what(|| "a thread that waits for the instance".into())
    }

    /// How an instance that was this daemon's child ended, if it did. Of a VM that went on in another process nothing has ended.
    #[must_use]
    pub fn exit(&self, vm: &VmId) -> Option<Exit> {
        let pid = self.meta(vm)?.pid?;
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        Some(ended.get(vm)?.get(&pid)?.exit)
    }

    /// How an instance that failed ended, and what it and its guest said last; once.
    #[must_use]
    pub fn last_words(&self, vm: &VmId) -> Option<String> {
        let pid = self.meta(vm)?.pid?;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let end = ended.get_mut(vm)?.get_mut(&pid)?;
        if std::mem::replace(&mut end.told, true) {
            return None;
        }
        let how = match end.exit {
            Exit::Clean => return None,
            // Another host runs the VM, as it should.
            Exit::Failed(Some(code), None) if code == i32::from(FENCED_EXIT) => return None,
            Exit::Failed(_, Some(signal)) => format!("killed by signal {signal}"),
            Exit::Failed(code, None) => format!("exit code {}", code.unwrap_or(-1)),
        };
        drop(ended);
        let folder = self.folder(vm);
        let said = ["log", "console"].map(|name| words::last(&folder.join(name)));
        Some(format!(
            "{how}; its log ends with: {}; its console with: {}",
            said[0], said[1]
        ))
    }

    /// The host's side of a VM's vsock device, if it has one.
    #[must_use]
    pub fn vsock(&self, vm: &StoredVm) -> Option<PathBuf> {
        vm.machine.vsock.as_ref()?;
        let machine = self.machine(&self.config(), vm).ok()?;
        machine.vsock.map(|v| v.path)
    }

    /// What the VM is made of, on this host.
    pub(crate) fn machine(&self, config: &NodeConfig, vm: &StoredVm) -> Result<VmSpec> {
        let wrong = |e: serde_json::Error| NodeError::Refused(format!("specification: {e}"));
        let text = serde_json::to_string(&vm.machine).map_err(wrong)?;
        let data = self.folders.data.display().to_string();
        let run = self.folders.run.display().to_string();
        let text = text
            .replace("{host}", config.host.as_str())
            .replace("{run}", &run)
            .replace("{data}", &data);
        serde_json::from_str(&text).map_err(wrong)
    }

    /// Writes down what the disks of a new VM are, as far as they are here: their format, which is not asked again (a guest that writes another
    /// one's header into a raw disk changes nothing), and the size that its copies on other hosts will have.
    ///
    /// # Errors
    /// What cannot be used.
    pub fn look_at_disks(&self, vm: &mut StoredVm) -> Result<()> {
        let here = self.machine(&self.config(), vm)?;
        for (wanted, disk) in vm.machine.disks.iter_mut().zip(&here.disks) {
            if !disk.path.exists() {
                continue;
            }
            let told = disk.format.as_deref().map(str::parse::<ImageFormat>).transpose();
            let info = told.and_then(|told| image::look_at(&disk.path, told));
            let info = info.map_err(|e| NodeError::Refused(e.to_string()))?;
            wanted.format = Some(info.format.name().into());
            let name = wanted.path.display().to_string();
            if let Some(record) = vm.record.disks.iter_mut().find(|d| d.name == name) {
                record.bytes = info.capacity_bytes;
            }
        }
        Ok(())
    }

    /// Tells this host's instance what its class promises now; links it with those hosts that have, or shall have, one too, and with no
    /// others; and tells it where the store's members are, if that has changed: a takeover must not wait for one that was taken
    /// out long ago.
    ///
    /// # Errors
    /// The instance does not answer, or its folder cannot be written. The next round goes on.
    pub fn keep_protection(&self, id: &VmId, entry: &PoolVm, pool: &Pool) -> Result<()> {
        let ProtectSpec {
            peers: wanted,
            store,
            hold_outputs,
            max_interval_us,
            memory,
            ..
        } = self.protection(&self.config(), entry, pool)?;
        let path = self.folder(id).join("protect.json");
        let text = fs::read(&path).what(|| format!("read {}", path.display()))?;
        let mut now: ProtectSpec = serde_json::from_slice(&text)
            .map_err(|e| NodeError::Refused(format!("{}: {e}", path.display())))?;
        if (now.hold_outputs, now.max_interval_us, now.memory) != (hold_outputs, max_interval_us, memory) {
            let class = Request::Class {
                hold_outputs,
                max_interval_us,
                memory,
            };
            self.ask(id, &class, PEER_BOUND)?;
            (now.hold_outputs, now.max_interval_us, now.memory) = (hold_outputs, max_interval_us, memory);
            write_json(&path, &now)?;
        }
        for peer in &wanted {
            if now.peers.iter().any(|p| p.host == peer.host) {
                continue;
            }
            let add = Request::AddPeer {
                host: peer.host.clone(),
                paths: peer.paths.clone(),
                standby: true,
            };
            self.ask(id, &add, PEER_BOUND)?;
            now.peers.push(peer.clone());
            write_json(&path, &now)?;
        }
        for gone in now.peers.clone() {
            if wanted.iter().any(|p| p.host == gone.host) {
                continue;
            }
            let remove = Request::RemovePeer {
                host: gone.host.clone(),
            };
            self.ask(id, &remove, PEER_BOUND)?;
            now.peers.retain(|p| p.host != gone.host);
            write_json(&path, &now)?;
        }
        if let StoreSpec::Etcd { etcd } = &store
            && now.store != store
        {
            let endpoints = etcd.endpoints.clone();
            self.ask(id, &Request::StoreEndpoints { endpoints }, PEER_BOUND)?;
            now.store = store;
            write_json(&path, &now)?;
        }
        Ok(())
    }

    fn protection(&self, config: &NodeConfig, entry: &PoolVm, pool: &Pool) -> Result<ProtectSpec> {
        let (vm, hosts) = (&entry.stored, &pool.hosts);
        let involved = entry.copies();
        let me = hosts
            .get(&config.host)
            .ok_or_else(|| NodeError::NotFound(format!("host {} in the pool", config.host)))?;
        let peers = hosts
            .iter()
            .filter(|(id, _)| **id != config.host && involved.contains(id))
            .map(|(id, info)| PeerSpec {
                host: id.clone(),
                paths: link(vm.index, (&config.host, me), (id, info)),
                standby: true,
            });
        let tls = self.folders.tls();
        Ok(ProtectSpec {
            peers: peers.collect(),
            // Also of a VM that is only moved: what a client was told is not taken back when its host dies meanwhile.
            hold_outputs: !matches!(vm.record.protection, Protection::Checkpoint { .. }),
            tls: Some(TlsSpec {
                ca: tls.ca,
                certificate: tls.certificate,
                key: tls.key,
                crl: Some(self.folders.crl()).filter(|p| p.is_file()),
            }),
            suspect_ms: pool.timings.vm_suspect_ms,
            // Of one that is moved as well: its guest shall go on.
            memory: !vm.record.disks_suffice() || pool.moves(&vm.record.id),
            boot_after_ms: pool.timings.dead_ms,
            shared_disks: vm.shared_disks(),
            max_interval_us: match vm.record.protection {
                Protection::Checkpoint { interval_ms } => Some(interval_ms.saturating_mul(1000)),
                _ => None,
            },
            ..ProtectSpec::new(config.host.clone(), config.store_spec(&self.folders))
        })
    }

    /// Asks an instance.
    ///
    /// # Errors
    /// It does not run here, does not answer, or says why not.
    pub fn ask(&self, vm: &VmId, request: &Request, bound: Duration) -> Result<Value> {
        ask(&self.socket(vm), request, bound).what(|| format!("VM {vm}"))
    }

    /// What all instances here are doing.
    #[must_use]
    pub fn report(&self) -> BTreeMap<VmId, InstanceReport> {
        let all = self.all();
        self.heard.keep(|vm| all.contains_key(vm));
        self.loads.keep(|vm| all.contains_key(vm));
        all.into_iter()
            .map(|(vm, meta)| {
                let report = self.report_one(&vm, &meta);
                (vm, report)
            })
            .collect()
    }

    fn report_one(&self, vm: &VmId, meta: &Meta) -> InstanceReport {
        let mut report = InstanceReport {
            phase: if meta.start {
                Phase::Starting
            } else {
                Phase::Standby
            },
            term: meta.term,
            protected: false,
            filled: false,
            lag_epochs: 0,
            copying: BTreeMap::new(),
            unfit: BTreeMap::new(),
            stays: None,
            takeover: None,
            service: None,
            load: VmLoad::default(),
            mishaps: Mishaps::default(),
        };
        let answer = self.ask(vm, &Request::Status, STATUS_BOUND);
        let answered = answer.is_ok();
        if let Ok(status) = &answer {
            if let Some(pid) = self.pid(vm) {
                report.load = self.loads.sample(vm, pid, status, Instant::now());
            }
            report.mishaps = serde_json::from_value(status["mishaps"].clone()).unwrap_or_default();
        }
        match answer {
            Ok(status) if meta.hot => {
                read_protocol(&status["protocol"], meta, &mut report);
                if report.phase == Phase::Running {
                    report.takeover = read_takeover(&status["timeline"]["takeover"]);
                }
            }
            Ok(_) => report.phase = Phase::Running,
            Err(_) if self.pid(vm).is_some() => {
                if let Some(last) = self.heard.instead(vm, meta.pid, Instant::now()) {
                    report = last;
                }
            }
            Err(_) => {
                let disk = Exit::Failed(Some(i32::from(DISK_FAULT_EXIT)), None);
                report.phase = Phase::Failed(match self.exit(vm) == Some(disk) {
                    true => FailureClass::DiskFault,
                    false => FailureClass::ProcessDied,
                });
            }
        }
        if !answered
            && self.changing(vm)
            && let Some(last) = self.heard.lately(vm, Instant::now())
        {
            // It goes on in another process in a moment.
            report = last;
        }
        if answered {
            self.heard.note(vm, meta.pid, Instant::now(), &report);
        }
        if meta.stopping.is_some() {
            report.phase = Phase::Stopping;
        }
        report
    }

    /// Marks an instance as one that shall end.
    ///
    /// # Errors
    /// The run folder cannot be written.
    pub fn mark_stopping(&self, vm: &VmId, in_order: bool) -> Result<()> {
        self.edit_meta(vm, |meta| {
            if meta.stopping.is_none_or(|(_, order)| order && !in_order) {
                meta.stopping = Some((now_ms(), in_order));
            }
        })
    }

    /// Sets the limits of an instance's process, unless that was tried.
    ///
    /// # Errors
    /// They cannot be set (they are not tried again until they change, or the process does); or the run folder cannot be written.
    pub fn set_limits(&self, id: &VmId, vm: &StoredVm) -> Result<()> {
        let (Some(meta), Some(pid)) = (self.meta(id), self.pid(id)) else {
            return Ok(());
        };
        if meta.net_max != vm.limits.net_max {
            // One that does not answer yet is asked again in the next round, which must not be late for it.
            match self.ask(id, &Request::NetRate(vm.limits.net_rate()?), NET_BOUND) {
                Ok(_) => {
                    self.edit_meta(id, |meta| meta.net_max.clone_from(&vm.limits.net_max))?;
                }
                Err(error) => tracing::debug!(vm = %id, %error, "its cards are not limited yet"),
            }
        }
        if meta.limits == vm.limits {
            return Ok(());
        }
        self.edit_meta(id, |meta| meta.limits = vm.limits.clone())?;
        limits::set(id, pid, &vm.limits.read(vm.machine.memory_bytes)?)
    }

    /// Puts an instance under the lease, or takes it out.
    ///
    /// # Errors
    /// The run folder cannot be written.
    pub fn set_leased(&self, vm: &VmId, leased: bool) -> Result<()> {
        self.edit_meta(vm, |meta| meta.leased = leased)
    }

    /// Ends an instance's process and waits for it; what was written down about it goes too. Blocks for a bounded time.
    ///
    /// # Errors
    /// The process does not end even when killed.
    pub fn end(&self, vm: &VmId) -> Result<()> {
        if self.changing(vm) {
            let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
            given_up.insert(vm.clone());
            return Err(NodeError::Refused(format!(
                "VM {vm}: its process is being changed; that is given up"
            )));
        }
        if let Some(pid) = self.pid(vm) {
            let _ = self.ask(vm, &Request::Stop, Duration::from_secs(3));
            let until = Instant::now() + END_BOUND;
            let kill_at = Instant::now() + Duration::from_secs(3);
            let since = procs::started(pid);
            while since.is_some_and(|since| procs::runs(pid, since)) {
                if Instant::now() > kill_at
                    && let Some(pid) = Pid::from_raw(pid.cast_signed())
                {
                    let _ = kill_process(pid, Signal::KILL);
                }
                if Instant::now() > until {
                    return Err(NodeError::Refused(format!(
                        "VM {vm}: process {pid} does not end, even killed; its disk or memory hangs in the kernel"
                    )));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.forget(vm)
    }

    /// Forgets an instance that has no process.
    ///
    /// # Errors
    /// The run folder cannot be written.
    pub fn forget(&self, vm: &VmId) -> Result<()> {
        limits::tidy(vm);
        self.ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(vm);
        match fs::remove_file(self.meta_path(vm)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).what(|| format!("forget VM {vm}")),
            _ => Ok(()),
        }
    }
}

/// Where the two ends of a link meet: at the host with the smaller name, one port for each VM and other host.
fn link(vm: u16, one: (&HostId, &HostInfo), two: (&HostId, &HostInfo)) -> Vec<SocketAddr> {
    let (listens, other) = if one.0 < two.0 {
        (one.1, two.1)
    } else {
        (two.1, one.1)
    };
    let port = FIRST_PORT + u32::from(vm) * u32::from(LINKS) + u32::from(other.index % LINKS);
    let port = u16::try_from(port).unwrap_or(u16::MAX);
    listens
        .replication
        .iter()
        .map(|ip| SocketAddr::new(*ip, port))
        .collect()
}

fn read_protocol(protocol: &Value, meta: &Meta, report: &mut InstanceReport) {
    if let Some(term) = protocol["term"].as_u64() {
        report.term = Term(term);
    }
    if protocol["role"] != "primary" {
        report.phase = if meta.start && report.term == Term::ZERO {
            Phase::Starting
        } else {
            Phase::Standby
        };
        report.filled = !protocol["staged"].is_null();
        return;
    }
    report.phase = Phase::Running;
    report.protected = protocol["protected"] == true;
    report.lag_epochs = protocol["lag_epochs"].as_u64().unwrap_or(0);
    for member in protocol["members"].as_array().into_iter().flatten() {
        let host = member["host"].as_str().and_then(|h| HostId::new(h).ok());
        if let (Some(host), Some(left)) = (host, member["copying_bytes"].as_u64()) {
            report.copying.insert(host, left);
        }
    }
    report.stays = protocol["stays"].as_str().map(str::to_owned);
    report.unfit = serde_json::from_value(protocol["unfit"].clone()).unwrap_or_default();
}

fn read_takeover(takeover: &Value) -> Option<Takeover> {
    let ago_us = takeover["since_running_us"].as_u64()?;
    let us = |name: &str| takeover[name].as_u64();
    Some(Takeover {
        at_ms: now_ms().saturating_sub(ago_us / 1000),
        detect_us: us("detect_us"),
        grant_us: us("grant_us"),
        resume_us: us("resume_us"),
        first_output_us: us("first_output_us"),
    })
}

fn read_meta(path: &Path) -> Option<Meta> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| NodeError::Refused(e.to_string()))?;
    write_file(path, &text)
}

fn open_log(path: &Path) -> Result<File> {
    let long = fs::metadata(path).is_ok_and(|m| m.len() > LOG_MAX);
    let mut options = File::options();
    options.create(true);
    // Always in append mode: two processes may write it.
    options.append(true);
    let file = options.open(path).what(|| format!("open {}", path.display()))?;
    if long {
        file.set_len(0).what(|| format!("empty {}", path.display()))?;
    }
    Ok(file)
}

/// A standby's images: made empty where they are missing; the primary fills them.
fn empty_disks(vm: &StoredVm, machine: &VmSpec) -> Result<()> {
    let shared = vm.shared_disks();
    for (n, (wanted, disk)) in vm.machine.disks.iter().zip(&machine.disks).enumerate() {
        if disk.read_only || disk.path.exists() || shared.contains(&n) {
            continue;
        }
        let name = wanted.path.display().to_string();
        let Some(record) = vm.record.disks.iter().find(|d| d.name == name && d.bytes > 0) else {
            continue;
        };
        if let Some(folder) = disk.path.parent() {
            fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
        }
        // Sectors; of an odd end no guest sees anything.
        let whole = record.bytes / image::SECTOR * image::SECTOR;
        let made = match disk.format.as_deref() {
            Some("qcow2") => create::create_qcow2(&disk.path, whole),
            _ => create::create_raw(&disk.path, whole),
        };
        made.map_err(|e| NodeError::Refused(format!("a disk for the standby of VM {}: {e}", vm.record.id)))?;
    }
    Ok(())
}
