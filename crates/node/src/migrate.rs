//! Moves of running VMs, as tasks: each round of the leader looks where the move stands and does the next step, so that a new
//! leader carries on.
//!
//! ```text
//! protected VM:  list the target as a standby -> wait until the arbiter lists it in sync -> planned promote -> owner is the target
//! ```
//! A VM of class `none` or `restart` is protected for as long as its move takes: to be listed a standby is what lets its process be
//! changed for one with the engine (`engine.rs`), which it keeps.

use crate::engine;
use crate::error::{NodeError, Result, refused};
use crate::journal::About;
use crate::leader::{change_standbys, send};
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{StoredTask, TaskState, VmMemory, json, now_ms, update, vm_state};
use std::sync::Arc;
use steadfast_cluster::Action;
use steadfast_cluster::model::{Home, MoveCause, Task};
use steadfast_store::Commit;
use steadfast_types::{HostId, VmId};

/// A move that takes longer has failed, ms.
const BOUND_MS: u64 = 30 * 60_000;
/// A handover is asked for again after so long, ms.
const AGAIN_MS: u64 = 5_000;

/// Key of a task.
#[must_use]
pub fn key(id: &str) -> String {
    format!("p/task/{id}")
}

/// Begins a move. One that is under way already is left alone.
///
/// # Errors
/// The VM cannot be moved, or the store's.
pub async fn begin(
    node: &Arc<Node>,
    pool: &Pool,
    vm: &VmId,
    from: &HostId,
    to: &HostId,
    cause: MoveCause,
) -> Result<StoredTask> {
    let entry = pool.vm_entry(vm)?;
    pool.host(to)?;
    engine::possible(&node.config(), pool, &entry.stored)?;
    if from == to {
        return refused(format!("VM {vm} is on {to} already"));
    }
    if let Some(unfit) = entry.memory.unfit.get(to) {
        return refused(format!("VM {vm} cannot go on on {to}: {}", unfit.why));
    }
    let running = |t: &&StoredTask| {
        let same = matches!(&t.task, Task::Migrate { vm: v, .. } if v == vm);
        same && t.state == TaskState::Running
    };
    if let Some(task) = pool.tasks.iter().find(running) {
        return Ok(task.clone());
    }
    let task = StoredTask {
        id: format!("move-{vm}-{}", now_ms()),
        task: Task::Migrate {
            vm: vm.clone(),
            from: from.clone(),
            to: to.clone(),
            cause,
            since_ms: now_ms(),
        },
        state: TaskState::Running,
        text: "begun".into(),
        ended_ms: None,
    };
    keep(node, &task).await?;
    Ok(task)
}

/// Writes a new task down.
///
/// # Errors
/// There is one of this name, or the store's.
pub async fn keep(node: &Arc<Node>, task: &StoredTask) -> Result<()> {
    let (key, value) = (key(&task.id), json(task)?);
    node.blocking(move |n| {
        let done = n
            .kv()
            .commit(&Commit::default().unchanged(&key, None).put(&key, value))?;
        match done.is_done() {
            true => Ok(()),
            false => Err(NodeError::Conflict("the task".into())),
        }
    })
    .await
}

/// Ends a move that is under way.
///
/// # Errors
/// The store's.
pub async fn cancel(node: &Arc<Node>, pool: &Pool, vm: &VmId, to: &HostId) -> Result<()> {
    for t in &pool.tasks {
        let same = matches!(&t.task, Task::Migrate { vm: v, to: h, .. } if v == vm && h == to);
        if same && t.state == TaskState::Running {
            set(node, &t.id, TaskState::Cancelled, "cancelled").await?;
        }
    }
    Ok(())
}

/// Changes how a task stands, unless it has ended.
///
/// # Errors
/// The store's.
pub async fn set(node: &Arc<Node>, id: &str, state: TaskState, text: &str) -> Result<()> {
    let (id, text) = (id.to_owned(), text.to_owned());
    node.blocking(move |n| set_now(n, &id, state, &text)).await
}

fn set_now(node: &Node, id: &str, state: TaskState, text: &str) -> Result<()> {
    let mut subject = None;
    update(&*node.kv(), &key(id), |old: Option<StoredTask>| {
        Ok(old.filter(|t| t.state == TaskState::Running).map(|mut t| {
            let about = match &t.task {
                Task::Migrate { vm, .. } => About::Vm(vm.clone()),
                Task::Upgrade { host, .. } => About::Host(host.clone()),
                Task::RollingUpgrade { .. } => About::Pool,
            };
            subject = Some((about, format!("{}: {text}", t.id)));
            t.state = state;
            t.text = text.to_owned();
            t.ended_ms = (state != TaskState::Running).then(now_ms);
            t
        }))
    })?;
    if let Some((about, text)) = subject.filter(|_| state != TaskState::Running) {
        node.note(about, text);
    }
    Ok(())
}

/// This host's process for a VM that is on its way here ended as soon as it was started: who asked for the move is told. The pool's own
/// moves are tried again.
///
/// # Errors
/// The store's.
pub fn cannot_take(node: &Node, pool: &Pool, vm: &VmId, words: &str) -> Result<()> {
    let me = node.host();
    let asked = |t: &&StoredTask| {
        let here = matches!(&t.task, Task::Migrate { vm: v, to, cause: MoveCause::Operator, .. } if v == vm && *to == me);
        here && t.state == TaskState::Running
    };
    let text = format!("{me} cannot take it, its process there ended: {words}");
    let mut tasks = pool.tasks.iter().filter(asked);
    tasks.try_for_each(|t| set_now(node, &t.id, TaskState::Failed, &text))
}

/// Takes every move a step further.
///
/// # Errors
/// The store's. What a host refuses is written into the task.
pub async fn progress(node: &Arc<Node>, pool: &Pool) -> Result<()> {
    for stored in pool.tasks.iter().filter(|t| t.state == TaskState::Running) {
        let Task::Migrate {
            vm,
            from,
            to,
            cause,
            since_ms,
        } = &stored.task
        else {
            continue;
        };
        let Some(entry) = pool.vms.get(vm) else {
            set(node, &stored.id, TaskState::Failed, "the VM was deleted").await?;
            continue;
        };
        let owner = entry.owner();
        if owner == Some(to) {
            let left = now_ms();
            remember_move(node, vm, from, *cause, left).await?;
            let text = format!("it runs on {to}, after {} ms", left.saturating_sub(*since_ms));
            set(node, &stored.id, TaskState::Done, &text).await?;
        } else if owner != Some(from) {
            set(
                node,
                &stored.id,
                TaskState::Failed,
                "it runs elsewhere, or not at all",
            )
            .await?;
        } else if let Some(unfit) = entry.memory.unfit.get(to) {
            if !entry.stored.record.disks_suffice() {
                change_standbys(node, vm, to, false).await?;
            }
            let text = format!("it cannot go on on {to}: {}", unfit.why);
            set(node, &stored.id, TaskState::Failed, &text).await?;
        } else if now_ms() > since_ms.saturating_add(BOUND_MS) {
            set(
                node,
                &stored.id,
                TaskState::Failed,
                "it did not become in sync in time",
            )
            .await?;
        } else if entry.record.as_ref().is_some_and(|r| r.in_sync.contains(to)) {
            hand_over(node, pool, stored, (vm, from, to, *cause), since_ms).await?;
        } else {
            if !entry.memory.standbys.contains(to) {
                change_standbys(node, vm, to, true).await?;
            }
            let left = crate::agent::copying(pool, vm).get(to).copied();
            let text = left.map_or_else(
                || "waiting for the standby".to_owned(),
                |bytes| format!("copying, {} MiB to go", bytes >> 20),
            );
            if text != stored.text {
                set(node, &stored.id, TaskState::Running, &text).await?;
            }
        }
    }
    Ok(())
}

async fn hand_over(
    node: &Arc<Node>,
    pool: &Pool,
    stored: &StoredTask,
    (vm, from, to, cause): (&VmId, &HostId, &HostId, MoveCause),
    since_ms: &u64,
) -> Result<()> {
    // The text carries when it was last asked for.
    let asked = stored
        .text
        .strip_prefix("handing over since ")
        .and_then(|t| t.split(';').next()?.parse::<u64>().ok());
    if asked.is_some_and(|at| now_ms() < at.saturating_add(AGAIN_MS)) {
        return Ok(());
    }
    let said = pool
        .reports
        .get(from)
        .and_then(|r| r.instances.get(vm)?.stays.clone());
    let said = said.filter(|_| asked.is_some());
    if let Some(why) = said.as_ref().filter(|_| cause == MoveCause::Operator) {
        return set(node, &stored.id, TaskState::Failed, why).await;
    }
    let last = said.map_or_else(String::new, |why| format!("; last time: {why}"));
    let text = format!("handing over since {}{last}", now_ms().max(*since_ms));
    set(node, &stored.id, TaskState::Running, &text).await?;
    let action = Action::Migrate {
        vm: vm.clone(),
        from: from.clone(),
        to: to.clone(),
        term: pool.vm_entry(vm)?.term(),
        cause,
    };
    if let Err(error) = send(node, pool, from, &action).await {
        tracing::warn!(%error, %vm, "a handover was not begun; it is asked for again");
    }
    Ok(())
}

async fn remember_move(node: &Arc<Node>, vm: &VmId, from: &HostId, cause: MoveCause, at: u64) -> Result<()> {
    let (key, from) = (vm_state(vm), from.clone());
    node.blocking(move |n| {
        update(&*n.kv(), &key, |old: Option<VmMemory>| {
            let mut memory = old.unwrap_or_default();
            (memory.moved_ms, memory.moved_from) = (Some(at), Some(from.clone()));
            memory.home = match cause {
                MoveCause::Drain => memory.home.or(Some(Home {
                    host: from.clone(),
                    left_ms: at,
                })),
                _ => None,
            };
            Ok(Some(memory))
        })
    })
    .await
    .map(|_| ())
}
