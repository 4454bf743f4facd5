//! Developer commands: `cargo xtask verify | lint | bench`.
//!
//! - `verify` runs `./test`, the list that CI runs.
//! - `lint` checks rules that the compiler does not know ([`lint`]).
//! - `bench` measures and keeps the tables of `docs/benchmarks.md` ([`bench`]).

mod bench;
mod lint;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

#[derive(Parser)]
#[command(about = "Developer commands of Steadfast")]
struct Args {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Run everything that CI runs (as ./test).
    Verify {
        /// Also the long tests.
        #[arg(long)]
        full: bool,
    },
    /// Check imports, unsafe code, file lengths, words and links.
    Lint,
    /// Run a benchmark; without a name, list them.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        What::Verify { full } => verify(full),
        What::Lint => lint::run(&root()),
        What::Bench(args) => bench::run(&root(), &args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// The project's folder: where the program is run from, or the nearest parent with the workspace.
fn root() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    here.ancestors()
        .find(|p| p.join("Cargo.lock").is_file() && p.join("xtask").is_dir())
        .map_or_else(|| here.clone(), PathBuf::from)
}

fn verify(full: bool) -> Result<bool> {
    let test = root().join("test");
    if !test.is_file() {
        bail!("{} does not exist; run this inside the project", test.display());
    }
    let mut command = Command::new("bash");
    command.arg(&test);
    if full {
        command.arg("--full");
    }
    let status = command
        .status()
        .with_context(|| format!("run {}", test.display()))?;
    Ok(status.success())
}
