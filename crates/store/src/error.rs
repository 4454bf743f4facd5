//! What can go wrong with a store.

/// Why a call to the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing was changed: the store was not reached, or refused before it began.
    #[error(
        "the store at {at} cannot be reached: {why}; check that it runs and that a majority of its members is up"
    )]
    Unreachable {
        /// Folder or endpoints.
        at: String,
        /// The last reason.
        why: String,
    },
    /// A commit was sent and no answer came: it may have happened, or may yet. Read back before acting.
    #[error(
        "the store at {at} did not say what became of a change: {why}; it is read back before anything is decided"
    )]
    Unknown {
        /// Folder or endpoints.
        at: String,
        /// The last reason.
        why: String,
    },
    /// The data is not what was written.
    #[error(
        "{at} is damaged: {what}; restore the folder from a backup, or move it away to begin with an empty store"
    )]
    Damaged {
        /// The file.
        at: String,
        /// What is wrong.
        what: String,
    },
    /// The request breaks a limit or a rule.
    #[error("the store refuses the request: {0}")]
    Refused(String),
    /// A setting that cannot work.
    #[error("store settings: {0}")]
    Setting(String),
}

impl From<StoreError> for std::io::Error {
    fn from(error: StoreError) -> Self {
        Self::other(error)
    }
}
