//! Commands and files in a simulated server, through its agent.

use super::server::Server;
use crate::error::{IoContext, Result, RigError};
use crate::link::frame::Kind;
use crate::link::messages::{Exec, Outcome, Request};
use crate::link::mux::Channel;
use crate::tools;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a command may run when the caller names no bound.
pub const EXEC_BOUND: Duration = Duration::from_secs(60);
/// Output that [`Server::run`] keeps of each stream; more is an error.
pub const OUTPUT_BYTES_MAX: usize = 64 << 20;
/// The result of a command in a server.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub outcome: Outcome,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// True for exit code 0.
    pub fn success(&self) -> bool {
        self.outcome == Outcome::Exited(0)
    }

    /// Standard output as text, without space at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }

    /// Standard error as text.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_string()
    }
}

impl Server {
    fn agent_error(&self, what: &str, e: &dyn std::fmt::Display) -> RigError {
        RigError::Agent {
            server: self.name().to_string(),
            detail: format!("{what}: {e}"),
        }
    }

    /// Opens a request to the agent as a channel of frames, for callers that stream (a shell).
    pub fn open(&self, request: &Request) -> Result<Channel> {
        let text = serde_json::to_vec(request).map_err(|e| self.agent_error("request", &e))?;
        self.mux()?.open(&text).map_err(|e| self.agent_error("open", &e))
    }

    /// Runs a program with this input and gives back all it wrote; any exit code is a result.
    pub fn run(&self, request: Exec, input: &[u8]) -> Result<Output> {
        let mut request = request;
        if request.timeout_ms == 0 {
            request.timeout_ms = EXEC_BOUND.as_millis() as u64;
        }
        request.input |= !input.is_empty();
        let words = request.argv.join(" ");
        // The agent enforces the bound; this one is for an agent that says nothing.
        let deadline = Instant::now() + Duration::from_millis(request.timeout_ms) + Duration::from_secs(20);
        let channel = self.open(&Request::Exec(request.clone()))?;
        std::thread::scope(|scope| {
            if request.input {
                scope.spawn(|| {
                    // A program that ends without reading all its input is no error.
                    let _ = channel.send_bulk(Kind::Input, input, EXEC_BOUND);
                    let _ = channel.send_small(Kind::InputEnd, &[]);
                });
            }
            self.collect(&channel, &words, deadline)
        })
    }

    fn collect(&self, channel: &Channel, words: &str, deadline: Instant) -> Result<Output> {
        let mut output = Output {
            outcome: Outcome::TimedOut,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (kind, bytes) = match channel.recv(left) {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    return Err(RigError::Timeout {
                        what: format!(
                            "the end of `{words}` in {} ({})",
                            self.name(),
                            self.state_in_words()
                        ),
                        after_ms: left.as_millis() as u64,
                        detail: String::new(),
                    });
                }
                Err(e) => return Err(self.agent_error(&format!("`{words}`"), &e)),
            };
            match kind {
                Kind::Output => output.stdout.extend_from_slice(&bytes),
                Kind::ErrorOutput => output.stderr.extend_from_slice(&bytes),
                Kind::End => {
                    output.outcome =
                        serde_json::from_slice(&bytes).map_err(|e| self.agent_error("outcome", &e))?;
                    if let Outcome::Failed(why) = &output.outcome {
                        return Err(self.agent_error("the agent", why));
                    }
                    return Ok(output);
                }
                _ => {}
            }
            if output.stdout.len().max(output.stderr.len()) > OUTPUT_BYTES_MAX {
                return Err(
                    self.agent_error(words, &"it wrote more than the rig keeps; redirect it to a file")
                );
            }
        }
    }

    /// Runs a shell command (`bash -c`) within 60 s; gives back its standard output as text.
    ///
    /// # Errors
    /// [`RigError::CommandFailed`] for any other end than exit code 0.
    pub fn exec(&self, command: &str) -> Result<String> {
        self.exec_within(command, EXEC_BOUND)
    }

    /// [`Server::exec`] with another bound.
    pub fn exec_within(&self, command: &str, bound: Duration) -> Result<String> {
        let output = self.shell(command, bound)?;
        if output.success() {
            return Ok(output.text());
        }
        let said = if output.stderr.is_empty() {
            output.text()
        } else {
            output.error_text()
        };
        Err(RigError::CommandFailed {
            command: command.to_string(),
            place: self.name().to_string(),
            status: output.outcome.to_string(),
            stderr: tools::tail(&said, 1500).to_string(),
        })
    }

    /// Runs a shell command and gives back all of its result, whatever its exit code.
    pub fn shell(&self, command: &str, bound: Duration) -> Result<Output> {
        let argv = vec!["bash".to_string(), "-c".to_string(), command.to_string()];
        self.run(
            Exec {
                argv,
                timeout_ms: bound.as_millis() as u64,
                ..Exec::default()
            },
            &[],
        )
    }

    /// Runs a shell command in the background, its output in the file `log` of the server; gives back its process id.
    pub fn spawn(&self, command: &str, log: &str) -> Result<u32> {
        let argv = vec!["bash".to_string(), "-c".to_string(), format!("exec {command}")];
        let output = self.run(
            Exec {
                argv,
                detach_log: Some(log.to_string()),
                ..Exec::default()
            },
            &[],
        )?;
        match output.outcome {
            Outcome::Detached(pid) => Ok(pid),
            other => Err(self.agent_error(command, &other)),
        }
    }

    /// Waits until a shell command succeeds, trying it again and again.
    pub fn wait_for(&self, command: &str, bound: Duration) -> Result<String> {
        let deadline = Instant::now() + bound;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tried = self.exec_within(command, left.max(Duration::from_secs(1)));
            match tried {
                Ok(text) => return Ok(text),
                Err(RigError::CommandFailed { .. }) if !left.is_zero() => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(RigError::CommandFailed { stderr, .. }) => {
                    return Err(RigError::Timeout {
                        what: format!("`{command}` succeeding in {}", self.name()),
                        after_ms: bound.as_millis() as u64,
                        detail: format!("; it last said: {stderr}"),
                    });
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// Writes a file into the server; it appears whole or not at all.
    pub fn put_bytes(&self, bytes: &[u8], path: &str, mode: u32) -> Result<()> {
        self.put_from(&mut std::io::Cursor::new(bytes), path, mode)
    }

    /// Copies a file of this machine into the server.
    pub fn put(&self, local: &Path, path: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let mut file = std::fs::File::open(local).what(|| format!("read {}", local.display()))?;
        let mode = file
            .metadata()
            .map(|data| data.permissions().mode() & 0o7777)
            .unwrap_or(0o644);
        self.put_from(&mut file, path, mode)
    }

    /// Copies a stream into a file of the server.
    pub fn put_from(&self, source: &mut dyn Read, path: &str, mode: u32) -> Result<()> {
        let channel = self.open(&Request::Put {
            path: path.to_string(),
            mode,
        })?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = source
                .read(&mut buffer)
                .what(|| format!("read the source of {path}"))?;
            if n == 0 {
                break;
            }
            // When the agent gave up, its outcome says why; collect it below.
            if channel.send_bulk(Kind::Input, &buffer[..n], EXEC_BOUND).is_err() {
                break;
            }
        }
        channel
            .send_small(Kind::InputEnd, &[])
            .map_err(|e| self.agent_error(path, &e))?;
        self.collect(&channel, &format!("put {path}"), Instant::now() + EXEC_BOUND)
            .map(|_| ())
    }

    /// Reads a file of the server, up to 64 MiB.
    pub fn get_bytes(&self, path: &str) -> Result<Vec<u8>> {
        let channel = self.open(&Request::Get {
            path: path.to_string(),
        })?;
        let deadline = Instant::now() + Duration::from_secs(300);
        Ok(self.collect(&channel, &format!("get {path}"), deadline)?.stdout)
    }

    /// Copies a file of the server to this machine.
    pub fn get(&self, path: &str, local: &Path) -> Result<()> {
        let bytes = self.get_bytes(path)?;
        std::fs::write(local, bytes).what(|| format!("write {}", local.display()))
    }

    /// Its wall clock jumps (its monotonic clock does not).
    pub fn clock_jump(&self, by_ms: i64) -> Result<()> {
        let channel = self.open(&Request::ClockJump { by_ms })?;
        self.collect(&channel, "clock jump", Instant::now() + EXEC_BOUND)
            .map(|_| ())
    }
}
