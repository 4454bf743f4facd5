//! Rust files: where `unsafe` may be, that every module says what it is for, and that none grows into two things.

use super::{Finding, Tree, quoted, section};
use anyhow::Result;

/// A file longer than this is two things.
const LINES_MAX: usize = 800;

pub(super) fn check(tree: &Tree, architecture: &str) -> Result<Vec<Finding>> {
    let places: Vec<&str> = section(architecture, "unsafe")?
        .into_iter()
        .filter(|l| l.trim_start().starts_with(['-', '|']))
        .flat_map(quoted)
        .collect();
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|f| f.ends_with(".rs")) {
        let text = tree.read(file)?;
        let lines = text.lines().count();
        if lines > LINES_MAX {
            findings.push(format!("{file}: {lines} lines, more than {LINES_MAX}: split it"));
        }
        let test = is_test(file);
        if !test && file.contains("src/") && !text.trim_start().starts_with("//!") {
            findings.push(format!("{file}: no module documentation (//!) at its top"));
        }
        if test || places.iter().any(|p| file.starts_with(p)) {
            continue;
        }
        if let Some(line) = first_unsafe(&text) {
            findings.push(format!(
                "{file}:{line}: unsafe outside the places listed in ARCHITECTURE.md"
            ));
        }
    }
    Ok(findings)
}

fn is_test(file: &str) -> bool {
    file.contains("/tests/") || file.ends_with("/tests.rs")
}

/// The first line with the keyword `unsafe` outside comments and strings (as far as one line tells), before the
/// file's test module.
fn first_unsafe(text: &str) -> Option<usize> {
    for (i, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        if code.trim_start().starts_with("#[cfg(test)]") {
            return None;
        }
        let bare: String = code.split('"').step_by(2).collect();
        let words = bare.split(|c: char| !c.is_alphanumeric() && c != '_');
        if words.into_iter().any(|w| w == "unsafe") {
            return Some(i + 1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    #[test]
    fn unsafe_long_and_undocumented_files_are_found() {
        let arch = "<!-- unsafe begin -->\n- `crates/a/src/thin/`: why\n<!-- unsafe end -->";
        let long = format!("//! Long.\n{}", "\n".repeat(LINES_MAX));
        let (_dir, tree) = tree_of(&[
            ("crates/a/src/thin/x.rs", "//! Thin.\nunsafe fn f() {}\n"),
            ("crates/a/src/thick.rs", "//! Thick.\nfn f() { unsafe { g() } }\n"),
            (
                "crates/a/src/word.rs",
                "//! Word.\n// unsafe\nconst A: &str = \"unsafe\"; fn unsafe_x() {}\n",
            ),
            ("crates/a/src/bare.rs", "fn f() {}\n"),
            ("crates/a/src/long.rs", &long),
            ("crates/a/tests/t.rs", "fn f() { unsafe { g() } }\n"),
        ]);
        let found = check(&tree, arch).unwrap();
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(
            found[0].starts_with("crates/a/src/thick.rs:2: unsafe"),
            "{found:?}"
        );
        assert!(found[1].contains("bare.rs: no module documentation"), "{found:?}");
        assert!(found[2].contains("long.rs: 801 lines"), "{found:?}");
    }
}
