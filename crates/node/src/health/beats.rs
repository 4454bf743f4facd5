//! Heartbeats of an application in a guest: it connects to port 1024 of the host (CID 2) over vsock, and each connection and whatever it
//! sends there is a beat (`socat -u /dev/null VSOCK-CONNECT:2:1024`). Nothing is answered.

use crate::guard::boot_ms;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

/// Where applications connect to.
pub const BEAT_PORT: u32 = 1024;
/// Connections of one VM that are kept open.
const CONNECTIONS_MAX: usize = 16;
/// Between two connections of a VM, and two pieces of what one of them sends.
const PACE: Duration = Duration::from_millis(50);
/// One that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(600);

/// The ear for one VM. Ends when it is dropped.
#[derive(Debug)]
pub struct Beats {
    vsock: PathBuf,
    path: PathBuf,
    /// Which file that is.
    inode: (u64, u64),
    /// Since boot, ms; 0: none yet.
    last_ms: Arc<AtomicU64>,
    /// Beats from before do not count.
    since_ms: AtomicU64,
    task: JoinHandle<()>,
}

impl Beats {
    /// Listens beside the VM's vsock socket. Call it on a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(vsock: &Path) -> io::Result<Self> {
        let mut path = vsock.as_os_str().to_owned();
        path.push(format!("_{BEAT_PORT}"));
        let path = PathBuf::from(path);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let inode = inode(&path)?;
        let last_ms = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(hear(listener, Arc::clone(&last_ms)));
        Ok(Self {
            vsock: vsock.to_owned(),
            path,
            inode,
            last_ms,
            since_ms: AtomicU64::new(boot_ms().max(1)),
            task,
        })
    }

    /// The VM's process may be somebody else since its last start: it must be able to connect, and nobody else.
    pub fn keep(&self) {
        let owner = |path: &Path| std::fs::symlink_metadata(path).map(|m| (m.uid(), m.gid()));
        // No vsock socket: the VM does not run.
        if let (Ok(wanted), Ok(now)) = (owner(&self.vsock), owner(&self.path))
            && wanted != now
            && let Err(error) = std::os::unix::fs::lchown(&self.path, Some(wanted.0), Some(wanted.1))
        {
            tracing::warn!(%error, path = %self.path.display(), "the VM's process cannot be given its heartbeat socket");
        }
    }

    /// The VM starts anew: what was heard before does not count, and silence does from now on.
    pub fn begin(&self) {
        self.since_ms.store(boot_ms().max(1), Ordering::Release);
    }

    /// Whether nobody can say yet: no beat since the VM's start, or since this ear is there, and less than so long ago.
    #[must_use]
    pub fn is_early(&self, within_ms: u64) -> bool {
        let since = self.since_ms.load(Ordering::Acquire);
        self.last_ms.load(Ordering::Acquire) < since && boot_ms().saturating_sub(since) <= within_ms
    }

    /// Whether the application said something within so long.
    ///
    /// # Errors
    /// It did not.
    pub fn within(&self, ms: u64) -> Result<(), String> {
        let last = self.last_ms.load(Ordering::Acquire);
        if last < self.since_ms.load(Ordering::Acquire) {
            return Err(format!(
                "its application sent no heartbeat yet (vsock, host port {BEAT_PORT})"
            ));
        }
        match boot_ms().saturating_sub(last) {
            age if age <= ms => Ok(()),
            age => Err(format!("its application's last heartbeat was {age} ms ago")),
        }
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.task.abort();
        // A later ear may have its name by now.
        if inode(&self.path).is_ok_and(|i| i == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

async fn hear(listener: UnixListener, last_ms: Arc<AtomicU64>) {
    let mut open = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                last_ms.store(boot_ms().max(1), Ordering::Release);
                while open.try_join_next().is_some() {}
                // Beyond that, to have connected is all that is heard.
                if open.len() < CONNECTIONS_MAX {
                    let last_ms = Arc::clone(&last_ms);
                    open.spawn(async move { read(stream, &last_ms).await });
                }
                // A guest that connects in a loop waits for its turn.
                tokio::time::sleep(PACE).await;
            }
            // No descriptors left, or the like.
            Err(error) => {
                tracing::warn!(%error, "a heartbeat could not be taken");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn read(mut stream: UnixStream, last_ms: &AtomicU64) {
    let mut some = [0; 256];
    while let Ok(Ok(1..)) = tokio::time::timeout(IDLE, stream.read(&mut some)).await {
        last_ms.store(boot_ms().max(1), Ordering::Release);
        // As does one that sends without end: its socket is full meanwhile.
        tokio::time::sleep(PACE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::runtime;
    use super::*;
    use std::time::Instant;
    use tokio::io::AsyncWriteExt;

    async fn beats_within(beats: &Beats, ms: u64) {
        let until = Instant::now() + Duration::from_secs(20);
        while let Err(why) = beats.within(ms) {
            assert!(Instant::now() < until, "{why}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn silent_for(beats: &Beats, ms: u64) {
        let until = Instant::now() + Duration::from_secs(20);
        while beats.within(ms).is_ok() {
            assert!(Instant::now() < until, "it is never silent");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[test]
    fn the_vms_process_can_connect_and_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let vsock = folder.path().join("vsock");
        std::fs::write(&vsock, "").unwrap();
        if std::os::unix::fs::lchown(&vsock, Some(4711), Some(4712)).is_err() {
            println!("SKIPPED: only root gives files away");
            return;
        }
        runtime().block_on(async {
            let beats = Beats::listen(&vsock).unwrap();
            beats.keep();
            let made = std::fs::metadata(folder.path().join("vsock_1024")).unwrap();
            assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (4711, 4712, 0o600));
        });
    }

    #[test]
    fn connections_and_what_they_say_are_beats() {
        runtime().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let vsock = folder.path().join("vsock");
            // One that was left by a daemon that was killed is taken over.
            std::fs::write(folder.path().join("vsock_1024"), "").unwrap();
            let beats = Beats::listen(&vsock).unwrap();
            assert!(beats.within(u64::MAX).unwrap_err().contains("yet"));
            assert!(beats.is_early(60_000), "it has a minute to begin");
            let path = folder.path().join("vsock_1024");
            let mut stream = UnixStream::connect(&path).await.unwrap();
            beats_within(&beats, 10_000).await;
            silent_for(&beats, 100).await;
            stream.write_all(b"x").await.unwrap();
            beats_within(&beats, 90).await;
            // A VM that starts anew is not believed for what it said before.
            beats.begin();
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert!(beats.is_early(60_000) && !beats.is_early(0));
            assert!(beats.within(60_000).unwrap_err().contains("yet"));
            stream.write_all(b"x").await.unwrap();
            beats_within(&beats, 10_000).await;
            assert!(!beats.is_early(60_000));
            // Connections that are left open do not keep later ones from being heard.
            let mut many = vec![stream];
            for _ in 0..CONNECTIONS_MAX {
                many.push(UnixStream::connect(&path).await.unwrap());
            }
            beats_within(&beats, 10_000).await;
            silent_for(&beats, 300).await;
            many.push(UnixStream::connect(&path).await.unwrap());
            beats_within(&beats, 250).await;
            // One that is made anew is not ended by the end of the former.
            let next = Beats::listen(&vsock).unwrap();
            drop(beats);
            many.push(UnixStream::connect(&path).await.unwrap());
            beats_within(&next, 10_000).await;
            drop(next);
            assert!(!path.exists());
        });
    }
}
