//! One check of a service in a guest, from the host that runs it.

use super::agent::Agent;
use super::beats::Beats;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use steadfast_cluster::model::{Check, HealthPolicy, Remedy};
use tokio::net::TcpStream;

/// Checks of one VM.
const CHECKS_MAX: usize = 16;
/// Shortest time between two rounds, ms: the daemon looks once a second.
const INTERVAL_MIN_MS: u64 = 1000;

/// Words of a command in the guest, and bytes of all of them.
const WORDS_MAX: usize = 64;
const COMMAND_BYTES_MAX: usize = 16 << 10;

/// The ways into a guest that its vsock device gives; none of them, and of neither anything but an error, without it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inside<'a> {
    /// Its agent.
    pub agent: Option<&'a Agent>,
    /// Heartbeats of its application.
    pub beats: Option<&'a Beats>,
}

/// Whether a check needs a vsock device.
#[must_use]
pub const fn is_inside(check: &Check) -> bool {
    matches!(check, Check::Command { .. } | Check::Heartbeat { .. })
}

/// Says what a policy lacks, if anything. `vsock`: the VM has such a device.
///
/// # Errors
/// What is wrong, and what would be right.
pub fn valid(policy: &HealthPolicy, vsock: bool) -> Result<(), String> {
    if policy.checks.is_empty() || policy.checks.len() > CHECKS_MAX {
        return Err(format!("a policy has 1 to {CHECKS_MAX} checks"));
    }
    if policy.interval_ms < INTERVAL_MIN_MS {
        return Err(format!(
            "checks are made every {INTERVAL_MIN_MS} ms at most; give a longer interval"
        ));
    }
    if policy.timeout_ms == 0 || policy.timeout_ms > policy.interval_ms {
        return Err(
            "a check must be over before the next begins: give a timeout from 1 ms to the interval".into(),
        );
    }
    for check in &policy.checks {
        match check {
            Check::Tcp { to } => {
                let port = to
                    .rsplit_once(':')
                    .and_then(|(host, port)| (!host.is_empty()).then_some(port));
                if port.and_then(|p| p.parse::<u16>().ok()).is_none_or(|p| p == 0) {
                    return Err(format!("{to:?} is no ADDRESS:PORT"));
                }
            }
            Check::Http { url } => {
                target(url)?;
            }
            Check::Command { argv } => command(argv)?,
            Check::Heartbeat { within_ms } if *within_ms < policy.interval_ms => {
                return Err(format!(
                    "heartbeats are looked for every {} ms: none can be demanded within {within_ms} ms",
                    policy.interval_ms
                ));
            }
            Check::Heartbeat { .. } => {}
        }
    }
    let restarts = policy.ladder.iter().any(|r| r.remedy == Remedy::RestartService);
    if !policy.restart.is_empty() {
        command(&policy.restart)?;
    }
    if (policy.checks.iter().any(is_inside) || restarts && !policy.restart.is_empty()) && !vsock {
        return Err(
            "commands and heartbeats in the guest take a vsock device, which this VM has not: create it with --agent, or check \
             the service by TCP or HTTP"
                .into(),
        );
    }
    Ok(())
}

fn command(argv: &[String]) -> Result<(), String> {
    let bytes: usize = argv.iter().map(String::len).sum();
    match argv.first() {
        None => Err("a command names a program".into()),
        Some(program) if program.is_empty() => Err("a command names a program".into()),
        Some(_) if argv.len() > WORDS_MAX || bytes > COMMAND_BYTES_MAX => Err(format!(
            "a command has at most {WORDS_MAX} words and {} KiB: put it into a script in the guest",
            COMMAND_BYTES_MAX >> 10
        )),
        Some(_) => Ok(()),
    }
}

/// Where to connect for a URL, and what to ask for there.
fn target(url: &str) -> Result<(String, Uri), String> {
    let uri: Uri = url.parse().map_err(|e| format!("{url:?} is no URL: {e}"))?;
    let host = uri.host().ok_or_else(|| format!("{url:?} names no host"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("{url:?}: checks are made by http:// only"));
    }
    Ok((format!("{host}:{}", uri.port_u16().unwrap_or(80)), uri))
}

/// Makes a check. The caller bounds its time.
///
/// # Errors
/// Why the service does not pass.
pub async fn make(check: &Check, inside: Inside<'_>) -> Result<(), String> {
    match check {
        Check::Tcp { to } => connect(to).await.map(|_| ()),
        Check::Http { url } => http(url).await,
        Check::Command { argv } => inside.agent.ok_or_else(none)?.run(argv).await,
        Check::Heartbeat { within_ms } => inside.beats.ok_or_else(none)?.within(*within_ms),
    }
}

fn none() -> String {
    "it takes a vsock device, which this VM has not".into()
}

async fn connect(to: &str) -> Result<TcpStream, String> {
    TcpStream::connect(to).await.map_err(|e| format!("{to}: {e}"))
}

async fn http(url: &str) -> Result<(), String> {
    let (to, uri) = target(url)?;
    let stream = connect(&to).await?;
    let named = |e: hyper::Error| format!("{url}: {e}");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(named)?;
    let driver = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let request = Request::get(path)
        .header("host", &to)
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("{url}: {e}"))?;
    let answer = sender.send_request(request).await.map_err(named);
    driver.abort();
    let status = answer?.status();
    match status.is_success() || status.is_redirection() {
        true => Ok(()),
        false => Err(format!("{url} answers {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::runtime;
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn serve(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = [0; 1024];
                let n = stream.read(&mut head).await.unwrap_or(0);
                if n > 0 {
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            }
        });
        at
    }

    #[test]
    fn a_service_passes_when_it_answers_well() {
        runtime().block_on(async {
            let well = serve("HTTP/1.1 204 No Content\r\n\r\n").await;
            let ill = serve("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n").await;
            let make = |check: Check| async move { make(&check, Inside::default()).await };
            assert_eq!(make(Check::Tcp { to: well.clone() }).await, Ok(()));
            let url = |at: &str| Check::Http {
                url: format!("http://{at}/health?full=1"),
            };
            assert_eq!(make(url(&well)).await, Ok(()));
            let why = make(url(&ill)).await.unwrap_err();
            assert!(why.contains("503"), "{why}");
            // Nobody listens there: the port was free a moment ago.
            let free = TcpListener::bind("127.0.0.1:0")
                .await
                .unwrap()
                .local_addr()
                .unwrap();
            let why = make(Check::Tcp { to: free.to_string() }).await.unwrap_err();
            assert!(why.contains(&free.to_string()), "{why}");
        });
    }

    #[test]
    fn what_cannot_be_checked_is_refused_with_the_reason() {
        let with = |check| HealthPolicy {
            checks: vec![check],
            ..HealthPolicy::default()
        };
        let tcp = |to: &str| with(Check::Tcp { to: to.into() });
        assert_eq!(valid(&tcp("10.0.0.2:80"), false), Ok(()));
        let beats = with(Check::Heartbeat { within_ms: 60_000 });
        assert_eq!(valid(&beats, true), Ok(()));
        for (policy, reason) in [
            (tcp("10.0.0.2"), "ADDRESS:PORT"),
            (tcp(":80"), "ADDRESS:PORT"),
            (
                with(Check::Http {
                    url: "https://x/".into(),
                }),
                "http://",
            ),
            (
                with(Check::Command {
                    argv: vec!["true".into()],
                }),
                "--agent",
            ),
            (with(Check::Heartbeat { within_ms: 60_000 }), "--agent"),
            (with(Check::Heartbeat { within_ms: 10 }), "every 5000 ms"),
            (with(Check::Command { argv: vec![] }), "program"),
            (
                with(Check::Command {
                    argv: vec!["x".into(); 65],
                }),
                "64 words",
            ),
            (
                HealthPolicy {
                    restart: vec!["systemctl".into()],
                    ..tcp("10.0.0.2:80")
                },
                "--agent",
            ),
            (HealthPolicy::default(), "checks"),
            (
                HealthPolicy {
                    interval_ms: 10,
                    ..tcp("10.0.0.2:80")
                },
                "interval",
            ),
            (
                HealthPolicy {
                    timeout_ms: 6000,
                    ..tcp("10.0.0.2:80")
                },
                "timeout",
            ),
        ] {
            let why = valid(&policy, false).unwrap_err();
            assert!(why.contains(reason), "{why}");
        }
    }
}
