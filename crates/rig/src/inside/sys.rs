//! Thin wrappers over the system calls that process 1 needs.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// `mount(2)`; makes the mount point when it is missing.
pub fn mount(source: &str, target: &str, fs: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let (source, target, fs, data) = (
        c_string(source)?,
        c_string(target)?,
        c_string(fs)?,
        c_string(data)?,
    );
    // SAFETY: all four are NUL-terminated strings that outlive the call; the kernel copies them.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fs.as_ptr(),
            flags,
            data.as_ptr().cast::<libc::c_void>(),
        )
    })?;
    Ok(())
}

/// Makes the mounted tree at `new_root` the root of this process (the way `switch_root` does, without deleting).
pub fn switch_root(new_root: &str) -> io::Result<()> {
    for folder in ["/dev", "/proc", "/sys"] {
        let target = format!("{new_root}{folder}");
        std::fs::create_dir_all(&target)?;
        mount(folder, &target, "", libc::MS_MOVE, "")?;
    }
    std::env::set_current_dir(new_root)?;
    mount(".", "/", "", libc::MS_MOVE, "")?;
    let here = c_string(".")?;
    // SAFETY: a NUL-terminated string that outlives the call.
    check(unsafe { libc::chroot(here.as_ptr()) })?;
    std::env::set_current_dir("/")
}

/// Loads a module's file; a module that is loaded already is no error.
pub fn finit_module(path: &Path, parameters: &str) -> io::Result<()> {
    let file = std::fs::File::open(path)?;
    let parameters = c_string(parameters)?;
    // SAFETY: the descriptor is open and the string NUL-terminated for the length of the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EEXIST) {
            return Err(error);
        }
    }
    Ok(())
}

/// Sets the host name.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`, which outlives the call.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;
    Ok(())
}

/// Makes a device node; one that is there is no error.
pub fn make_block_node(path: &str, device: u64) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: a NUL-terminated string that outlives the call; the rest are plain numbers.
    match check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFBLK | 0o660, device) }) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// Moves the wall clock by so many milliseconds.
pub fn jump_clock(by_ms: i64) -> io::Result<()> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec to write to.
    check(unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut now) })?;
    let nanos =
        i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec) + i128::from(by_ms) * 1_000_000;
    let seconds = i64::try_from(nanos.div_euclid(1_000_000_000)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let then = libc::timespec {
        tv_sec: seconds,
        tv_nsec: nanos.rem_euclid(1_000_000_000) as i64,
    };
    // SAFETY: `then` is a valid timespec to read from.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &then) })?;
    Ok(())
}

/// Time since the machine started, in milliseconds.
pub fn uptime_ms() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec to write to; CLOCK_BOOTTIME exists on every kernel the rig boots.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// `fork(2)`, for a process that has one thread: `Ok(None)` in the child.
///
/// # Errors
/// When the process has more than one thread: the child would hold locks that nobody unlocks.
pub fn fork_single_threaded() -> io::Result<Option<i32>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("fork with several threads"));
    }
    // SAFETY: this process has one thread (just checked), so the child's copy of every lock is consistent.
    let pid = check(unsafe { libc::fork() })?;
    Ok((pid != 0).then_some(pid))
}

/// As process 1: reaps children until `agent` ends.
pub fn reap_until(agent: i32) {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the answer; -1 waits for any child.
        let pid = unsafe { libc::waitpid(-1, &mut status, 0) };
        if pid == agent || (pid < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD)) {
            return;
        }
    }
}

/// Syncs nothing, restarts the machine. Returns only when the kernel refuses.
pub fn restart_machine() {
    // SAFETY: no memory is passed.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
}

/// Turns the machine off. Returns only when the kernel refuses.
pub fn power_off() {
    // SAFETY: no memory is passed.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF) };
}
