//! The `steadfast` binary of a host: which one runs, others that are kept, and how one takes the other's place.
//!
//! ```text
//! DATA/binaries/VERSION     what came over the API, and what ran before: the way back
//! PROGRAM                   what `steadfast node` was started from; replaced by rename, then exec() in the same process
//! ```
//! A version is the package's with the first digits of the file's SHA-256, so that two builds of one release are told apart. What
//! came is asked to describe itself (`steadfast node --describe`), with this host's settings, before it is kept: what does not run
//! here, or cannot talk to what runs now, is refused before anything is touched.

use crate::config::{Folders, NodeConfig};
use crate::error::{IoContext, NodeError, Result, refused};
use crate::pki::hex;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use steadfast_protect::{WIRE_MAX, WIRE_MIN};
use utoipa::ToSchema;

/// Largest binary, bytes.
pub const BYTES_MAX: u64 = 512 << 20;
/// How long a binary may take to describe itself.
const DESCRIBE_BOUND: Duration = Duration::from_secs(30);
/// Longest description.
const DESCRIPTION_MAX: usize = 4096;
/// Binaries kept beside the one that runs.
const KEPT: usize = 3;
/// A file that another thread's child still holds open for writing cannot be run for a moment.
const BUSY_BOUND: Duration = Duration::from_secs(10);

/// What a binary is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Described {
    /// `1.2.3+0123456789ab`: of the package, and of this very file.
    pub version: String,
    /// Version of the epoch stream that it speaks: lowest.
    pub wire_min: u32,
    /// Version of the epoch stream that it speaks: highest.
    pub wire_max: u32,
}

/// What `steadfast node --describe` prints. The file's own name comes from whoever has the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The package's version.
    pub package: String,
    /// See [`Described`].
    pub wire_min: u32,
    /// See [`Described`].
    pub wire_max: u32,
}

impl Description {
    /// Of this binary.
    #[must_use]
    pub fn own() -> Self {
        Self {
            package: env!("CARGO_PKG_VERSION").into(),
            wire_min: WIRE_MIN.into(),
            wire_max: WIRE_MAX.into(),
        }
    }

    fn of(&self, digest: &str) -> Described {
        Described {
            version: format!("{}+{}", self.package, &digest[..digest.len().min(12)]),
            wire_min: self.wire_min,
            wire_max: self.wire_max,
        }
    }
}

/// The binary that this process runs.
pub fn own() -> &'static Described {
    static OWN: OnceLock<Described> = OnceLock::new();
    OWN.get_or_init(|| {
        // A host whose /proc cannot be read still has a version; it is only not told from other builds.
        // It is long work for a slow CPU, and the guests need it as well.
        let digest = crate::precedence::without(|| digest_of(Path::new("/proc/self/exe")));
        let digest = digest.and_then(|d| d).unwrap_or_else(|_| "unknown".into());
        Description::own().of(&digest)
    })
}

/// SHA-256 of a file.
fn digest_of(path: &Path) -> Result<String> {
    let reading = || format!("read {}", path.display());
    let mut file = File::open(path).what(reading)?;
    let (mut context, mut part) = (Context::new(&SHA256), vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut part).what(reading)?;
        if n == 0 {
            return Ok(hex(context.finish().as_ref()));
        }
        context.update(&part[..n]);
    }
}

/// What `steadfast node --describe` does: this host's settings and certificates can be read.
///
/// # Errors
/// Why this binary could not serve this host.
pub fn describe(folders: &Folders) -> Result<Description> {
    if NodeConfig::exists(folders) {
        let config = NodeConfig::load(folders)?;
        crate::tls::client(&folders.tls(), &folders.crl())?;
        tracing::debug!(host = %config.host, "its settings can be read");
    }
    Ok(Description::own())
}

fn folder(folders: &Folders) -> PathBuf {
    folders.data.join("binaries")
}

/// Where a binary is kept.
///
/// # Errors
/// The version is none.
fn path_of(folders: &Folders, version: &str) -> Result<PathBuf> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-' | '_');
    if version.is_empty() || version.len() > 64 || version.starts_with('.') || !version.chars().all(fine) {
        return refused(format!("{version:?} is no version of a binary"));
    }
    Ok(folder(folders).join(version))
}

/// A binary that is coming in.
pub struct Incoming {
    folders: Folders,
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
}

impl Incoming {
    /// Begins one.
    ///
    /// # Errors
    /// The data folder cannot be written.
    pub fn new(folders: &Folders) -> Result<Self> {
        let folder = folder(folders);
        fs::create_dir_all(&folder).what(|| format!("make {}", folder.display()))?;
        let number = steadfast_store::random_u64().what(|| "random numbers".into())?;
        let path = folder.join(format!(".incoming-{number:016x}"));
        let mut options = File::options();
        let file = options.create_new(true).write(true).mode(0o700).open(&path);
        let file = file.what(|| format!("make {}", path.display()))?;
        Ok(Self {
            folders: folders.clone(),
            path,
            file: Some(file),
            bytes: 0,
        })
    }

    /// Takes a part of it. Blocks.
    ///
    /// # Errors
    /// It is too large, or the disk is full.
    pub fn write(&mut self, part: &[u8]) -> Result<()> {
        self.bytes += part.len() as u64;
        if self.bytes > BYTES_MAX {
            return refused(format!("a binary has at most {} MiB", BYTES_MAX >> 20));
        }
        let path = self.path.display().to_string();
        match &mut self.file {
            Some(file) => file.write_all(part).what(|| format!("write {path}")),
            None => refused("it has come in already"),
        }
    }

    /// Asks it what it is, and keeps it. Blocks.
    ///
    /// # Errors
    /// It does not run here, or cannot talk to what runs now.
    pub fn finish(mut self) -> Result<Described> {
        if let Some(file) = self.file.take() {
            file.sync_all()
                .what(|| format!("write {}", self.path.display()))?;
        }
        let digest = digest_of(&self.path)?;
        let found = ask(&self.path, &self.folders)?.of(&digest);
        fits(&found)?;
        let kept = path_of(&self.folders, &found.version)?;
        fs::rename(&self.path, &kept).what(|| format!("keep {}", kept.display()))?;
        prune(&self.folders, &found.version);
        Ok(found)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // Gone already if it was kept.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether hosts with both binaries can mirror to each other meanwhile.
fn fits(new: &Described) -> Result<()> {
    let own = own();
    if new.wire_min > own.wire_max || own.wire_min > new.wire_max {
        return refused(format!(
            "{} speaks versions {} to {} of the epoch stream and {} speaks {} to {}: VMs could not be protected between them while \
             the pool is upgraded; go by way of a version that speaks both",
            new.version, new.wire_min, new.wire_max, own.version, own.wire_min, own.wire_max
        ));
    }
    Ok(())
}

/// Runs something as soon as nobody has the file open for writing any more.
fn when_free<T>(mut run: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let until = Instant::now() + BUSY_BOUND;
    loop {
        match run() {
            Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// Asks a binary to describe itself.
fn ask(path: &Path, folders: &Folders) -> Result<Description> {
    let no = |why: String| NodeError::Refused(format!("this binary does not run on this host: {why}"));
    let mut command = Command::new(path);
    command.args(["node", "--describe", "--data"]).arg(&folders.data);
    command.arg("--run").arg(&folders.run);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = when_free(|| command.spawn()).map_err(|e| no(e.to_string()))?;
    let until = Instant::now() + DESCRIBE_BOUND;
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            other => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(no(match other {
                    Err(e) => e.to_string(),
                    Ok(_) => format!("it did not describe itself within {DESCRIBE_BOUND:?}"),
                }));
            }
        }
    };
    let mut said = Vec::new();
    let mut take = |pipe: Option<&mut dyn Read>| {
        if let Some(pipe) = pipe {
            let _ = pipe.take(DESCRIPTION_MAX as u64).read_to_end(&mut said);
        }
    };
    if !ended.success() {
        take(child.stderr.as_mut().map(|p| p as &mut dyn Read));
        let said = String::from_utf8_lossy(&said);
        return Err(no(format!("it ended with {ended}: {}", said.trim())));
    }
    take(child.stdout.as_mut().map(|p| p as &mut dyn Read));
    serde_json::from_slice(&said).map_err(|e| no(format!("it does not describe itself ({e})")))
}

/// A binary that this host could run: what it runs now, or one that is kept. Blocks.
///
/// # Errors
/// There is none of this version, or it does not run.
pub fn known(folders: &Folders, version: &str) -> Result<Described> {
    if version == own().version {
        return Ok(own().clone());
    }
    let path = path_of(folders, version)?;
    if !path.is_file() {
        return Err(NodeError::NotFound(format!(
            "binary {version} on this host; give it with `steadfast pool upgrade --binary FILE`"
        )));
    }
    let digest = digest_of(&path)?;
    let found = ask(&path, folders)?.of(&digest);
    fits(&found)?;
    match found.version == version {
        true => Ok(found),
        false => refused(format!("{} is not what it was", path.display())),
    }
}

/// The file of a binary that is kept, or of the one that runs.
///
/// # Errors
/// The version is none.
pub fn file_of(folders: &Folders, version: &str) -> Result<PathBuf> {
    let kept = path_of(folders, version)?;
    match version == own().version && !kept.is_file() {
        true => Ok("/proc/self/exe".into()),
        false => Ok(kept),
    }
}

/// Keeps what runs now as the way back, and puts a kept binary into the place that this daemon was started from. Running
/// processes are not touched.
///
/// # Errors
/// There is no such binary, or a folder cannot be written. The old one is still there then.
pub fn install(folders: &Folders, version: &str, program: &Path) -> Result<()> {
    let new = known(folders, version)?;
    let former = path_of(folders, &own().version)?;
    if !former.is_file() {
        copy(Path::new("/proc/self/exe"), &former, 0o700)?;
    }
    copy(&path_of(folders, &new.version)?, program, 0o755)
}

/// Copies a file to where it replaces another, atomically and durably.
fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let parent = to.parent().unwrap_or(Path::new("/"));
    let name = to.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let temp = parent.join(format!(".{name}.new"));
    let copied = (|| {
        let _ = fs::remove_file(&temp);
        let mut options = File::options();
        let mut out = options.create_new(true).write(true).mode(mode).open(&temp)?;
        std::io::copy(&mut File::open(from)?, &mut out)?;
        out.sync_all()?;
        fs::rename(&temp, to)?;
        File::open(parent)?.sync_all()
    })();
    if copied.is_err() {
        let _ = fs::remove_file(&temp);
    }
    copied.what(|| format!("put {} in the place of {}", from.display(), to.display()))
}

/// Removes the oldest ones, and what a killed daemon left half.
fn prune(folders: &Folders, newest: &str) {
    let Ok(dir) = fs::read_dir(folder(folders)) else {
        return;
    };
    let mut all: Vec<_> = dir
        .flatten()
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .collect();
    all.sort();
    let hour = Duration::from_secs(3600);
    let hidden = |p: &Path| {
        p.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with('.'))
    };
    let (halves, kept): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, p)| hidden(p));
    let old_halves = halves
        .into_iter()
        .filter(|(at, _)| at.elapsed().is_ok_and(|age| age > hour));
    let surplus = kept.len().saturating_sub(KEPT);
    for (_, path) in old_halves.chain(kept.into_iter().take(surplus)) {
        let named = |v: &str| path.file_name().is_some_and(|n| n == v);
        if !named(newest) && !named(&own().version) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Becomes the binary that is at `program` now, with the same arguments, in the same process. Returns only if that fails.
#[must_use]
pub fn become_new(program: &Path) -> NodeError {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1));
    let failed = when_free(|| Err::<(), _>(command.exec()));
    NodeError::Io {
        what: format!("become {}", program.display()),
        source: failed.err().unwrap_or_else(|| std::io::ErrorKind::Other.into()),
    }
}

/// Waits, in threads, for the children of the process that this one was before its exec(): nobody else would, and they would
/// stay as zombies.
pub fn adopt_children() {
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|p| p.parse::<i32>().ok()) {
            let Some(pid) = rustix::process::Pid::from_raw(pid) else {
                continue;
            };
            let waiter = std::thread::Builder::new().name("child-wait".into());
            let _ = waiter.spawn(move || {
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(folders: &Folders, text: &str) -> Result<Described> {
        let mut incoming = Incoming::new(folders)?;
        incoming.write(format!("#!/bin/sh\n{text}\n").as_bytes())?;
        incoming.finish()
    }

    #[test]
    fn what_does_not_run_or_does_not_fit_is_not_kept() {
        let at = tempfile::tempdir().unwrap();
        let folders = Folders {
            data: at.path().join("data"),
            run: at.path().join("run"),
        };
        let mut garbage = Incoming::new(&folders).unwrap();
        garbage.write(&[0x7f; 1000]).unwrap();
        let said = garbage.finish().unwrap_err().to_string();
        assert!(said.contains("does not run on this host"), "{said}");
        let said = script(&folders, "echo no; exit 3").unwrap_err().to_string();
        assert!(said.contains("exit status: 3"), "{said}");
        let said = script(&folders, "echo nonsense").unwrap_err().to_string();
        assert!(said.contains("does not describe itself"), "{said}");
        let other = r#"echo '{"package":"9.0.0","wire_min":77,"wire_max":78}'"#;
        let said = script(&folders, other).unwrap_err().to_string();
        assert!(said.contains("speaks versions 77 to 78"), "{said}");
        let left = || fs::read_dir(folder(&folders)).unwrap().count();
        assert_eq!(left(), 0, "nothing is left of what was refused");
        let good = format!("echo '{}'", serde_json::to_string(&Description::own()).unwrap());
        let kept = script(&folders, &good).unwrap();
        assert_ne!(kept.version, own().version, "the same package, another file");
        assert_eq!(known(&folders, &kept.version).unwrap(), kept);
        let program = at.path().join("steadfast");
        fs::write(&program, "old").unwrap();
        install(&folders, &kept.version, &program).unwrap();
        assert_eq!(
            fs::read(&program).unwrap(),
            fs::read(path_of(&folders, &kept.version).unwrap()).unwrap()
        );
        assert!(
            path_of(&folders, &own().version).unwrap().is_file(),
            "the way back is kept"
        );
        // What was changed on the disk since is not what it was.
        fs::write(path_of(&folders, &kept.version).unwrap(), "#!/bin/sh\necho\n").unwrap();
        assert!(known(&folders, &kept.version).is_err());
        assert!(known(&folders, "../x").is_err());
        for n in 0..KEPT + 2 {
            script(&folders, &format!("{good}; # {n}")).unwrap();
        }
        assert!(left() <= KEPT + 1, "bounded");
    }
}
