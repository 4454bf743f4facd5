//! What runs inside a simulated server (and inside the mini guest): this same static binary as process 1 and as agent.
//!
//! ```text
//! stage 1 (initramfs): /dev /proc /sys, modules for PCI, disks, overlay -> root = overlay(tmpfs over the read-only root disk)
//! stage 2 (real root): names, NICs, bridge, cgroup2, disks, modules for KVM and taps -> fork the agent, reap orphans
//! agent:               frames on the virtio-serial port "rig.agent"
//! ```
//! A step that fails is noted and reported in the agent's Hello; the server comes up as far as it can.

pub mod agent;
pub mod disks;
pub mod exec;
pub mod mini;
pub mod modules;
pub mod server;
pub mod sys;

use serde::{Deserialize, Serialize};

/// Where the configuration is in the initramfs.
pub const CONFIG_PATH: &str = "/rig.json";
/// The agent's port on the virtio-serial bus.
pub const AGENT_PORT: &str = "rig.agent";

/// Process 1 of an initramfs: the mini guest when the kernel's command line says so, else a server. Never returns.
pub fn start() -> ! {
    // `/proc` is not there yet, so neither is the command line.
    if let Err(e) = sys::mount("proc", "/proc", "proc", 0, "") {
        eprintln!("rig: /proc: {e}");
    }
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if mini::Words::parse(&line).get(mini::WORD).is_some() {
        mini::run()
    }
    server::stage_1()
}

/// What a server is told at its start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ServerConfig {
    /// Host name.
    pub name: String,
    /// NICs by MAC address.
    pub nics: Vec<NicConfig>,
    /// Lines of `/etc/hosts`: (address, name).
    pub hosts: Vec<(String, String)>,
    /// Disks by virtio serial number.
    pub mounts: Vec<MountConfig>,
}

/// A NIC of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NicConfig {
    /// MAC address, lower case with colons.
    pub mac: String,
    /// Name in the server.
    pub name: String,
    /// IPv4 address with prefix length.
    pub address: String,
    /// A bridge to make, put the NIC into, and give the address to.
    pub bridge: Option<String>,
    /// Largest IP packet in bytes.
    pub mtu: u32,
}

/// A disk of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountConfig {
    /// The serial number of the virtio-blk disk.
    pub serial: String,
    /// Where to mount it; none for a disk that is only linked as `/dev/rig/SERIAL`.
    pub path: Option<String>,
    /// Mount it read-only.
    pub read_only: bool,
    /// Put a device-mapper device between, which the rig can make fail or slow (`/dev/mapper/SERIAL`).
    pub faulty: bool,
}
