//! The pool's etcd: this host's member as a supervised process, and changes of membership.
//!
//! The member is a child of the daemon in a process group of its own. It outlives the daemon, so that an upgrade of the daemon does
//! not cost the store a vote; the next daemon finds it by `DATA/etcd.pid`. It is started again, with back-off, when it ends.
//! New members join as learners, which do not vote, and are promoted once they have caught up.

use crate::config::{Folders, NodeConfig, StoreChoice, write_file};
use crate::error::{IoContext, NodeError, Result};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, MemberAddOptions, TlsOptions};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_store::StoreSpec;

/// How long one request about membership may take.
const BOUND: Duration = Duration::from_secs(10);
/// How long one member may take to be found alive, before the next is tried.
const ANSWER_BOUND: Duration = Duration::from_secs(2);
/// A client is made anew after so long: certificates are renewed.
const CLIENT_KEPT: Duration = Duration::from_secs(600);
/// Members beyond this do not make the store safer, only slower.
pub const MEMBERS_MAX: usize = 5;

/// This host's member.
pub struct Member {
    folders: Folders,
    failures: u32,
    next_start: Instant,
}

impl Member {
    /// Of this host.
    #[must_use]
    pub fn new(folders: Folders) -> Self {
        Self {
            folders,
            failures: 0,
            next_start: Instant::now(),
        }
    }

    fn pid_path(&self) -> PathBuf {
        self.folders.data.join("etcd.pid")
    }

    /// The process, if it lives.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.pid_path()).ok()?.trim().parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let data = self.data_argument();
        line.split(|b| *b == 0)
            .any(|w| w == data.as_bytes())
            .then_some(pid)
    }

    fn data_argument(&self) -> String {
        format!("--data-dir={}", self.folders.data.join("etcd").display())
    }

    /// Starts the member if this host shall have one and it does not run. Call it at intervals.
    ///
    /// # Errors
    /// There is no etcd program, or it cannot be started.
    pub fn supervise(&mut self, config: &NodeConfig) -> Result<()> {
        let StoreChoice::Managed {
            member: true,
            initial,
            state,
            ..
        } = &config.store
        else {
            return Ok(());
        };
        if self.pid().is_some() || Instant::now() < self.next_start {
            return Ok(());
        }
        self.failures = (self.failures + 1).min(6);
        self.next_start = Instant::now() + Duration::from_millis(500 << self.failures);
        let (tls, data) = (self.folders.tls(), self.folders.data.join("etcd"));
        let log = self.folders.data.join("etcd.log");
        let mut options = File::options();
        let log_file = options.create(true).append(true).open(&log);
        let log_file = log_file.what(|| format!("open {}", log.display()))?;
        fs::create_dir_all(&data).what(|| format!("make {}", data.display()))?;
        // etcd insists on it.
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&data, private).what(|| format!("make {} private", data.display()))?;
        let (client, peer) = (
            config.url(config.ports.etcd_client),
            config.url(config.ports.etcd_peer),
        );
        let election = config.etcd_election_ms();
        let (heartbeat, election) = ((election / 10).to_string(), election.to_string());
        let mut command = Command::new(program(config)?);
        command.arg(self.data_argument());
        command.arg(format!("--name={}", config.host));
        for (name, value) in [
            ("listen-client-urls", client.as_str()),
            ("advertise-client-urls", client.as_str()),
            ("listen-peer-urls", peer.as_str()),
            ("initial-advertise-peer-urls", peer.as_str()),
            ("initial-cluster", initial.as_str()),
            ("initial-cluster-state", state.as_str()),
            ("initial-cluster-token", config.pool.as_str()),
            ("heartbeat-interval", heartbeat.as_str()),
            ("election-timeout", election.as_str()),
            ("auto-compaction-mode", "revision"),
            ("auto-compaction-retention", "2000"),
            ("quota-backend-bytes", "1073741824"),
            // What is acknowledged is in the log, synced; the database follows, and each time costs two more syncs.
            ("backend-batch-interval", "1s"),
            ("logger", "zap"),
            ("log-level", "warn"),
        ] {
            command.arg(format!("--{name}={value}"));
        }
        for side in ["", "peer-"] {
            command.arg(format!("--{side}client-cert-auth=true"));
            command.arg(format!("--{side}trusted-ca-file={}", tls.ca.display()));
            command.arg(format!("--{side}cert-file={}", tls.certificate.display()));
            command.arg(format!("--{side}key-file={}", tls.key.display()));
        }
        // It reads the list anew for each connection, and needs it to be there.
        let crl = self.folders.crl();
        if crl.is_file() {
            command.arg(format!("--client-crl-file={}", crl.display()));
            command.arg(format!("--peer-crl-file={}", crl.display()));
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file);
        command.process_group(0);
        let mut child = command
            .spawn()
            .what(|| format!("start {}", command.get_program().display()))?;
        write_file(&self.pid_path(), child.id().to_string().as_bytes())?;
        tracing::info!(pid = child.id(), "etcd member started");
        let waiter = std::thread::Builder::new().name("etcd-wait".into());
        waiter
            .spawn(move || _ = child.wait())
            .map(|_| ())
            .what(|| "a thread that waits for etcd".into())
    }
}

/// The etcd program.
///
/// # Errors
/// There is none.
pub fn program(config: &NodeConfig) -> Result<PathBuf> {
    if let Some(path) = &config.etcd {
        return Ok(path.clone());
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths)
        .map(|folder| folder.join("etcd"))
        .find(|p| p.is_file())
        .ok_or_else(|| {
            NodeError::Etcd(
                "there is no `etcd` on the PATH; install it (Debian: etcd-server), name it with --etcd-program, or use an \
                 existing cluster with `pool init --etcd URL`"
                    .into(),
            )
        })
}

/// A connection to the first member that has a vote and answers.
async fn client(spec: &StoreSpec) -> Result<Client> {
    let StoreSpec::Etcd { etcd } = spec else {
        return Err(NodeError::Etcd("this pool's store is a folder".into()));
    };
    let mut options = ConnectOptions::new()
        .with_timeout(BOUND)
        .with_connect_timeout(ANSWER_BOUND);
    if let Some(tls) = &etcd.tls {
        let read = |path: &Path| fs::read(path).what(|| format!("read {}", path.display()));
        options = options.with_tls(
            TlsOptions::new()
                .ca_certificate(Certificate::from_pem(read(&tls.ca)?))
                .identity(Identity::from_pem(read(&tls.certificate)?, read(&tls.key)?)),
        );
    }
    let mut last = "it has no endpoint".to_owned();
    for endpoint in &etcd.endpoints {
        let asked = async {
            let client = Client::connect([endpoint], Some(options.clone())).await?;
            let status = client.maintenance_client().status().await?;
            Ok::<_, etcd_client::Error>((client, status.is_learner()))
        };
        match tokio::time::timeout(ANSWER_BOUND, asked).await {
            Ok(Ok((client, false))) => return Ok(client),
            Ok(Ok((_, true))) => last = format!("{endpoint} has no vote yet"),
            Ok(Err(error)) => last = format!("{endpoint}: {error}"),
            Err(_) => last = format!("{endpoint} does not answer"),
        }
    }
    Err(NodeError::Etcd(last))
}

/// A member as the cluster knows it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its number.
    pub id: u64,
    /// Its name: the host's; empty before its first start.
    pub name: String,
    /// Its address for members.
    pub peer: String,
    /// It does not vote yet.
    pub learner: bool,
}

/// The members.
///
/// # Errors
/// The cluster does not answer.
pub async fn members(spec: &StoreSpec) -> Result<Vec<Listed>> {
    let listed = client(spec).await?.cluster_client().member_list().await;
    Ok(list(&listed.map_err(|e| NodeError::Etcd(e.to_string()))?))
}

fn list(answer: &etcd_client::MemberListResponse) -> Vec<Listed> {
    let all = answer.members().iter().map(|m| Listed {
        id: m.id(),
        name: m.name().to_owned(),
        peer: m.peer_urls().first().cloned().unwrap_or_default(),
        learner: m.is_learner(),
    });
    all.collect()
}

/// Adds a member as a learner, unless it is there. Returns `--initial-cluster` for its start.
///
/// # Errors
/// The cluster does not answer or refuses, for example while another one is still a learner.
pub async fn add(spec: &StoreSpec, name: &str, peer: &str) -> Result<String> {
    let mut all = members(spec).await?;
    if !all.iter().any(|m| m.peer == peer) {
        let options = MemberAddOptions::new().with_is_learner();
        let added = client(spec)
            .await?
            .cluster_client()
            .member_add(vec![peer.to_owned()], Some(options))
            .await;
        added.map_err(|e| NodeError::Etcd(format!("cannot add member {name}: {e}")))?;
        all = members(spec).await?;
    }
    let parts = all.iter().map(|m| {
        let name = if m.peer == peer { name } else { m.name.as_str() };
        format!("{name}={}", m.peer)
    });
    Ok(parts.collect::<Vec<_>>().join(","))
}

/// Gives every learner that has caught up a vote. True when there is none left.
///
/// # Errors
/// The cluster does not answer.
pub async fn promote_learners(spec: &StoreSpec) -> Result<bool> {
    let mut left = false;
    for m in members(spec).await?.into_iter().filter(|m| m.learner) {
        let done = client(spec).await?.cluster_client().member_promote(m.id).await;
        if let Err(error) = done {
            tracing::debug!(%error, name = m.name, "a learner is not promoted yet");
            left = true;
        } else {
            tracing::info!(name = m.name, "a learner has a vote now");
        }
    }
    Ok(!left)
}

/// Removes the member of a host that is gone for good. Already done if there is none.
///
/// # Errors
/// The cluster does not answer or refuses.
pub async fn remove(spec: &StoreSpec, name: &str) -> Result<()> {
    for m in members(spec).await?.into_iter().filter(|m| m.name == name) {
        let done = client(spec).await?.cluster_client().member_remove(m.id).await;
        done.map_err(|e| NodeError::Etcd(format!("cannot remove member {name}: {e}")))?;
    }
    Ok(())
}

/// The cluster as it said last.
pub struct Cluster {
    /// Who belongs to it.
    pub members: Vec<Listed>,
    /// The number of the member that leads; 0: none that is known of.
    pub leader: u64,
}

/// Looks at the cluster again and again, over one connection: each new one costs both sides a handshake.
#[derive(Default)]
pub struct Looker {
    client: Option<(StoreSpec, Client, Instant)>,
}

impl Looker {
    /// The cluster now.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn look(&mut self, spec: &StoreSpec) -> Result<Cluster> {
        let known = self.client.take();
        let (client, since) = match known.filter(|(of, _, since)| of == spec && since.elapsed() < CLIENT_KEPT)
        {
            Some((_, client, since)) => (client, since),
            None => (client(spec).await?, Instant::now()),
        };
        let status = client.maintenance_client().status().await;
        let leader = status.map_err(|e| NodeError::Etcd(e.to_string()))?.leader();
        let listed = client.cluster_client().member_list().await;
        let members = list(&listed.map_err(|e| NodeError::Etcd(e.to_string()))?);
        self.client = Some((spec.clone(), client, since));
        Ok(Cluster { members, leader })
    }
}

/// Lets the leader, which is at this address, give the lead to that member.
///
/// # Errors
/// It does not answer, or refuses.
pub async fn give_lead(spec: &StoreSpec, at: &str, to: &Listed) -> Result<()> {
    let mut only = spec.clone();
    if let StoreSpec::Etcd { etcd } = &mut only {
        etcd.endpoints = vec![at.to_owned()];
    }
    let given = client(&only).await?.maintenance_client().move_leader(to.id).await;
    given
        .map(|_| ())
        .map_err(|e| NodeError::Etcd(format!("the lead cannot go to {}: {e}", to.name)))
}
