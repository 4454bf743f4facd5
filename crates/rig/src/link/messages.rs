//! What travels in the JSON frames of a link.

use serde::{Deserialize, Serialize};

/// The agent's first words: the server is up, or why it is not.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// The server's name.
    pub server: String,
    /// Milliseconds from the kernel's start to here, by the server's own clock.
    pub boot_ms: u64,
    /// What failed on the way up; empty when all is well.
    pub failures: Vec<String>,
}

/// Opens a channel: what the agent shall do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a program.
    Exec(Exec),
    /// Write a file from the channel's input; it appears under its name only when whole.
    Put {
        /// Absolute path in the server.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Send a file's bytes as output.
    Get {
        /// Absolute path in the server.
        path: String,
    },
    /// Set the server's wall clock forward or back.
    ClockJump {
        /// Milliseconds, negative goes back.
        by_ms: i64,
    },
}

/// A program to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's own.
    pub env: Vec<(String, String)>,
    /// Working directory; `/root` when none.
    pub cwd: Option<String>,
    /// Give it a terminal of (rows, columns).
    pub pty: Option<(u16, u16)>,
    /// True when input will be sent; else its input is `/dev/null`.
    pub input: bool,
    /// Run it in the background with its output in this file; the channel ends at once with its process id.
    pub detach_log: Option<String>,
    /// Kill it (its whole process group) after so many milliseconds.
    pub timeout_ms: u64,
}

/// For a running program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Send this signal to its process group.
    Signal(i32),
    /// The terminal is now (rows, columns).
    Window(u16, u16),
}

/// How a channel ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The program exited, or the file operation is complete (0).
    Exited(i32),
    /// The program was killed by a signal.
    Signalled(i32),
    /// It ran past its timeout and was killed.
    TimedOut,
    /// It runs in the background under this process id.
    Detached(u32),
    /// It could not be done.
    Failed(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Exited(code) => write!(f, "exit code {code}"),
            Outcome::Signalled(signal) => write!(f, "signal {signal}"),
            Outcome::TimedOut => write!(f, "its time limit"),
            Outcome::Detached(pid) => write!(f, "process {pid} in the background"),
            Outcome::Failed(why) => write!(f, "failure: {why}"),
        }
    }
}
