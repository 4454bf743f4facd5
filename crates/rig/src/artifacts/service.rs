//! A service disk for the mini guest: redis that syncs every write, and a web server, as Debian packages have them, on ext4.
//!
//! The disk holds only what the two programs need (their shared libraries are found by Debian's own dynamic loader), so that it
//! is small: a full copy of it takes seconds, also under software emulation. The mini guest runs it with `mini.root=vda`.

use super::cache::{Cache, digest};
use super::packages;
use crate::error::{IoContext, Result, RigError};
use crate::inside::mini::service::START;
use crate::tools;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The serial number by which servers find it: `/dev/rig/SERIAL`, read-only; copy it to write to it.
pub const SERIAL: &str = "guests-service";
/// Port of redis.
pub const REDIS_PORT: u16 = 6379;
/// Port of the web server.
pub const HTTP_PORT: u16 = 80;
/// What the web server's only page, `/`, says.
pub const PAGE: &str = "<!doctype html><title>Steadfast</title><p>It works, and goes on working.\n";
/// Size of the disk in bytes.
pub const BYTES: u64 = 48 << 20;

const PACKAGES: &[&str] = &["busybox-static", "redis-server"];

/// `appendfsync always`: a write is answered when it is on the disk. No snapshots: a fork of a busy redis would be what is measured.
const REDIS_CONF: &str = "\
bind 0.0.0.0
port 6379
protected-mode no
daemonize no
dir /redis
save \"\"
appendonly yes
appendfsync always
auto-aof-rewrite-percentage 0
maxmemory 32mb
maxmemory-policy noeviction
loglevel warning
";

const START_SCRIPT: &str = "\
#!/bin/busybox sh
/bin/busybox httpd -f -p 80 -h /www &
exec /usr/bin/redis-server /etc/redis.conf
";

/// Takes the disk's image out of the cache, making it when it is not there (some seconds, once).
///
/// # Errors
/// What Debian's tools say.
pub fn image(cache: &Cache) -> Result<PathBuf> {
    let key = format!(
        "service-{}-{}",
        packages::suite(),
        // The last part counts the changes of how the tree is finished.
        digest(&[
            REDIS_CONF.as_bytes(),
            START_SCRIPT.as_bytes(),
            PAGE.as_bytes(),
            &BYTES.to_le_bytes(),
            b"1"
        ])
    );
    let folder = cache.get_or_make(&key, make)?;
    Ok(folder.join("service.ext4"))
}

fn make(folder: &Path) -> Result<()> {
    let (whole, tree) = (folder.join("whole"), folder.join("tree"));
    // SAFETY: no memory is passed, it cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let mode = if root { "--mode=root" } else { "--mode=chrootless" };
    packages::mmdebstrap(
        &["--variant=extract", mode, "--format=directory"],
        PACKAGES,
        &whole,
    )?;
    copy(&whole, &tree, "bin/busybox")?;
    copy(&whole, &tree, "usr/bin/redis-server")?;
    for library in libraries(&whole, "usr/bin/redis-server")? {
        copy(&whole, &tree, &library)?;
    }
    for empty in ["dev", "proc", "redis", "tmp", "run", "www"] {
        let path = tree.join(empty);
        std::fs::create_dir_all(&path).what(|| format!("make {}", path.display()))?;
    }
    write(&tree, "etc/redis.conf", REDIS_CONF, 0o644)?;
    write(&tree, "www/index.html", PAGE, 0o644)?;
    write(&tree, START.trim_start_matches('/'), START_SCRIPT, 0o755)?;
    let image = folder.join("service.ext4");
    packages::ext4_of(Some(&tree), &image, BYTES, 0, &["-m", "0", "-J", "size=4"])?;
    for used in [whole, tree] {
        std::fs::remove_dir_all(&used).what(|| format!("remove {}", used.display()))?;
    }
    Ok(())
}

/// The shared libraries of a program in a tree, the loader too, as paths in the tree.
fn libraries(tree: &Path, program: &str) -> Result<Vec<String>> {
    const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
    let folders =
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|f| tree.join(f).display().to_string());
    let mut list = Command::new(tree.join(LOADER));
    list.arg("--library-path").arg(folders.join(":"));
    list.arg("--list").arg(tree.join(program));
    let said = tools::run(&mut list, Duration::from_secs(20))?;
    let mut found = vec![LOADER.to_string()];
    let root = format!("{}/", tree.display());
    for line in said.lines() {
        // `libssl.so.3 => /tree/usr/lib/.../libssl.so.3 (0x...)`; the kernel's own and the loader have no such path.
        let Some((name, path)) = line.trim().split_once(" => ") else {
            continue;
        };
        let path = path.split(" (").next().unwrap_or(path);
        match path.strip_prefix(&root) {
            Some(path) => found.push(path.to_string()),
            None if name.contains("ld-linux") => {}
            None => {
                return Err(RigError::malformed(
                    format!("the libraries of {program}"),
                    format!("{name} is {path}, which is not in the packages"),
                ));
            }
        }
    }
    Ok(found)
}

/// Copies a file (or what a link leads to) under the same path.
fn copy(from: &Path, to: &Path, path: &str) -> Result<()> {
    let target = to.join(path);
    if let Some(folder) = target.parent() {
        std::fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
    }
    std::fs::copy(from.join(path), &target).what(|| format!("copy {path} of the service"))?;
    Ok(())
}

fn write(tree: &Path, path: &str, text: &str, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let target = tree.join(path);
    if let Some(folder) = target.parent() {
        std::fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
    }
    std::fs::write(&target, text)
        .and_then(|()| std::fs::set_permissions(&target, std::fs::Permissions::from_mode(mode)))
        .what(|| format!("write {path} of the service"))
}
