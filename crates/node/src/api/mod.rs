//! The HTTP API: versioned (`/v1`), JSON, described by `/v1/openapi.json`.
//!
//! It is served on the daemon's unix socket, for whoever may open that, and over TLS. There a client must show a certificate of
//! the pool; without one only `/v1/join` is to be had, which asks for a token. Connections are bounded in number, handshakes
//! and bodies in time and size (I9).

pub mod apps;
pub mod drill;
mod fence;
pub mod handlers;
pub mod join;
pub mod serve;
pub mod settings;
mod storage;
pub mod types;
pub mod upgrade;
pub mod vms;

use crate::error::NodeError;
use crate::node::Node;
use axum::Json;
use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use std::sync::Arc;
use utoipa::OpenApi;

/// Largest request body in bytes.
const BODY_MAX: usize = 1 << 20;

/// An error as it goes out: `{"error": "..."}`.
pub struct Failure(pub NodeError);

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            NodeError::NotFound(_) => StatusCode::NOT_FOUND,
            NodeError::Refused(_) | NodeError::Conflict(_) => StatusCode::CONFLICT,
            NodeError::Store(_) | NodeError::Peer { .. } | NodeError::Etcd(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(serde_json::json!({"error": self.0.to_string()}))).into_response()
    }
}

/// An answer.
pub type Answer<T> = Result<Json<T>, Failure>;

/// The description of the API.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Steadfast",
        description = "A pool of hosts that keeps virtual machines running"
    ),
    paths(
        handlers::status,
        handlers::hosts,
        handlers::drain,
        handlers::resume,
        fence::set,
        fence::remove,
        storage::set,
        handlers::remove_host,
        handlers::events,
        handlers::availability,
        handlers::tasks,
        handlers::cancel_task,
        handlers::token,
        handlers::plan,
        vms::list,
        vms::show,
        vms::create,
        vms::delete,
        vms::start,
        vms::stop,
        vms::protect,
        vms::migrate,
        vms::health,
        vms::limits,
        upgrade::take,
        upgrade::begin,
        settings::vm,
        settings::show,
        settings::pool,
        apps::list,
        apps::set,
        apps::start,
        apps::stop,
        apps::protect,
        vms::console,
        drill::run,
        drill::last,
        drill::schedule,
    ),
    components(schemas(
        types::PoolStatus,
        types::HostStatus,
        types::VmStatus,
        types::NewVm,
        types::NewClass,
        types::NewHealth,
        crate::limits::VmLimits,
        crate::fence::FenceAgent,
        types::Storages,
        settings::VmChange,
        settings::PoolChange,
        apps::AppStatus,
        apps::AppChange,
        types::MoveTo,
        types::HowToStop,
        types::Done,
        types::NewToken,
        upgrade::UpgradeTo,
        crate::binary::Described,
        types::Availability,
        drill::DrillSchedule,
        crate::records::DrillReport,
        crate::records::StoredTask,
        crate::records::TaskState,
    ))
)]
pub struct Description;

/// For those who proved to belong to the pool, or opened the unix socket.
pub fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/status", get(handlers::status))
        .route("/v1/hosts", get(handlers::hosts))
        .route("/v1/hosts/{host}", axum::routing::delete(handlers::remove_host))
        .route("/v1/hosts/{host}/drain", post(handlers::drain))
        .route("/v1/hosts/{host}/resume", post(handlers::resume))
        .route("/v1/hosts/{host}/storages", put(storage::set))
        .route("/v1/hosts/{host}/fence", put(fence::set).delete(fence::remove))
        .route("/v1/events", get(handlers::events))
        .route("/v1/tasks", get(handlers::tasks))
        .route("/v1/tasks/{task}", axum::routing::delete(handlers::cancel_task))
        .route("/v1/tokens", post(handlers::token))
        .route("/v1/plan", get(handlers::plan))
        .route("/v1/vms", get(vms::list).post(vms::create))
        .route("/v1/vms/{vm}", get(vms::show).delete(vms::delete))
        .route("/v1/vms/{vm}/start", post(vms::start))
        .route("/v1/vms/{vm}/stop", post(vms::stop))
        .route("/v1/vms/{vm}/protection", post(vms::protect))
        .route("/v1/vms/{vm}/migrate", post(vms::migrate))
        .route("/v1/vms/{vm}/health", post(vms::health))
        .route("/v1/vms/{vm}/limits", post(vms::limits))
        .route("/v1/vms/{vm}/availability", get(handlers::availability))
        .route("/v1/vms/{vm}/drill", get(drill::last).post(drill::run))
        .route("/v1/vms/{vm}/drill/schedule", post(drill::schedule))
        .route("/internal/v1/drill/{vm}", post(drill::here))
        .route("/v1/vms/{vm}/console", get(vms::console))
        .route("/v1/vms/{vm}/settings", post(settings::vm))
        .route("/v1/settings", get(settings::show).post(settings::pool))
        .route("/v1/applications", get(apps::list))
        .route("/v1/applications/{app}/settings", post(apps::set))
        .route("/v1/applications/{app}/start", post(apps::start))
        .route("/v1/applications/{app}/stop", post(apps::stop))
        .route("/v1/applications/{app}/protection", post(apps::protect))
        .route("/v1/binaries", post(upgrade::take))
        .route("/v1/upgrade", post(upgrade::begin))
        .route("/internal/v1/binaries", post(upgrade::take))
        .route("/internal/v1/binaries/{version}", get(upgrade::known))
        .route("/v1/openapi.json", get(|| async { Json(Description::openapi()) }))
        .route(
            "/internal/v1/ping",
            get(|| async { Json(serde_json::json!({"ok": true})) }),
        )
        .route("/internal/v1/act", post(handlers::act))
        .merge(joining(node.clone()))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_MAX))
        .with_state(node)
}

/// For strangers.
pub fn joining(node: Arc<Node>) -> Router<Arc<Node>> {
    let _ = node;
    Router::new().route("/v1/join", post(join::join))
}
