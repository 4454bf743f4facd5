//! The `steadfast` binary: every verb of the product.
//!
//! Exit codes: 0 done, 1 failed (the reason on stderr), 2 wrong usage.

mod console;
mod pool;
mod vm;

use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use std::process::ExitCode;
use steadfast_vmm::process::{DISK_FAULT_EXIT, FENCED_EXIT, ProcessError};

/// Keeps virtual machines running when the machine under them dies.
#[derive(Parser)]
#[command(name = "steadfast", version, about, propagate_version = true)]
struct Cli {
    /// Answers as JSON where a verb has one.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// VMs: of the pool, and single ones on this host.
    #[command(subcommand)]
    Vm(vm::VmVerb),
    /// The pool on one screen; the exit code is 0 only if nothing needs attention.
    Status {
        #[command(flatten)]
        folders: pool::FolderArgs,
    },
    /// Make a pool, join one, look at it.
    #[command(subcommand)]
    Pool(pool::PoolVerb),
    /// Hosts of the pool.
    #[command(subcommand)]
    Host(pool::HostVerb),
    /// Applications made of several VMs.
    #[command(subcommand)]
    App(pool::settings::AppVerb),
    /// Change how a VM is protected.
    Protect(pool::ProtectArgs),
    /// Move a running VM.
    Migrate(pool::MigrateArgs),
    /// What happened, and why.
    Events(pool::EventsArgs),
    /// How available a VM was: up, degraded, down, nines, longest gap.
    Availability(pool::AvailabilityArgs),
    /// Try a VM's standby: an isolated copy of it is started, checked, and thrown away. The VM runs on.
    Drill(pool::DrillArgs),
    /// The daemon of this host.
    Node(pool::NodeArgs),
    /// Ends `restart` VMs when this host has lost its lease; started by the daemon.
    #[command(hide = true)]
    Guard(pool::GuardArgs),
    /// The process of one VM, from a specification (JSON); used by other verbs and by the node daemon.
    Vmm(vm::VmmArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("STEADFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let done = match cli.verb {
        Verb::Vm(verb) => vm::run_verb(verb, cli.json),
        Verb::Vmm(args) => vm::run_vmm(args).map(|()| ExitCode::SUCCESS),
        Verb::Status { folders } => pool::status(&folders, cli.json),
        Verb::Pool(verb) => pool::pool(verb, cli.json),
        Verb::Host(verb) => pool::host(verb, cli.json),
        Verb::App(verb) => pool::settings::app(verb, cli.json),
        Verb::Drill(args) => pool::drill(&args, cli.json),
        Verb::Protect(args) => pool::protect(args, cli.json),
        Verb::Migrate(args) => pool::migrate(args, cli.json),
        Verb::Events(args) => pool::events(&args, cli.json),
        Verb::Availability(args) => pool::availability(&args, cli.json),
        Verb::Node(args) => pool::node(&args),
        Verb::Guard(args) => pool::guard(args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("steadfast: {error}");
            match error.downcast_ref() {
                Some(ProcessError::Fenced) => ExitCode::from(FENCED_EXIT),
                Some(ProcessError::DiskFault(_)) => ExitCode::from(DISK_FAULT_EXIT),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
