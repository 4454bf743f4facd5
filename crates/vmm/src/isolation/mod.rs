//! What keeps a VM's process from harming its host, should a guest take it over.
//!
//! ```text
//! root or not:  control socket, cgroup, janitor, open images, TAPs, KVM      (opening needs privileges)
//!                                     |  confine(): user, capabilities, no_new_privs, main filter
//!                                     v
//! nobody:       build the machine, threads take their own filters, run, reset, save
//! ```
//! Everything a machine needs is open before [`Confined`] begins ([`crate::resources`]), so the first machine is built
//! under the same restrictions as the one after a guest's reset: a boot proves a reset.
//!
//! - [`user`]: the unprivileged user, capabilities, limits of the process.
//! - [`seccomp`]: system call filters per kind of thread.
//! - [`cgroup`]: CPU, memory and I/O limits.
//! - [`janitor`]: removes what the process itself no longer may or can, and tells if it was killed.

pub mod cgroup;
pub mod janitor;
pub mod seccomp;
pub mod user;

use cgroup::{Cgroup, Limits};
use janitor::{Janitor, Leftover};
use seccomp::{Filters, SeccompError, SeccompMode};
use std::path::{Path, PathBuf};
use steadfast_machine::machine::ThreadHooks;
use steadfast_types::VmId;
use user::{UserChoice, UserError};

/// How a VM's process is confined.
#[derive(Clone, Debug)]
pub struct Isolation {
    /// Who it becomes, if it starts as root.
    pub user: UserChoice,
    /// System call filters.
    pub seccomp: SeccompMode,
    /// Parent of its cgroup; none: it stays in the one it is in.
    pub cgroup: Option<PathBuf>,
    /// Limits from the start. Without a memory limit here, RAM and a margin is the limit.
    pub limits: Limits,
}

impl Default for Isolation {
    fn default() -> Self {
        Self {
            user: UserChoice::default(),
            seccomp: SeccompMode::default(),
            cgroup: Some(cgroup::PARENT.into()),
            limits: Limits::default(),
        }
    }
}

/// A process that cannot be confined. It must not run a guest.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum IsolationError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("cannot start the process that tidies up after the VM: {0}")]
    Janitor(std::io::Error),
}

/// The confinement of this process; it lives as long as the VM.
pub struct Confined {
    _janitor: Janitor,
    /// Run first on each thread of the machine.
    pub hooks: ThreadHooks,
}

impl Isolation {
    /// Puts the process into its cgroup. Before RAM is allocated, so that it counts. A host without cgroups that
    /// can be used is worth a warning, not the VM.
    #[must_use]
    pub fn enter_cgroup(&self, name: &VmId, ram_bytes: u64) -> Option<Cgroup> {
        let group = match Cgroup::enter(self.cgroup.as_deref()?, name) {
            Ok(group) => group,
            Err(error) => {
                tracing::warn!(%error, "the VM runs without a cgroup of its own, and so without limits");
                return None;
            }
        };
        let mut limits = self.limits;
        limits
            .memory_max
            .get_or_insert(cgroup::limits::memory_for(ram_bytes));
        // I/O limits need the disks, which are not open yet.
        limits.io_max = None;
        if let Err(error) = group.set(&limits, &[]) {
            tracing::warn!(%error, "the VM runs without some of its limits");
        }
        Some(group)
    }

    /// Makes sockets the VM user's own: each process of the VM, also an earlier one, can then see whether a socket of
    /// the VM is served. A socket that cannot be given away is worth a warning.
    pub fn give<'a>(&self, name: &VmId, sockets: impl Iterator<Item = &'a Path>) {
        if !user::is_root() {
            return;
        }
        let ids = self.user.ids(name);
        for path in sockets {
            if let Err(error) = user::give_socket(path, ids) {
                tracing::warn!(path = %path.display(), %error, "a socket cannot be given to the VM's user");
            }
        }
    }

    /// Gives up all privileges. `sockets` are names of ours in the file system.
    ///
    /// # Errors
    /// [`IsolationError`]; the process must end.
    pub fn confine(
        &self,
        name: &VmId,
        group: Option<&Cgroup>,
        sockets: &[&Path],
        hooks: &ThreadHooks,
    ) -> Result<Confined, IsolationError> {
        if let (Some(group), Some(_)) = (group, self.limits.io_max) {
            let disks = cgroup::disks_of_process(std::process::id());
            let limits = Limits {
                io_max: self.limits.io_max,
                ..Limits::default()
            };
            if disks.is_empty() {
                tracing::warn!(
                    "no disk of this VM can be limited: its images are on no block device of this host"
                );
            }
            if let Err(error) = group.set(&limits, &disks) {
                tracing::warn!(%error, "the VM runs without its I/O limit");
            }
        }
        let filters = Filters::new(self.seccomp)?;
        let folders: Vec<PathBuf> = group
            .map(|g| g.folders().map(Path::to_owned).collect())
            .unwrap_or_default();
        let files: Vec<_> = sockets.iter().filter_map(|p| Leftover::of(p).ok()).collect();
        let home = group.map(Cgroup::before).unwrap_or_default();
        let janitor = Janitor::start(name, &files, &folders, home).map_err(IsolationError::Janitor)?;
        user::drop_privileges(self.user.ids(name))?;
        let hooks = match &filters {
            Some(filters) => {
                filters.confine_process()?;
                filters.hooks(hooks)
            }
            None => hooks.clone(),
        };
        Ok(Confined {
            _janitor: janitor,
            hooks,
        })
    }
}
