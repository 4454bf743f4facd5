//! Accepts connections, on the unix socket and over TLS, and finds out who is there.

use super::{joining, router};
use crate::error::{IoContext, Result};
use crate::node::Node;
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// Connections served at a time, on each listener.
const CONNECTIONS_MAX: usize = 256;
/// How long a client may take for the handshake, and for the head of a request.
const PATIENCE: Duration = Duration::from_secs(10);

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of the API ended badly");
    }
}

/// Serves the unix socket until the daemon ends.
///
/// # Errors
/// It cannot be bound.
pub async fn unix(node: Arc<Node>) -> Result<()> {
    let path = node.folders.socket();
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).what(|| format!("remove {}", path.display()))?
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).what(|| format!("listen at {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .what(|| format!("make {} private", path.display()))?;
    let (router, room) = (router(node), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return Ok(());
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, router).await;
                    drop(permit);
                });
            }
            // Out of descriptors, say; not a reason to spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Serves TLS until the daemon ends.
///
/// # Errors
/// The address cannot be bound, or the certificates cannot be used.
pub async fn tls(node: Arc<Node>) -> Result<()> {
    let at = node.config().api();
    let listener = TcpListener::bind(at).await.what(|| format!("listen at {at}"))?;
    let members = router(Arc::clone(&node));
    let strangers = joining(Arc::clone(&node)).with_state(Arc::clone(&node));
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Certificates may have been renewed or revoked since the last one.
        let acceptor = TlsAcceptor::from(node.server_tls());
        let (node, members, strangers) = (Arc::clone(&node), members.clone(), strangers.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    // The handshake has checked a certificate if there is one.
                    let shown = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
                    match shown.map(|c| crate::pki::number_and_end(c)) {
                        None => connection(stream, strangers).await,
                        Some(Err(error)) => tracing::warn!(%error, "a certificate without a number"),
                        Some(Ok((serial, _))) => tokio::select! {
                            () = connection(stream, members) => {}
                            () = node.until_revoked(&serial) => {
                                tracing::info!(serial, "a connection is closed: its certificate is revoked");
                            }
                        },
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
                Err(_) => tracing::debug!("a handshake took too long"),
            }
            drop(permit);
        });
    }
}
