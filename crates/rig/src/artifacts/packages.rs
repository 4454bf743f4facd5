//! Debian packages without installing them: download, unpack, and root trees made of them.

use super::cache::lock_file;
use crate::error::{IoContext, Result, RigError};
use crate::tools;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const DOWNLOAD_BOUND: Duration = Duration::from_secs(600);

/// The Debian release of this machine, for which packages are taken; `bookworm` when it is not a Debian.
pub fn suite() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.map(|value| value.trim_matches('"').to_string())
    };
    match (value("ID=").as_deref(), value("VERSION_CODENAME=")) {
        (Some("debian"), Some(name)) => name,
        _ => "bookworm".to_string(),
    }
}

/// Fetches the package lists when apt does not know `package`.
fn ensure_known(package: &str) -> Result<()> {
    let apt_cache = tools::find("apt-cache")?;
    let known = || {
        tools::run(
            Command::new(&apt_cache).args(["show", package]),
            Duration::from_secs(60),
        )
        .is_ok()
    };
    if known() {
        return Ok(());
    }
    let lock = std::env::temp_dir().join("steadfast-apt-update.lock");
    let _lock = lock_file(&lock, DOWNLOAD_BOUND)?;
    if !known() {
        tools::run(
            Command::new(tools::find("apt-get")?).arg("update"),
            DOWNLOAD_BOUND,
        )?;
    }
    Ok(())
}

/// The package that `package` stands for: the first real one it depends on whose name begins with `prefix`.
pub fn depends_on(package: &str, prefix: &str) -> Result<String> {
    ensure_known(package)?;
    let text = tools::run(
        Command::new(tools::find("apt-cache")?).args(["depends", "--important", package]),
        Duration::from_secs(60),
    )?;
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_string)
        .ok_or_else(|| {
            RigError::malformed(
                format!("apt-cache depends {package}"),
                format!("no {prefix}...: {text}"),
            )
        })
}

/// Downloads a package's file into a folder and unpacks it into `tree`.
pub fn fetch_and_unpack(package: &str, folder: &Path, tree: &Path) -> Result<()> {
    ensure_known(package)?;
    // `_apt`, apt's own user, may not read the folder; downloading as the caller is what we want.
    let mut download = Command::new(tools::find("apt-get")?);
    download
        .args(["-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(folder);
    tools::run(&mut download, DOWNLOAD_BOUND)?;
    let file = std::fs::read_dir(folder)
        .what(|| format!("list {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| RigError::malformed(format!("apt-get download {package}"), "no .deb appeared"))?;
    let mut unpack = Command::new(tools::find("dpkg-deb")?);
    unpack.arg("-x").arg(&file).arg(tree);
    tools::run(&mut unpack, DOWNLOAD_BOUND)?;
    std::fs::remove_file(&file).what(|| format!("remove {}", file.display()))
}

/// The apt sources of this machine, so that what is made here comes from the same mirror.
fn sources() -> Option<PathBuf> {
    ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| std::fs::metadata(path).is_ok_and(|m| m.len() > 0))
}

/// A `mmdebstrap` of this machine's release and mirror, with these arguments before the release's name.
pub fn mmdebstrap(arguments: &[&str], packages: &[&str], target: &Path) -> Result<String> {
    let mut command = Command::new(tools::find("mmdebstrap")?);
    command
        .arg("--quiet")
        .args(arguments)
        .arg(format!("--include={}", packages.join(",")));
    command.arg(suite()).arg(target);
    if let Some(sources) = sources() {
        command.arg(sources);
    }
    tools::run(&mut command, Duration::from_secs(1800))
}

/// Bytes of all files under a folder.
pub fn tree_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).what(|| format!("list {}", folder.display()))? {
            let entry = entry.what(|| format!("list {}", folder.display()))?;
            let data = entry
                .metadata()
                .what(|| format!("look at {}", entry.path().display()))?;
            if data.is_dir() {
                open.push(entry.path());
            }
            bytes += data.len().next_multiple_of(4096);
        }
    }
    Ok(bytes)
}

/// Makes an ext4 image without a partition table of a folder's contents.
///
/// `bytes` is the size of the file system; it begins at `offset` in the file (for a partition).
pub fn ext4_of(folder: Option<&Path>, image: &Path, bytes: u64, offset: u64, options: &[&str]) -> Result<()> {
    let bytes = bytes.next_multiple_of(4096);
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(image);
    let file = file.what(|| format!("make {}", image.display()))?;
    let have = file
        .metadata()
        .what(|| format!("look at {}", image.display()))?
        .len();
    file.set_len(have.max(offset + bytes))
        .what(|| format!("size {}", image.display()))?;
    let mut command = Command::new(tools::find("mke2fs")?);
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096"]);
    let extended = format!("root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard,offset={offset}");
    command.args(["-E", &extended]).args(options);
    if let Some(folder) = folder {
        command.arg("-d").arg(folder);
    }
    command.arg(image).arg((bytes / 4096).to_string());
    tools::run(&mut command, Duration::from_secs(600)).map(|_| ())
}
