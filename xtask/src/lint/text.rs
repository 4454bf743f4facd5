//! All text files: no words of the place where they were written; documents: links that lead somewhere.

use super::{Finding, Tree};
use anyhow::Result;
use std::path::Path;

/// Joined here, so that this file does not contain them.
fn words() -> Vec<String> {
    [["/wo", "rk/"], ["/fa", "rm/"], [".libr", "ary"], ["/ho", "me/"]]
        .iter()
        .map(|p| p.concat())
        .collect()
}

pub(super) fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let words = words();
    let mut findings = Vec::new();
    for file in &tree.files {
        if file.ends_with(".lock") {
            continue;
        }
        let text = tree.read(file)?;
        for (i, line) in text.lines().enumerate() {
            for w in words.iter().filter(|w| line.contains(w.as_str())) {
                findings.push(format!(
                    "{file}:{}: names the place where it was written ({w})",
                    i + 1
                ));
            }
        }
        if file.ends_with(".md") {
            findings.extend(broken_links(tree, file, &text));
        }
    }
    Ok(findings)
}

/// Targets of `](...)` that are paths and do not exist.
fn broken_links(tree: &Tree, file: &str, text: &str) -> Vec<Finding> {
    let folder = Path::new(file).parent().unwrap_or(Path::new(""));
    let mut findings = Vec::new();
    for piece in text.split("](").skip(1) {
        let Some((target, _)) = piece.split_once(')') else {
            continue;
        };
        let path = target.split('#').next().unwrap_or_default();
        if path.is_empty() || path.contains("://") || path.starts_with("mailto:") {
            continue;
        }
        if !tree.root.join(folder).join(path).exists() {
            findings.push(format!("{file}: the link to {target} leads nowhere"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    #[test]
    fn workplace_words_and_dead_links_are_found() {
        let word = words()[0].clone();
        let bad = format!("see {word}x\n");
        let (_dir, tree) = tree_of(&[
            ("a.sh", bad.as_str()),
            (
                "docs/a.md",
                "[b](b.md#x) [c](../a.sh) [d](https://example.org) [e](#here)\n",
            ),
        ]);
        let found = check(&tree).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].starts_with("a.sh:1:") && found[1].contains("b.md#x"),
            "{found:?}"
        );
    }
}
