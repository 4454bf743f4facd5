//! Which shared storages a host reaches: its VMs with disks there can be started on it, and moved to it.

use super::handlers::load;
use super::types::{Done, DryRun, Storages};
use super::{Answer, Failure};
use crate::error::refused;
use crate::node::Node;
use crate::records::{HostInfo, host_info, update};
use axum::Json;
use axum::extract::{Path, Query, State};
use std::sync::Arc;
use steadfast_types::HostId;

/// The shared storages that a host reaches from now on, all of them. One that a VM uses there cannot be left out.
#[utoipa::path(put, path = "/v1/hosts/{host}/storages", request_body = Storages,
    params(("host" = String, Path), ("dry_run" = Option<bool>, Query)), responses((status = 200, body = Done)))]
pub async fn set(
    State(node): State<Arc<Node>>,
    Path(host): Path<HostId>,
    Query(dry): Query<DryRun>,
    Json(wanted): Json<Storages>,
) -> Answer<Done> {
    let storages = wanted.storages;
    if let Some(odd) = storages.iter().find(|s| s.is_empty() || s.len() > 64) {
        return refused(format!("{odd:?} is no name of a storage: use 1 to 64 characters")).map_err(Failure);
    }
    let pool = load(&node).await?;
    pool.host(&host)?;
    let lacks = |vm: &&crate::pool::PoolVm| {
        let mut needed = vm.stored.record.storages();
        vm.copies().contains(&host) && needed.any(|s| !storages.contains(s))
    };
    if let Some(vm) = pool.vms.values().find(lacks) {
        let id = &vm.stored.record.id;
        return refused(format!(
            "VM {id} is on host {host} and needs its storage: move it first"
        ))
        .map_err(Failure);
    }
    let names: Vec<&str> = storages.iter().map(String::as_str).collect();
    let text = match names.is_empty() {
        true => "it reaches no shared storage".to_owned(),
        false => format!("it reaches the shared storages {}", names.join(", ")),
    };
    let plan = vec![format!("host {host}: {text}")];
    if !dry.dry_run {
        node.blocking(move |n| {
            update(&*n.kv(), &host_info(&host), |old: Option<HostInfo>| {
                Ok(old.map(|mut info| {
                    info.record.storages.clone_from(&storages);
                    info
                }))
            })?;
            n.note(&host, format!("{text} from now on"));
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
