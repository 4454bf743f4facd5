//! The rolling upgrade as the command line asks for it.

use super::handlers::load;
use super::types::{Done, DryRun};
use super::{Answer, Failure};
use crate::node::Node;
use crate::upgrade;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use std::sync::Arc;
use steadfast_cluster::decide;
use utoipa::ToSchema;

type Shared = State<Arc<Node>>;

/// Upgrade the pool to this program, host by host, with protection kept. The body is the program file.
#[utoipa::path(post, path = "/v1/upgrade", params(("dry_run" = Option<bool>, Query)),
    request_body(content = Program, content_type = "application/octet-stream"),
    responses((status = 200, body = Done), (status = 409, description = "the file is no program that runs here")))]
pub async fn start(State(node): Shared, Query(dry): Query<DryRun>, body: Bytes) -> Answer<Done> {
    let version = node.blocking(move |n| upgrade::keep(n, &body)).await?;
    let mut snapshot = load(&node).await?.snapshot(None);
    snapshot.pool.upgrade_to = Some(version.clone());
    let on_it = |v: &str| v == version;
    let (done, left): (Vec<_>, Vec<_>) = snapshot
        .hosts
        .iter()
        .partition(|(_, h)| on_it(&h.status.versions.steadfast));
    let mut plan = vec![format!(
        "{version} on all hosts, one after the other, each drained before: {} to go, {} run it",
        left.len(),
        done.len()
    )];
    plan.extend(decide(&snapshot).to_string().lines().map(str::to_owned));
    if !dry.dry_run {
        let why = format!("an upgrade of all hosts to {version} was begun");
        node.blocking(move |n| upgrade::want(n, Some(&version), &why))
            .await?;
        node.wake.notify_one();
    }
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task: None,
    }))
}

/// Call the upgrade off: hosts that were emptied for it are used again, those upgraded stay so.
#[utoipa::path(delete, path = "/v1/upgrade", responses((status = 200, body = Done)))]
pub async fn stop(State(node): Shared) -> Answer<Done> {
    let wanted = load(&node).await?.settings.upgrade_to;
    let Some(version) = wanted else {
        return crate::error::refused("no upgrade is under way").map_err(Failure);
    };
    let text = format!("the upgrade to {version} was called off");
    let plan = vec![text.clone()];
    node.blocking(move |n| upgrade::want(n, None, &text)).await?;
    node.wake.notify_one();
    Ok(Json(Done {
        plan,
        dry_run: false,
        task: None,
    }))
}

/// A program that this host keeps, for another host.
pub async fn program(State(node): Shared, Path(version): Path<String>) -> Result<Vec<u8>, Failure> {
    Ok(node.blocking(move |n| upgrade::read(n, &version)).await?)
}

/// A program file.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
pub struct Program(#[allow(dead_code)] Vec<u8>);
