//! How a VM is protected on one host: who it is, where its peers are, where the arbiter is.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use steadfast_store::StoreSpec;
use steadfast_types::HostId;

/// Protection of a VM, as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectSpec {
    /// This host.
    pub host: HostId,
    /// The store, the same for all hosts of the VM: a folder (a plain string), or `{"etcd": {"endpoints": [...], ...}}`.
    pub store: StoreSpec,
    /// The other hosts that may run or mirror this VM.
    pub peers: Vec<PeerSpec>,
    /// Start the VM here from power-on, unless the store says that another host owns it.
    #[serde(default)]
    pub start: bool,
    /// Outputs wait for their epoch's commit (`ft`); false: they leave at once (`checkpoint`).
    #[serde(default = "yes")]
    pub hold_outputs: bool,
    /// Certificates for TLS; none is an explicit choice of plain connections.
    #[serde(default)]
    pub tls: Option<TlsSpec>,
    /// Silence after which the primary is suspected, in milliseconds.
    #[serde(default = "suspect_ms")]
    pub suspect_ms: u64,
    /// For tests: a folder, shared by all hosts, in which every cut leaves a digest of RAM and every standby compares.
    #[serde(default)]
    pub audit: Option<PathBuf>,
    /// Longest interval between cuts in microseconds, also while the VM is idle; none: the policy's own, which backs off.
    #[serde(default)]
    pub max_interval_us: Option<u64>,
}

impl ProtectSpec {
    /// Interval of signs of life in milliseconds. Whoever waits long before it suspects need not hear often.
    pub fn heartbeat_ms(&self) -> u64 {
        (self.suspect_ms / 16).clamp(10, 100)
    }

    /// How long an answer of the store is awaited before it is asked again, in milliseconds. The store's calls are bounded by
    /// themselves and made one after the other: to ask again earlier would only throw a late answer away.
    pub fn store_answer_ms(&self) -> u64 {
        match &self.store {
            StoreSpec::Folder(_) => 100,
            StoreSpec::Etcd { etcd } => etcd.timeout_ms + 50,
        }
    }
}

fn yes() -> bool {
    true
}

fn suspect_ms() -> u64 {
    160
}

/// One other host. Of each pair the host with the smaller name listens.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Its name.
    pub host: HostId,
    /// Addresses, one for each replication path: where this host listens, or where it connects to.
    pub paths: Vec<SocketAddr>,
    /// Mirror the VM to it when this host is the primary.
    #[serde(default = "yes")]
    pub standby: bool,
}

/// Certificate files, PEM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSpec {
    /// The pool's CA.
    pub ca: PathBuf,
    /// This host's certificate chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}
