//! The rolling upgrade, as the leader carries it out. What is to be done next follows from the settings (`upgrade_to`) and the
//! versions that hosts report: `cluster::decide` says it, and a new leader goes on (the old one may be the host being upgraded).
//!
//! ```text
//! decide: empty a host -> UpgradeHost -> [task: its daemon becomes the new binary] -> use it again -> all protected? -> the next
//!                              |  refused, or not back in time
//!                              v
//!                         the rolling upgrade has failed: `upgrade_to` is cleared, emptied hosts are used again
//! ```

use crate::api::types::vm_status;
use crate::error::{NodeError, Result, refused};
use crate::leader::send;
use crate::migrate::{keep, key, set};
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{SETTINGS, StoredTask, TaskState, UPGRADE, json, now_ms, parse};
use std::sync::Arc;
use steadfast_cluster::Action;
use steadfast_cluster::model::{HostAdmin, PoolSettings, Power, Task};
use steadfast_store::Commit;
use steadfast_types::HostId;

/// A daemon that has not come back as the new version after so long has failed, ms.
const BACK_MS: u64 = 120_000;

/// What a host runs, as it reports.
#[must_use]
pub fn version(pool: &Pool, host: &HostId) -> String {
    let report = pool.reports.get(host);
    report
        .map(|r| r.status.versions.steadfast.clone())
        .unwrap_or_default()
}

/// Begins to bring all hosts to a version; says the task's name.
///
/// # Errors
/// One is under way, all hosts run it, or the store's.
pub async fn begin(node: &Arc<Node>, pool: &Pool, to: &str) -> Result<String> {
    let rolling = |t: &&StoredTask| matches!(t.task, Task::RollingUpgrade { .. });
    let running = pool.tasks.iter().filter(|t| t.state == TaskState::Running);
    if let Some(task) = running.clone().find(rolling) {
        return refused(format!(
            "a rolling upgrade is under way ({}); wait for it, or cancel it: steadfast pool cancel {}",
            task.text, task.id
        ));
    }
    let Some(from) = pool.hosts.keys().map(|h| version(pool, h)).find(|v| v != to) else {
        return refused(format!("all hosts run {to} already"));
    };
    let task = StoredTask {
        id: format!("upgrade-{}", now_ms()),
        task: Task::RollingUpgrade {
            from: from.clone(),
            to: to.into(),
            since_ms: now_ms(),
        },
        state: TaskState::Running,
        text: "begun".into(),
        ended_ms: None,
    };
    let (id, to) = (task.id.clone(), to.to_owned());
    node.blocking(move |n| {
        let kv = n.kv();
        let now = kv.read(&[SETTINGS])?;
        let entry = now.get(SETTINGS);
        let old: Option<PoolSettings> = entry.map(|e| parse(SETTINGS, &e.value)).transpose()?;
        let settings = PoolSettings {
            upgrade_to: Some(to.clone()),
            ..old.unwrap_or_default()
        };
        let commit = Commit::default()
            .unchanged(SETTINGS, entry)
            .unchanged(key(&task.id), None)
            .put(SETTINGS, json(&settings)?)
            .put(UPGRADE, json(&(&from, &to))?)
            .put(key(&task.id), json(&task)?);
        if !kv.commit(&commit)?.is_done() {
            return Err(NodeError::Conflict("the pool's settings".into()));
        }
        n.note(
            crate::journal::About::Pool,
            format!("{}: from {from} to {to}", task.id),
        );
        Ok(())
    })
    .await?;
    node.wake.notify_one();
    Ok(id)
}

/// Ends a rolling upgrade: the settings and the task at once, so that neither goes on without the other.
///
/// # Errors
/// The store's, or somebody else changed either.
pub async fn end(node: &Arc<Node>, task: &StoredTask, state: TaskState, text: &str) -> Result<()> {
    let (task, text) = (task.clone(), text.to_owned());
    node.blocking(move |n| {
        let kv = n.kv();
        let task_key = key(&task.id);
        let now = kv.read(&[SETTINGS, &task_key])?;
        let (settings, entry) = (now.get(SETTINGS), now.get(&task_key));
        let old: Option<StoredTask> = entry.map(|e| parse(&task_key, &e.value)).transpose()?;
        let Some(mut ended) = old.filter(|t| t.state == TaskState::Running) else {
            return Ok(());
        };
        ended.state = state;
        ended.text.clone_from(&text);
        ended.ended_ms = Some(now_ms());
        let old: Option<PoolSettings> = settings.map(|e| parse(SETTINGS, &e.value)).transpose()?;
        let wanted = PoolSettings {
            upgrade_to: None,
            ..old.unwrap_or_default()
        };
        let commit = Commit::default()
            .unchanged(SETTINGS, settings)
            .unchanged(&task_key, entry)
            .put(SETTINGS, json(&wanted)?)
            .put(&task_key, json(&ended)?);
        if !kv.commit(&commit)?.is_done() {
            return Err(NodeError::Conflict(format!("task {}", task.id)));
        }
        n.note(crate::journal::About::Pool, format!("{}: {text}", task.id));
        Ok(())
    })
    .await
}

/// Has an emptied host replace its binary. What a host refuses is written into the task.
///
/// # Errors
/// The store's.
pub async fn host(node: &Arc<Node>, pool: &Pool, host: &HostId, to: &str) -> Result<()> {
    let task = StoredTask {
        id: format!("upgrade-{host}-{}", now_ms()),
        task: Task::Upgrade {
            host: host.clone(),
            to: to.into(),
            since_ms: now_ms(),
        },
        state: TaskState::Running,
        text: format!("its daemon becomes {to}"),
        ended_ms: None,
    };
    keep(node, &task).await?;
    let action = Action::UpgradeHost {
        host: host.clone(),
        to: to.into(),
    };
    match send(node, pool, host, &action).await {
        Ok(()) => {}
        // Its daemon may have become the new one before the answer came: what it reports tells.
        Err(NodeError::Peer { at, why }) => {
            tracing::warn!(%host, at, why, "no answer from a host being upgraded")
        }
        Err(error) => set(node, &task.id, TaskState::Failed, &error.to_string()).await?,
    }
    Ok(())
}

/// Looks where the hosts stand, and ends what has ended. `waits`: why the next step is not made.
///
/// # Errors
/// The store's.
pub async fn progress(node: &Arc<Node>, pool: &Pool, waits: &Option<String>) -> Result<()> {
    for stored in pool.tasks.iter().filter(|t| t.state == TaskState::Running) {
        let Task::Upgrade { host, to, since_ms } = &stored.task else {
            continue;
        };
        let runs = version(pool, host);
        if runs == *to {
            let text = format!("it runs {to}, after {} ms", now_ms().saturating_sub(*since_ms));
            set(node, &stored.id, TaskState::Done, &text).await?;
        } else if now_ms() > since_ms.saturating_add(BACK_MS) {
            let text = format!(
                "its daemon did not come back as {to} within {} s (last heard of as {runs}); the former binary is in its data \
                 folder, below binaries/",
                BACK_MS / 1000
            );
            set(node, &stored.id, TaskState::Failed, &text).await?;
        }
    }
    for stored in pool.tasks.iter().filter(|t| t.state == TaskState::Running) {
        let Task::RollingUpgrade { to, since_ms, .. } = &stored.task else {
            continue;
        };
        if let Some((host, why)) = failed(pool, to, *since_ms) {
            let text = format!("stopped at host {host}: {why}");
            end(node, stored, TaskState::Failed, &text).await?;
            continue;
        }
        let all = pool.hosts.len();
        let done = pool.hosts.keys().filter(|h| version(pool, h) == *to).count();
        let now = pool.hosts.iter().find_map(|(id, info)| match info.record.admin {
            HostAdmin::Draining(_) => Some(format!("{id} is being emptied")),
            HostAdmin::Maintenance(_) => Some(format!("{id} is empty")),
            HostAdmin::InUse => None,
        });
        if done == all && now.is_none() && protected(pool) {
            let text = format!("all {all} hosts run {to}");
            end(node, stored, TaskState::Done, &text).await?;
            continue;
        }
        let mut text = format!("{done} of {all} hosts run {to}");
        for part in now.iter().chain(waits) {
            text += "; ";
            text += part;
        }
        if text != stored.text {
            set(node, &stored.id, TaskState::Running, &text).await?;
        }
    }
    Ok(())
}

/// The first host of this upgrade that failed, and why.
fn failed<'a>(pool: &'a Pool, wanted: &str, began_ms: u64) -> Option<(&'a HostId, &'a str)> {
    pool.tasks.iter().find_map(|t| match &t.task {
        Task::Upgrade { host, to, since_ms }
            if to == wanted && *since_ms >= began_ms && t.state == TaskState::Failed =>
        {
            Some((host, t.text.as_str()))
        }
        _ => None,
    })
}

/// Every VM that is on and has standbys by its class could survive the loss of its host.
fn protected(pool: &Pool) -> bool {
    pool.vms.iter().all(|(id, vm)| {
        let record = &vm.stored.record;
        let well = match record.disks_suffice() {
            true => "restart elsewhere",
            false => "protected",
        };
        record.standbys_wanted() == 0
            || record.power == Power::Off
            || vm_status(pool, id, vm).protection == well
    })
}
