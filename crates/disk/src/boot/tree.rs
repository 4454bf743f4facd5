//! A file system as boot discovery sees it: read files, list directories, nothing else.

use super::error::BootError;
use std::collections::BTreeMap;

/// Names that a directory may have for us; the rest is not looked at.
pub(crate) const LIST_MAX: usize = 4096;

/// Reading access to a file system. Paths are absolute; symbolic links are followed inside the file system.
pub trait FileTree {
    /// For people: partition, type, label, UUID.
    fn describe(&self) -> String;

    /// The file system's UUID, lower case with dashes.
    fn uuid(&self) -> &str;

    /// The file system's label, perhaps empty.
    fn label(&self) -> &str;

    /// The contents of a regular file; `None` when there is none.
    ///
    /// # Errors
    /// [`BootError::TooLarge`] above `limit` bytes; [`BootError::FileSystem`].
    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, BootError>;

    /// The names in a directory, sorted, at most a few thousand; empty when there is none.
    ///
    /// # Errors
    /// [`BootError::FileSystem`].
    fn list(&self, path: &str) -> Result<Vec<String>, BootError>;

    /// Whether the path leads to a regular file (`Some(false)`), a directory (`Some(true)`), or nothing of these.
    ///
    /// # Errors
    /// [`BootError::FileSystem`].
    fn is_dir(&self, path: &str) -> Result<Option<bool>, BootError>;
}

/// Makes a path absolute and plain: no empty or `.` parts, `..` taken back (never above the root).
pub(crate) fn normalize(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            other => parts.push(other),
        }
    }
    format!("/{}", parts.join("/"))
}

/// A file system made of a list, for tests and fuzzing.
#[derive(Clone, Debug, Default)]
pub struct MemTree {
    /// Label.
    pub label: String,
    /// UUID.
    pub uuid: String,
    /// Path to contents.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl FileTree for MemTree {
    fn describe(&self) -> String {
        format!("memory file system {}", self.uuid)
    }

    fn uuid(&self) -> &str {
        &self.uuid
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, BootError> {
        let found = self.files.get(&normalize(path));
        match found {
            Some(data) if data.len() as u64 > limit => Err(BootError::TooLarge {
                file: path.to_owned(),
                bytes: data.len() as u64,
                limit,
            }),
            other => Ok(other.cloned()),
        }
    }

    fn list(&self, path: &str) -> Result<Vec<String>, BootError> {
        let prefix = format!("{}/", normalize(path).trim_end_matches('/'));
        let mut names: Vec<String> = self
            .files
            .keys()
            .filter_map(|k| k.strip_prefix(&prefix))
            .filter_map(|rest| rest.split('/').next())
            .map(str::to_owned)
            .collect();
        names.dedup();
        Ok(names)
    }

    fn is_dir(&self, path: &str) -> Result<Option<bool>, BootError> {
        let path = normalize(path);
        if self.files.contains_key(&path) {
            return Ok(Some(false));
        }
        Ok(if path == "/" || !self.list(&path)?.is_empty() {
            Some(true)
        } else {
            None
        })
    }
}
