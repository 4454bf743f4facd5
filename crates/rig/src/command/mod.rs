//! The command line of the rig.
//!
//! ```text
//! steadfast-rig up --> supervisor (holds the Rig) <-- control.sock <-- steadfast-rig kill|shell|switch|...
//! ```

pub mod demo;
pub mod local;
pub mod protocol;
pub mod remote;
pub mod setup;
pub mod supervisor;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// A data centre in a box: simulated servers, switches, disks, and the axe.
#[derive(Debug, Parser)]
#[command(name = "steadfast-rig", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

/// What a rig that starts is made of.
#[derive(Debug, Clone, Args, serde::Serialize, serde::Deserialize)]
pub struct UpOptions {
    /// How many servers: s1, s2, ...
    #[arg(long, default_value_t = 3)]
    pub servers: usize,
    /// MiB of memory of each server
    #[arg(long, default_value_t = 1024)]
    pub mem: u32,
    /// CPUs of each server
    #[arg(long, default_value_t = 1)]
    pub smp: u32,
    /// GiB of each server's data disk (it takes only what is written)
    #[arg(long, default_value_t = 8)]
    pub data: u32,
    /// Give the servers the Debian guest's images under /guests/debian (made once, about a minute)
    #[arg(long)]
    pub debian: bool,
    /// Give the servers the service disk as /dev/rig/guests-service (redis and a web server for the mini guest)
    #[arg(long)]
    pub service: bool,
    /// Start an etcd member on every server
    #[arg(long)]
    pub etcd: bool,
    /// More Debian packages in the servers, such as qemu-system-x86
    #[arg(long, value_delimiter = ',')]
    pub packages: Vec<String>,
    /// The steadfast program for the servers (else the one beside this program)
    #[arg(long)]
    pub steadfast: Option<PathBuf>,
    /// Keep the run's files, data disks too, in this folder; the next `up` with it goes on from them
    #[arg(long)]
    pub keep: Option<PathBuf>,
    /// Without a client on the client switch (there is none without root either)
    #[arg(long)]
    pub no_client: bool,
    /// Seed of the switches' faults
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Install what the rig needs on this machine (Debian packages); quick when all is there
    Setup,
    /// Fetch and make all artefacts, and print where they are
    Artifacts {
        /// Without the Debian guest (it takes root and a minute)
        #[arg(long)]
        no_debian: bool,
    },
    /// Show it: a Linux with redis, protected on three simulated servers, goes on when two of them die
    Demo(demo::DemoOptions),
    /// Start simulated servers, and leave them running
    Up(UpOptions),
    /// End everything
    Down,
    /// Show servers, switches and faults; exit code 0 when all servers are ready, 3 when not
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Power on a server that is off
    Start { server: String },
    /// The axe: a server's power is gone
    Kill { server: String },
    /// Power off and on
    Reboot { server: String },
    /// A server stands still (SIGSTOP to its machine)
    Freeze { server: String },
    /// It goes on
    Thaw { server: String },
    /// Pull the cable of a NIC: repl0, repl1 or client0
    Unplug { server: String, nic: String },
    /// Plug it in
    Plug { server: String, nic: String },
    /// Faults of a switch: repl0, repl1 or client0
    Switch {
        switch: String,
        #[command(subcommand)]
        act: SwitchAct,
    },
    /// Faults of a server's data disk
    Disk {
        server: String,
        #[command(subcommand)]
        act: DiskAct,
    },
    /// A server gets only so many percent of its CPU time; 100 ends it
    Starve { server: String, percent: u32 },
    /// A server's wall clock
    Clock {
        server: String,
        #[command(subcommand)]
        act: ClockAct,
    },
    /// Heal every switch and cable
    Heal,
    /// A shell on a server, or one command there
    Shell {
        server: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run a command of this machine as the client on the client switch
    Client {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy a file into a server
    Put {
        server: String,
        local: PathBuf,
        path: String,
    },
    /// Copy a file out of a server
    Get {
        server: String,
        path: String,
        local: PathBuf,
    },
    /// What a server said on its serial console
    Console { server: String },
    /// (internal) Hold a rig for the other commands
    #[command(hide = true)]
    Supervise { options: String },
}

#[derive(Debug, Clone, Subcommand, serde::Serialize, serde::Deserialize)]
pub enum SwitchAct {
    /// The whole switch is off
    Down,
    /// And on
    Up,
    /// Every frame waits so many milliseconds
    Delay { ms: f64, port: Option<String> },
    /// And up to so many milliseconds longer, at random
    Jitter { ms: f64, port: Option<String> },
    /// So many percent of the frames are lost
    Loss { percent: f64, port: Option<String> },
    /// So many percent come twice
    Duplicate { percent: f64, port: Option<String> },
    /// So many percent are overtaken by later ones
    Reorder { percent: f64, port: Option<String> },
    /// So many percent have a bit flipped
    Corrupt { percent: f64, port: Option<String> },
    /// No faster than so many kbit/s; 0: as fast as it goes
    Rate { kbit: u64, port: Option<String> },
    /// Cut the way between two ports (servers, or `client`), both directions
    Partition { a: String, b: String },
    /// Cut the way from one port to another, this direction only
    OneWay { from: String, to: String },
    /// End all faults of this switch
    Heal,
}

#[derive(Debug, Clone, Subcommand, serde::Serialize, serde::Deserialize)]
pub enum DiskAct {
    /// Every read and write fails
    Fail,
    /// Every write fails
    FailWrites,
    /// Writes succeed and are lost
    LoseWrites,
    /// Every read and write takes so many milliseconds longer
    Slow { ms: u32 },
    /// Nothing ends
    Hang,
    /// So many MiB of room are left
    Full {
        #[arg(default_value_t = 0)]
        left_mib: u32,
    },
    /// The disk is whole again
    Heal,
}

#[derive(Debug, Clone, Subcommand)]
pub enum ClockAct {
    /// Set it forward (or back: `-- -5`) by so many seconds
    Jump {
        #[arg(allow_negative_numbers = true)]
        seconds: f64,
    },
}
