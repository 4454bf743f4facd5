//! How a host is fenced from outside: see `crate::fence`.

use super::handlers::load;
use super::types::{Done, DryRun};
use super::{Answer, Failure};
use crate::error::refused;
use crate::fence::FenceAgent;
use crate::node::Node;
use crate::records::{HostInfo, host_info, update};
use axum::Json;
use axum::extract::{Path, Query, State};
use std::sync::Arc;
use steadfast_types::HostId;

type Shared = State<Arc<Node>>;

/// How a host is fenced from outside. The agent is asked for the host's power first, from the host that is asked.
#[utoipa::path(put, path = "/v1/hosts/{host}/fence", request_body = FenceAgent,
    params(("host" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn set(
    State(node): Shared,
    Path(host): Path<HostId>,
    Query(dry): Query<DryRun>,
    Json(agent): Json<FenceAgent>,
) -> Answer<Done> {
    if host == node.host() {
        return refused("ask another host: it is the others that will fence this one").map_err(Failure);
    }
    agent.check().map_err(Failure)?;
    let tried = agent.clone();
    node.blocking(move |_| tried.status()).await?;
    let said = format!("{} reaches the power of {host}", agent.agent);
    let text = format!("it is fenced by {} ({}) from now on", agent.agent, agent.action);
    keep(
        &node,
        host,
        (!dry.dry_run).then_some((Some(agent), text)),
        vec![said],
    )
    .await
}

/// A host is fenced by its lease alone.
#[utoipa::path(delete, path = "/v1/hosts/{host}/fence", params(("host" = String, Path), ("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn remove(
    State(node): Shared,
    Path(host): Path<HostId>,
    Query(dry): Query<DryRun>,
) -> Answer<Done> {
    let text = "it is fenced by its lease alone from now on";
    let change = (!dry.dry_run).then(|| (None, text.to_owned()));
    let plan = vec![format!("host {host}: {text}")];
    keep(&node, host, change, plan).await
}

async fn keep(
    node: &Arc<Node>,
    host: HostId,
    change: Option<(Option<FenceAgent>, String)>,
    plan: Vec<String>,
) -> Answer<Done> {
    load(node).await?.host(&host)?;
    let dry_run = change.is_none();
    if let Some((fence, text)) = change {
        node.blocking(move |n| {
            update(&*n.kv(), &host_info(&host), |old: Option<HostInfo>| {
                let fence = fence.clone();
                Ok(old.map(|info| HostInfo { fence, ..info }))
            })?;
            n.note(&host, text);
            Ok(())
        })
        .await?;
    }
    Ok(Json(Done {
        plan,
        dry_run,
        task: None,
    }))
}
