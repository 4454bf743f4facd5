//! A cgroup per VM: CPU weight and maximum, memory and I/O limits, changeable while the VM runs.
//!
//! The group is `<hierarchy>/<parent>/<vm>`, parent `steadfast` unless another is named. Each controller is looked for in
//! cgroup v2 first and in its v1 hierarchy second, so a host with both in use (as systemd's hybrid layout) works too.
//!
//! Limits are set by whoever may write the group's files, which is never the VM's process itself once it has given up
//! root: a monitor that was taken over cannot raise its own limits. `steadfast vm limits` finds the group through the
//! process that serves the control socket, so it asks the kernel, not the VM.
//!
//! Sources: Linux `Documentation/admin-guide/cgroup-v2.rst`, `cgroup-v1/`; cgroups(7).

mod files;
pub mod limits;

pub use files::{Controller, V1, V2, Version};
pub use limits::{CpuMax, IoMax, Limits, MemoryMax};

use std::io;
use std::path::{Path, PathBuf};
use steadfast_types::VmId;

/// The parent of all VMs' groups unless another is named.
pub const PARENT: &str = "steadfast";
/// Variable of the environment that names the parent of the group which a protected VM's process enters, and its daemon removes.
pub const OF_POOL: &str = "STEADFAST_CGROUP";

/// A cgroup that cannot be had or changed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CgroupError {
    #[error("no cgroup hierarchy with a controller of {0} is mounted; mount cgroup2 on /sys/fs/cgroup")]
    NoHierarchy(&'static str),
    #[error("{path}: {source}; run as root, or name a parent cgroup that is delegated to you with --cgroup")]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot set {path} to {value:?}: {source}")]
    Set {
        path: PathBuf,
        value: String,
        source: io::Error,
    },
    #[error("process {0} is in no cgroup of a VM: it was started without one (see its log)")]
    NotInOne(u32),
    #[error("{0}: not a name of a cgroup; use a relative path such as steadfast or my.slice/vms")]
    Parent(PathBuf),
}

/// One mounted hierarchy that has at least one controller of use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    controllers: Vec<Controller>,
}

impl Hierarchy {
    /// The group that a process with this `/proc/PID/cgroup` is in.
    fn folder_of(&self, proc_cgroup: &str) -> Option<PathBuf> {
        // "4:memory:/steadfast/db", "0::/steadfast/db"
        let path = proc_cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (names, path) = (fields.next()?, fields.next()?);
            let known = |n| Controller::by_name(Version::V1, n);
            let ours = match self.version {
                Version::V2 => names.is_empty(),
                Version::V1 => names
                    .split(',')
                    .filter_map(known)
                    .any(|c| self.controllers.contains(&c)),
            };
            ours.then_some(path)
        })?;
        Some(self.mount.join(path.trim_start_matches('/')))
    }
}

/// The cgroup of one VM: a folder per hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    folders: Vec<(Hierarchy, PathBuf)>,
    /// Where the process was before, per hierarchy.
    before: Vec<PathBuf>,
}

/// What the host has mounted. Controllers in v2 win over v1.
fn hierarchies(mountinfo: &str, v2_controllers: impl Fn(&Path) -> String) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        // "36 35 98:0 /root /mount/point options - type source super-options"
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(mount), mut after) = (before.split(' ').nth(4), after.split(' ')) else {
            continue;
        };
        let mount = PathBuf::from(mount);
        let (version, names) = match (after.next(), after.nth(1)) {
            (Some("cgroup2"), _) => (Version::V2, v2_controllers(&mount)),
            (Some("cgroup"), Some(options)) => (Version::V1, options.replace(',', " ")),
            _ => continue,
        };
        let controllers: Vec<_> = names
            .split_whitespace()
            .filter_map(|name| Controller::by_name(version, name))
            .collect();
        if found.iter().all(|h| h.mount != mount) {
            found.push(Hierarchy {
                version,
                mount,
                controllers,
            });
        }
    }
    let in_v2: Vec<Controller> = found
        .iter()
        .filter(|h| h.version == Version::V2)
        .flat_map(|h| h.controllers.clone())
        .collect();
    found.retain_mut(|h| {
        if h.version == Version::V1 {
            h.controllers.retain(|c| !in_v2.contains(c));
        }
        !h.controllers.is_empty()
    });
    found
}

fn mounted() -> Vec<Hierarchy> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    hierarchies(&text, |mount| {
        std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default()
    })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    std::fs::write(path, value).map_err(|source| CgroupError::Set {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

impl Cgroup {
    /// Makes the group of VM `name` under `parent` and moves the calling process into it; its limits are none yet.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing of it stays then.
    pub fn enter(parent: &Path, name: &VmId) -> Result<Self, CgroupError> {
        let hierarchies = mounted();
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let before = hierarchies.iter().filter_map(|h| h.folder_of(&own)).collect();
        let mut this = Self::enter_in(hierarchies, parent, name, &std::process::id().to_string())?;
        this.before = before;
        Ok(this)
    }

    /// Enters the group of VM `name` if whoever started this process wants that ([`OF_POOL`]), and sees to its end with [`Self::remove`]. To be
    /// called before any thread has a priority of its own: a kernel with groups for real-time threads does not let it in then.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing of it stays then.
    pub fn enter_of_pool(name: &VmId) -> Result<(), CgroupError> {
        match std::env::var_os(OF_POOL) {
            Some(parent) => Self::enter(Path::new(&parent), name).map(drop),
            None => Ok(()),
        }
    }

    /// Removes the group of VM `name` under `parent`, if there is one and no process is left in it.
    pub fn remove(parent: &Path, name: &VmId) {
        for hierarchy in mounted() {
            let _ = std::fs::remove_dir(hierarchy.mount.join(parent).join(name.as_str()));
        }
    }

    fn enter_in(
        hierarchies: Vec<Hierarchy>,
        parent: &Path,
        name: &VmId,
        pid: &str,
    ) -> Result<Self, CgroupError> {
        let plain = |c| matches!(c, std::path::Component::Normal(_));
        if parent.as_os_str().is_empty() || !parent.components().all(plain) {
            return Err(CgroupError::Parent(parent.to_owned()));
        }
        if hierarchies.is_empty() {
            return Err(CgroupError::NoHierarchy("cpu, memory or io"));
        }
        let mut this = Self {
            folders: Vec::new(),
            before: Vec::new(),
        };
        let done = hierarchies.into_iter().try_for_each(|hierarchy| {
            let above = hierarchy.mount.join(parent);
            let folder = above.join(name.as_str());
            let make = || {
                std::fs::create_dir_all(&folder).map_err(|source| CgroupError::Folder {
                    path: folder.clone(),
                    source,
                })
            };
            make()?;
            this.folders.push((hierarchy.clone(), folder.clone()));
            if hierarchy.version == Version::V2 {
                // Controllers reach a group through all groups above it.
                let mut at = hierarchy.mount.clone();
                hand_down(&at, &hierarchy.controllers)?;
                for part in parent {
                    at.push(part);
                    hand_down(&at, &hierarchy.controllers)?;
                }
            }
            write(&folder.join("cgroup.procs"), pid)
        });
        match done {
            Ok(()) => Ok(this),
            Err(error) => {
                for folder in this.folders() {
                    let _ = std::fs::remove_dir(folder);
                }
                Err(error)
            }
        }
    }

    /// The group that process `pid` is in, if it is one of VM `name`.
    ///
    /// # Errors
    /// [`CgroupError::NotInOne`].
    pub fn of_process(pid: u32, name: &VmId) -> Result<Self, CgroupError> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        Self::found(mounted(), &text, name).ok_or(CgroupError::NotInOne(pid))
    }

    fn found(hierarchies: Vec<Hierarchy>, proc_cgroup: &str, name: &VmId) -> Option<Self> {
        let mut folders = Vec::new();
        for hierarchy in hierarchies {
            let folder = hierarchy.folder_of(proc_cgroup)?;
            if folder.file_name()? == name.as_str() {
                folders.push((hierarchy, folder));
            }
        }
        (!folders.is_empty()).then_some(Self {
            folders,
            before: Vec::new(),
        })
    }

    /// Its folders, one per hierarchy.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        self.folders.iter().map(|(_, folder)| folder.as_path())
    }

    /// The groups that the process left for this one.
    #[must_use]
    pub fn before(&self) -> &[PathBuf] {
        &self.before
    }

    /// Sets the limits that are given; others stay as they are. `disks` are the devices (major, minor) to which
    /// I/O limits apply. All are tried; the first failure is returned.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn set(&self, limits: &Limits, disks: &[(u32, u32)]) -> Result<(), CgroupError> {
        let mut first = Ok(());
        for wanted in limits.controllers() {
            let Some((hierarchy, folder)) =
                self.folders.iter().find(|(h, _)| h.controllers.contains(&wanted))
            else {
                first = first.and(Err(CgroupError::NoHierarchy(wanted.what())));
                continue;
            };
            let knobs = hierarchy.version.knobs();
            for (file, value) in knobs.settings(wanted, limits, disks) {
                first = first.and(write(&folder.join(file), &value));
            }
        }
        first
    }

    /// What the group's limit files hold, for display: `(file, contents)`.
    #[must_use]
    pub fn show(&self) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for (hierarchy, folder) in &self.folders {
            for &controller in &hierarchy.controllers {
                for file in hierarchy.version.knobs().files(controller) {
                    if let Ok(text) = std::fs::read_to_string(folder.join(file)) {
                        all.push(((*file).to_owned(), text.trim().to_owned()));
                    }
                }
            }
        }
        all
    }
}

/// Lets the groups below `folder` use controllers. One that is on already, or not to be had here, is not an error by
/// itself: the limit's own file will be missing.
fn hand_down(folder: &Path, controllers: &[Controller]) -> Result<(), CgroupError> {
    let path = folder.join("cgroup.subtree_control");
    let on = std::fs::read_to_string(&path).unwrap_or_default();
    for controller in controllers {
        let name = controller.v2_name();
        if !on.split_whitespace().any(|n| n == name) {
            write(&path, &format!("+{name}"))?;
        }
    }
    Ok(())
}

/// The whole disks that the files open in process `pid` are on, for I/O limits. Files on anonymous devices (overlay,
/// btrfs, network file systems) have none.
#[must_use]
pub fn disks_of_process(pid: u32) -> Vec<(u32, u32)> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let mut disks = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(meta) = std::fs::metadata(entry.path()) else {
            continue;
        };
        let device = match meta.file_type() {
            t if t.is_block_device() => meta.rdev(),
            t if t.is_file() => meta.dev(),
            _ => continue,
        };
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        if let Some(disk) = whole_disk(Path::new("/sys/dev/block"), device)
            && !disks.contains(&disk)
        {
            disks.push(disk);
        }
    }
    disks
}

/// Limits belong to disks, not to their partitions.
fn whole_disk(sys: &Path, (major, minor): (u32, u32)) -> Option<(u32, u32)> {
    let own = sys.join(format!("{major}:{minor}"));
    let own = own.canonicalize().ok()?;
    if !own.join("partition").exists() {
        return Some((major, minor));
    }
    let text = std::fs::read_to_string(own.parent()?.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests;
