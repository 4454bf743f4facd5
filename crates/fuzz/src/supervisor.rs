//! Starts workers, bounds them, and keeps the input of one that died without a word.

use crate::targets::Target;
use crate::worker::{self, EXIT_FINDING};
use anyhow::{Context, Result};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// How a target's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No finding.
    Clean,
    /// The input is in the folder of findings.
    Finding,
}

/// Runs this program again as a worker for `target` with `arguments`, and judges its end.
///
/// # Errors
/// The worker cannot be started, or failed for a reason that is no finding.
pub fn run(target: &Target, arguments: &[String], time: Duration, findings: &Path) -> Result<Outcome> {
    let program = std::env::current_exe().context("find this program")?;
    let mut child = Killed(
        Command::new(program)
            .arg("--worker")
            .args(arguments)
            .spawn()
            .with_context(|| format!("start the worker of {}", target.name))?,
    );
    // The worker watches itself; this bound is for a worker whose watchdog cannot run any more.
    let status = wait(&mut child.0, time + Duration::from_secs(60))?;
    judge(target.name, status, findings)
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Already ended and waited for, in the usual case: then both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait(child: &mut Child, bound: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + bound;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > end {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn judge(target: &str, status: Option<ExitStatus>, findings: &Path) -> Result<Outcome> {
    let how = match status {
        Some(s) if s.success() => {
            let _ = std::fs::remove_file(worker::current_file(findings, target));
            return Ok(Outcome::Clean);
        }
        Some(s) if s.code() == Some(EXIT_FINDING) => return Ok(Outcome::Finding),
        Some(s) if s.signal().is_some() => format!("died of signal {}", s.signal().unwrap_or_default()),
        Some(s) => anyhow::bail!("the worker of {target} failed: {s}"),
        None => "did not end".to_owned(),
    };
    let input = worker::read_current(findings, target).unwrap_or_default();
    let at = worker::save(findings, target, "killed", &input)?;
    println!("FINDING {target}: the worker {how}; input {}", at.display());
    Ok(Outcome::Finding)
}
