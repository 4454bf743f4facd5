//! `steadfast-rig demo`: what Steadfast is for, shown on simulated servers of this machine. Each step prints what happened and how
//! long it took; the exit code tells whether all held.

mod failover;
mod save_restore;
mod story;

use clap::Args;
use std::process::ExitCode;
use std::time::Duration;
use steadfast_rig::artifacts::initramfs::steadfast_program;
use steadfast_rig::failover::Options;
use steadfast_rig::{Result, RigError, tools};
use story::Story;

/// Which demo, and how.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// The smaller one: a guest on one server is saved, and goes on in another process
    #[arg(long)]
    pub save_restore: bool,
    /// Milliseconds of silence after which a standby suspects its primary
    #[arg(long)]
    pub suspect_ms: Option<u64>,
    /// Seconds that the clients are looked at in each state
    #[arg(long)]
    pub look: Option<u64>,
    /// Folder for the logs of the VM's processes, with a line for every epoch
    #[arg(long)]
    pub logs: Option<std::path::PathBuf>,
    /// The leader of the store is on the first server that is killed, so that the grant waits for an election
    #[arg(long)]
    pub leader_dies: bool,
}

/// Runs a demo.
///
/// # Errors
/// What keeps it from starting at all; what fails on the way is told and gives another exit code.
pub fn run(options: &DemoOptions) -> Result<ExitCode> {
    tools::find("qemu-system-x86_64")?;
    if steadfast_program().is_none() {
        return Err(RigError::NotHere {
            what: "the demo".to_string(),
            why: "the program steadfast is not beside this one; build it with `cargo build --release -p steadfast`"
                .to_string(),
        });
    }
    let mut story = Story::new();
    let held = if options.save_restore {
        story.title(save_restore::TITLE);
        save_restore::play(&mut story)
    } else {
        story.title(failover::TITLE);
        failover::play(&mut story, &of(options))
    };
    match held {
        Ok(()) => {
            story.title("All of it held.");
            Ok(ExitCode::SUCCESS)
        }
        Err(e) => {
            story.failed(&e.to_string());
            Ok(ExitCode::FAILURE)
        }
    }
}

fn of(options: &DemoOptions) -> Options {
    let mut chosen = Options {
        leader_dies: options.leader_dies,
        logs: options.logs.clone(),
        ..Options::default()
    };
    if let Some(ms) = options.suspect_ms {
        chosen.plan.suspect = Duration::from_millis(ms);
    }
    if let Some(seconds) = options.look {
        chosen.look = Duration::from_secs(seconds);
    }
    chosen
}
