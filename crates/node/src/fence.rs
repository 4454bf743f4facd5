//! Fence agents: programs that switch a host off through something beside it (its management board, a switched power outlet), so that
//! nobody has to wait for its lease, or trust it. Any agent of the fence-agents project can be named; what they take and give is in
//! ClusterLabs' FenceAgentAPI: options as `name=value` lines on standard input, exit code 0 for success.
//!
//! ```text
//! leader: a host is dead, not fenced, and `restart` VMs wait for it ──> its agent: action=off | reboot ──> 0: it is fenced
//!                                                                           └── else: said, tried again; its lease runs on
//! ```
//! The leader runs it. Success counts for the report that was the host's last: one that reports again is another matter.

use crate::error::{NodeError, Result, refused};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use utoipa::ToSchema;

/// Management boards take their time.
const BOUND: Duration = Duration::from_secs(90);
/// An agent that failed is tried again after so long.
pub const AGAIN: Duration = Duration::from_secs(5);
/// Kept of what an agent says.
const WORDS_MAX: usize = 2000;
/// Where Debian and others have them, beside the PATH.
const FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// How a host is fenced from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FenceAgent {
    /// The program, `fence_ipmilan` for example, or its path. It must be on every host that may lead.
    pub agent: String,
    /// Its options, such as `ip`, `username`, `password`, `plug`.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// `reboot` (the host comes back by itself) or `off`.
    #[serde(default = "reboot")]
    pub action: String,
}

fn reboot() -> String {
    "reboot".into()
}

impl FenceAgent {
    /// Whether it can be what an operator means.
    ///
    /// # Errors
    /// With the way out.
    pub fn check(&self) -> Result<()> {
        if !["reboot", "off"].contains(&self.action.as_str()) {
            return refused(format!("the action is reboot or off, not {:?}", self.action));
        }
        let line = |text: &str| text.contains('\n');
        let named = |(name, value): (&String, &String)| {
            name.is_empty() || name.contains('=') || line(name) || line(value) || name == "action"
        };
        if self.options.iter().any(named) {
            return refused("options are NAME=VALUE, each in one line; the action is set with --action");
        }
        self.program().map(|_| ())
    }

    /// Asks it whether it reaches the host's power.
    ///
    /// # Errors
    /// What it said.
    pub fn status(&self) -> Result<()> {
        // 2: the host is off. Some agents and every shell end with 2 as well when they were called wrongly.
        match self.run("status", &[0, 2])? {
            2 => self.run("monitor", &[0]).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Switches the host off, or off and on.
    ///
    /// # Errors
    /// What it said; the host may be on.
    pub fn fence(&self) -> Result<()> {
        self.run(&self.action, &[0]).map(|_| ())
    }

    fn program(&self) -> Result<PathBuf> {
        let named = PathBuf::from(&self.agent);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(FOLDERS.map(PathBuf::from));
        let mut places = match self.agent.contains('/') {
            true => vec![named],
            false => folders.map(|f| f.join(&named)).collect(),
        }
        .into_iter();
        match places.find(|p| p.is_file()) {
            Some(program) => Ok(program),
            None => refused(format!(
                "there is no fence agent {} here; install it on every host (Debian: fence-agents), or give its path",
                self.agent
            )),
        }
    }

    /// Its exit code, which is one of these.
    fn run(&self, action: &str, fine: &[i32]) -> Result<i32> {
        let program = self.program()?;
        let failed =
            |why: String| NodeError::Refused(format!("{} (action {action}): {why}", program.display()));
        let mut child = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| failed(e.to_string()))?;
        let mut input = format!("action={action}\n");
        for (name, value) in &self.options {
            input.push_str(&format!("{name}={value}\n"));
        }
        let to = child.stdin.take();
        // One that reads nothing must not hold anybody up; it ends with its pipe.
        let writer = std::thread::Builder::new().name("fence-agent".into());
        let writer = writer.spawn(move || to.map(|mut to| to.write_all(input.as_bytes())));
        let from = child.stderr.take();
        let (said, silent) = std::sync::mpsc::sync_channel::<()>(1);
        let words = Arc::new(Mutex::new(Vec::new()));
        let to_words = Arc::clone(&words);
        let reader = std::thread::Builder::new()
            .name("fence-words".into())
            .spawn(move || {
                let _said = said;
                let mut piece = [0; 4096];
                let Some(mut from) = from else { return };
                while let Ok(n @ 1..) = from.read(&mut piece) {
                    let mut words = to_words.lock().unwrap_or_else(PoisonError::into_inner);
                    words.extend_from_slice(&piece[..n]);
                    let beyond = words.len().saturating_sub(WORDS_MAX);
                    words.drain(..beyond);
                }
            });
        // Without its threads nothing is heard of it: it is ended, not left alone.
        let threads = writer.map(|_| ()).and(reader.map(|_| ()));
        let ended = threads.is_ok() && has_ended(&child, BOUND);
        // Whatever it started ends with it, and with that the pipes. It is not waited for before: its number is its own until then.
        end_group(&child);
        let status = child.wait().map_err(|e| failed(e.to_string()))?;
        // Who left the group may hold a pipe; that is nobody's wait.
        let _ = silent.recv_timeout(Duration::from_secs(1));
        let words = words.lock().unwrap_or_else(PoisonError::into_inner).clone();
        threads.map_err(|e| failed(e.to_string()))?;
        if !ended {
            return Err(failed(format!("it did not end within {} s", BOUND.as_secs())));
        }
        match status.code() {
            Some(code) if fine.contains(&code) => Ok(code),
            _ => Err(failed(format!(
                "it ended with {status}: {}",
                String::from_utf8_lossy(&words).trim()
            ))),
        }
    }
}

fn has_ended(child: &Child, bound: Duration) -> bool {
    let Some(pid) = Pid::from_raw(child.id().cast_signed()) else {
        return false;
    };
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    let until = Instant::now() + bound;
    loop {
        match waitid(WaitId::Pid(pid), look) {
            Ok(Some(_)) => return true,
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            _ => return false,
        }
    }
}

fn end_group(child: &Child) {
    if let Some(group) = Pid::from_raw(child.id().cast_signed()) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn agent(folder: &Path, script: &str) -> FenceAgent {
        let path = folder.join("agent");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        FenceAgent {
            agent: path.display().to_string(),
            options: [("ip".into(), "10.0.0.9".into()), ("plug".into(), "7".into())].into(),
            action: "reboot".into(),
        }
    }

    #[test]
    fn an_agent_is_told_by_lines_and_believed_by_its_exit_code() {
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("told");
        let good = agent(folder.path(), &format!("cat > {}", told.display()));
        good.check().unwrap();
        good.fence().unwrap();
        assert_eq!(
            std::fs::read_to_string(&told).unwrap(),
            "action=reboot\nip=10.0.0.9\nplug=7\n"
        );
        good.status().unwrap();
        let off = agent(
            folder.path(),
            "case $(cat) in *action=status*) exit 2;; *action=monitor*) exit 0;; esac; exit 2",
        );
        off.status().unwrap();
        let wrong = agent(folder.path(), "exit 2");
        wrong.status().unwrap_err();
        let off = agent(folder.path(), "exit 2");
        let said = off.fence().unwrap_err().to_string();
        assert!(said.contains("exit status: 2"), "{said}");
        // It reads nothing, says much, and leaves something behind that holds its pipes.
        let bad = agent(
            folder.path(),
            "sleep 1000 & setsid sleep 5 & yes no | head -c 100000 >&2; echo no power >&2; exit 1",
        );
        let began = Instant::now();
        let said = bad.fence().unwrap_err().to_string();
        assert!(said.ends_with("no power") && said.len() < 2 * WORDS_MAX, "{said}");
        assert!(began.elapsed() < BOUND / 2, "it waited for what was left behind");
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let good = agent(folder.path(), "exit 0");
        let bad = |change: &dyn Fn(&mut FenceAgent)| {
            let mut it = good.clone();
            change(&mut it);
            it.check().unwrap_err().to_string()
        };
        assert!(bad(&|a| a.action = "on".into()).contains("reboot or off"));
        assert!(bad(&|a| a.agent = "fence_that_is_not_there".into()).contains("install it"));
        let option = |name: &str, value: &str| {
            let (name, value) = (name.to_owned(), value.to_owned());
            bad(&move |a| _ = a.options.insert(name.clone(), value.clone()))
        };
        for (name, value) in [("ip", "a\naction=on"), ("action", "on"), ("a=b", "c"), ("", "x")] {
            assert!(option(name, value).contains("NAME=VALUE"), "{name:?}");
        }
    }
}
