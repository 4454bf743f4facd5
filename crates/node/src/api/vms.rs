//! VMs: create, delete, start, stop, protect, migrate, look at.

use super::handlers::load;
use super::types::{Done, DryRun, HowToStop, MoveTo, NewClass, NewHealth, NewVm, VmStatus, class, vm_status};
use super::{Answer, Failure};
use crate::engine;
use crate::error::{IoContext, NodeError, Result, refused};
use crate::http::ask;
use crate::limits::VmLimits;
use crate::migrate;
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{StoredVm, VmMemory, json, update, vm_drill, vm_spec, vm_state};
use axum::Json;
use axum::extract::{Path, Query, State};
use hyper::Method;
use serde::{Deserialize, Serialize};
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::time::Duration;
use steadfast_cluster::decide::admit;
use steadfast_cluster::model::{
    DiskPlace, DiskRecord, MoveCause, Power, Protection, Resources, VmSpecRecord,
};
use steadfast_protect::store::RecordStore;
use steadfast_store::Commit;
use steadfast_types::VmId;
use utoipa::ToSchema;

type Shared = State<Arc<Node>>;

/// What hosts of an older version cannot read.
const NEW_HERE: &str = "not all hosts of the pool run this version yet, and older ones do not know watchdogs, commands and heartbeats in the \
                        guest: bring all hosts to one version first (`steadfast pool upgrade`)";

/// How much of a console is shown, bytes.
const CONSOLE_BYTES: u64 = 64 << 10;

fn index_key(index: u16) -> String {
    format!("p/vmindex/{index}")
}

/// All VMs.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = Vec<VmStatus>)))]
pub async fn list(State(node): Shared) -> Answer<Vec<VmStatus>> {
    let pool = load(&node).await?;
    Ok(Json(
        pool.vms.iter().map(|(id, vm)| vm_status(&pool, id, vm)).collect(),
    ))
}

/// A VM with all that is known of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shown {
    /// How it stands.
    pub status: VmStatus,
    /// What is wanted.
    pub wanted: StoredVm,
    /// What the pool remembers.
    pub memory: VmMemory,
}

/// A VM with all that is known of it.
#[utoipa::path(get, path = "/v1/vms/{vm}", params(("vm" = String, Path)), responses((status = 200, body = VmStatus)))]
pub async fn show(State(node): Shared, Path(vm): Path<VmId>) -> Answer<Shown> {
    let pool = load(&node).await?;
    let entry = pool.vm_entry(&vm)?;
    Ok(Json(Shown {
        status: vm_status(&pool, &vm, entry),
        wanted: entry.stored.clone(),
        memory: entry.memory.clone(),
    }))
}

/// What cannot be kept is refused before anything is written.
fn check(node: &Node, pool: &Pool, stored: &StoredVm) -> Result<()> {
    let (id, spec) = (&stored.record.id, &stored.record);
    match spec.protection {
        Protection::Checkpoint { .. } if !spec.disks.is_empty() => refused(format!(
            "VM {id}: class `checkpoint` with writable disks could lose what the guest has flushed; use `ft`, or make the \
             disks read-only (,ro)"
        )),
        _ if spec.standbys_wanted() > 0 => engine::possible(&node.config(), pool, stored),
        _ => Ok(()),
    }
}

fn admitted(pool: &Pool, spec: &VmSpecRecord) -> Result<Vec<String>> {
    let placed = admit(&pool.snapshot(None), spec).map_err(|r| NodeError::Refused(r.to_string()))?;
    let mut plan = vec![format!("start {} on {}", spec.id, placed.host)];
    plan.extend(
        placed
            .standbys
            .iter()
            .map(|h| format!("a standby of {} on {h}", spec.id)),
    );
    Ok(plan)
}

fn stored(new: &NewVm, index: u16) -> Result<StoredVm> {
    let machine = new.machine.clone();
    let disks = machine.disks.iter().filter(|d| !d.read_only).map(|d| DiskRecord {
        name: d.path.display().to_string(),
        bytes: 0,
        place: match &new.shared {
            Some(storage) => DiskPlace::Shared(storage.clone()),
            None => DiskPlace::Local,
        },
    });
    let baseline = Some(machine.cpu.name()).filter(|n| n.starts_with("x86-64"));
    Ok(StoredVm {
        drill_every_ms: None,
        record: VmSpecRecord {
            id: machine.name.clone(),
            resources: Resources {
                cpu_milli: u64::from(machine.vcpus) * 1000,
                memory_bytes: machine.memory_bytes,
                disk_bytes: 0,
            },
            disks: disks.collect(),
            protection: class(&new.class).map_err(NodeError::Refused)?,
            standbys: 1,
            standby_memory: Default::default(),
            baseline: baseline.unwrap_or_default().into(),
            groups: Default::default(),
            sites: Default::default(),
            priority: new.priority,
            depends_on: Default::default(),
            application: None,
            health: None,
            power: if new.start { Power::On } else { Power::Off },
            pinned: false,
        },
        machine,
        index,
        limits: VmLimits::default(),
    })
}

/// A new VM.
#[utoipa::path(post, path = "/v1/vms", request_body = NewVm, params(("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn create(State(node): Shared, Query(dry): Query<DryRun>, Json(new): Json<NewVm>) -> Answer<Done> {
    let pool = load(&node).await?;
    let id = new.machine.name.clone();
    if pool.vms.contains_key(&id) {
        return refused(format!("there is a VM {id} already; choose another name")).map_err(Failure);
    }
    if new.machine.watchdog && !pool.one_version() {
        return refused(NEW_HERE).map_err(Failure);
    }
    let index = Pool::free_index(pool.vms.values().map(|v| v.stored.index));
    let mut vm = stored(&new, index)?;
    vm = node
        .blocking(move |n| n.instances.look_at_disks(&mut vm).map(|()| vm))
        .await?;
    check(&node, &pool, &vm)?;
    let mut plan = vec![format!("create {id}, class {}", vm.record.protection.name())];
    if new.start {
        plan.extend(admitted(&pool, &vm.record)?);
    }
    if !dry.dry_run {
        let value = json(&vm)?;
        node.blocking(move |n| {
            let commit = Commit::default()
                .unchanged(vm_spec(&id), None)
                .unchanged(index_key(index), None)
                .put(vm_spec(&id), value)
                .put(index_key(index), id.as_str());
            if !n.kv().commit(&commit)?.is_done() {
                return Err(NodeError::Conflict(format!("VM {id}")));
            }
            n.note(&id, "it was created");
            Ok(())
        })
        .await?;
        node.wake.notify_one();
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Forget a VM that is off. Its disks stay where they are.
#[utoipa::path(delete, path = "/v1/vms/{vm}", params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn delete(State(node): Shared, Path(vm): Path<VmId>, Query(dry): Query<DryRun>) -> Answer<Done> {
    let pool = load(&node).await?;
    let entry = pool.vm_entry(&vm)?;
    if entry.stored.record.power == Power::On || entry.owner().is_some() {
        return refused(format!(
            "VM {vm} is not off; stop it first (`steadfast vm stop {vm}`)"
        ))
        .map_err(Failure);
    }
    let index = entry.stored.index;
    let plan = vec![format!("forget {vm}; its disks stay")];
    if !dry.dry_run {
        node.blocking(move |n| {
            let commit = Commit::default()
                .delete(vm_spec(&vm))
                .delete(vm_state(&vm))
                .delete(vm_drill(&vm))
                .delete(RecordStore::key(&vm))
                .delete(index_key(index));
            n.kv().commit(&commit)?;
            n.note(&vm, "it was deleted");
            Ok(())
        })
        .await?;
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Changes what is wanted of a VM.
async fn want(
    node: &Arc<Node>,
    vm: &VmId,
    text: String,
    change: impl Fn(&mut StoredVm) + Send + 'static,
) -> Result<()> {
    let id = vm.clone();
    node.blocking(move |n| {
        update(&*n.kv(), &vm_spec(&id), |old: Option<StoredVm>| {
            Ok(old.map(|mut v| {
                change(&mut v);
                v
            }))
        })?;
        n.note(&id, text);
        Ok(())
    })
    .await?;
    node.wake.notify_one();
    Ok(())
}

async fn set_stop_now(node: &Arc<Node>, vm: &VmId, now: bool) -> Result<()> {
    let key = vm_state(vm);
    node.blocking(move |n| {
        update(&*n.kv(), &key, |old: Option<VmMemory>| {
            let mut memory = old.unwrap_or_default();
            memory.stop_now = now;
            if !now {
                memory.start_failures.clear();
            }
            Ok(Some(memory))
        })
    })
    .await
    .map(|_| ())
}

/// Power on.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn start(State(node): Shared, Path(vm): Path<VmId>, Query(dry): Query<DryRun>) -> Answer<Done> {
    let pool = load(&node).await?;
    let entry = pool.vm_entry(&vm)?;
    check(&node, &pool, &entry.stored)?;
    let plan = match entry.owner() {
        Some(host) => vec![format!("{vm} runs on {host} already")],
        None => admitted(&pool, &entry.stored.record)?,
    };
    if !dry.dry_run {
        set_stop_now(&node, &vm, false).await?;
        want(&node, &vm, "it shall be on".into(), |v| {
            v.record.power = Power::On
        })
        .await?;
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Power off: by the guest's own shutdown, or at once.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", request_body = HowToStop,
    params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn stop(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(dry): Query<DryRun>,
    Json(how): Json<HowToStop>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let entry = pool.vm_entry(&vm)?;
    let plan = match entry.owner() {
        Some(host) if how.now => vec![format!("end {vm} on {host} at once, as if its power failed")],
        Some(host) => vec![format!(
            "ask the guest of {vm} on {host} to shut down; end it after 30 s"
        )],
        None => vec![format!("{vm} is off")],
    };
    if !dry.dry_run {
        set_stop_now(&node, &vm, how.now).await?;
        want(&node, &vm, "it shall be off".into(), |v| {
            v.record.power = Power::Off
        })
        .await?;
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Change the class.
#[utoipa::path(post, path = "/v1/vms/{vm}/protection", request_body = NewClass,
    params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn protect(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(dry): Query<DryRun>,
    Json(new): Json<NewClass>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let entry = pool.vm_entry(&vm)?;
    let wanted = class(&new.class).map_err(NodeError::Refused)?;
    let mut changed = entry.stored.clone();
    let old = changed.record.protection;
    changed.record.protection = wanted;
    check(&node, &pool, &changed)?;
    let running = entry.owner().is_some();
    // Its host must learn what the VM's class is; until then it must not be booted elsewhere.
    if let Some(owner) = entry.owner().filter(|_| old != wanted)
        && !pool.hosts.get(owner).is_some_and(|h| h.record.reachable())
    {
        return refused(format!(
            "host {owner}, which runs VM {vm}, cannot be told; wait until it is up, or until it is dead and the VM off"
        ))
        .map_err(Failure);
    }
    let mut plan = vec![format!("{vm}: class {} becomes {}", old.name(), wanted.name())];
    if running && wanted.hot() && !old.hot() {
        plan.push(format!(
            "{vm} goes on in a process that can mirror it; its guest stands still for a moment"
        ));
    }
    if changed.record.power == Power::On {
        plan.extend(
            admitted(&pool, &changed.record)?
                .into_iter()
                .skip(usize::from(running)),
        );
    }
    if !dry.dry_run {
        let text = format!("its class is {} now, before {}", wanted.name(), old.name());
        want(&node, &vm, text, move |v| v.record.protection = wanted).await?;
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Limit what a VM may use of its host; what is not given stays. Live.
#[utoipa::path(post, path = "/v1/vms/{vm}/limits", request_body = VmLimits,
    params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn limits(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(dry): Query<DryRun>,
    Json(new): Json<VmLimits>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let stored = &pool.vm_entry(&vm)?.stored;
    let wanted = new.over(&stored.limits);
    wanted.read(stored.machine.memory_bytes)?;
    wanted.net_rate()?;
    let text = serde_json::to_string(&wanted).unwrap_or_default();
    let plan = vec![format!("limits of {vm}: {text}")];
    if !dry.dry_run {
        let text = plan.join("; ");
        want(&node, &vm, text, move |v| v.limits = new.over(&v.limits)).await?;
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Look after the service in a VM: how it is checked, and what is done when it fails.
#[utoipa::path(post, path = "/v1/vms/{vm}/health", request_body = NewHealth,
    params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn health(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(dry): Query<DryRun>,
    Json(new): Json<NewHealth>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let vsock = pool.vm_entry(&vm)?.stored.machine.vsock.is_some();
    let plan = match &new.policy {
        None => vec![format!("the service in {vm} is not looked after any more")],
        Some(policy) => {
            crate::health::check::valid(policy, vsock).map_err(NodeError::Refused)?;
            let inside = policy.checks.iter().any(crate::health::check::is_inside);
            if inside && !pool.one_version() {
                return refused(NEW_HERE).map_err(Failure);
            }
            let rungs = policy.ladder.iter();
            let rungs: Vec<String> = rungs
                .map(|r| format!("{:?} ({} times)", r.remedy, r.tries.max(1)))
                .collect();
            vec![
                format!(
                    "check the service in {vm} every {} ms, {} checks; it has failed after {} rounds in a row",
                    policy.interval_ms,
                    policy.checks.len(),
                    policy.failures.max(1)
                ),
                format!("then: {}", rungs.join(", ")),
            ]
        }
    };
    if !dry.dry_run {
        let text = plan.join("; ");
        want(&node, &vm, text, move |v| v.record.health.clone_from(&new.policy)).await?;
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Move a running VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", request_body = MoveTo,
    params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn migrate(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(dry): Query<DryRun>,
    Json(target): Json<MoveTo>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let entry = pool.vm_entry(&vm)?;
    let Some(from) = entry.owner().cloned() else {
        return refused(format!(
            "VM {vm} is off: it is started where it suits best (`steadfast vm start {vm}`)"
        ))
        .map_err(Failure);
    };
    if !pool.host(&target.to)?.record.usable() {
        return refused(format!(
            "host {} is not in use now; see `steadfast host list`",
            target.to
        ))
        .map_err(Failure);
    }
    let plan = vec![format!("move {vm} from {from} to {}", target.to)];
    let mut done = Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    };
    if !dry.dry_run {
        let task = migrate::begin(&node, &pool, &vm, &from, &target.to, MoveCause::Operator).await?;
        done.task = Some(task.id);
        node.wake.notify_one();
    }
    Ok(Json(done))
}

/// The end of a VM's console.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Console {
    /// Its last bytes, as text.
    pub text: String,
}

/// The end of a VM's console, from the host where it runs.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", params(("vm" = String, Path)), responses((status = 200, body = Console)))]
pub async fn console(State(node): Shared, Path(vm): Path<VmId>) -> Answer<Console> {
    let pool = load(&node).await?;
    let owner = pool.vm_entry(&vm)?.owner().cloned();
    if let Some(host) = owner.filter(|h| *h != node.host()) {
        let target = node.target(&host, pool.host(&host)?)?;
        let path = format!("/v1/vms/{vm}/console");
        let found = ask(&target, Method::GET, &path, None::<&()>, Duration::from_secs(10)).await?;
        return Ok(Json(found));
    }
    let text = node
        .blocking(move |n| {
            let path = n.instances.folder(&vm).join("console");
            let named = || format!("read {}", path.display());
            let mut file = std::fs::File::open(&path).what(named)?;
            let length = file.metadata().what(named)?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE_BYTES)))
                .what(named)?;
            let mut bytes = Vec::new();
            file.take(CONSOLE_BYTES).read_to_end(&mut bytes).what(named)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
        .await?;
    Ok(Json(Console { text }))
}
