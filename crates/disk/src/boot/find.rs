//! The search itself: file systems, then boot loader configurations, then files.

use super::error::BootError;
use super::ext4::{ExtTree, has_magic, open_window};
use super::partition::{self, Partition, TableKind};
use super::tree::FileTree;
use super::{BootPlan, CONFIG_MAX, Choice, INITRD_MAX, KERNEL_MAX, bls, extlinux, grub, plain};
use crate::image::BlockIo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// File systems that are looked into.
const FS_MAX: usize = 16;

/// What to look for.
#[derive(Clone, Debug)]
pub struct DiscoverOptions {
    /// Look only at the file system with this UUID or label (and follow its configuration from there).
    pub boot_fs: Option<String>,
    /// Give up after this long.
    pub deadline: Duration,
}

impl Default for DiscoverOptions {
    fn default() -> Self {
        Self {
            boot_fs: None,
            deadline: Duration::from_secs(60),
        }
    }
}

/// Finds what to boot, in a thread of its own, so that an image made to keep it busy forever cannot hang the caller.
///
/// # Errors
/// [`BootError`]; [`BootError::Deadline`] when it took too long.
pub fn discover(io: &Arc<dyn BlockIo>, options: &DiscoverOptions) -> Result<BootPlan, BootError> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (tx, rx) = mpsc::sync_channel(1);
    let (io, opts, flag) = (io.clone(), options.clone(), cancel.clone());
    std::thread::Builder::new()
        .name("boot-discovery".to_owned())
        .stack_size(8 << 20)
        .spawn(move || {
            let found = crate::guard::no_panic("boot discovery", || Ok(search(&io, &opts, &flag)));
            // Nobody listens after the deadline.
            let _ = tx.send(found.unwrap_or_else(|e| Err(e.into())));
        })
        .map_err(|source| crate::DiskError::File {
            what: "cannot start a thread",
            path: std::path::PathBuf::new(),
            source,
        })?;
    rx.recv_timeout(options.deadline).unwrap_or_else(|_| {
        // The thread ends at its next read of the image.
        cancel.store(true, Ordering::Relaxed);
        Err(BootError::Deadline {
            seconds: options.deadline.as_secs(),
        })
    })
}

/// The same on the caller's thread, without a deadline: for tests and fuzzing.
///
/// # Errors
/// [`BootError`].
pub fn discover_here(io: &Arc<dyn BlockIo>, options: &DiscoverOptions) -> Result<BootPlan, BootError> {
    search(io, options, &Arc::new(AtomicBool::new(false)))
}

fn search(
    io: &Arc<dyn BlockIo>,
    options: &DiscoverOptions,
    cancel: &Arc<AtomicBool>,
) -> Result<BootPlan, BootError> {
    let table = partition::read(io.as_ref())?;
    let mut notes = Vec::new();
    let mut trees: Vec<ExtTree> = Vec::new();
    for p in &table.partitions {
        let place = place_of(p, table.kind);
        if !has_magic(io.as_ref(), p.start, p.len) {
            notes.push(format!("{place}: {}", recognise(io.as_ref(), p)));
            continue;
        }
        if trees.len() == FS_MAX {
            notes.push(format!("only the first {FS_MAX} file systems were looked at"));
            break;
        }
        match open_window(io, p.start, p.len, &place, cancel) {
            Ok(tree) => trees.push(tree),
            Err(e) => notes.push(e.to_string()),
        }
    }
    let trees: Vec<&dyn FileTree> = trees.iter().map(|t| t as &dyn FileTree).collect();
    plan(&trees, options, notes)
}

fn place_of(p: &Partition, kind: TableKind) -> String {
    let name = if p.name.is_empty() {
        String::new()
    } else {
        format!(" \"{}\"", p.name)
    };
    match kind {
        TableKind::None => "whole disk".to_owned(),
        TableKind::Mbr => format!("MBR partition {}", p.number),
        TableKind::Gpt => format!("GPT partition {}{name}", p.number),
    }
}

/// Names what is in a partition that cannot be read, so that the error tells the way out.
fn recognise(io: &dyn BlockIo, p: &Partition) -> &'static str {
    let has = |offset: u64, magic: &[u8]| {
        let mut buf = vec![0; magic.len()];
        offset + magic.len() as u64 <= p.len && io.read_at(p.start + offset, &mut buf).is_ok() && buf == magic
    };
    if has(0, b"XFSB") {
        "XFS, which is not supported (only ext4 is)"
    } else if has(0x1_0040, b"_BHRfS_M") {
        "btrfs, which is not supported (only ext4 is)"
    } else if has(0, b"LUKS\xba\xbe") {
        "LUKS encryption, which is not supported"
    } else if has(512, b"LABELONE") {
        "LVM, which is not supported"
    } else if has(54, b"FAT") || has(82, b"FAT32") {
        "FAT (an EFI system partition?), not searched"
    } else if has(4086, b"SWAPSPACE2") {
        "swap"
    } else {
        "no known file system"
    }
}

/// Whether this looks like the root of a Linux system.
fn is_root(tree: &dyn FileTree) -> bool {
    ["/etc/os-release", "/usr/lib/os-release", "/etc/fstab"]
        .iter()
        .any(|f| matches!(tree.is_dir(f), Ok(Some(false))))
}

/// The file system that `/etc/fstab` of `tree` mounts at `/boot`, as its UUID or label.
fn boot_of_fstab(tree: &dyn FileTree) -> Option<String> {
    let fstab = tree.read("/etc/fstab", 1 << 20).ok().flatten()?;
    let text = String::from_utf8_lossy(&fstab).into_owned();
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (what, at) = (words.next()?, words.next()?);
        if at != "/boot" || what.starts_with('#') {
            return None;
        }
        let (key, value) = what.split_once('=')?;
        matches!(key, "UUID" | "LABEL").then(|| value.trim_matches('"').to_owned())
    })
}

fn is_named(tree: &dyn FileTree, name: &str) -> bool {
    tree.uuid().eq_ignore_ascii_case(name) || (!tree.label().is_empty() && tree.label() == name)
}

/// From opened file systems to a plan. `notes` says what was found before.
pub(crate) fn plan(
    trees: &[&dyn FileTree],
    options: &DiscoverOptions,
    mut notes: Vec<String>,
) -> Result<BootPlan, BootError> {
    let machines: Vec<String> = trees
        .iter()
        .filter_map(|t| t.read("/etc/machine-id", 256).ok().flatten())
        .map(|b| String::from_utf8_lossy(&b).trim().to_ascii_lowercase())
        .filter(|id| id.len() == 32)
        .collect();
    let roots: Vec<usize> = (0..trees.len()).filter(|n| is_root(trees[*n])).collect();
    let from_fstab: Vec<String> = roots.iter().filter_map(|n| boot_of_fstab(trees[*n])).collect();

    // Best first: the one that a root's fstab mounts at /boot, one that is labelled so, one that is no root (a
    // separate /boot has its files at the top), then roots.
    let mut order: Vec<usize> = (0..trees.len())
        .filter(|n| {
            options
                .boot_fs
                .as_ref()
                .is_none_or(|name| is_named(trees[*n], name))
        })
        .collect();
    order.sort_by_key(|n| {
        let tree = trees[*n];
        let named = from_fstab.iter().any(|name| is_named(tree, name));
        (
            !named,
            !tree.label().eq_ignore_ascii_case("boot"),
            roots.contains(n),
        )
    });
    if let Some(name) = options.boot_fs.as_ref().filter(|_| order.is_empty()) {
        notes.push(format!("no file system is called {name}"));
    }

    for &n in &order {
        let tree = trees[n];
        for prefix in ["/boot", ""] {
            let mut found = Vec::new();
            let mut keep = |result: Result<Vec<Choice>, BootError>, notes: &mut Vec<String>| match result {
                Ok(choices) => found.extend(choices),
                Err(e) => notes.push(e.to_string()),
            };
            keep(bls::choices(tree, n, prefix, &machines, &mut notes), &mut notes);
            keep(grub_choices(trees, n, prefix, &mut notes), &mut notes);
            keep(extlinux::choices(tree, n, prefix), &mut notes);
            if let Some(root) = root_for(trees, &roots, n) {
                keep(plain::choices(tree, n, prefix, root), &mut notes);
            }
            for choice in found.into_iter().take(64) {
                match load(trees, &choice) {
                    Ok(plan) => return Ok(plan),
                    Err(e) => notes.push(e.to_string()),
                }
            }
        }
        notes.push(format!(
            "{}: no boot entry with a kernel in /boot or / (loader/entries, grub.cfg, extlinux.conf, vmlinuz)",
            tree.describe()
        ));
    }
    if notes.is_empty() {
        notes.push("the disk has no partition with a file system".to_owned());
    }
    // A hostile image must not fill the operator's screen.
    let total = notes.len();
    notes.truncate(24);
    if total > notes.len() {
        notes.push(format!("and {} more", total - notes.len()));
    }
    let looked: String = notes.join("; ").chars().take(8000).collect();
    Err(BootError::NoKernel {
        looked: format!("looked at {looked}"),
    })
}

/// The UUID of the root file system that belongs to a kernel on file system `n`.
fn root_for<'a>(trees: &[&'a dyn FileTree], roots: &[usize], n: usize) -> Option<&'a str> {
    let root = if roots.contains(&n) || roots.is_empty() {
        n
    } else {
        // Which of several would be a guess.
        if roots.len() > 1 {
            return None;
        }
        roots[0]
    };
    trees.get(root).map(|t| t.uuid())
}

fn grub_choices(
    trees: &[&dyn FileTree],
    n: usize,
    prefix: &str,
    notes: &mut Vec<String>,
) -> Result<Vec<Choice>, BootError> {
    for dir in ["grub", "grub2"] {
        let dir = format!("{prefix}/{dir}");
        let file = format!("{dir}/grub.cfg");
        let Some(bytes) = trees[n].read(&file, CONFIG_MAX)? else {
            continue;
        };
        match grub::choices(trees, n, &dir, &file, &String::from_utf8_lossy(&bytes)) {
            Ok(choices) if choices.is_empty() => notes.push(format!("{file}: no entry with a kernel")),
            other => return other,
        }
    }
    Ok(Vec::new())
}

/// Reads the files of an entry.
fn load(trees: &[&dyn FileTree], choice: &Choice) -> Result<BootPlan, BootError> {
    let missing = |file: &str| BootError::Missing {
        origin: choice.origin.clone(),
        file: file.to_owned(),
    };
    let tree = trees.get(choice.fs).ok_or_else(|| missing(&choice.kernel))?;
    let kernel = tree
        .read(&choice.kernel, KERNEL_MAX)?
        .ok_or_else(|| missing(&choice.kernel))?;
    let is_bzimage = kernel.get(0x202..0x206) == Some(b"HdrS");
    let is_elf64 = kernel.starts_with(b"\x7fELF\x02\x01") && kernel.get(18..20) == Some(&[62, 0]);
    if !is_bzimage && !is_elf64 {
        return Err(BootError::NotAKernel {
            file: choice.kernel.clone(),
        });
    }
    let mut initrd: Option<Vec<u8>> = None;
    for (fs, path) in &choice.initrds {
        let joined = initrd.get_or_insert_default();
        joined.resize(joined.len().next_multiple_of(4), 0);
        let left = INITRD_MAX.saturating_sub(joined.len() as u64);
        let tree = trees.get(*fs).ok_or_else(|| missing(path))?;
        let part = tree.read(path, left)?.ok_or_else(|| missing(path))?;
        if joined.is_empty() {
            *joined = part;
        } else {
            joined.extend_from_slice(&part);
        }
    }
    Ok(BootPlan {
        kernel,
        initrd,
        cmdline: choice.cmdline.clone(),
        source: format!("{}, {}", tree.describe(), choice.origin),
        title: choice.title.clone(),
    })
}

/// [`plan`] for fuzzing.
pub(crate) fn plan_of(trees: &[&dyn FileTree], options: &DiscoverOptions) -> Result<BootPlan, BootError> {
    plan(trees, options, Vec::new())
}
