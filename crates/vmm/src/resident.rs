//! A host whose memory runs short: our processes go on. The kernel takes the pages of a program back first (they can be read again), and
//! whoever needs one then waits for a disk that all others wait for; and it ends the largest process, which a VM is as a rule, whoever
//! took the memory.

use rustix::mm::{MlockFlags, mlock_with};
use std::io;
use std::os::unix::ffi::OsStrExt;

/// The daemon, its store and its guard; they are small, and nothing works without them.
pub const ESSENTIAL: i32 = -900;
/// A VM: after what is no part of the pool. Its own limit of memory holds as before.
pub const VM: i32 = -500;

/// Keeps the program's own pages in memory, each from when it is first used, and says when the kernel shall end this process for want of
/// memory (`oom_score_adj`, which children inherit). Best effort: it takes privileges.
pub fn stay(score: i32) {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::debug!(%error, "this process is not spared when memory runs short");
    }
    match lock_program() {
        Ok(bytes) => tracing::debug!(bytes, "pages of the program stay in memory"),
        Err(error) => {
            tracing::debug!(%error, "pages of the program may be taken back when memory runs short")
        }
    }
}

/// Bytes of its mappings.
fn lock_program() -> io::Result<usize> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read("/proc/self/maps")?;
    let mut bytes = 0;
    for (start, end) in mappings(&maps, program.as_os_str().as_bytes()) {
        let at = std::ptr::without_provenance_mut(start);
        // SAFETY: no memory is read or written, and what is mapped where stays as it is: the kernel only notes that pages that are there,
        // or come there, are not to be taken back. The program's own mappings stay as long as it runs.
        unsafe { mlock_with(at, end - start, MlockFlags::ONFAULT)? };
        bytes += end - start;
    }
    Ok(bytes)
}

/// Where this file is mapped, by the text of `/proc/PID/maps`.
fn mappings(maps: &[u8], file: &[u8]) -> Vec<(usize, usize)> {
    let mapping = |line: &[u8]| {
        // Start-end, permissions, offset, device, inode, path.
        let range = line.split(|b| *b == b' ').next()?;
        let path = line.iter().position(|b| *b == b'/').map(|at| &line[at..]);
        let (start, end) = std::str::from_utf8(range).ok()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let range = (number(start)?, number(end)?);
        (path == Some(file) && range.0 < range.1).then_some(range)
    };
    maps.split(|b| *b == b'\n').filter_map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_mappings_are_found_and_others_not() {
        let maps = b"55d0-55e0 r--p 00000000 fe:00 1234   /opt/a b/steadfast\n\
            55e0-55f0 r-xp 00001000 fe:00 1234   /opt/a b/steadfast\n\
            7f00-7f10 r-xp 00000000 fe:00 99     /usr/lib/libc.so.6\n\
            7f20-7f30 rw-s 00000000 00:01 5      /memfd:ram (deleted)\n\
            7f40-7f50 rw-p 00000000 00:00 0\nrubbish\n";
        let found = mappings(maps, b"/opt/a b/steadfast");
        assert_eq!(found, [(0x55d0, 0x55e0), (0x55e0, 0x55f0)]);
    }

    #[test]
    fn pages_of_this_program_are_locked() {
        let locked = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status
                .lines()
                .find(|l| l.starts_with("VmLck:"))
                .unwrap()
                .to_owned();
            let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
            kib
        };
        assert_eq!(locked(), 0);
        match lock_program() {
            Ok(bytes) => assert!(locked() > 0 && bytes > 1 << 20, "{bytes}"),
            Err(error) => println!("SKIPPED: no right to lock pages here: {error}"),
        }
    }
}
