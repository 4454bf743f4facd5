//! Binaries that come in, and the rolling upgrade of the pool.

use super::Answer;
use super::handlers::load;
use super::types::{Done, DryRun};
use crate::binary::{self, Described, Incoming};
use crate::error::{IoContext, NodeError, Result, refused};
use crate::http::{Bytes, ask, ask_with};
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{UPGRADE, get};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use http_body_util::BodyExt;
use hyper::Method;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use steadfast_cluster::decide;
use steadfast_types::HostId;
use utoipa::ToSchema;

type Shared = State<Arc<Node>>;

/// How long a host may take to take a binary and to look at it.
const TAKE_BOUND: Duration = Duration::from_secs(300);
/// Between two parts of a binary.
const PART_BOUND: Duration = Duration::from_secs(30);

/// Give this host a binary; it is asked what it is, and kept.
#[utoipa::path(post, path = "/v1/binaries", request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = Described)))]
pub async fn take(State(node): Shared, mut body: Body) -> Answer<Described> {
    let mut incoming = node.blocking(|n| Incoming::new(&n.folders)).await?;
    loop {
        let part = tokio::time::timeout(PART_BOUND, body.frame()).await;
        let cut = |why: String| NodeError::Refused(format!("the binary did not come in whole: {why}"));
        match part {
            Err(_) => return Err(cut(format!("nothing for {PART_BOUND:?}")).into()),
            Ok(None) => break,
            Ok(Some(Err(e))) => return Err(cut(e.to_string()).into()),
            Ok(Some(Ok(frame))) => {
                let Ok(part) = frame.into_data() else { continue };
                incoming = node
                    .blocking(move |_| {
                        incoming.write(&part)?;
                        Ok(incoming)
                    })
                    .await?;
            }
        }
    }
    Ok(Json(node.blocking(move |_| incoming.finish()).await?))
}

/// Whether this host could run a version.
pub async fn known(State(node): Shared, Path(version): Path<String>) -> Answer<Described> {
    let found = node
        .blocking(move |n| binary::known(&n.folders, &version))
        .await?;
    Ok(Json(found))
}

/// To which version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpgradeTo {
    /// A version that this host keeps, as `/v1/binaries` answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Back to what ran before the last rolling upgrade.
    pub back: bool,
}

/// Bring all hosts to another version, one after the other, with protection kept. Refused, with nothing touched, when a host
/// could not run it.
#[utoipa::path(post, path = "/v1/upgrade", request_body = UpgradeTo, params(("dry_run" = Option<bool>, Query)),
    responses((status = 200, body = Done)))]
pub async fn begin(
    State(node): Shared,
    Query(dry): Query<DryRun>,
    Json(wanted): Json<UpgradeTo>,
) -> Answer<Done> {
    let pool = load(&node).await?;
    let to = match wanted {
        UpgradeTo {
            to: Some(to),
            back: false,
        } => to,
        UpgradeTo { to: None, back: true } => {
            let last: Option<(String, String)> = node.blocking(|n| get(&*n.kv(), UPGRADE)).await?;
            let last = last.ok_or_else(|| NodeError::NotFound("rolling upgrade to go back from".into()))?;
            last.0
        }
        _ => return Err(NodeError::Refused("either `to` or `back` says where to".into()).into()),
    };
    let mut plan = Vec::new();
    for host in pool.hosts.keys() {
        let runs = crate::upgrade::version(&pool, host);
        let how = if runs == to {
            "runs it already"
        } else {
            "is upgraded"
        };
        plan.push(format!("host {host} runs {runs}: {how}"));
    }
    let here = {
        let to = to.clone();
        node.blocking(move |n| binary::known(&n.folders, &to)).await?
    };
    for host in pool.hosts.keys().filter(|h| **h != node.host()) {
        hand_out(&node, &pool, host, &here.version, dry.dry_run)
            .await
            .map_err(|e| NodeError::Refused(format!("host {host}: {e}; nothing was changed")))?;
    }
    let mut snapshot = pool.snapshot(None);
    snapshot.pool.upgrade_to = Some(to.clone());
    plan.extend(decide(&snapshot).to_string().lines().map(str::to_owned));
    let task = match dry.dry_run {
        true => None,
        false => Some(crate::upgrade::begin(&node, &pool, &to).await?),
    };
    Ok(Json(Done {
        plan,
        dry_run: dry.dry_run,
        task,
    }))
}

/// Another host gets the binary unless it has it, and has looked at it after this. With `only_ask` nothing is sent: only a host that
/// cannot be asked is an error.
async fn hand_out(node: &Arc<Node>, pool: &Pool, host: &HostId, version: &str, only_ask: bool) -> Result<()> {
    let target = node.target(host, pool.host(host)?)?;
    let path = format!("/internal/v1/binaries/{version}");
    let there = ask::<Described>(&target, Method::GET, &path, None::<&()>, TAKE_BOUND).await;
    match there {
        Ok(_) => return Ok(()),
        // It answers, and has none.
        Err(NodeError::Refused(_)) if only_ask => return Ok(()),
        Err(NodeError::Refused(_)) => {}
        Err(other) => return Err(other),
    }
    let version_here = version.to_owned();
    let bytes = node
        .blocking(move |n| {
            let file = binary::file_of(&n.folders, &version_here)?;
            let bytes = std::fs::read(&file).what(|| format!("read {}", file.display()))?;
            Ok(Bytes::from(bytes))
        })
        .await?;
    let body = ("application/octet-stream", bytes);
    let taken: Described = ask_with(&target, Method::POST, "/internal/v1/binaries", body, TAKE_BOUND).await?;
    match taken.version == version {
        true => Ok(()),
        false => refused(format!("it got {} instead of {version}", taken.version)),
    }
}
