//! The unprivileged user that a VM's process becomes, and what else it gives up.
//!
//! Every VM has a user of its own, so that a monitor that was taken over can neither signal, trace nor read another VM's:
//! [`UserChoice::OwnOfVm`] makes a number from the VM's name, in a range that no distribution and no systemd hands out
//! (1,900,000,000 and up; systemd's table of UIDs ends its container range at 1,879,048,191). Nothing on disk needs to
//! belong to it: what the VM uses is open before the process becomes that user.
//!
//! Sources: credentials(7), capabilities(7), prctl(2), setrlimit(2).

use std::io;
use steadfast_types::VmId;

/// First of the users made from VM names.
const OWN_UID_FIRST: u32 = 1_900_000_000;
/// How many there are: enough that two VMs of a host do not meet.
const OWN_UIDS: u32 = 1 << 24;
/// Most threads (of the user) that a VM's process may have: 64 vCPUs, 31 devices with up to 8 workers, peers.
const THREADS_MAX: u64 = 1024;
/// Most open descriptors: queues and interrupts of 31 devices need some thousands.
const FILES_MAX: u64 = 16 << 10;
/// io_uring's rings count as locked memory on older kernels.
const LOCKED_BYTES: u64 = 64 << 20;

/// Which user a VM's process becomes when it is started as root. Another user stays who they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum UserChoice {
    /// A user of the VM's own, made from its name.
    #[default]
    OwnOfVm,
    /// This one. User 0 keeps root's files, but no capability.
    Ids {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
}

/// Privileges that could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The system refused.
    #[error("cannot {what}: {source}; choose another user with --user, or start without root")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The process could become root again.
    #[error("the process is still root after it became user {0}; it is not safe to go on")]
    StillRoot(u32),
}

impl UserChoice {
    /// Reads `NAME`, `UID` or `UID:GID`. Names are looked up in `/etc/passwd` only: a static binary has no other.
    ///
    /// # Errors
    /// What would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("--user is a name, UID or UID:GID".into());
        }
        let (user, group) = text.split_once(':').unwrap_or((text, text));
        if let (Ok(uid), Ok(gid)) = (user.parse(), group.parse()) {
            return Ok(Self::Ids { uid, gid });
        }
        let passwd = std::fs::read_to_string("/etc/passwd")
            .map_err(|e| format!("cannot look up {text:?}: /etc/passwd: {e}"))?;
        find_user(&passwd, text)
            .ok_or_else(|| format!("there is no user {text:?} in /etc/passwd; make it, or give UID:GID"))
    }

    /// User and group for the VM `name`.
    #[must_use]
    pub fn ids(&self, name: &VmId) -> (u32, u32) {
        match *self {
            Self::Ids { uid, gid } => (uid, gid),
            Self::OwnOfVm => {
                // FNV-1a, stable over versions: sockets may be made accessible for this user.
                let mut hash = 0x811c_9dc5u32;
                for b in name.as_str().bytes() {
                    hash = (hash ^ u32::from(b)).wrapping_mul(0x0100_0193);
                }
                let id = OWN_UID_FIRST + hash % OWN_UIDS;
                (id, id)
            }
        }
    }
}

fn find_user(passwd: &str, name: &str) -> Option<UserChoice> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() != Some(name) {
            return None;
        }
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(UserChoice::Ids { uid, gid })
    })
}

fn check(result: libc::c_int, what: impl FnOnce() -> String) -> Result<(), UserError> {
    if result >= 0 {
        return Ok(());
    }
    Err(UserError::System {
        what: what(),
        source: io::Error::last_os_error(),
    })
}

/// Whether this process is root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes the socket at `path`, which is root's, the user's. Others may write in its folder: nothing but a socket with
/// this one name is given away.
pub(super) fn give_socket(path: &std::path::Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, fstat, openat};
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = openat(CWD, path, flags, Mode::empty())?;
    let stat = fstat(&socket)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket || stat.st_nlink != 1 {
        return Err(io::Error::other("it is not the socket that was bound there"));
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(chownat(&socket, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?)
}

fn limit(resource: libc::__rlimit_resource_t, most: u64) -> Result<(), UserError> {
    let mut now = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit writes one rlimit through the pointer, which names this frame's.
    check(unsafe { libc::getrlimit(resource, &raw mut now) }, || {
        "read a resource limit".into()
    })?;
    let set = |most: u64| {
        let new = libc::rlimit {
            rlim_cur: most,
            rlim_max: most,
        };
        // SAFETY: setrlimit reads one rlimit through the pointer.
        check(unsafe { libc::setrlimit(resource, &raw const new) }, || {
            format!("set resource limit {resource} to {most}")
        })
    };
    // Only CAP_SYS_RESOURCE may raise the upper bound, which root in a container may lack.
    set(most).or_else(|_| set(most.min(now.rlim_max)))
}

/// Gives up all privileges of the process: user, groups, capabilities, core dumps, and the way back.
///
/// As root the process becomes `(uid, gid)`. After this no system call can raise its privileges again.
///
/// # Errors
/// [`UserError`]; the process must then end, since part of its privileges may be gone.
pub fn drop_privileges((uid, gid): (u32, u32)) -> Result<(), UserError> {
    one_arena()?;
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_NOFILE, FILES_MAX)?;
    let root = is_root();
    if root {
        limit(libc::RLIMIT_MEMLOCK, LOCKED_BYTES)?;
        if uid != 0 {
            // The count is per user; others' processes do not count for a user that only this VM has.
            limit(libc::RLIMIT_NPROC, THREADS_MAX)?;
        }
        drop_bounding_set()?;
        // SAFETY: with a count of 0 the list is not read. glibc changes all threads of the process.
        check(unsafe { libc::setgroups(0, std::ptr::null()) }, || {
            "leave the supplementary groups".into()
        })?;
        // SAFETY: takes plain numbers.
        check(unsafe { libc::setresgid(gid, gid, gid) }, || {
            format!("become group {gid}")
        })?;
        // SAFETY: takes plain numbers.
        check(unsafe { libc::setresuid(uid, uid, uid) }, || {
            format!("become user {uid}")
        })?;
        // SAFETY: takes plain numbers; meant to fail.
        if uid != 0 && unsafe { libc::setresuid(0, 0, 0) } == 0 {
            return Err(UserError::StillRoot(uid));
        }
    }
    drop_capabilities()?;
    // SAFETY: takes plain numbers.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    check(done, || "set no_new_privs".into())?;
    // No ptrace and no /proc/PID/mem for other processes of the same user.
    // SAFETY: takes plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }, || {
        "forbid dumps and tracing".into()
    })
}

/// One malloc arena for all threads: making another reads /sys and asks the kernel things (`open`, `prctl`) on whatever
/// thread happens to find the first one taken, which no filter of a vCPU thread should have to allow.
fn one_arena() -> Result<(), UserError> {
    // SAFETY: takes plain numbers; it changes only how later allocations are made. It returns 1 when done.
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    check(done - 1, || "keep to one malloc arena".into())
}

fn drop_bounding_set() -> Result<(), UserError> {
    for capability in 0..64 {
        // SAFETY: takes plain numbers.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            // Behind the last one that this kernel knows.
            break;
        }
        check(result, || format!("give up capability {capability}"))?;
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), UserError> {
    // SAFETY: takes plain numbers.
    let done = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    check(done, || "give up ambient capabilities".into())?;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // _LINUX_CAPABILITY_VERSION_3: two words each of effective, permitted and inheritable.
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let none = [0u32; 6];
    // SAFETY: capset reads a header and, for version 3, 24 bytes of data; both live on this frame.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    check(result as libc::c_int, || "give up capabilities".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nvmm:x:998:997::/:/bin/false\nbroken:x:y\n";
        assert_eq!(
            find_user(passwd, "vmm"),
            Some(UserChoice::Ids { uid: 998, gid: 997 })
        );
        assert_eq!(find_user(passwd, "broken"), None);
        assert_eq!(find_user(passwd, "nobody"), None);
        assert_eq!(UserChoice::parse("7"), Ok(UserChoice::Ids { uid: 7, gid: 7 }));
        assert_eq!(UserChoice::parse("7:8"), Ok(UserChoice::Ids { uid: 7, gid: 8 }));
        assert!(UserChoice::parse("").is_err() && UserChoice::parse("no such user").is_err());
    }

    #[test]
    fn each_vm_has_its_own_user() {
        let ids = |n: &str| UserChoice::OwnOfVm.ids(&VmId::new(n).unwrap());
        assert_ne!(ids("a").0, ids("b").0);
        assert_eq!(ids("a"), ids("a"));
        assert!((OWN_UID_FIRST..OWN_UID_FIRST + OWN_UIDS).contains(&ids("db").0));
    }
}
