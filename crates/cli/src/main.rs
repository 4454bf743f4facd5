//! The `steadfast` binary: every verb of the product.
//!
//! Exit codes: 0 done, 1 failed (the reason on stderr), 2 wrong usage.

mod console;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

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
    /// Run, stop, save and restore single VMs on this host.
    #[command(subcommand)]
    Vm(vm::VmVerb),
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
        .init();
    let done = match cli.verb {
        Verb::Vm(verb) => vm::run_verb(verb, cli.json),
        Verb::Vmm(args) => vm::run_vmm(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("steadfast: {error}");
            ExitCode::FAILURE
        }
    }
}
