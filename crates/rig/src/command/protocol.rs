//! What the command line and the supervisor say to each other over `control.sock`: one channel a request, on the frames of
//! [`steadfast_rig::link`].

use super::{DiskAct, SwitchAct};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use steadfast_rig::{Counters, Exec, Result, RigError};

/// A request. Those about a server name it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// JSON of [`Status`] as output.
    Status,
    Down,
    Start(String),
    Kill(String),
    Reboot(String),
    Freeze(String),
    Thaw(String),
    Unplug(String, String),
    Plug(String, String),
    Switch(String, SwitchAct),
    Disk(String, DiskAct),
    Starve(String, u32),
    /// By milliseconds.
    Clock(String, i64),
    Heal,
    /// Input, output and controls go through.
    Exec(String, Exec),
    /// The file's bytes are the channel's input.
    Put(String, String, u32),
    /// The file's bytes are the channel's output.
    Get(String, String),
    Console(String),
}

/// The state of a rig.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// Process id of the supervisor.
    pub supervisor: u32,
    /// The descriptor of the client's namespace in the supervisor.
    pub client_namespace: Option<i32>,
    /// The client's address.
    pub client_address: Option<String>,
    /// Files of the run.
    pub folder: PathBuf,
    pub servers: Vec<ServerStatus>,
    pub switches: Vec<SwitchStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct ServerStatus {
    pub name: String,
    pub state: String,
    pub ready: bool,
    pub starts: u32,
    pub qemu_pid: Option<i32>,
    /// On repl0, repl1, client0.
    pub addresses: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct SwitchStatus {
    pub name: String,
    /// In words; empty when there are none.
    pub faults: Vec<String>,
    /// Of each port.
    pub ports: Vec<(String, Counters)>,
}

/// Where the control socket and the supervisor's log are: `$STEADFAST_RUN`, else `/run/steadfast-rig` for root, else
/// `$XDG_RUNTIME_DIR/steadfast-rig`.
pub fn control_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("STEADFAST_RUN") {
        return Ok(PathBuf::from(folder));
    }
    // SAFETY: no memory is passed, it cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return Ok(PathBuf::from("/run/steadfast-rig"));
    }
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(|base| PathBuf::from(base).join("steadfast-rig"))
        .ok_or_else(|| RigError::NotHere {
            what: "a folder for the control socket".to_string(),
            why: "set STEADFAST_RUN to a folder that is yours".to_string(),
        })
}
