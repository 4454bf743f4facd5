//! Rules that the compiler does not know, checked over the files that git tracks.
//!
//! - [`imports`]: which crate may import which, from the table in `ARCHITECTURE.md`.
//! - [`licences`]: nothing is linked in under a licence that `deny.toml` does not allow.
//! - [`source`]: `unsafe` only in the places listed there, module docs, file lengths.
//! - [`text`]: no words of the place where the project was made; links in documents lead somewhere.

mod imports;
mod licences;
mod source;
mod text;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a rule found: where, and what is wrong.
pub type Finding = String;

/// The tracked files that exist, relative to the root.
struct Tree {
    root: PathBuf,
    files: Vec<String>,
}

impl Tree {
    fn of(root: &Path) -> Result<Self> {
        // Untracked files count too, so that a new file is checked before it is added.
        let out = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .context("run git ls-files")?;
        if !out.status.success() {
            bail!("git ls-files: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        let mut files: Vec<String> = String::from_utf8_lossy(&out.stdout)
            .lines()
            .map(str::to_owned)
            .filter(|f| root.join(f).is_file())
            .collect();
        files.sort();
        files.dedup();
        Ok(Self {
            root: root.to_owned(),
            files,
        })
    }

    fn read(&self, file: &str) -> Result<String> {
        let bytes = std::fs::read(self.root.join(file)).with_context(|| format!("read {file}"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The lines of `document` between `<!-- name begin -->` and `<!-- name end -->`.
fn section<'a>(document: &'a str, name: &str) -> Result<Vec<&'a str>> {
    let (_, rest) = document
        .split_once(&format!("<!-- {name} begin -->"))
        .with_context(|| format!("ARCHITECTURE.md has no section {name}"))?;
    let (inside, _) = rest
        .split_once(&format!("<!-- {name} end -->"))
        .with_context(|| format!("section {name} of ARCHITECTURE.md has no end"))?;
    Ok(inside.lines().collect())
}

/// The words between backticks in a line.
fn quoted(line: &str) -> Vec<&str> {
    line.split('`').skip(1).step_by(2).collect()
}

/// Runs all rules; false when one found something.
pub fn run(root: &Path) -> Result<bool> {
    let tree = Tree::of(root)?;
    let architecture = tree.read("ARCHITECTURE.md")?;
    let mut findings = imports::check(&tree, &architecture)?;
    findings.extend(source::check(&tree, &architecture)?);
    findings.extend(text::check(&tree)?);
    findings.extend(licences::check(&tree)?);
    for f in &findings {
        println!("lint: {f}");
    }
    println!("lint: {} files, {} findings", tree.files.len(), findings.len());
    Ok(findings.is_empty())
}

#[cfg(test)]
fn tree_of(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let tree = Tree {
        root: dir.path().to_owned(),
        files: files.iter().map(|(n, _)| (*n).to_owned()).collect(),
    };
    (dir, tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_and_quotes() {
        let doc = "x\n<!-- a begin -->\n| `b` | `c` |\n<!-- a end -->\n";
        let lines = section(doc, "a").unwrap();
        assert_eq!(quoted(lines[1]), ["b", "c"]);
        assert!(section(doc, "b").is_err());
    }
}
