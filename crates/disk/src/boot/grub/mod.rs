//! `grub.cfg`: enough of GRUB's script language for what `grub-mkconfig` writes on Debian, Ubuntu and Fedora.
//!
//! ```text
//! text -> lex (words, quotes, variables) -> parse (if, while, for, function, menuentry, submenu)
//!      -> exec (variables, test, search by UUID/label/file, load_env, source) -> entries -> the chosen one's linux, initrd
//! ```
//!
//! Devices: `(hd0,gpt2)` names a partition by number, which says nothing about this disk in this machine; so only
//! what `search` finds by UUID, label or file counts, and any other device means the file system of the
//! configuration file. Bounds: see the constants in [`exec`]. Nothing here reads the clock, the terminal or hardware.

mod exec;
mod lex;
mod parse;
mod test_expr;

use super::error::BootError;
use super::tree::FileTree;
use super::{Choice, tree};
use exec::{Machine, MenuEntry};
use std::collections::BTreeMap;

/// Entries that are tried when the chosen one cannot be used.
const CHOICES_MAX: usize = 16;
/// Entries and submenus that are looked into for them.
const TRIED_MAX: usize = 256;

/// Parses a GRUB environment block (`grubenv`): `name=value` lines, padded with `#`.
#[must_use]
pub fn parse_grubenv(bytes: &[u8]) -> BTreeMap<String, String> {
    String::from_utf8_lossy(&bytes[..bytes.len().min(64 << 10)])
        .lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|l| l.split_once('='))
        .map(|(k, v)| (k.trim().to_owned(), v.replace("\\\\", "\\")))
        .take(256)
        .collect()
}

/// Replaces `$name` and `${name}` in `text` from `env`; unknown names become nothing.
#[must_use]
pub fn expand_env(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let (name, after) = lex::variable(&rest[at + 1..]);
        if name.is_empty() {
            out.push('$');
        } else if let Some(value) = env.get(name) {
            out.push_str(value);
        }
        rest = after;
        if out.len() > 64 << 10 {
            break;
        }
    }
    out.push_str(rest);
    out
}

/// Runs `text`, the contents of `file`, which lies in directory `dir` of file system number `home`; returns what it
/// would boot, the default first.
///
/// # Errors
/// [`BootError::Config`] for text that is not a script, or one that never ends.
pub(crate) fn choices(
    trees: &[&dyn FileTree],
    home: usize,
    dir: &str,
    file: &str,
    text: &str,
) -> Result<Vec<Choice>, BootError> {
    let error = |why: String| BootError::Config {
        file: file.to_owned(),
        why,
    };
    let script = parse::parse(text).map_err(error)?;
    let mut machine = Machine::new(trees, home, dir);
    machine.run(&script).map_err(error)?;
    let mut out = Vec::new();
    // What the default leads to, then everything else in the order of the menu.
    let wanted = machine.default_entry();
    let chosen = select(&mut machine, &wanted).map_err(error)?;
    let mut queue: Vec<(MenuEntry, usize)> = chosen.into_iter().map(|e| (e, 0)).collect();
    queue.extend(machine.entries.clone().into_iter().map(|e| (e, 0)));
    let mut at = 0;
    while at < queue.len().min(TRIED_MAX) && out.len() < CHOICES_MAX {
        let (entry, depth) = queue[at].clone();
        at += 1;
        if entry.submenu {
            if depth < 4 {
                let inner = machine.open_submenu(&entry).map_err(error)?;
                queue.extend(inner.into_iter().map(|e| (e, depth + 1)));
            }
            continue;
        }
        let Some((fs, kernel, cmdline, initrds)) = machine.boot(&entry).map_err(error)? else {
            continue;
        };
        let choice = Choice {
            fs,
            kernel,
            initrds,
            cmdline,
            origin: format!("{file}, entry {:?}", entry.title),
            title: entry.title,
        };
        if !out.contains(&choice) {
            out.push(choice);
        }
    }
    // A script that boots without any menu.
    if let Some((fs, kernel, cmdline, initrds)) = machine.booted() {
        out.push(Choice {
            fs,
            kernel,
            initrds,
            cmdline,
            title: "Linux".to_owned(),
            origin: file.to_owned(),
        });
    }
    Ok(out)
}

/// Follows a default like `0`, `Debian GNU/Linux`, an id, or `1>2`, to an entry that is no submenu.
fn select(machine: &mut Machine<'_>, wanted: &str) -> Result<Option<MenuEntry>, String> {
    let mut menu = machine.entries.clone();
    // `>>` is a `>` inside a title.
    let parts: Vec<String> = wanted
        .replace(">>", "\u{1}")
        .split('>')
        .map(|p| p.trim().replace('\u{1}', ">"))
        .take(8)
        .collect();
    let mut parts = parts.into_iter();
    for _ in 0..8 {
        let part = parts.next().unwrap_or_default();
        let by_number = || part.parse::<usize>().ok().and_then(|n| menu.get(n));
        let found = menu
            .iter()
            .find(|e| !part.is_empty() && (e.id == part || e.title == part))
            .or_else(by_number)
            // As GRUB: what cannot be found means the first.
            .or_else(|| menu.first())
            .cloned();
        match found {
            Some(entry) if entry.submenu => menu = machine.open_submenu(&entry)?,
            other => return Ok(other),
        }
    }
    Ok(None)
}

/// Absolute form of a path from a script.
fn normal(path: &str) -> String {
    tree::normalize(path)
}
