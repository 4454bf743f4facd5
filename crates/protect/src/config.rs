//! How a VM is protected on one host: who it is, where its peers are, where the arbiter is.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use steadfast_store::StoreSpec;
use steadfast_types::HostId;
use steadfast_vmm::spec::{DiskSpec, VmSpec};

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
    /// The VM is not booted, but taken over from a process of this host which runs it until this one is ready: it was not protected
    /// until now.
    #[serde(default)]
    pub takes_over: Option<TakeOver>,
    /// Outputs wait for their epoch's commit (`ft`); false: they leave at once (`checkpoint`).
    #[serde(default = "yes")]
    pub hold_outputs: bool,
    /// Certificates for TLS; none is an explicit choice of plain connections.
    #[serde(default)]
    pub tls: Option<TlsSpec>,
    /// Silence after which the primary is suspected, in milliseconds.
    #[serde(default = "suspect_ms")]
    pub suspect_ms: u64,
    /// All of the VM is mirrored. False: only its disks are, and who takes over boots it from them (class `restart`).
    #[serde(default = "yes")]
    pub memory: bool,
    /// The same silence where only disks are mirrored, if that is longer: a guest that is booted for nothing has lost its work, and a process
    /// that died is started again where it was.
    #[serde(default)]
    pub boot_after_ms: u64,
    /// How many standbys must acknowledge an epoch before it commits (1 to 3); none: all that are in sync.
    #[serde(default)]
    pub acks: Option<u8>,
    /// For tests: the step at which this process kills itself, see [`crate::failpoint`].
    #[serde(default)]
    pub die_at: Option<String>,
    /// A disk that does not come back from one operation for so long counts as dead, in milliseconds. A slow one does not.
    #[serde(default = "disk_hang_ms")]
    pub disk_hang_ms: u64,
    /// Bytes a second at which blocks are checked against their checksums; 0: never.
    #[serde(default = "scrub_bytes_per_s")]
    pub scrub_bytes_per_s: u64,
    /// Pause before each walk over the disks, in seconds.
    #[serde(default = "scrub_pause_s")]
    pub scrub_pause_s: u64,
    /// Bytes a second of a copy to a standby, on the link or of its disks, whichever is more; 0: as fast as the link. At least
    /// [`COPY_RATE_MIN`]. It can be set while a copy runs.
    #[serde(default)]
    pub copy_bytes_per_s: u64,
    /// Folder for the journals and checksums of this VM's disks; none: beside each image. Needed for block devices.
    #[serde(default)]
    pub journals: Option<PathBuf>,
    /// Writable disks, by their number from 0 on, that all hosts reach as one. They are not mirrored, and so nobody takes over from a silent
    /// primary: the VM can be handed over, and nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_disks: Vec<usize>,
    /// For tests: a file of rules for faults of this host's disks (`steadfast_disk::testing::LiveFaults`).
    #[serde(default)]
    pub disk_faults: Option<PathBuf>,
    /// For tests: features of the guest's CPU that this host is to lack.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpu_without: Vec<String>,
    /// For tests: a folder, shared by all hosts, in which every cut leaves a digest of RAM and every standby compares.
    #[serde(default)]
    pub audit: Option<PathBuf>,
    /// Longest interval between cuts in microseconds, also while the VM is idle; none: the policy's own, which backs off.
    #[serde(default)]
    pub max_interval_us: Option<u64>,
}

impl ProtectSpec {
    /// With every default: no peers, outputs held, plain connections.
    #[must_use]
    pub fn new(host: HostId, store: StoreSpec) -> Self {
        Self {
            host,
            store,
            peers: Vec::new(),
            start: false,
            takes_over: None,
            hold_outputs: true,
            tls: None,
            suspect_ms: suspect_ms(),
            memory: true,
            boot_after_ms: 0,
            acks: None,
            die_at: None,
            disk_hang_ms: disk_hang_ms(),
            scrub_bytes_per_s: scrub_bytes_per_s(),
            scrub_pause_s: scrub_pause_s(),
            copy_bytes_per_s: 0,
            journals: None,
            shared_disks: Vec::new(),
            disk_faults: None,
            cpu_without: Vec::new(),
            audit: None,
            max_interval_us: None,
        }
    }

    /// Writable disks of a VM that are mirrored.
    pub fn mirrored_disks<'a>(&'a self, spec: &'a VmSpec) -> impl Iterator<Item = (usize, &'a DiskSpec)> {
        let all = spec.disks.iter().enumerate();
        all.filter(|(n, d)| !d.read_only && !self.shared_disks.contains(n))
    }

    /// Silence after which the primary is suspected, in microseconds.
    pub fn suspect_us(&self, disks_only: bool) -> u64 {
        let ms = match disks_only {
            false => self.suspect_ms,
            true => self.suspect_ms.max(self.boot_after_ms),
        };
        ms * 1000
    }

    /// Interval of signs of life in milliseconds. Whoever waits long before it suspects need not hear often.
    pub fn heartbeat_ms(&self) -> u64 {
        (self.suspect_ms / 16).clamp(10, 100)
    }

    /// The longest step of time that counts as another host's silence, in microseconds: an eighth of what makes it suspect. It is
    /// also about how often an idle instance looks at the time.
    pub fn step_cap_us(&self) -> u64 {
        (self.suspect_ms * 1000 / 8).clamp(5_000, 250_000)
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

/// A VM that another process of this host leaves to this one, once this one is ready ([`crate::taking`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeOver {
    /// State of its vCPUs and devices: when it is there, that process stands still and has let go of disks and sockets. Renamed to
    /// [`TakeOver::taken`] at the moment from which on the VM is this process's: who renames it first, this process or whoever wants
    /// the VM back, has the VM.
    pub state: PathBuf,
    /// Its memory: a descriptor of that process, below /proc.
    pub memory: PathBuf,
    /// This process's control socket until the VM is its own; from then on it has the other's name.
    #[serde(default)]
    pub control: PathBuf,
}

impl TakeOver {
    /// While this is there the VM may be taken over; without it whoever waits ends.
    #[must_use]
    pub fn wanted(state: &Path) -> PathBuf {
        state.with_extension("wanted")
    }

    /// Written by this process when it is ready: a [`Mapped`].
    #[must_use]
    pub fn ready(state: &Path) -> PathBuf {
        state.with_extension("ready")
    }

    /// The same while it is being written.
    #[must_use]
    pub fn draft(state: &Path) -> PathBuf {
        state.with_extension("draft")
    }

    /// A state's name once its VM has been taken over.
    #[must_use]
    pub fn taken(state: &Path) -> PathBuf {
        state.with_extension("taken")
    }
}

/// What a process has mapped that is ready to take a VM over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapped {
    /// Device and inode of the memory's file.
    pub memory: [u64; 2],
}

impl Mapped {
    /// Of this file.
    #[must_use]
    pub fn of(file: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self {
            memory: [file.dev(), file.ino()],
        }
    }
}

/// The slowest copy: below this, its pieces would take longer than the patience of the protocol.
pub const COPY_RATE_MIN: u64 = 1 << 20;

fn disk_hang_ms() -> u64 {
    5000
}

fn scrub_bytes_per_s() -> u64 {
    4 << 20
}

fn scrub_pause_s() -> u64 {
    6 * 3600
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
    /// Revoked certificates; read when a link is opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<PathBuf>,
}
