//! `steadfast pool upgrade`.

use super::{FolderArgs, Outcome, api, show};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use steadfast_node::api::types::Done;
use steadfast_node::api::upgrade::UpgradeTo;
use steadfast_node::binary::Described;
use steadfast_node::http::{Method, ask_with};
use steadfast_node::records::{StoredTask, TaskState};

/// How long the hosts may take to take the binary and to look at it.
const GIVE_BOUND: Duration = Duration::from_secs(600);
/// How often `--wait` looks.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Args)]
pub struct UpgradeArgs {
    /// The new binary; by default the one that this command is.
    #[arg(long, conflicts_with_all = ["to", "back"])]
    binary: Option<PathBuf>,
    /// A version that the hosts have.
    #[arg(long, conflicts_with = "back")]
    to: Option<String>,
    /// Back to what ran before the last upgrade.
    #[arg(long)]
    back: bool,
    /// Show the steps until it ends; the exit code is 0 only if all hosts were upgraded.
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// Only print the plan (the binary is given to this host, and looked at there).
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    folders: FolderArgs,
}

/// Runs `steadfast pool upgrade`.
pub fn upgrade(args: &UpgradeArgs, json: bool) -> Outcome {
    let api = api(&args.folders, json)?;
    let to = match (&args.to, args.back) {
        (_, true) => None,
        (Some(to), _) => Some(to.clone()),
        (None, false) => {
            let file = match &args.binary {
                Some(file) => file.clone(),
                None => std::env::current_exe()?,
            };
            let bytes = std::fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            let body = ("application/octet-stream", bytes.into());
            let asked = ask_with(&api.target, Method::POST, "/v1/binaries", body, GIVE_BOUND);
            let taken: Described = api.runtime.block_on(asked)?;
            Some(taken.version)
        }
    };
    let wanted = UpgradeTo { to, back: args.back };
    let body = ("application/json", serde_json::to_vec(&wanted)?.into());
    let path = format!("/v1/upgrade?dry_run={}", args.dry_run);
    let asked = ask_with(&api.target, Method::POST, &path, body, GIVE_BOUND);
    let done: Done = api.runtime.block_on(asked)?;
    let task = done.task.clone();
    api.print(&done, show::done)?;
    let Some(task) = task.filter(|_| args.wait) else {
        return Ok(ExitCode::SUCCESS);
    };
    let mut last = String::new();
    loop {
        // While this host's own daemon becomes the new binary nobody answers.
        let tasks: Vec<StoredTask> = match api.get("/v1/tasks") {
            Ok(tasks) => tasks,
            Err(error) => {
                tracing::info!(%error, "asked again");
                std::thread::sleep(LOOK);
                continue;
            }
        };
        let Some(now) = tasks.into_iter().find(|t| t.id == task) else {
            return Err(format!("task {task} is not kept any more; see `steadfast events`").into());
        };
        if now.text != last {
            last.clone_from(&now.text);
            api.print(&now, |t| format!("{}\n", t.text))?;
        }
        match now.state {
            TaskState::Running => std::thread::sleep(LOOK),
            TaskState::Done => return Ok(ExitCode::SUCCESS),
            TaskState::Failed | TaskState::Cancelled => return Ok(ExitCode::FAILURE),
        }
    }
}
