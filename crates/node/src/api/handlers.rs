//! Status, hosts, events, tasks, and what daemons ask of each other.

use super::types::{Availability, Done, DryRun, HostStatus, NewToken, PoolStatus, in_ms, pool_status};
use super::{Answer, Failure};
use crate::config::StoreChoice;
use crate::error::{NodeError, Result, refused};
use crate::journal::{self, EVENTS_MAX, Told};
use crate::node::Node;
use crate::pki::{Token, fingerprint_of_pem};
use crate::pool::Pool;
use crate::records::{
    CA, HostInfo, StoredTask, StoredToken, TaskState, get, host_info, host_report, json, now_ms, update,
};
use crate::{certs, etcd, migrate, upgrade};
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use std::sync::Arc;
use steadfast_cluster::availability::report;
use steadfast_cluster::model::{DrainWhy, HostAdmin, Task};
use steadfast_cluster::{Action, decide};
use steadfast_store::Commit;
use steadfast_types::{HostId, VmId};

type Shared = State<Arc<Node>>;

/// How long a join token lives, ms.
const TOKEN_MS: u64 = 3_600_000;

/// Reads the pool.
///
/// # Errors
/// The store's.
pub async fn load(node: &Arc<Node>) -> Result<Pool> {
    node.blocking(|n| Pool::load(&*n.kv())).await
}

/// The pool on one screen.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = PoolStatus)))]
pub async fn status(State(node): Shared) -> Answer<PoolStatus> {
    let pool = load(&node).await?;
    Ok(Json(pool_status(&pool, &node.config())))
}

/// All hosts.
#[utoipa::path(get, path = "/v1/hosts", responses((status = 200, body = Vec<HostStatus>)))]
pub async fn hosts(State(node): Shared) -> Answer<Vec<HostStatus>> {
    let pool = load(&node).await?;
    Ok(Json(pool_status(&pool, &node.config()).hosts))
}

/// What would be decided now: the plan, line by line.
#[utoipa::path(get, path = "/v1/plan", responses((status = 200, body = Done)))]
pub async fn plan(State(node): Shared) -> Answer<Done> {
    let snapshot = load(&node).await?.snapshot(None);
    let text = decide(&snapshot).to_string();
    Ok(Json(Done {
        plan: text.lines().map(str::to_owned).collect(),
        dry_run: true,
        task: None,
    }))
}

async fn set_admin(node: &Arc<Node>, host: HostId, admin: HostAdmin, dry_run: bool) -> Answer<Done> {
    let pool = load(node).await?;
    pool.host(&host)?;
    let mut snapshot = pool.snapshot(None);
    if let Some(h) = snapshot.hosts.get_mut(&host) {
        h.record.admin = admin;
    }
    let text = decide(&snapshot).to_string();
    if !dry_run {
        let key = host_info(&host);
        let text = format!("it shall be {admin:?}");
        node.blocking(move |n| {
            update(&*n.kv(), &key, |old: Option<HostInfo>| {
                Ok(old.map(|mut info| {
                    info.set_admin(admin);
                    info
                }))
            })?;
            n.note(&host, text);
            Ok(())
        })
        .await?;
        node.wake.notify_one();
    }
    Ok(Json(Done {
        plan: text.lines().map(str::to_owned).collect(),
        dry_run,
        task: None,
    }))
}

/// Empty a host: its VMs are moved, its standbys replaced.
#[utoipa::path(post, path = "/v1/hosts/{host}/drain", params(("host" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn drain(State(node): Shared, Path(host): Path<HostId>, Query(dry): Query<DryRun>) -> Answer<Done> {
    set_admin(&node, host, HostAdmin::Draining(DrainWhy::Operator), dry.dry_run).await
}

/// Use a host again.
#[utoipa::path(post, path = "/v1/hosts/{host}/resume", params(("host" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn resume(
    State(node): Shared,
    Path(host): Path<HostId>,
    Query(dry): Query<DryRun>,
) -> Answer<Done> {
    set_admin(&node, host, HostAdmin::InUse, dry.dry_run).await
}

/// Take a host that is gone for good, or empty, out of the pool, and its etcd member out of the store.
#[utoipa::path(delete, path = "/v1/hosts/{host}", params(("host" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn remove_host(
    State(node): Shared,
    Path(host): Path<HostId>,
    Query(dry): Query<DryRun>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let info = pool.host(&host)?;
    if host == node.host() {
        return refused("a host cannot remove itself; ask another one").map_err(Failure);
    }
    let used: Vec<String> = pool
        .vms
        .iter()
        .filter(|(_, vm)| vm.owner() == Some(&host))
        .map(|(id, _)| id.to_string())
        .collect();
    let fenced = info.record.fenced();
    if !used.is_empty()
        || !(fenced || matches!(info.record.admin, HostAdmin::Maintenance(_)) || info.record.witness)
    {
        return refused(format!(
            "host {host} is in use{}; drain it first (`steadfast host drain {host}`), or wait until it is known to be dead",
            if used.is_empty() { String::new() } else { format!(" by {}", used.join(", ")) }
        ))
        .map_err(Failure);
    }
    if !dry.dry_run {
        let config = node.config();
        let name = host.clone();
        node.blocking(move |n| certs::revoke(&*n.kv(), &name)).await?;
        if matches!(config.store, StoreChoice::Managed { .. }) {
            etcd::remove(&config.store_spec(&node.folders), host.as_str()).await?;
        }
        let name = host.clone();
        node.blocking(move |n| {
            let commit = Commit::default()
                .delete(host_info(&name))
                .delete(host_report(&name));
            n.kv().commit(&commit)?;
            n.note(&name, "it was taken out of the pool");
            Ok(())
        })
        .await?;
    }
    Ok(Json(Done {
        plan: vec![format!("host {host} leaves the pool")],
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Which events.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Which {
    /// At most so many of the newest; 0: 100.
    limit: usize,
    /// Only those about this VM or host.
    subject: Option<String>,
    /// Only those after the one with this number.
    after: u64,
}

impl Which {
    fn holds(&self, told: &Told) -> bool {
        let e = &told.event;
        let about = |s: &String| {
            e.vm.as_ref().is_some_and(|vm| vm.as_str() == s)
                || e.host.as_ref().is_some_and(|h| h.as_str() == s)
        };
        e.id > self.after && self.subject.as_ref().is_none_or(about)
    }
}

/// The newest events, oldest first.
#[utoipa::path(get, path = "/v1/events",
    params(("limit" = Option<usize>, Query), ("subject" = Option<String>, Query), ("after" = Option<u64>, Query)),
    responses((status = 200, body = Vec<Object>)))]
pub async fn events(State(node): Shared, Query(which): Query<Which>) -> Answer<Vec<Told>> {
    let limit = match which.limit {
        0 => 100,
        limit => limit.min(EVENTS_MAX),
    };
    let found = node
        .blocking(move |n| {
            let mut found = journal::all(&*n.kv())?;
            found.retain(|told| which.holds(told));
            Ok(found.split_off(found.len().saturating_sub(limit)))
        })
        .await?;
    Ok(Json(found))
}

/// The part of time to look at.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Span {
    /// From when, wall clock, ms; 0: from the first event that is kept.
    from_ms: u64,
    /// Until when; 0: now.
    to_ms: u64,
}

/// How available a VM was: from its changes of service that are kept.
#[utoipa::path(get, path = "/v1/vms/{vm}/availability",
    params(("vm" = String, Path), ("from_ms" = Option<u64>, Query), ("to_ms" = Option<u64>, Query)),
    responses((status = 200, body = Availability)))]
pub async fn availability(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(span): Query<Span>,
) -> Answer<Availability> {
    let found = node
        .blocking(move |n| {
            let kv = n.kv();
            Pool::load(&*kv)?.vm_entry(&vm)?;
            let events: Vec<_> = journal::all(&*kv)?.into_iter().map(|told| told.event).collect();
            let first = events
                .iter()
                .find(|e| e.vm.as_ref() == Some(&vm))
                .map(|e| e.at_ms);
            let to_ms = if span.to_ms == 0 { now_ms() } else { span.to_ms };
            let from_ms = match span.from_ms {
                0 => first.unwrap_or(to_ms),
                from => from,
            };
            let report = report(events.iter(), &vm, from_ms, to_ms);
            Ok(Availability {
                vm,
                from_ms,
                to_ms,
                report,
            })
        })
        .await?;
    Ok(Json(found))
}

/// Long actions: under way, and those that ended lately.
#[utoipa::path(get, path = "/v1/tasks", responses((status = 200, body = Vec<StoredTask>)))]
pub async fn tasks(State(node): Shared) -> Answer<Vec<StoredTask>> {
    Ok(Json(load(&node).await?.tasks))
}

/// Cancel a task. What it has done so far stays; the VM runs on where it is.
#[utoipa::path(delete, path = "/v1/tasks/{task}", params(("task" = String, Path)), responses((status = 200, body = Done)))]
pub async fn cancel_task(State(node): Shared, Path(task): Path<String>) -> Answer<Done> {
    let pool = load(&node).await?;
    let found = pool.tasks.iter().find(|t| t.id == task);
    let found = found.ok_or_else(|| NodeError::NotFound(format!("task {task}")))?;
    if found.state != TaskState::Running {
        return refused(format!("task {task} has ended: {}", found.text)).map_err(Failure);
    }
    match &found.task {
        Task::Upgrade { .. } => {
            return refused("a host that replaces its binary is not stopped in the middle; cancel the rolling upgrade itself")
                .map_err(Failure);
        }
        Task::RollingUpgrade { .. } => {
            let text = "cancelled; hosts that run the new version keep it";
            upgrade::end(&node, found, TaskState::Cancelled, text).await?;
        }
        Task::Migrate { .. } => migrate::set(&node, &task, TaskState::Cancelled, "cancelled").await?,
    }
    Ok(Json(Done {
        plan: vec![format!("{task} is cancelled")],
        ..Done::default()
    }))
}

/// A token that lets one host join within an hour.
#[utoipa::path(post, path = "/v1/tokens", responses((status = 200, body = NewToken)))]
pub async fn token(State(node): Shared) -> Answer<NewToken> {
    let address = node.config().api().to_string();
    let made = node.blocking(move |n| new_token(n, address)).await?;
    Ok(Json(made))
}

/// Makes a token. Blocks.
///
/// # Errors
/// The store's.
pub fn new_token(node: &Node, address: String) -> Result<NewToken> {
    let kv = node.kv();
    let ca: Option<(String, String)> = get(&*kv, CA)?;
    let (certificate, _) = ca.ok_or_else(|| NodeError::NotFound("CA in the store".into()))?;
    let token = Token::new(&fingerprint_of_pem(&certificate)?)?;
    let expires_ms = in_ms(TOKEN_MS);
    let stored = StoredToken {
        hash: token.hash(),
        expires_ms,
        uses: 1,
    };
    let key = format!("p/token/{}", token.id);
    kv.commit(&Commit::default().put(key, json(&stored)?))?;
    Ok(NewToken {
        token: token.to_string(),
        address,
        expires_ms,
    })
}

/// The leader asks this host to do something.
pub async fn act(State(node): Shared, Json(action): Json<Action>) -> Answer<serde_json::Value> {
    node.blocking(move |n| crate::agent::act(n, &action)).await?;
    Ok(Json(serde_json::json!({"ok": true})))
}
