//! Debian's cloud kernel: the image, and the tree of its modules with `modules.dep`.

use super::cache::Cache;
use super::packages;
use crate::error::{IoContext, Result, RigError};
use crate::inside::modules::ModuleTree;
use crate::tools;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
    /// The folder that has `lib/modules/RELEASE`.
    pub tree: PathBuf,
}

impl Kernel {
    /// Takes the kernel out of the cache, fetching it when it is not there.
    pub fn of(cache: &Cache) -> Result<Kernel> {
        let key = format!("kernel-{}-1", packages::suite());
        let folder = cache.get_or_make(&key, |folder| {
            let package = packages::depends_on("linux-image-cloud-amd64", "linux-image-")?;
            let tree = folder.join("tree");
            packages::fetch_and_unpack(&package, folder, &tree)?;
            let release = only_entry(&tree.join("lib/modules"), &tree.join("usr/lib/modules"))?;
            depmod(&tree, &release)
        })?;
        let tree = folder.join("tree");
        let release = only_entry(&tree.join("lib/modules"), &tree.join("usr/lib/modules"))?;
        let image = tree.join(format!("boot/vmlinuz-{release}"));
        let config = tree.join(format!("boot/config-{release}"));
        Ok(Kernel {
            release,
            image,
            config,
            tree,
        })
    }

    /// The folder of its modules.
    pub fn modules(&self) -> PathBuf {
        let plain = self.tree.join("lib/modules").join(&self.release);
        if plain.is_dir() {
            plain
        } else {
            self.tree.join("usr/lib/modules").join(&self.release)
        }
    }

    /// The files for these modules in an order that loads, relative to [`Kernel::modules`]. A module that the kernel has
    /// built in needs no file.
    ///
    /// # Errors
    /// When the kernel has one of them neither as a module nor built in.
    pub fn closure(&self, modules: &[&str]) -> Result<Vec<String>> {
        let read = |name: &str| {
            let path = self.modules().join(name);
            std::fs::read_to_string(&path).what(|| format!("read {}", path.display()))
        };
        let (files, missing) = ModuleTree::parse(&read("modules.dep")?).closure(modules);
        let built_in = read("modules.builtin")?.replace('-', "_");
        match missing
            .iter()
            .find(|name| !built_in.contains(&format!("/{}.ko", name.replace('-', "_"))))
        {
            Some(name) => Err(RigError::Unknown(format!(
                "kernel {} has no module {name}",
                self.release
            ))),
            None => Ok(files),
        }
    }
}

fn only_entry(first: &Path, second: &Path) -> Result<String> {
    let folder = if first.is_dir() { first } else { second };
    let entries = std::fs::read_dir(folder).what(|| format!("list {}", folder.display()))?;
    let name = entries
        .flatten()
        .next()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    name.ok_or_else(|| RigError::malformed(folder.display().to_string(), "it is empty"))
}

/// `depmod` over an unpacked tree. The package has no `modules.dep`: its installation would make it.
fn depmod(tree: &Path, release: &str) -> Result<()> {
    let mut command = Command::new(tools::find("depmod")?);
    command.arg("-b").arg(tree).arg(release);
    tools::run(&mut command, Duration::from_secs(120)).map(|_| ())
}
