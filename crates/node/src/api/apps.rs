//! Applications: several VMs under one name, with one status, one protection, one start order.
//!
//! The VMs of an application are those whose settings name it. What is asked of it is asked of each of its VMs; if one of them
//! cannot, nothing is begun.

use super::handlers::load;
use super::types::{Done, DryRun, HowToStop, NewClass, VmStatus, vm_status};
use super::{Answer, Failure, vms};
use crate::error::{NodeError, Result};
use crate::journal::About;
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{SETTINGS, update};
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use steadfast_cluster::model::{AppRecord, Keep, PoolSettings};
use steadfast_types::{AppId, VmId};
use utoipa::ToSchema;

type Shared = State<Arc<Node>>;

/// An application.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AppStatus {
    /// Its name.
    #[schema(value_type = String)]
    pub application: AppId,
    /// `running` when all its VMs run, `off` when all are off, else `partly`.
    pub state: String,
    /// `protected` when every VM is; `as promised` when each has what its class promises; `off`; else what is missing first.
    pub protection: String,
    /// How its VMs are kept: `free`, `together`, `apart`.
    pub keep: String,
    /// Stages of its start; VMs in none start last.
    #[schema(value_type = Vec<Vec<String>>)]
    pub start_order: Vec<BTreeSet<VmId>>,
    /// Its VMs.
    pub vms: Vec<VmStatus>,
}

/// How an application is kept and started. What is not given stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AppChange {
    /// `free`, `together` or `apart`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub keep: Option<Keep>,
    /// Stages: all of a stage are ready before the next starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<String>>>)]
    pub start_order: Option<Vec<BTreeSet<VmId>>>,
}

fn members<'p>(pool: &'p Pool, app: &AppId) -> impl Iterator<Item = &'p VmId> {
    let part = |vm: &crate::pool::PoolVm| vm.stored.record.application.as_ref() == Some(app);
    let found: Vec<_> = pool
        .vms
        .iter()
        .filter(|(_, vm)| part(vm))
        .map(|(id, _)| id)
        .collect();
    found.into_iter()
}

fn some_members(pool: &Pool, app: &AppId) -> Result<Vec<VmId>> {
    let found: Vec<VmId> = members(pool, app).cloned().collect();
    match found.is_empty() {
        true => Err(NodeError::NotFound(format!(
            "application {app}; make VMs a part of it: steadfast vm set VM --application {app}"
        ))),
        false => Ok(found),
    }
}

fn status_of(pool: &Pool, app: &AppId) -> AppStatus {
    let record = pool.settings.applications.get(app).cloned().unwrap_or_default();
    let vms: Vec<VmStatus> = members(pool, app)
        .filter_map(|id| Some(vm_status(pool, id, pool.vms.get(id)?)))
        .collect();
    let all = |state: &str| vms.iter().all(|v| v.state == state);
    let state = match () {
        () if vms.is_empty() => "empty",
        () if all("running") => "running",
        () if all("off") => "off",
        () => "partly",
    };
    let whole = |v: &&VmStatus| !matches!(v.protection.as_str(), "protected" | "restart elsewhere" | "off");
    let protection = match vms.iter().find(whole) {
        _ if vms.is_empty() => "-".into(),
        None if all("off") => "off".into(),
        None if vms.iter().all(|v| v.protection == "protected") => "protected".into(),
        None => "as promised".into(),
        Some(v) => format!("{}: {}", v.vm, v.protection),
    };
    AppStatus {
        application: app.clone(),
        state: state.into(),
        protection,
        keep: format!("{:?}", record.keep).to_lowercase(),
        start_order: record.start_order,
        vms,
    }
}

/// All applications.
#[utoipa::path(get, path = "/v1/applications", responses((status = 200, body = Vec<AppStatus>)))]
pub async fn list(State(node): Shared) -> Answer<Vec<AppStatus>> {
    let pool = load(&node).await?;
    let mut names: BTreeSet<AppId> = pool.settings.applications.keys().cloned().collect();
    names.extend(
        pool.vms
            .values()
            .filter_map(|vm| vm.stored.record.application.clone()),
    );
    Ok(Json(names.iter().map(|app| status_of(&pool, app)).collect()))
}

/// Change how an application is kept and started.
#[utoipa::path(post, path = "/v1/applications/{app}/settings", request_body = AppChange,
    params(("app" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn set(
    State(node): Shared,
    Path(app): Path<AppId>,
    Query(dry): Query<DryRun>,
    Json(change): Json<AppChange>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let mut seen = BTreeSet::new();
    for vm in change.start_order.iter().flatten().flatten() {
        if !members(&pool, &app).any(|m| m == vm) {
            let text =
                format!("VM {vm} is no part of application {app}: steadfast vm set {vm} --application {app}");
            return Err(Failure(NodeError::Refused(text)));
        }
        if !seen.insert(vm) {
            return Err(Failure(NodeError::Refused(format!("VM {vm} is in two stages"))));
        }
    }
    let text = serde_json::to_string(&change).unwrap_or_default();
    let plan = vec![format!("application {app}: {text}")];
    if !dry.dry_run {
        node.blocking(move |n| {
            update(&*n.kv(), SETTINGS, |old: Option<PoolSettings>| {
                let mut settings = old.unwrap_or_default();
                let record: &mut AppRecord = settings.applications.entry(app.clone()).or_default();
                record.keep = change.keep.unwrap_or(record.keep);
                if let Some(order) = &change.start_order {
                    record.start_order.clone_from(order);
                }
                Ok(Some(settings))
            })?;
            n.note(About::Pool, format!("application {app}: {text}"));
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

/// Asks the same of each VM: first whether it could be, of all, then to do it.
async fn each<F, A>(node: &Arc<Node>, app: &AppId, dry: bool, ask: F) -> Answer<Done>
where
    F: Fn(VmId, DryRun) -> A,
    A: Future<Output = Answer<Done>>,
{
    let pool = load(node).await?;
    let vms = some_members(&pool, app)?;
    let mut done = Done {
        dry_run: dry,
        ..Done::default()
    };
    for vm in &vms {
        done.plan
            .extend(ask(vm.clone(), DryRun { dry_run: true }).await?.0.plan);
    }
    if !dry {
        for vm in vms {
            let _ = ask(vm, DryRun { dry_run: false }).await?;
        }
    }
    Ok(Json(done))
}

/// Power on all its VMs, stage by stage.
#[utoipa::path(post, path = "/v1/applications/{app}/start", params(("app" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn start(State(node): Shared, Path(app): Path<AppId>, Query(dry): Query<DryRun>) -> Answer<Done> {
    let ask = |vm, dry| vms::start(State(Arc::clone(&node)), Path(vm), Query(dry));
    each(&node, &app, dry.dry_run, ask).await
}

/// Power off all its VMs.
#[utoipa::path(post, path = "/v1/applications/{app}/stop", request_body = HowToStop,
    params(("app" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn stop(
    State(node): Shared,
    Path(app): Path<AppId>,
    Query(dry): Query<DryRun>,
    Json(how): Json<HowToStop>,
) -> Answer<Done> {
    let ask = |vm, dry| vms::stop(State(Arc::clone(&node)), Path(vm), Query(dry), Json(how.clone()));
    each(&node, &app, dry.dry_run, ask).await
}

/// Change the class of all its VMs.
#[utoipa::path(post, path = "/v1/applications/{app}/protection", request_body = NewClass,
    params(("app" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn protect(
    State(node): Shared,
    Path(app): Path<AppId>,
    Query(dry): Query<DryRun>,
    Json(class): Json<NewClass>,
) -> Answer<Done> {
    let ask = |vm, dry| {
        vms::protect(
            State(Arc::clone(&node)),
            Path(vm),
            Query(dry),
            Json(class.clone()),
        )
    };
    each(&node, &app, dry.dry_run, ask).await
}
