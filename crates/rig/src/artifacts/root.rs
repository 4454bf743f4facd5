//! The root file system of a simulated server: an ext4 image of Debian packages, unpacked, never configured.
//!
//! The servers mount it read-only under a tmpfs (overlay), so one image serves all of them and each start is a fresh machine.

use super::cache::{Cache, digest};
use super::kernel::Kernel;
use super::packages;
use crate::error::{IoContext, Result};
use std::path::{Path, PathBuf};

/// What every server has. More can be asked for with [`crate::RigBuilder::packages`].
pub const PACKAGES: &[&str] = &[
    "bash",
    "bsdutils",
    "coreutils",
    "debianutils",
    "diffutils",
    "dmsetup",
    "e2fsprogs",
    "etcd-client",
    "etcd-server",
    "ethtool",
    "findutils",
    "gawk",
    "grep",
    "gzip",
    "hostname",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "mount",
    "ncurses-base",
    "netcat-openbsd",
    "procps",
    "psmisc",
    "redis-tools",
    "sed",
    "socat",
    "strace",
    "tar",
    "tcpdump",
    "util-linux",
];

/// Written into the tree: the packages' own scripts, which would make these, never run.
const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/:/usr/sbin/nologin\n\
         steadfast:x:900:900::/var/lib/steadfast:/usr/sbin/nologin\netcd:x:901:901::/data/etcd:/usr/sbin/nologin\n\
         nobody:x:65534:65534::/:/usr/sbin/nologin\n",
    ),
    (
        "etc/group",
        "root:x:0:\ndaemon:x:1:\ntty:x:5:\ndisk:x:6:\nkvm:x:902:steadfast\nsteadfast:x:900:\netcd:x:901:\nnogroup:x:65534:\n",
    ),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
    ),
    (
        "etc/profile",
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nPS1='\\u@\\h:\\w\\$ '\n",
    ),
    ("root/.bashrc", "PS1='\\u@\\h:\\w\\$ '\nalias ll='ls -la'\n"),
    (
        "etc/ld.so.conf",
        "/usr/local/lib\n/lib/x86_64-linux-gnu\n/usr/lib/x86_64-linux-gnu\n",
    ),
];

/// The image of a server's root, with `extra` packages beside [`PACKAGES`].
pub fn image(cache: &Cache, kernel: &Kernel, extra: &[String]) -> Result<PathBuf> {
    let mut wanted: Vec<&str> = PACKAGES
        .iter()
        .copied()
        .chain(extra.iter().map(String::as_str))
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    let files: Vec<u8> = FILES
        .iter()
        .flat_map(|(path, text)| [path.as_bytes(), text.as_bytes()].concat())
        .collect();
    // The last part counts the changes of how the tree is finished.
    let what = digest(&[
        wanted.join(",").as_bytes(),
        kernel.release.as_bytes(),
        &files,
        b"2",
    ]);
    let key = format!("root-{}-{what}", packages::suite());
    let folder = cache.get_or_make(&key, |folder| {
        let tree = folder.join("tree");
        let mode = if is_root() {
            "--mode=root"
        } else {
            "--mode=chrootless"
        };
        packages::mmdebstrap(&["--variant=extract", mode, "--format=directory"], &wanted, &tree)?;
        finish_tree(&tree, kernel)?;
        let bytes = packages::tree_bytes(&tree)? * 11 / 10 + (32 << 20);
        // Read-only for all its life: no journal.
        packages::ext4_of(
            Some(&tree),
            &folder.join("root.ext4"),
            bytes,
            0,
            &["-O", "^has_journal", "-m", "0"],
        )?;
        std::fs::remove_dir_all(&tree).what(|| format!("remove {}", tree.display()))
    })?;
    Ok(folder.join("root.ext4"))
}

fn is_root() -> bool {
    // SAFETY: no memory is passed, it cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn finish_tree(tree: &Path, kernel: &Kernel) -> Result<()> {
    for (path, text) in FILES {
        let path = tree.join(path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
        }
        std::fs::write(&path, text).what(|| format!("write {}", path.display()))?;
    }
    for folder in [
        "data",
        "guests",
        "opt/steadfast",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var/lib/steadfast",
    ] {
        let folder = tree.join(folder);
        std::fs::create_dir_all(&folder).what(|| format!("make {}", folder.display()))?;
    }
    for folder in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
    ] {
        let folder = tree.join(folder);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).what(|| format!("remove {}", folder.display()))?;
        }
    }
    // The programs of the binary disk, found on the PATH.
    for program in ["steadfast", "steadfast-rig"] {
        let link = tree.join("usr/local/bin").join(program);
        std::fs::create_dir_all(tree.join("usr/local/bin")).what(|| "make usr/local/bin".to_string())?;
        std::os::unix::fs::symlink(format!("/opt/steadfast/{program}"), &link)
            .what(|| format!("link {}", link.display()))?;
    }
    // What Debian's alternatives would give.
    let alternatives = [
        ("bin/sh", "bash"),
        ("usr/bin/awk", "gawk"),
        ("usr/bin/nc", "nc.openbsd"),
        ("usr/bin/pager", "less"),
        ("usr/bin/which", "which.debianutils"),
    ];
    for (link, target) in alternatives {
        let link = tree.join(link);
        if std::fs::symlink_metadata(&link).is_err() {
            std::os::unix::fs::symlink(target, &link).what(|| format!("link {}", link.display()))?;
        }
    }
    copy_tree(
        &kernel.modules(),
        &tree.join("usr/lib/modules").join(&kernel.release),
        tree,
    )
}

/// Copies the modules; into `lib` where the tree has no merged `/usr`.
fn copy_tree(source: &Path, target: &Path, tree: &Path) -> Result<()> {
    let merged = std::fs::symlink_metadata(tree.join("lib")).is_ok_and(|m| m.file_type().is_symlink());
    let name = target.file_name().unwrap_or_default();
    let target = if merged {
        target.to_path_buf()
    } else {
        tree.join("lib/modules").join(name)
    };
    copy_folder(source, &target)
}

fn copy_folder(source: &Path, target: &Path) -> Result<()> {
    std::fs::create_dir_all(target).what(|| format!("make {}", target.display()))?;
    for entry in std::fs::read_dir(source)
        .what(|| format!("list {}", source.display()))?
        .flatten()
    {
        let (from, to) = (entry.path(), target.join(entry.file_name()));
        let kind = entry.file_type().what(|| format!("look at {}", from.display()))?;
        if kind.is_dir() {
            copy_folder(&from, &to)?;
        } else if kind.is_file() {
            std::fs::copy(&from, &to).what(|| format!("copy {}", from.display()))?;
        }
    }
    Ok(())
}
