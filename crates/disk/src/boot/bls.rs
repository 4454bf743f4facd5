//! Boot Loader Specification entries, type 1: `loader/entries/*.conf`.
//!
//! Order: the entry that the loader was told to use (GRUB's `saved_entry`, or `default` in `loader.conf`) comes
//! first; then entries of this machine, entries with tries left, by `sort-key`, machine, and newest version.

use super::error::BootError;
use super::tree::{FileTree, normalize};
use super::{CONFIG_MAX, Choice, grub, version};
use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;

/// Entries that are read.
const ENTRIES_MAX: usize = 256;
/// Largest entry file in bytes.
const ENTRY_MAX: u64 = 64 << 10;

/// One entry file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The file's name without `.conf`, and without the boot counter.
    pub id: String,
    /// Shown to people.
    pub title: String,
    /// Version, usually of the kernel.
    pub version: String,
    /// What the machine calls itself in `/etc/machine-id`.
    pub machine_id: String,
    /// Groups entries.
    pub sort_key: String,
    /// Path of the kernel.
    pub linux: String,
    /// Paths of initrds, to be joined.
    pub initrds: Vec<String>,
    /// Command line, the lines joined by spaces.
    pub options: String,
    /// Architecture, perhaps empty.
    pub architecture: String,
    /// No tries left in the boot counter.
    pub exhausted: bool,
}

/// Parses an entry file named `file_name`. Unknown keys are skipped, as the specification asks.
#[must_use]
pub fn parse_entry(file_name: &str, text: &str) -> Entry {
    let stem = file_name.strip_suffix(".conf").unwrap_or(file_name);
    // `name+LEFT` or `name+LEFT-DONE`: the boot counter.
    let (id, exhausted) = match stem.rsplit_once('+') {
        Some((id, counter))
            if counter.bytes().all(|c| c.is_ascii_digit() || c == b'-') && !counter.is_empty() =>
        {
            let left = counter.split('-').next().unwrap_or("");
            (id, !left.is_empty() && left.bytes().all(|c| c == b'0'))
        }
        _ => (stem, false),
    };
    let mut entry = Entry {
        id: id.to_owned(),
        exhausted,
        ..Entry::default()
    };
    let mut options: Vec<&str> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_owned(),
            "version" => entry.version = value.to_owned(),
            "machine-id" => entry.machine_id = value.to_ascii_lowercase(),
            "sort-key" => entry.sort_key = value.to_owned(),
            "linux" => entry.linux = value.to_owned(),
            // GRUB's writers put several into one line.
            "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => options.push(value),
            "architecture" => entry.architecture = value.to_ascii_lowercase(),
            _ => {}
        }
    }
    entry.options = options.join(" ");
    entry
}

fn compare(a: &Entry, b: &Entry, machines: &[String]) -> Ordering {
    let foreign =
        |e: &Entry| !e.machine_id.is_empty() && !machines.is_empty() && !machines.contains(&e.machine_id);
    foreign(a)
        .cmp(&foreign(b))
        .then_with(|| a.exhausted.cmp(&b.exhausted))
        // Entries with a sort key come before those without.
        .then_with(|| a.sort_key.is_empty().cmp(&b.sort_key.is_empty()))
        .then_with(|| a.sort_key.cmp(&b.sort_key))
        .then_with(|| {
            if a.sort_key.is_empty() {
                Ordering::Equal
            } else {
                a.machine_id.cmp(&b.machine_id)
            }
        })
        .then_with(|| {
            let newest = version::compare(&b.version, &a.version);
            if a.sort_key.is_empty() {
                Ordering::Equal
            } else {
                newest
            }
        })
        .then_with(|| version::compare(&b.id, &a.id))
        .then_with(|| Reverse(&a.id).cmp(&Reverse(&b.id)))
}

/// Reads the entries under `prefix` (`/boot` or nothing) of file system number `fs`, best first. Entries whose kernel
/// is not there are left out; `notes` says so.
pub(crate) fn choices(
    tree: &dyn FileTree,
    fs: usize,
    prefix: &str,
    machines: &[String],
    notes: &mut Vec<String>,
) -> Result<Vec<Choice>, BootError> {
    let dir = format!("{prefix}/loader/entries");
    let mut entries = Vec::new();
    for name in tree
        .list(&dir)?
        .into_iter()
        .filter(|n| n.ends_with(".conf"))
        .take(ENTRIES_MAX)
    {
        match tree.read(&format!("{dir}/{name}"), ENTRY_MAX) {
            Ok(Some(bytes)) => {
                entries.push((name.clone(), parse_entry(&name, &String::from_utf8_lossy(&bytes))))
            }
            Ok(None) => {}
            Err(e) => notes.push(e.to_string()),
        }
    }
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    entries.sort_by(|(_, a), (_, b)| compare(a, b, machines));
    let env = environment(tree, prefix);
    if let Some(at) = default_of(tree, prefix, &env, &entries) {
        let chosen = entries.remove(at);
        entries.insert(0, chosen);
    }
    let mut choices = Vec::new();
    for (name, entry) in entries {
        let origin = format!("{dir}/{name}");
        if entry.linux.is_empty() {
            notes.push(format!(
                "{origin} names no kernel (a unified kernel image is not supported)"
            ));
            continue;
        }
        if !matches!(entry.architecture.as_str(), "" | "x64" | "x86_64" | "amd64") {
            notes.push(format!("{origin} is for {}", entry.architecture));
            continue;
        }
        let locate = |path: &str| -> Result<String, BootError> {
            let plain = normalize(path);
            let below = normalize(&format!("{prefix}/{path}"));
            // Relative to the file system, says the specification; some writers mean relative to /boot.
            Ok(
                if tree.is_dir(&plain)? != Some(false) && tree.is_dir(&below)? == Some(false) {
                    below
                } else {
                    plain
                },
            )
        };
        let kernel = locate(&entry.linux)?;
        if tree.is_dir(&kernel)? != Some(false) {
            notes.push(format!("{origin} names {kernel}, which does not exist"));
            continue;
        }
        let mut initrds = Vec::new();
        for path in &entry.initrds {
            let path = grub::expand_env(path, &env);
            if !path.trim().is_empty() {
                initrds.push((fs, locate(path.trim())?));
            }
        }
        let cmdline = grub::expand_env(&entry.options, &env);
        choices.push(Choice {
            fs,
            kernel,
            initrds,
            cmdline: cmdline.split_whitespace().collect::<Vec<_>>().join(" "),
            title: if entry.title.is_empty() {
                entry.id
            } else {
                entry.title
            },
            origin,
        });
    }
    Ok(choices)
}

fn environment(tree: &dyn FileTree, prefix: &str) -> BTreeMap<String, String> {
    for dir in ["grub2", "grub"] {
        if let Ok(Some(bytes)) = tree.read(&format!("{prefix}/{dir}/grubenv"), CONFIG_MAX) {
            return grub::parse_grubenv(&bytes);
        }
    }
    BTreeMap::new()
}

/// Which entry the loader was told to use.
fn default_of(
    tree: &dyn FileTree,
    prefix: &str,
    env: &BTreeMap<String, String>,
    entries: &[(String, Entry)],
) -> Option<usize> {
    for key in ["next_entry", "saved_entry"] {
        let Some(wanted) = env.get(key).filter(|v| !v.is_empty()) else {
            continue;
        };
        let by_name = entries
            .iter()
            .position(|(_, e)| e.id == *wanted || e.title == *wanted);
        if let Some(at) = by_name.or_else(|| wanted.parse().ok().filter(|n| *n < entries.len())) {
            return Some(at);
        }
    }
    let conf = tree
        .read(&format!("{prefix}/loader/loader.conf"), ENTRY_MAX)
        .ok()
        .flatten()?;
    let text = String::from_utf8_lossy(&conf).into_owned();
    let pattern = text
        .lines()
        .find_map(|l| l.trim().strip_prefix("default"))
        .map(str::trim)?;
    let pattern = pattern.strip_suffix(".conf").unwrap_or(pattern);
    entries.iter().position(|(_, e)| glob(pattern, &e.id))
}

/// Shell patterns with `*` and `?` only, in time linear in the product of the lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (p, t): (Vec<char>, Vec<char>) = (
        pattern.chars().take(256).collect(),
        text.chars().take(256).collect(),
    );
    let (mut i, mut j, mut star) = (0, 0, None);
    while j < t.len() {
        match p.get(i) {
            Some('*') => {
                star = Some((i, j));
                i += 1;
            }
            Some(c) if *c == '?' || *c == t[j] => {
                i += 1;
                j += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    i = at + 1;
                    j = from + 1;
                }
                None => return false,
            },
        }
    }
    p[i..].iter().all(|c| *c == '*')
}
