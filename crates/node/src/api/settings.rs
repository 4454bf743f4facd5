//! What people set about the pool and about a VM's place in it: admission, balancing, groups; priority, standbys, dependencies.

use super::Answer;
use super::handlers::load;
use super::types::{Done, DryRun};
use crate::error::{NodeError, Result};
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{SETTINGS, StoredVm, update, vm_spec};
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use steadfast_cluster::decide;
use steadfast_cluster::model::{GroupRule, PoolSettings};
use steadfast_types::{AppId, GroupId, VmId};
use utoipa::ToSchema;

type Shared = State<Arc<Node>>;

/// Standbys of one VM: the protocol's bound.
const STANDBYS_MAX: u8 = 3;

/// Changes of a VM's place in the pool. What is not given stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmChange {
    /// Higher is served first when room or time is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u16>,
    /// Standbys, 1 to 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standbys: Option<u8>,
    /// VMs that must be ready before it starts: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub depends_on: Option<BTreeSet<VmId>>,
    /// Placement groups that it belongs to: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub groups: Option<BTreeSet<GroupId>>,
    /// The application that it is a part of; an empty name: of none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application: Option<String>,
    /// The balancer leaves it alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned: Option<bool>,
}

impl VmChange {
    /// What would be changed, in words.
    ///
    /// # Errors
    /// What cannot be, and why.
    fn plan(&self, pool: &Pool, vm: &VmId) -> Result<Vec<String>> {
        let mut plan = Vec::new();
        let refuse = |text: String| Err(NodeError::Refused(text));
        if let Some(p) = self.priority {
            plan.push(format!("{vm}: priority {p}"));
        }
        if let Some(n) = self.standbys {
            if !(1..=STANDBYS_MAX).contains(&n) {
                return refuse(format!("a VM has 1 to {STANDBYS_MAX} standbys"));
            }
            plan.push(format!("{vm}: {n} standbys"));
        }
        if let Some(needs) = &self.depends_on {
            if let Some(unknown) = needs.iter().find(|n| !pool.vms.contains_key(*n)) {
                return refuse(format!("there is no VM {unknown} that {vm} could depend on"));
            }
            if needs.contains(vm) {
                return refuse(format!("VM {vm} cannot depend on itself"));
            }
            plan.push(format!("{vm}: starts after {}", names(needs)));
        }
        if let Some(groups) = &self.groups {
            if let Some(unknown) = groups.iter().find(|g| !pool.settings.groups.contains_key(*g)) {
                return refuse(format!(
                    "group {unknown} has no rule; give it one first: steadfast pool group {unknown} --rule apart"
                ));
            }
            plan.push(format!("{vm}: in groups {}", names(groups)));
        }
        match self.application.as_deref() {
            None => {}
            Some("") => plan.push(format!("{vm}: part of no application")),
            Some(name) => {
                AppId::new(name).map_err(|e| NodeError::Refused(e.to_string()))?;
                plan.push(format!("{vm}: part of application {name}"));
            }
        }
        if let Some(pinned) = self.pinned {
            let text = if pinned {
                "the balancer leaves it alone"
            } else {
                "the balancer may move it"
            };
            plan.push(format!("{vm}: {text}"));
        }
        match plan.is_empty() {
            true => refuse("nothing to change was given".into()),
            false => Ok(plan),
        }
    }

    fn apply(&self, vm: &mut StoredVm) {
        let r = &mut vm.record;
        r.priority = self.priority.unwrap_or(r.priority);
        r.standbys = self.standbys.unwrap_or(r.standbys);
        r.pinned = self.pinned.unwrap_or(r.pinned);
        if let Some(needs) = &self.depends_on {
            r.depends_on.clone_from(needs);
        }
        if let Some(groups) = &self.groups {
            r.groups.clone_from(groups);
        }
        if let Some(name) = &self.application {
            r.application = AppId::new(name.as_str()).ok();
        }
    }
}

fn names<T: ToString>(all: &BTreeSet<T>) -> String {
    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
    if all.is_empty() {
        "none".into()
    } else {
        all.join(", ")
    }
}

/// Change a VM's place in the pool.
#[utoipa::path(post, path = "/v1/vms/{vm}/settings", request_body = VmChange,
    params(("vm" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn vm(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Query(dry): Query<DryRun>,
    Json(change): Json<VmChange>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    pool.vm_entry(&vm)?;
    let mut plan = change.plan(&pool, &vm)?;
    let mut snapshot = pool.snapshot(None);
    if let Some(entry) = snapshot.vms.get_mut(&vm) {
        let mut stored = pool.vm_entry(&vm)?.stored.clone();
        change.apply(&mut stored);
        entry.spec = stored.record;
    }
    plan.extend(decide(&snapshot).to_string().lines().map(str::to_owned));
    if !dry.dry_run {
        node.blocking(move |n| {
            update(&*n.kv(), &vm_spec(&vm), |old: Option<StoredVm>| {
                Ok(old.map(|mut v| {
                    change.apply(&mut v);
                    v
                }))
            })?;
            n.note(
                &vm,
                format!(
                    "settings were changed: {}",
                    serde_json::to_string(&change).unwrap_or_default()
                ),
            );
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

/// Changes of the pool's settings. What is not given stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolChange {
    /// How many hosts may fail at once with every protected VM going on or being booted again; 0: no check.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_failures: Option<u8>,
    /// How much virtual CPU may be promised per real CPU, in thousandths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_overcommit_permille: Option<u32>,
    /// Whether VMs are moved from hot hosts by themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<bool>,
    /// Whether a host that predicts its failure is emptied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evacuate_on_prediction: Option<bool>,
    /// For how long after a drain VMs go back to their host, ms; 0: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bring_back_ms: Option<u64>,
    /// A placement group and its rule (`apart`, `together`), or none: without rule, without effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub group: Option<(GroupId, Option<GroupRule>)>,
}

impl PoolChange {
    fn apply(&self, s: &mut PoolSettings) {
        s.host_failures = self.host_failures.unwrap_or(s.host_failures);
        // Nothing at all could be promised with less than a thousandth.
        let overcommit = self.cpu_overcommit_permille.unwrap_or(s.cpu_overcommit_permille);
        s.cpu_overcommit_permille = overcommit.max(1);
        s.balance.enabled = self.balance.unwrap_or(s.balance.enabled);
        s.evacuate_on_prediction = self.evacuate_on_prediction.unwrap_or(s.evacuate_on_prediction);
        s.bring_back_ms = self.bring_back_ms.unwrap_or(s.bring_back_ms);
        match &self.group {
            Some((group, Some(rule))) => drop(s.groups.insert(group.clone(), *rule)),
            Some((group, None)) => drop(s.groups.remove(group)),
            None => {}
        }
    }
}

/// The pool's settings.
#[utoipa::path(get, path = "/v1/settings", responses((status = 200, body = Object)))]
pub async fn show(State(node): Shared) -> Answer<PoolSettings> {
    Ok(Json(load(&node).await?.settings))
}

/// Change the pool's settings.
#[utoipa::path(post, path = "/v1/settings", request_body = PoolChange, params(("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn pool(
    State(node): Shared,
    Query(dry): Query<DryRun>,
    Json(change): Json<PoolChange>,
) -> Answer<Done> {
    let mut snapshot = load(&node).await?.snapshot(None);
    change.apply(&mut snapshot.pool);
    let text = serde_json::to_string(&change).unwrap_or_default();
    let mut plan = vec![format!("settings: {text}")];
    plan.extend(decide(&snapshot).to_string().lines().map(str::to_owned));
    if !dry.dry_run {
        node.blocking(move |n| {
            update(&*n.kv(), SETTINGS, |old: Option<PoolSettings>| {
                let mut settings = old.unwrap_or_default();
                change.apply(&mut settings);
                Ok(Some(settings))
            })?;
            n.note(
                crate::journal::About::Pool,
                format!("settings were changed: {text}"),
            );
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
