//! A small HTTP client: one JSON request, one JSON answer, bounded in time and size; over the daemon's unix socket or over TLS.

use crate::error::{NodeError, Result};
use http_body_util::{BodyExt, Full, Limited};
pub use hyper::Method;
pub use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// Largest answer in bytes.
const ANSWER_MAX: usize = 64 << 20;

/// Whom to ask.
#[derive(Clone)]
pub enum Target {
    /// A daemon on this host.
    Unix(PathBuf),
    /// A daemon elsewhere, which must prove to be `name` (a host's name, or the address).
    Tls {
        /// Where.
        at: SocketAddr,
        /// Whose certificate.
        name: ServerName<'static>,
        /// With what.
        config: Arc<ClientConfig>,
    },
}

impl Target {
    fn name(&self) -> String {
        match self {
            Self::Unix(path) => path.display().to_string(),
            Self::Tls { at, .. } => at.to_string(),
        }
    }
}

/// An error as the API gives it.
#[derive(serde::Deserialize)]
struct Failure {
    error: String,
}

/// Asks, and waits at most `bound` for the whole answer.
///
/// # Errors
/// No connection, no answer in time, or an answer that says why not.
pub async fn ask<A: DeserializeOwned>(
    target: &Target,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
    bound: Duration,
) -> Result<A> {
    let bytes = match body {
        Some(body) => serde_json::to_vec(body).map_err(|e| NodeError::Refused(e.to_string()))?,
        None => Vec::new(),
    };
    ask_with(target, method, path, ("application/json", bytes.into()), bound).await
}

/// As [`ask`], with a body of another kind.
///
/// # Errors
/// As [`ask`].
pub async fn ask_with<A: DeserializeOwned>(
    target: &Target,
    method: Method,
    path: &str,
    body: (&str, Bytes),
    bound: Duration,
) -> Result<A> {
    let failed = |mut why: String| {
        let way_out = [
            (
                "CertificateRevoked",
                "this host was taken out of the pool; let it join again under another --data",
            ),
            (
                "CertificateExpired",
                "are the clocks right? a host that was away for too long must join again",
            ),
            (
                "certificate expired",
                "are the clocks right? a host that was away for too long must join again",
            ),
        ];
        for (sign, way) in way_out {
            if why.contains(sign) {
                why = format!("{why}: {way}");
            }
        }
        NodeError::Peer {
            at: target.name(),
            why,
        }
    };
    let whole = async {
        let (status, bytes) = match target {
            Target::Unix(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(|e| {
                    failed(format!(
                        "{e}; does the daemon run? start it with `steadfast node`"
                    ))
                })?;
                send(stream, method, path, body).await.map_err(failed)?
            }
            Target::Tls { at, name, config } => {
                let stream = TcpStream::connect(at).await.map_err(|e| failed(e.to_string()))?;
                let _ = stream.set_nodelay(true);
                let tls = TlsConnector::from(Arc::clone(config));
                let stream = tls
                    .connect(name.clone(), stream)
                    .await
                    .map_err(|e| failed(e.to_string()))?;
                send(stream, method, path, body).await.map_err(failed)?
            }
        };
        if status.is_success() {
            return serde_json::from_slice(&bytes)
                .map_err(|e| failed(format!("an answer that is none: {e}")));
        }
        match serde_json::from_slice::<Failure>(&bytes) {
            Ok(failure) => Err(NodeError::Refused(failure.error)),
            Err(_) => Err(failed(format!("it answered {status}"))),
        }
    };
    tokio::time::timeout(bound, whole)
        .await
        .map_err(|_| failed(format!("no answer within {} s", bound.as_secs_f32())))?
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    method: Method,
    path: &str,
    (kind, bytes): (&str, Bytes),
) -> std::result::Result<(StatusCode, Bytes), String> {
    // What TLS says comes with the first answer, as the cause of an error that only names the connection.
    let text = |e: &dyn std::error::Error| {
        let causes = std::iter::successors(e.source(), |e| e.source());
        causes.fold(e.to_string(), |text, cause| format!("{text}: {cause}"))
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| text(&e))?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "steadfast")
        .header("content-type", kind)
        .body(Full::new(bytes))
        .map_err(|e| text(&e))?;
    let done = async {
        let response = sender.send_request(request).await.map_err(|e| text(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX);
        let bytes = body.collect().await.map_err(|e| text(&*e))?.to_bytes();
        Ok((status, bytes))
    };
    let answer = done.await;
    driver.abort();
    answer
}
