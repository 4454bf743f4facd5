//! What can go wrong in the daemon, in words for an operator.

use steadfast_store::StoreError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A file or folder.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on which path.
        what: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates.
    #[error("certificates: {0}")]
    Certificates(String),
    /// Another host, or this one's daemon.
    #[error("{at}: {why}")]
    Peer {
        /// Its address.
        at: String,
        /// Why not.
        why: String,
    },
    /// etcd.
    #[error("etcd: {0}")]
    Etcd(String),
    /// A rule; the text says which and what to do.
    #[error("{0}")]
    Refused(String),
    /// No such thing.
    #[error("there is no {0}")]
    NotFound(String),
    /// Something else changed it at the same time.
    #[error("{0} was changed by somebody else at the same time; look at it and try again")]
    Conflict(String),
}

/// Result of the daemon's functions.
pub type Result<T> = std::result::Result<T, NodeError>;

/// Names what was done when an I/O error came.
pub trait IoContext<T> {
    /// `what` is only called on failure.
    ///
    /// # Errors
    /// The same, with its name.
    fn what(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn what(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| NodeError::Io { what: what(), source })
    }
}

/// A refusal.
pub fn refused<T>(why: impl Into<String>) -> Result<T> {
    Err(NodeError::Refused(why.into()))
}
