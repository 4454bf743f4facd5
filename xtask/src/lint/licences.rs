//! Licences of everything that is linked in: only those that `deny.toml` allows. `cargo deny` checks the same and more where it
//! is installed; this needs cargo alone.

use super::{Finding, Tree};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// Checks all packages of the lock file that this platform builds.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let allowed = allowed(&tree.read("deny.toml")?)?;
    let out = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(&tree.root)
        .output()
        .context("run cargo metadata")?;
    if !out.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    let metadata: Value = serde_json::from_slice(&out.stdout).context("what cargo metadata says")?;
    let packages = metadata["packages"]
        .as_array()
        .context("packages of cargo metadata")?;
    Ok(packages.iter().filter_map(|p| finding(p, &allowed)).collect())
}

fn finding(package: &Value, allowed: &BTreeSet<String>) -> Option<Finding> {
    let (name, licence) = (
        package["name"].as_str()?,
        package["license"].as_str().unwrap_or(""),
    );
    let fine = !licence.is_empty() && permits(licence, allowed);
    (!fine).then(|| format!("{name}: licence {licence:?} is not one that deny.toml allows"))
}

/// The list `allow` of deny.toml.
fn allowed(deny: &str) -> Result<BTreeSet<String>> {
    let (_, after) = deny
        .split_once("\nallow = [")
        .context("deny.toml has no list `allow`")?;
    let (list, _) = after
        .split_once(']')
        .context("the list `allow` of deny.toml has no end")?;
    Ok(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether an SPDX expression can be met with what is allowed. `/` is an old way to write OR.
fn permits(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = either(&words, &mut at, allowed);
    met && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        // Not short-circuited: the words must be passed over.
        met |= both(words, at, allowed);
    }
    met
}

fn both(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let Some(&word) = words.get(*at) else { return false };
    *at += 1;
    if word == "(" {
        let met = either(words, at, allowed);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return met && closed;
    }
    let mut name = word.to_owned();
    if words.get(*at) == Some(&"WITH") {
        name = [word, "WITH", words.get(*at + 1).unwrap_or(&"")].join(" ");
        *at += 2;
    }
    allowed.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn expressions_are_met_or_not() {
        let allowed =
            allowed("x\nallow = [\n \"MIT\",\n \"ISC\", \"Apache-2.0 WITH LLVM-exception\",\n]\n").unwrap();
        for (fine, expression) in [
            (true, "MIT"),
            (true, "GPL-2.0 OR MIT"),
            (true, "GPL-2.0/MIT"),
            (true, "(GPL-2.0 OR MIT) AND ISC"),
            (true, "Apache-2.0 WITH LLVM-exception OR GPL-3.0"),
            (false, "Apache-2.0"),
            (false, "MIT AND GPL-2.0"),
            (false, "(MIT OR ISC) AND GPL-3.0-only"),
            (false, "MIT)"),
            (false, ""),
        ] {
            assert_eq!(permits(expression, &allowed), fine, "{expression}");
        }
        let package = json!({"name": "x", "license": "GPL-2.0-only"});
        assert!(finding(&package, &allowed).unwrap().contains("GPL-2.0-only"));
        assert!(finding(&json!({"name": "x", "license": null}), &allowed).is_some());
    }
}
