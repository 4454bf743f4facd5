//! A watchdog of the kernel, as `Documentation/watchdog/watchdog-api.rst` of Linux describes it.

use super::Keeps;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// `WDIOC_SETTIMEOUT`: seconds as a C `int`, in and out.
const SET_TIMEOUT: Opcode = opcode::read_write::<i32>(b'W', 6);

/// An open device: it counts.
pub struct Device(File);

impl Device {
    /// Opens it and sets its time.
    ///
    /// # Errors
    /// It is not there, somebody else has it, or it cannot count so few seconds: then it is let go.
    pub fn open(path: &Path, seconds: u32) -> io::Result<Self> {
        if cannot_be_let_go(path) {
            return Err(io::Error::other(
                "it cannot be let go once it counts (nowayout), and would reset the host when the last such VM has left it",
            ));
        }
        let mut device = Self(File::options().write(true).open(path)?);
        let set = device.set_timeout(seconds);
        if set.is_err() {
            // Nobody would keep it alive.
            device.let_go()?;
        }
        set.map(|()| device)
    }

    fn set_timeout(&self, seconds: u32) -> io::Result<()> {
        let mut value = i32::try_from(seconds).map_err(io::Error::other)?;
        // SAFETY: this request takes a pointer to an int, reads it, and writes the time that is in force; the value lives for the call.
        let done = unsafe { ioctl(&self.0, Updater::<SET_TIMEOUT, i32>::new(&mut value)) };
        done?;
        if value > seconds.cast_signed() {
            return Err(io::Error::other(format!(
                "its shortest time is {value} s, {seconds} s is needed; make the pool with a longer lease"
            )));
        }
        Ok(())
    }
}

/// As the kernel says: it was built, or its module loaded, with `nowayout`.
fn cannot_be_let_go(path: &Path) -> bool {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // The first device has a second name.
    let name = if name == "watchdog" {
        "watchdog0".into()
    } else {
        name
    };
    let says = std::fs::read_to_string(format!("/sys/class/watchdog/{name}/nowayout"));
    says.is_ok_and(|text| text.trim() == "1")
}

impl Keeps for Device {
    fn keep_alive(&mut self) -> io::Result<()> {
        self.0.write_all(b"\0")
    }

    fn let_go(&mut self) -> io::Result<()> {
        // The one byte after which closing it ends the counting.
        self.0.write_all(b"V")
    }
}
