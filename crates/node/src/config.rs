//! What a host knows about itself without the store: `FOLDER/node.json`, replaced atomically.

use crate::error::{IoContext, NodeError, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use steadfast_store::{EtcdSpec, StoreSpec, TlsFiles};
use steadfast_types::{HostId, SiteId};

/// Where the daemon keeps its files.
#[derive(Clone, Debug)]
pub struct Folders {
    /// Kept across restarts of the host: `/var/lib/steadfast`.
    pub data: PathBuf,
    /// Gone after a restart of the host: `/run/steadfast`. Control sockets, what runs here, the lease.
    pub run: PathBuf,
}

impl Folders {
    /// The daemon's own unix socket: the API for who may open it.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run.join("node.sock")
    }

    /// This host's certificate, its key, and the pool's CA.
    #[must_use]
    pub fn tls(&self) -> TlsFiles {
        TlsFiles {
            ca: self.data.join("ca.pem"),
            certificate: self.data.join("host.pem"),
            key: self.data.join("host.key"),
        }
    }

    /// The list of revoked certificates.
    #[must_use]
    pub fn crl(&self) -> PathBuf {
        self.data.join("ca.crl")
    }

    fn config(&self) -> PathBuf {
        self.data.join("node.json")
    }
}

/// Ports that this host uses on its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ports {
    /// The API.
    pub api: u16,
    /// The etcd member, for clients.
    pub etcd_client: u16,
    /// The etcd member, for other members.
    pub etcd_peer: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            api: 7440,
            etcd_client: 2379,
            etcd_peer: 2380,
        }
    }
}

/// Where the pool's store is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreChoice {
    /// The folder `DATA/store`: one host.
    Embedded,
    /// An etcd cluster of the pool's own.
    Managed {
        /// This host has a member, which the daemon supervises.
        member: bool,
        /// `--initial-cluster` of its first start; ignored once it has data.
        initial: String,
        /// `new` or `existing`, for its first start.
        state: String,
        /// Clients' addresses of all members, as last known.
        endpoints: Vec<String>,
    },
    /// An etcd that somebody else runs.
    External(EtcdSpec),
}

/// A host's own settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Name of the pool.
    pub pool: String,
    /// Name of this host.
    pub host: HostId,
    /// Where it stands.
    pub site: SiteId,
    /// The address at which the other hosts reach it.
    pub address: IpAddr,
    /// Addresses for replication links, one for each path; empty: `address`.
    #[serde(default)]
    pub replication: Vec<IpAddr>,
    /// Ports.
    #[serde(default)]
    pub ports: Ports,
    /// A voter in the store only: runs no VMs.
    #[serde(default)]
    pub witness: bool,
    /// The store.
    pub store: StoreChoice,
    /// More arguments for `steadfast vmm`, such as `--cgroup off`.
    #[serde(default)]
    pub vmm_args: Vec<String>,
    /// The etcd program, if not `etcd` on the PATH.
    #[serde(default)]
    pub etcd: Option<PathBuf>,
    /// Between two heartbeats of the pool's own etcd, ms. An election, and an answer of the store, may take ten times as long.
    #[serde(default = "etcd_heartbeat_ms")]
    pub etcd_heartbeat_ms: u64,
    /// The host's watchdog device, which resets it when it cannot end its `restart` VMs after its lease. Not written where there is
    /// none: a binary from before does not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<PathBuf>,
}

/// A pool's hosts may be busy: a short pause must not cost an election.
#[must_use]
pub const fn etcd_heartbeat_ms() -> u64 {
    200
}

impl NodeConfig {
    /// Where the API listens.
    #[must_use]
    pub fn api(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.api)
    }

    /// `https://ADDRESS:PORT`.
    #[must_use]
    pub fn url(&self, port: u16) -> String {
        format!("https://{}", SocketAddr::new(self.address, port))
    }

    /// Addresses for replication, one for each path.
    #[must_use]
    pub fn replication(&self) -> Vec<IpAddr> {
        match self.replication.is_empty() {
            true => vec![self.address],
            false => self.replication.clone(),
        }
    }

    /// How long the pool's own etcd may take to elect a leader, ms.
    #[must_use]
    pub fn etcd_election_ms(&self) -> u64 {
        // The range that etcd takes.
        self.etcd_heartbeat_ms.clamp(10, 5000) * 10
    }

    /// The store, for this host's processes.
    #[must_use]
    pub fn store_spec(&self, folders: &Folders) -> StoreSpec {
        match &self.store {
            StoreChoice::Embedded => StoreSpec::Folder(folders.data.join("store")),
            StoreChoice::Managed { endpoints, .. } => {
                // The own member first: it is the nearest.
                let own = self.url(self.ports.etcd_client);
                let mut all = endpoints.clone();
                all.sort_by_key(|e| *e != own);
                StoreSpec::Etcd {
                    etcd: EtcdSpec {
                        tls: Some(folders.tls()),
                        timeout_ms: self.etcd_election_ms(),
                        ..EtcdSpec::new(all)
                    },
                }
            }
            StoreChoice::External(etcd) => StoreSpec::Etcd { etcd: etcd.clone() },
        }
    }

    /// Reads a host's settings.
    ///
    /// # Errors
    /// The host is in no pool, or the file is damaged.
    pub fn load(folders: &Folders) -> Result<Self> {
        let path = folders.config();
        let text = match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(NodeError::Refused(format!(
                    "{}: this host is in no pool yet; run `steadfast pool init` or `steadfast pool join`",
                    path.display()
                )));
            }
            other => other.what(|| format!("read {}", path.display()))?,
        };
        serde_json::from_slice(&text).map_err(|e| NodeError::Refused(format!("{}: {e}", path.display())))
    }

    /// Writes them.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, folders: &Folders) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| NodeError::Refused(e.to_string()))?;
        write_file(&folders.config(), &text)
    }

    /// Whether this host is in a pool.
    #[must_use]
    pub fn exists(folders: &Folders) -> bool {
        folders.config().exists()
    }
}

/// Replaces a file atomically and durably, readable by its owner only.
///
/// # Errors
/// The folder cannot be written.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    // No two writers share one, nor do two files whose names differ at the end only.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut temp = path.to_path_buf().into_os_string();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    temp.push(format!(".new-{}-{count}", std::process::id()));
    let temp = PathBuf::from(temp);
    let mut options = File::options();
    options.create(true).truncate(true).write(true).mode(0o600);
    let parent = path.parent().unwrap_or(Path::new("."));
    let write = || {
        let mut file = options.open(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)?;
        File::open(parent)?.sync_all()
    };
    write().what(|| format!("write {}", path.display()))
}
