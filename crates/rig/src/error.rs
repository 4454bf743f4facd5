//! The errors of the rig: what failed, on what, and what the person at the keyboard can do about it.

use std::path::PathBuf;

/// Everything that can go wrong in the rig.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// A program of the machine under the rig is missing.
    #[error(
        "{tool} is not installed on this machine; run `steadfast-rig setup`, or: apt-get install {package}"
    )]
    ToolMissing {
        /// The program that was looked for.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program ran and failed.
    #[error("{program} failed ({status}): {detail}")]
    Program {
        /// The program and what it was asked.
        program: String,
        /// Its exit status, in words.
        status: String,
        /// The end of what it printed.
        detail: String,
    },
    /// A system call or a file operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, on what.
        what: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Something did not happen within its bound.
    #[error("{what} did not happen within {after_ms} ms{detail}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// The bound.
        after_ms: u64,
        /// More, for the person who reads it (may be empty; begins with its own separator).
        detail: String,
    },
    /// The server is not running, so it cannot be asked anything.
    #[error("server {server} is off ({why}); start it with `steadfast-rig reboot {server}` or Server::start")]
    ServerOff {
        /// The server's name.
        server: String,
        /// How it went off.
        why: String,
    },
    /// The server came up, but its start-up reported a failure.
    #[error("server {server} failed to start: {detail}")]
    ServerBoot {
        /// The server's name.
        server: String,
        /// What its init said, and the end of its console.
        detail: String,
    },
    /// The agent in the server refused or failed an operation.
    #[error("server {server}: {detail}")]
    Agent {
        /// The server's name.
        server: String,
        /// The agent's words.
        detail: String,
    },
    /// A command in a server ended with another exit code than 0 (from the calls that check it).
    #[error("`{command}` in {place} ended with {status}; stderr: {stderr}")]
    CommandFailed {
        /// The command.
        command: String,
        /// The server, or the client.
        place: String,
        /// Exit code or signal, in words.
        status: String,
        /// The end of what it wrote to stderr (or stdout where stderr is empty).
        stderr: String,
    },
    /// A name or a number that the rig does not know.
    #[error("{0}")]
    Unknown(String),
    /// A frame, a file or an answer is not what its format says.
    #[error("{what} is malformed: {detail}")]
    Malformed {
        /// What was read.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Something the rig needs is not allowed or not there on this machine.
    #[error("{what} is not possible here: {why}")]
    NotHere {
        /// What was asked.
        what: String,
        /// Why not, and the way out.
        why: String,
    },
    /// An artefact is not in the cache and may not be made now.
    #[error("artefact {name} is missing at {path}; run `steadfast-rig artifacts`")]
    ArtifactMissing {
        /// The artefact.
        name: String,
        /// Where it should be.
        path: PathBuf,
    },
}

/// The rig's result.
pub type Result<T> = std::result::Result<T, RigError>;

/// Adds "what was being done" to an I/O error.
pub trait IoContext<T> {
    /// Turns an I/O error into [`RigError::Io`] with `what` in front.
    fn what(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn what(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| RigError::Io { what: what(), source })
    }
}

impl RigError {
    /// An error of a format.
    pub(crate) fn malformed(what: impl Into<String>, detail: impl std::fmt::Display) -> Self {
        RigError::Malformed {
            what: what.into(),
            detail: detail.to_string(),
        }
    }
}
