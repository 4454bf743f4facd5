//! The watchdog of the machine, used as systemd would.

use super::Guest;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const DEVICE: &str = "/dev/watchdog0";
/// Its driver was loaded a moment ago.
const BOUND: Duration = Duration::from_secs(30);
/// `WDIOC_SETTIMEOUT` of linux/watchdog.h: `_IOWR('W', 6, int)`.
const SET_TIMEOUT: libc::c_ulong = 0xc004_5706;

/// Starts it and feeds it, for ever.
pub fn feed(guest: &Guest, seconds: u64) {
    let run = || -> io::Result<()> {
        let mut device = open()?;
        let mut timeout = seconds as libc::c_int;
        // SAFETY: the request reads and writes one int, which `timeout` is; the descriptor is open.
        if unsafe { libc::ioctl(device.as_raw_fd(), SET_TIMEOUT as _, &raw mut timeout) } < 0 {
            return Err(io::Error::last_os_error());
        }
        guest.say(&format!("WATCHDOG {timeout} s"));
        loop {
            device.write_all(&[0])?;
            std::thread::sleep(Duration::from_millis(seconds * 250));
        }
    };
    if let Err(e) = run() {
        guest.fault(format!("TROUBLE watchdog: {e}"));
    }
}

fn open() -> io::Result<File> {
    let began = Instant::now();
    loop {
        match OpenOptions::new().write(true).open(DEVICE) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && began.elapsed() < BOUND => {
                std::thread::sleep(Duration::from_millis(50));
            }
            opened => return opened,
        }
    }
}
