//! Who tidies up after a VM's process that may no longer do so itself.
//!
//! A process that gave up root cannot take its sockets' names out of `/run/steadfast`, nor remove the cgroup it is in.
//! So it forks a child first, which keeps its privileges, holds nothing but the end of a pipe and the log, does nothing at
//! all until that pipe closes (the process ended, also by SIGKILL), then tidies and exits. Of what comes through the pipe
//! it looks at no more than whether there was anything: the process has told why it ends. If not, the janitor tells that it
//! was killed. A taken-over VM process has no other way to talk to it.

use crate::last_words;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use steadfast_types::VmId;

/// How long a cgroup may take to be empty after its process ended.
const EMPTY_BOUND: Duration = Duration::from_secs(5);

/// Somebody who takes a name while a guest stands still waits no longer for others: the lock only narrows a race.
pub const NAME_BOUND: Duration = Duration::from_millis(100);

/// A file that is removed, if it is still the one that was there.
#[derive(Clone, Debug)]
pub struct Leftover {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Leftover {
    /// Remembers the file at `path`.
    ///
    /// # Errors
    /// It is not there.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: meta.dev(),
            inode: meta.ino(),
        })
    }

    /// Whether it is the same file, whatever its name.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Where it was.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file unless another has taken its name. Whoever makes such names holds [`lock_folder`] meanwhile.
    pub fn remove(&self) {
        let _lock = lock_folder(&self.path);
        if Self::of(&self.path).is_ok_and(|now| now.same(self)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Keeps others from making or removing names in the folder of `path` while the result lives; none where the
/// folder cannot be locked, which only widens a race.
#[must_use]
pub fn lock_folder(path: &Path) -> Option<File> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty())?;
    let file = File::open(folder).ok()?;
    flock(&file, FlockOperation::LockExclusive).ok()?;
    Some(file)
}

/// As [`lock_folder`], for somebody who must not wait for long: none too when others have it for longer than `bound`.
#[must_use]
pub fn lock_folder_within(path: &Path, bound: Duration) -> Option<File> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty())?;
    let (file, until) = (File::open(folder).ok()?, Instant::now() + bound);
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Some(file)
}

/// The janitor waits while this lives. It is meant to live as long as the process; dropping it is an orderly end.
#[derive(Debug)]
pub struct Janitor {
    _alive: OwnedFd,
}

impl Drop for Janitor {
    fn drop(&mut self) {
        last_words::said();
        last_words::to_janitor(None);
    }
}

impl Janitor {
    /// Forks the janitor, which removes `files` and then `folders` (in order; empty ones only) once this process ends.
    /// It lives in the cgroups `home`, not in those that it is to remove. `name` is for what it says.
    ///
    /// # Errors
    /// No pipe or no process to be had.
    pub fn start(name: &VmId, files: &[Leftover], folders: &[PathBuf], home: &[PathBuf]) -> io::Result<Self> {
        let (wait, alive) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let name = name.as_str().to_owned();
        let process = std::process::id();
        // SAFETY: the child runs only the code below. It allocates little, which glibc's fork allows also when other
        // threads exist (its allocator is made consistent), takes no lock of ours, and leaves by _exit.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(alive);
                if !serve(&wait, home) {
                    eprintln!("steadfast: {}\r", was_killed(&name, process, folders));
                }
                tidy(files, folders);
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(0) }
            }
            _ => {
                // A full pipe must not keep anybody waiting.
                rustix::io::ioctl_fionbio(&alive, true)?;
                last_words::to_janitor(Some(alive.as_raw_fd()));
                Ok(Self { _alive: alive })
            }
        }
    }
}

/// Waits for the end of the process; whether it gave a reason.
fn serve(wait: &OwnedFd, home: &[PathBuf]) -> bool {
    // First of all, so that a VM that is killed at once leaves no lock and no socket behind here.
    close_all_but(wait.as_raw_fd());
    // Its own session: a Ctrl-C at the terminal is for the VM.
    let _ = rustix::process::setsid();
    // SAFETY: the name is a literal with a final zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"vm-janitor".as_ptr(), 0, 0, 0) };
    for group in home {
        // Zero is whoever writes. If this fails the VM's group cannot be removed, which harms nobody.
        let _ = std::fs::write(group.join("cgroup.procs"), "0");
    }
    let mut buf = [0; 1];
    let read = loop {
        match rustix::io::read(wait, &mut buf) {
            Err(rustix::io::Errno::INTR) => {}
            read => break read,
        }
    };
    if read != Ok(1) {
        return false;
    }
    // Nothing more is read, however much is sent: only the hang-up counts, which poll always tells.
    loop {
        let mut fds = [PollFd::new(wait, PollFlags::empty())];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            _ => return true,
        }
    }
}

/// What can be told of the end of a process that said nothing.
fn was_killed(name: &str, process: u32, folders: &[PathBuf]) -> String {
    let kills = |file: &str| {
        folders.iter().find_map(|folder| {
            let text = std::fs::read_to_string(folder.join(file)).ok()?;
            let kills = text.lines().find_map(|l| l.strip_prefix("oom_kill "))?;
            kills.trim().parse::<u64>().ok()
        })
    };
    // cgroup v2, or v1.
    let why = match kills("memory.events").or_else(|| kills("memory.oom_control")) {
        Some(1..) => "it went beyond its memory limit; raise it with --memory-max",
        _ => "somebody sent SIGKILL, or the host ran out of memory: see the kernel's log",
    };
    format!("VM {name}: its process {process} was killed ({why})")
}

fn tidy(files: &[Leftover], folders: &[PathBuf]) {
    for file in files {
        file.remove();
    }
    let began = Instant::now();
    for folder in folders {
        // Busy while the process is still on its way out.
        while std::fs::remove_dir(folder).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
            && began.elapsed() < EMPTY_BOUND
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The janitor must hold neither the images' locks nor the control socket nor a terminal to read from. It keeps standard
/// error, to tell of an end that the process itself could not.
fn close_all_but(keep: i32) {
    const LOG: i32 = 2;
    // SAFETY: the child owns its copy of the descriptor table and uses no descriptor but `keep` and `LOG` from here on.
    unsafe {
        let close = |from: i32, to: u32| {
            if from.cast_unsigned() <= to {
                libc::syscall(libc::SYS_close_range, from.cast_unsigned(), to, 0u32);
            }
        };
        let (low, high) = (keep.min(LOG), keep.max(LOG));
        if low > 0 {
            close(0, (low - 1).cast_unsigned());
        }
        if high > low + 1 {
            close(low + 1, (high - 1).cast_unsigned());
        }
        close(high + 1, u32::MAX);
    }
}
