//! The cache of artefacts: one folder per key, made once, published by renaming.
//!
//! Invariants: a folder with a final name is whole (it was filled under another name and renamed); two processes that want
//! the same artefact do not make it twice (an exclusive lock on `KEY.lock`, which the kernel frees when its holder dies);
//! half-made folders of dead makers are swept by the next maker.

use crate::error::{IoContext, Result, RigError};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A folder of artefacts.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// How long one process waits for another that makes the same artefact.
const WAIT_BOUND: Duration = Duration::from_secs(1200);

/// An artefact that nobody used for so long may be removed.
const KEEP: Duration = Duration::from_secs(5 * 24 * 3600);

/// Marks an artefact as used now.
fn touch(path: &Path) {
    // A cache that is not ours to write to is used all the same.
    let _ = File::open(path).and_then(|folder| folder.set_modified(std::time::SystemTime::now()));
}

/// Takes an exclusive lock on a file, waiting up to `bound`. Dropping the file frees it.
///
/// # Errors
/// [`RigError::Timeout`] when somebody else holds it all that time.
pub fn lock_file(path: &Path, bound: Duration) -> Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .what(|| format!("lock file {}", path.display()))?;
    let start = Instant::now();
    loop {
        // SAFETY: an open descriptor and plain numbers.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        if start.elapsed() >= bound {
            return Err(RigError::Timeout {
                what: format!("the lock {}", path.display()),
                after_ms: bound.as_millis() as u64,
                detail: " (another process holds it; see `fuser` on that file)".to_string(),
            });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A short, stable name for the contents that a key describes (FNV-1a, 64 bits: a name, not a proof).
pub fn digest(parts: &[&[u8]]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

impl Cache {
    /// The cache of this user: `$STEADFAST_CACHE`, else `$XDG_CACHE_HOME/steadfast`, else `~/.cache/steadfast`.
    pub fn of_user() -> Result<Cache> {
        let folder = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let root = folder("STEADFAST_CACHE")
            .or_else(|| folder("XDG_CACHE_HOME").map(|base| base.join("steadfast")))
            .or_else(|| folder("HOME").map(|home| home.join(".cache/steadfast")))
            .ok_or_else(|| RigError::NotHere {
                what: "a cache of artefacts".to_string(),
                why: "neither STEADFAST_CACHE nor HOME is set".to_string(),
            })?;
        Cache::at(&root)
    }

    /// A cache in this folder, made when missing.
    pub fn at(root: &Path) -> Result<Cache> {
        std::fs::create_dir_all(root).what(|| format!("make the cache {}", root.display()))?;
        let root = root.canonicalize().what(|| format!("cache {}", root.display()))?;
        Ok(Cache { root })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder with this key, when it is whole.
    pub fn get(&self, key: &str) -> Option<PathBuf> {
        let path = self.root.join(key);
        path.is_dir().then_some(path)
    }

    /// The folder with this key; made by `make` in an empty folder when it is missing.
    pub fn get_or_make(&self, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.root.join(key);
        if path.is_dir() {
            touch(&path);
            return Ok(path);
        }
        let _lock = lock_file(&self.root.join(format!("{key}.lock")), WAIT_BOUND)?;
        if path.is_dir() {
            return Ok(path); // Somebody else made it while we waited.
        }
        let partial = self.root.join(format!("{key}.partial"));
        if partial.exists() {
            std::fs::remove_dir_all(&partial).what(|| format!("sweep {}", partial.display()))?;
        }
        std::fs::create_dir(&partial).what(|| format!("make {}", partial.display()))?;
        if let Err(e) = make(&partial) {
            // What cannot be removed now is swept by the next maker.
            let _ = std::fs::remove_dir_all(&partial);
            return Err(e);
        }
        self.prune(key);
        std::fs::rename(&partial, &path).what(|| format!("publish {}", path.display()))?;
        Ok(path)
    }

    /// Removes artefacts of the same kind (the part of the key before its first `-`) that nobody used for some days.
    fn prune(&self, key: &str) {
        let kind = format!("{}-", key.split('-').next().unwrap_or(key));
        let Ok(entries) = std::fs::read_dir(&self.root) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let unused = entry
                .metadata()
                .and_then(|data| data.modified())
                .ok()
                .and_then(|at| at.elapsed().ok());
            if name.to_string_lossy().starts_with(&kind) && unused.is_some_and(|unused| unused > KEEP) {
                let path = entry.path();
                // What cannot be removed is tried again by the next maker.
                let _ = if path.is_dir() {
                    std::fs::remove_dir_all(&path)
                } else {
                    std::fs::remove_file(&path)
                };
            }
        }
    }

    /// Throws an artefact away, so that the next [`Cache::get_or_make`] makes it anew.
    pub fn remove(&self, key: &str) -> Result<()> {
        let _lock = lock_file(&self.root.join(format!("{key}.lock")), WAIT_BOUND)?;
        let path = self.root.join(key);
        if path.exists() {
            std::fs::remove_dir_all(&path).what(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn two_makers_at_once_make_it_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let made = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let path = cache
                        .get_or_make("thing", |folder| {
                            made.fetch_add(1, Ordering::SeqCst);
                            std::thread::sleep(Duration::from_millis(50));
                            std::fs::write(folder.join("file"), b"whole").what(String::new)
                        })
                        .unwrap();
                    assert_eq!(std::fs::read(path.join("file")).unwrap(), b"whole");
                });
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_failed_make_leaves_nothing_under_the_name() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let failed = cache.get_or_make("thing", |_| Err(RigError::Unknown("no".to_string())));
        assert!(failed.is_err() && cache.get("thing").is_none());
        assert!(cache.get_or_make("thing", |_| Ok(())).is_ok());
    }
}
