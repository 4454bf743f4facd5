//! `steadfast node`: the daemon. VM processes, the guard and this host's etcd member outlive it.

use crate::agent::Agent;
use crate::api::serve;
use crate::config::{Folders, NodeConfig, StoreChoice};
use crate::error::{IoContext, Result, refused};
use crate::leader::{self, Decider};
use crate::node::Node;
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// How long the store may take to answer at start-up before the daemon says so.
const PATIENCE: Duration = Duration::from_secs(10);
/// Answers under way get so long before the daemon becomes another binary.
const LAST_ANSWERS: Duration = Duration::from_millis(300);

/// Why a daemon ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Told,
    /// Its binary was replaced: the process shall become the new one ([`crate::binary::become_new`]).
    Replaced,
}

/// Runs until told to end (SIGTERM, SIGINT), its binary is replaced, or a part of it ends.
///
/// # Errors
/// The host is in no pool, another daemon runs, or an address cannot be bound.
pub async fn run(folders: Folders, program: PathBuf) -> Result<Ended> {
    crate::binary::adopt_children();
    let config = NodeConfig::load(&folders)?;
    std::fs::create_dir_all(&folders.run).what(|| format!("make {}", folders.run.display()))?;
    let path = folders.data.join("daemon.lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let lock = lock.what(|| format!("open {}", path.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return refused(format!("a daemon runs with {} already", folders.data.display()));
    }
    let witness = config.witness;
    crate::certs::check(&folders, &config)?;
    crate::drill::sweep(&folders);
    let node = Arc::new(Node::new(folders, config.clone(), program)?);
    start_store(&node, &config).await?;
    let mut terminate = signal(SignalKind::terminate()).what(|| "wait for SIGTERM".into())?;
    let mut interrupt = signal(SignalKind::interrupt()).what(|| "wait for SIGINT".into())?;
    let decider = {
        let node = Arc::clone(&node);
        async move {
            if witness {
                // It votes in the store; hosts that run VMs decide.
                std::future::pending::<()>().await;
            }
            Decider::new(node).run().await;
        }
    };
    let version = &crate::binary::own().version;
    tracing::info!(host = %config.host, pool = config.pool, api = %config.api(), version, "the daemon runs");
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(Ended::Told),
        _ = interrupt.recv() => Ok(Ended::Told),
        () = replaced(&node) => Ok(Ended::Replaced),
        () = Agent::new(Arc::clone(&node)).run() => refused("the agent ended"),
        () = decider => refused("the decider ended"),
        () = crate::paths::run(Arc::clone(&node)) => refused("the heartbeats ended"),
        done = serve::unix(Arc::clone(&node)) => done.map(|()| Ended::Told),
        done = serve::tls(Arc::clone(&node)) => done.map(|()| Ended::Told),
    };
    let resigned = node.blocking(|n| {
        let _ = std::fs::remove_file(n.folders.socket());
        leader::resign(n)
    });
    let _ = tokio::time::timeout(Duration::from_secs(3), resigned).await;
    drop(lock);
    ended
}

/// Until the binary was replaced, and a moment longer, in which whoever asked for it gets the answer. (If that is lost, the version
/// that this host reports tells.)
async fn replaced(node: &Node) {
    node.replaced.notified().await;
    tokio::time::sleep(LAST_ANSWERS).await;
}

/// Starts this host's etcd member, and waits a little for it. A store that does not answer is no reason to end: the VMs run, and
/// the agent goes on trying.
async fn start_store(node: &Arc<Node>, config: &NodeConfig) -> Result<()> {
    if !matches!(config.store, StoreChoice::Managed { member: true, .. }) {
        return Ok(());
    }
    let (folders, config) = (node.folders.clone(), config.clone());
    node.blocking(move |n| {
        let mut member = crate::etcd::Member::new(folders);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Err(error) = member.supervise(&config) {
                tracing::error!(%error, "this host's etcd member does not run");
            }
            match n.kv().read(&[]) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > until => {
                    tracing::error!(%error, "the store does not answer yet");
                    return Ok(());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    })
    .await
}
