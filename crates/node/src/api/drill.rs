//! Drills as the command line asks for them.

use super::types::Done;
use super::{Answer, Failure};
use crate::drill;
use crate::error::refused;
use crate::node::Node;
use crate::pool::Pool;
use crate::records::DrillReport;
use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use steadfast_types::VmId;
use utoipa::ToSchema;

type Shared = State<Arc<Node>>;

/// Shortest time between two scheduled drills, ms.
const EVERY_MIN_MS: u64 = 60_000;

/// When a VM is drilled by itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrillSchedule {
    /// Milliseconds between two drills; none: never.
    pub every_ms: Option<u64>,
}

/// Start an isolated copy of a VM's standby, check it, and throw it away. The VM runs on. Answers with the report.
#[utoipa::path(post, path = "/v1/vms/{vm}/drill", params(("vm" = String, Path)), responses((status = 200, body = DrillReport)))]
pub async fn run(State(node): Shared, Path(vm): Path<VmId>) -> Answer<DrillReport> {
    Ok(Json(drill::drill(&node, &vm).await?))
}

/// The last report.
#[utoipa::path(get, path = "/v1/vms/{vm}/drill", params(("vm" = String, Path)), responses((status = 200, body = Option<DrillReport>)))]
pub async fn last(State(node): Shared, Path(vm): Path<VmId>) -> Answer<Option<DrillReport>> {
    let found = node
        .blocking(move |n| {
            Pool::load(&*n.kv())?.vm_entry(&vm)?;
            drill::last(n, &vm)
        })
        .await?;
    Ok(Json(found))
}

/// Drill a VM by itself from now on, or no more.
#[utoipa::path(post, path = "/v1/vms/{vm}/drill/schedule", params(("vm" = String, Path)), request_body = DrillSchedule,
    responses((status = 200, body = Done)))]
pub async fn schedule(
    State(node): Shared,
    Path(vm): Path<VmId>,
    Json(wanted): Json<DrillSchedule>,
) -> Answer<Done> {
    if wanted.every_ms.is_some_and(|ms| ms < EVERY_MIN_MS) {
        return refused("a VM is drilled once a minute at most; give a longer time").map_err(Failure);
    }
    let plan = vec![wanted.every_ms.map_or_else(
        || format!("{vm}: no scheduled drills"),
        |ms| format!("{vm}: a drill every {} s", ms / 1000),
    )];
    node.blocking(move |n| {
        Pool::load(&*n.kv())?.vm_entry(&vm)?;
        drill::schedule(n, &vm, wanted.every_ms)
    })
    .await?;
    Ok(Json(Done {
        plan,
        ..Done::default()
    }))
}

/// Another host asks for a drill of the standby here.
pub async fn here(State(node): Shared, Path(vm): Path<VmId>) -> Answer<DrillReport> {
    Ok(Json(node.blocking(move |n| drill::for_another(n, &vm)).await?))
}
