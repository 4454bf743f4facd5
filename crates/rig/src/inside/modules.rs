//! Kernel modules: the order of loading from a `depmod` tree (`modules.dep`), for process 1 and for picking the files of
//! an initramfs on the rig's side.
//!
//! `modules.dep` has a line per module: `path: dependency dependency ...`; the dependencies are complete, those on the right
//! must be loaded first. Names in the kernel's world treat `-` and `_` alike.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

/// A parsed `modules.dep`.
#[derive(Debug, Default)]
pub struct ModuleTree {
    by_name: HashMap<String, (String, Vec<String>)>,
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

impl ModuleTree {
    /// Parses the text of `modules.dep`.
    pub fn parse(text: &str) -> ModuleTree {
        let mut by_name = HashMap::new();
        for line in text.lines() {
            if let Some((path, needs)) = line.split_once(':') {
                let needs = needs.split_whitespace().map(str::to_string).collect();
                by_name.insert(name_of(path), (path.to_string(), needs));
            }
        }
        ModuleTree { by_name }
    }

    /// The files to load for `module`, in order, relative to the tree; none when the tree does not have it (built in, or
    /// unknown).
    pub fn order(&self, module: &str) -> Option<Vec<String>> {
        let (path, needs) = self.by_name.get(&module.replace('-', "_"))?;
        let mut order: Vec<String> = needs.iter().rev().cloned().collect();
        order.push(path.clone());
        Some(order)
    }

    /// The files for all of `modules`, each once, in an order that loads; with the names that the tree does not have.
    pub fn closure(&self, modules: &[&str]) -> (Vec<String>, Vec<String>) {
        let (mut files, mut missing) = (Vec::new(), Vec::new());
        for module in modules {
            match self.order(module) {
                None => missing.push((*module).to_string()),
                Some(order) => {
                    for file in order {
                        if !files.contains(&file) {
                            files.push(file);
                        }
                    }
                }
            }
        }
        (files, missing)
    }
}

/// The folder of the running kernel's modules.
pub fn running_folder() -> io::Result<PathBuf> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(Path::new("/lib/modules").join(release.trim()))
}

/// Loads modules of the running kernel; gives back what failed, in words. A module that the tree does not have is
/// reported too, unless the kernel has it built in.
pub fn load(modules: &[&str]) -> Vec<String> {
    let folder = match running_folder() {
        Ok(folder) => folder,
        Err(e) => return vec![format!("modules: {e}")],
    };
    let text = match std::fs::read_to_string(folder.join("modules.dep")) {
        Ok(text) => text,
        Err(e) => return vec![format!("{}/modules.dep: {e}", folder.display())],
    };
    let built_in = std::fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let (files, missing) = ModuleTree::parse(&text).closure(modules);
    let mut failures: Vec<String> = missing
        .into_iter()
        .filter(|name| {
            !built_in
                .lines()
                .any(|line| name_of(line) == name.replace('-', "_"))
        })
        .map(|name| format!("module {name} is not in {}", folder.display()))
        .collect();
    for file in files {
        if let Err(e) = super::sys::finit_module(&folder.join(&file), "") {
            failures.push(format!("module {file}: {e}"));
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let tree = ModuleTree::parse(
            "k/kvm-amd.ko: k/ccp.ko k/kvm.ko k/irqbypass.ko\nk/kvm.ko: k/irqbypass.ko\nk/irqbypass.ko:\nk/ccp.ko:\n",
        );
        let (files, missing) = tree.closure(&["kvm", "kvm_amd", "nope"]);
        assert_eq!(files, ["k/irqbypass.ko", "k/kvm.ko", "k/ccp.ko", "k/kvm-amd.ko"]);
        assert_eq!(missing, ["nope"]);
    }
}
