//! Failover drills: a copy of a VM's standby is started in isolation, looked at, and thrown away. The VM runs on, protected.
//!
//! ```text
//! any host:          who stands by for it, in sync? -> that host
//! the standby's:     its process writes what it holds (`copy-state`) -> `steadfast vmm --restore` of that, cut off from all networks
//!                    -> vCPUs make progress, no panic, no reset; the VM's own health checks, from within its island -> removed
//! store:             the report, as `vm/VM/drill`; an event; a failed one is a problem in `steadfast status` until one succeeds
//! ```
//! So a standby is not believed, it is tried: what a takeover would run is what was run.

mod island;

use crate::config::Folders;
use crate::error::{IoContext, NodeError, Result, refused};
use crate::health::agent::Agent;
use crate::health::beats::Beats;
use crate::health::check::{self, Inside};
use crate::http::{Method, ask};
use crate::journal::About;
use crate::node::Node;
use crate::pool::Pool;
use crate::procs;
use crate::records::{DrillReport, get, json, now_ms, vm_drill, vm_spec};
use crate::words;
use island::Island;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use steadfast_cluster::model::{Check, HealthPolicy};
use steadfast_protect::copy_out::{STATE_FILE, VSOCK_FILE};
use steadfast_store::Commit;
use steadfast_types::VmId;
use steadfast_vmm::control::{self, Request};
use steadfast_vmm::spec::VmSpec;

/// The whole of it, on the standby's host.
const BOUND: Duration = Duration::from_secs(300);
/// Writing what the standby holds.
const COPY_BOUND: Duration = Duration::from_secs(90);
/// Until the copy's process answers.
const START_BOUND: Duration = Duration::from_secs(60);
/// How long it is looked at, at least.
const LOOK: Duration = Duration::from_secs(2);
/// How long a service may take to pass in the copy: its clients are gone, and it was stopped in the middle of things.
const SERVICE_BOUND: Duration = Duration::from_secs(60);
/// CPU time that a guest uses that runs without ever leaving, in ticks of 10 ms.
const TICKS: u64 = 20;
/// Between two looks.
const AGAIN: Duration = Duration::from_millis(200);

/// Drills a VM on the host of a standby that could take over, wherever that is, and keeps the report.
///
/// # Errors
/// There is no such standby, or its host cannot be asked. A drill that fails is a report.
pub async fn drill(node: &Arc<Node>, vm: &VmId) -> Result<DrillReport> {
    let pool = node.blocking(|n| Pool::load(&*n.kv())).await?;
    let entry = pool.vm_entry(vm)?;
    if entry.stored.record.disks_suffice() {
        return refused(format!(
            "VM {vm}: its standby has its disks only; there is no running guest to try. Class `ft` has one"
        ));
    }
    if !entry.stored.shared_disks().is_empty() {
        return refused(format!(
            "VM {vm}: it has a disk that all hosts reach; there is no copy of it that a drill could write to"
        ));
    }
    let host = entry
        .memory
        .standbys
        .iter()
        .find(|h| pool.can_take_over(vm, entry, h))
        .cloned();
    let Some(host) = host else {
        return refused(format!(
            "VM {vm} has no standby that could take over now: there is nothing to drill; `steadfast status` says why"
        ));
    };
    let report: DrillReport = if host == node.host() {
        let (vm, policy) = (vm.clone(), entry.stored.record.health.clone());
        node.blocking(move |n| Ok(here(n, &vm, policy.as_ref()))).await?
    } else {
        let target = node.target(&host, pool.host(&host)?)?;
        let path = format!("/internal/v1/drill/{vm}");
        ask(&target, Method::POST, &path, None::<&()>, BOUND).await?
    };
    let (vm, kept) = (vm.clone(), report.clone());
    node.blocking(move |n| {
        let (kv, spec) = (n.kv(), vm_spec(&vm));
        let now = kv.read(&[&spec])?;
        let Some(entry) = now.get(&spec) else {
            // Deleted meanwhile; another VM of its name shall not have its report.
            return Ok(());
        };
        let commit = Commit::default().unchanged(&spec, Some(entry));
        if !kv.commit(&commit.put(vm_drill(&vm), json(&kept)?))?.is_done() {
            return Err(NodeError::Conflict(format!("VM {vm}")));
        }
        n.note(About::On(vm, kept.host.clone()), kept.to_string());
        Ok(())
    })
    .await?;
    Ok(report)
}

/// Runs those drills that are due; at most one at a time. For the leader, now and then.
pub fn due(node: &Arc<Node>, pool: &Pool) {
    let due = pool.vms.iter().find(|(vm, entry)| {
        let last = entry.drill.as_ref().map_or(0, |d| d.at_ms);
        let every = entry.stored.drill_every_ms;
        let ready = entry.copies().iter().any(|h| pool.can_take_over(vm, entry, h));
        ready
            && !entry.stored.record.disks_suffice()
            && entry.stored.shared_disks().is_empty()
            && every.is_some_and(|every| now_ms() > last.saturating_add(every))
    });
    let Some(vm) = due.map(|(vm, _)| vm.clone()) else {
        return;
    };
    let node = Arc::clone(node);
    tokio::spawn(async move {
        let Ok(_one) = node.drilling.try_lock() else {
            return;
        };
        if let Err(error) = drill(&node, &vm).await {
            tracing::warn!(%error, %vm, "a drill that was due was not held");
        }
    });
}

/// Removes what a daemon that was killed in a drill left: files, namespaces. Its copies have ended with it. At the daemon's start.
pub fn sweep(folders: &Folders) {
    let drills = folders.data.join("drill");
    for entry in fs::read_dir(&drills).into_iter().flatten().flatten() {
        let name = entry.file_name();
        tracing::warn!(vm = %name.display(), "a drill was cut off; what it left is removed");
        Island::sweep(&name.to_string_lossy());
    }
    let _ = fs::remove_dir_all(&drills);
}

/// Sets how often a VM is drilled. Blocks.
///
/// # Errors
/// The store's.
pub fn schedule(node: &Node, vm: &VmId, every_ms: Option<u64>) -> Result<()> {
    crate::records::update(
        &*node.kv(),
        &vm_spec(vm),
        |old: Option<crate::records::StoredVm>| {
            Ok(old.map(|mut v| {
                v.drill_every_ms = every_ms;
                v
            }))
        },
    )?;
    let text = every_ms.map_or("it is drilled no more by itself".to_owned(), |ms| {
        format!("it is drilled every {} s", ms / 1000)
    });
    node.note(vm, text);
    Ok(())
}

/// The host's part. Blocks.
#[must_use]
pub fn here(node: &Node, vm: &VmId, policy: Option<&HealthPolicy>) -> DrillReport {
    let began = Instant::now();
    let mut report = DrillReport {
        at_ms: now_ms(),
        host: node.host(),
        ok: false,
        text: String::new(),
        epoch: 0,
        copy_ms: 0,
        took_ms: 0,
        checks: Vec::new(),
    };
    let folder = node.folders.data.join("drill").join(vm.as_str());
    let done = (|| {
        let busy = node.drill_here.try_lock();
        let _one = match busy {
            Ok(guard) => guard,
            Err(std::sync::TryLockError::Poisoned(p)) => PoisonError::into_inner(p),
            Err(std::sync::TryLockError::WouldBlock) => {
                return refused("another drill runs on this host; try again in a minute");
            }
        };
        let done = hold(node, vm, policy, &folder, &mut report);
        let _ = fs::remove_dir_all(&folder);
        done
    })();
    match done {
        Ok(text) => (report.ok, report.text) = (true, text),
        Err(error) => report.text = error.to_string(),
    }
    report.took_ms = began.elapsed().as_millis() as u64;
    report
}

fn hold(
    node: &Node,
    vm: &VmId,
    policy: Option<&HealthPolicy>,
    folder: &Path,
    report: &mut DrillReport,
) -> Result<String> {
    let spec: VmSpec = serde_json::from_slice(
        &fs::read(node.instances.folder(vm).join("spec.json"))
            .what(|| format!("what VM {vm} is, on this host"))?,
    )
    .map_err(|e| NodeError::Refused(format!("what VM {vm} is: {e}")))?;
    enough_memory(spec.memory_bytes)?;
    let _ = fs::remove_dir_all(folder);
    let run = folder.join("run");
    fs::create_dir_all(&run).what(|| format!("make {}", run.display()))?;
    let copied = node.instances.ask(
        vm,
        &Request::CopyState {
            folder: folder.to_owned(),
        },
        COPY_BOUND,
    )?;
    report.epoch = copied["epoch"].as_u64().unwrap_or_default();
    report.copy_ms = copied["took_ms"].as_u64().unwrap_or_default();

    let checks = policy.map_or(&[][..], |p| &p.checks);
    let island = Island::make(vm, &spec, checks)?;
    let mut command = island.command(&node.program);
    command.arg("vmm").arg("--restore").arg(folder.join(STATE_FILE));
    command.arg("--console").arg(folder.join("console"));
    command.arg("--debugcon").arg(folder.join("debugcon"));
    // Its files are root's, and it is not counted as the VM that it is a copy of.
    command.args(["--user=0", "--cgroup=off"]);
    // Also when the daemon is killed, or becomes another binary.
    command.arg(format!("--end-with={}", std::process::id()));
    command.env("STEADFAST_RUN_DIR", &run);
    let log = fs::File::create(folder.join("log")).what(|| "a log".into())?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let child = command.spawn().what(|| "start the copy".into())?;
    // Not from a thread without precedence: it ends with the thread that started it.
    crate::precedence::give_way(child.id());
    let mut copy = Copy { child, folder };
    let socket = run.join(format!("{vm}.sock"));
    copy.progress(&socket)?;
    for one in checks {
        let said = match check::is_inside(one) {
            true => inside(one, &folder.join(VSOCK_FILE), SERVICE_BOUND).map(|()| None),
            false => island.check(one, SERVICE_BOUND),
        };
        report.checks.push(match &said {
            Ok(None) => format!("{}: passed", words(one)),
            Ok(Some(why)) => format!("{}: not made, {why}", words(one)),
            Err(why) => format!("{}: {why}", words(one)),
        });
        if let Err(why) = said {
            return refused(format!("{}: {why}", words(one)));
        }
    }
    copy.progress(&socket)?;
    Ok(format!(
        "a copy of epoch {} ran on {}, {} checks passed",
        report.epoch,
        report.host,
        report.checks.iter().filter(|c| c.ends_with("passed")).count()
    ))
}

fn words(check: &Check) -> String {
    match check {
        Check::Tcp { to } => format!("TCP {to}"),
        Check::Http { url } => format!("GET {url}"),
        Check::Command { argv } => format!("`{}` in the guest", argv.join(" ")),
        Check::Heartbeat { within_ms } => format!("a heartbeat within {within_ms} ms"),
    }
}

/// Makes a check over the copy's own vsock device until it passes.
fn inside(check: &Check, vsock: &Path, bound: Duration) -> std::result::Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let agent = Agent::at(vsock);
        let beats = Beats::listen(vsock).map_err(|e| format!("listen for heartbeats: {e}"))?;
        let ways = Inside {
            agent: Some(&agent),
            beats: Some(&beats),
        };
        island::until_it_passes(check, ways, bound).await
    })
}

/// The copy takes its RAM, and a file of the size at most.
fn enough_memory(ram: u64) -> Result<()> {
    let Some((_, free)) = crate::measure::memory() else {
        return Ok(());
    };
    let need = ram.saturating_mul(2);
    if free < need {
        return refused(format!(
            "the copy takes up to {} MiB, this host has {} MiB free: drill it when there is room, or on another standby",
            need >> 20,
            free >> 20
        ));
    }
    Ok(())
}

/// The process of the copy; it ends with this.
struct Copy<'a> {
    child: Child,
    folder: &'a Path,
}

impl Copy<'_> {
    /// It runs: its vCPUs leave the guest again and again, or (in a guest that never does) use their CPU; and the guest has
    /// neither panicked nor started anew.
    fn progress(&mut self, socket: &Path) -> Result<()> {
        let (began, mut first) = (Instant::now(), None);
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return refused(format!("the copy ended ({status}): {}", self.said()));
            }
            let status = control::ask(socket, &Request::Status, Duration::from_secs(5)).unwrap_or_default();
            let number = |name: &str| status[name].as_u64();
            if number("guest_panics") > Some(0) || number("guest_resets") > Some(0) {
                return refused(format!(
                    "the guest panicked or started anew in the copy: {}",
                    self.said()
                ));
            }
            let exits = match &status["exits"] {
                serde_json::Value::Array(all) => Some(all.iter().filter_map(serde_json::Value::as_u64).sum()),
                one => one.as_u64(),
            };
            let now: Option<(u64, u64)> = exits.map(|e| (e, procs::cpu_ticks(self.child.id())));
            match (first, now) {
                (Some((at, (e, t))), Some((exits, ticks)))
                    if Instant::now() > at && (exits > e || ticks >= t + TICKS) =>
                {
                    return Ok(());
                }
                (None, Some(now)) if status["state"] == "running" => {
                    first = Some((Instant::now() + LOOK, now));
                }
                _ => {}
            }
            if began.elapsed() > START_BOUND {
                let what = if first.is_some() {
                    "its vCPUs do not run"
                } else {
                    "it does not answer"
                };
                return refused(format!(
                    "{what} after {} s: {}",
                    START_BOUND.as_secs(),
                    self.said()
                ));
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// The end of its log and console.
    fn said(&self) -> String {
        ["log", "console", "debugcon"]
            .map(|name| words::last(&self.folder.join(name)))
            .join(" | ")
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last report of a VM. Blocks.
///
/// # Errors
/// The store's.
pub fn last(node: &Node, vm: &VmId) -> Result<Option<DrillReport>> {
    get(&*node.kv(), &vm_drill(vm))
}

/// What a host is asked for another one's drill. Blocks.
///
/// # Errors
/// The VM is not of this pool.
pub fn for_another(node: &Node, vm: &VmId) -> Result<DrillReport> {
    let pool = Pool::load(&*node.kv())?;
    let policy = pool.vm_entry(vm)?.stored.record.health.clone();
    Ok(here(node, vm, policy.as_ref()))
}
