//! Which crate may import which. The table in `ARCHITECTURE.md` is the rule:
//! crate, crates of this project that it may import, and, for a pure crate, the only outside crates that it may have.

use super::{Finding, Tree, quoted, section};
use anyhow::Result;
use std::collections::BTreeMap;

struct Rule {
    ours: Vec<String>,
    /// `None`: any.
    others: Option<Vec<String>>,
}

fn rules(architecture: &str) -> Result<BTreeMap<String, Rule>> {
    let mut rules = BTreeMap::new();
    for line in section(architecture, "imports")? {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').collect();
        let [name, ours, others, ..] = cells.as_slice() else {
            continue;
        };
        let Some(name) = quoted(name).first().copied() else {
            continue;
        };
        let words = |cell: &str| quoted(cell).into_iter().map(str::to_owned).collect::<Vec<_>>();
        let others = (others.trim() != "any").then(|| words(others));
        rules.insert(
            name.to_owned(),
            Rule {
                ours: words(ours),
                others,
            },
        );
    }
    Ok(rules)
}

/// Names in `[dependencies]` and `[target.*.dependencies]`; what only tests and builds use is free.
fn dependencies(manifest: &str) -> Vec<&str> {
    let mut inside = false;
    let mut names = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            let header = header.trim_end_matches(']');
            inside = header == "dependencies" || header.ends_with(".dependencies");
            // A table of its own: [dependencies.name]
            if let Some(name) = header.strip_prefix("dependencies.") {
                names.push(name);
            }
        } else if inside && !line.starts_with('#') {
            let name = line.split(['=', '.', ' ']).next().unwrap_or_default();
            if !name.is_empty() {
                names.push(name);
            }
        }
    }
    names
}

/// The name by which the table calls one of our crates.
fn ours(dependency: &str) -> Option<&str> {
    match dependency {
        "pulse" | "xtask" => Some(dependency),
        other => other.strip_prefix("steadfast-"),
    }
}

pub(super) fn check(tree: &Tree, architecture: &str) -> Result<Vec<Finding>> {
    let rules = rules(architecture)?;
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|f| f.ends_with("Cargo.toml")) {
        // The root has no code, and `fuzz/` is outside the workspace.
        let Some(folder) = file.strip_suffix("/Cargo.toml").filter(|f| *f != "fuzz") else {
            continue;
        };
        let name = folder.rsplit('/').next().unwrap_or(folder);
        let Some(rule) = rules.get(name) else {
            findings.push(format!(
                "{file}: crate {name} is not in the table of ARCHITECTURE.md"
            ));
            continue;
        };
        for dependency in dependencies(&tree.read(file)?) {
            let allowed = match (ours(dependency), &rule.others) {
                (Some(d), _) => rule.ours.iter().any(|o| o == d),
                (None, Some(others)) => others.iter().any(|o| o == dependency),
                (None, None) => true,
            };
            if !allowed {
                findings.push(format!(
                    "{file}: {name} may not import {dependency} (table in ARCHITECTURE.md)"
                ));
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    const TABLE: &str = "<!-- imports begin -->\n| crate | may import | others |\n|---|---|---|\n\
        | `types` | | `serde` |\n| `epoch` | `types` | `thiserror` |\n| `node` | `types` `epoch` | any |\n<!-- imports end -->";

    #[test]
    fn imports_that_the_table_does_not_have_are_found() {
        let (_dir, tree) = tree_of(&[
            ("crates/types/Cargo.toml", "[dependencies]\nserde = \"1\"\n"),
            (
                "crates/epoch/Cargo.toml",
                "[dependencies]\nsteadfast-types.workspace = true\ntokio = \"1\"\nsteadfast-node = {}\n\
                 [dev-dependencies]\nproptest = \"1\"\n",
            ),
            (
                "crates/node/Cargo.toml",
                "[dependencies]\ntokio = \"1\"\nsteadfast-epoch = {}\n",
            ),
            ("crates/new/Cargo.toml", "[package]\nname = \"x\"\n"),
        ]);
        let found = check(&tree, TABLE).unwrap().join("\n");
        assert!(found.contains("epoch may not import tokio"), "{found}");
        assert!(found.contains("epoch may not import steadfast-node"), "{found}");
        assert!(found.contains("crate new is not in the table"), "{found}");
        assert_eq!(found.lines().count(), 3, "{found}");
    }
}
