//! The guest's serial port on this terminal.

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use steadfast_machine::devices::legacy::{FdSink, NullSink, OutputSink, SerialPort};

/// Ctrl-], as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Puts the terminal back as it was.
pub struct Terminal(Option<Termios>);

impl Terminal {
    /// Gives every key to the guest, if stdin is a terminal.
    pub fn raw() -> Self {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return Self(None);
        }
        let Ok(before) = tcgetattr(stdin) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        let _ = tcsetattr(stdin, OptionalActions::Now, &raw);
        eprintln!("The guest's serial port; Ctrl-] ends the VM.\r");
        Self(Some(before))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Opens where console output goes: stdout, or a file that is appended to. Before the process gives up the right to.
pub fn open(file: Option<&Path>) -> std::io::Result<OwnedFd> {
    match file {
        Some(path) => Ok(std::fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .map_err(|e| std::io::Error::new(e.kind(), format!("{}: {e}", path.display())))?
            .into()),
        None => Ok(rustix::io::dup(rustix::stdio::stdout())?),
    }
}

/// A sink to what [`open`] opened; a reset guest gets another.
pub fn sink(to: &OwnedFd) -> Box<dyn OutputSink> {
    match to.try_clone() {
        Ok(fd) => Box::new(FdSink::new(fd)),
        Err(error) => {
            tracing::warn!(%error, "console output is dropped");
            Box::new(NullSink)
        }
    }
}

/// The serial port that takes input now; a reset guest has a new one.
pub type Current = Arc<Mutex<Option<Arc<Mutex<SerialPort>>>>>;

/// Feeds stdin to the serial port, on a thread of its own; `on_escape` is called at Ctrl-].
pub fn feed(current: Current, on_escape: impl Fn() + Send + 'static) {
    let run = move || {
        let mut buf = [0; 256];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buf) {
            let mut rest = &buf[..n];
            if rest.contains(&ESCAPE) {
                on_escape();
                return;
            }
            while !rest.is_empty() {
                let port = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let Some(port) = port else { break };
                let taken = port
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .enqueue_input(rest);
                rest = &rest[taken..];
                if taken == 0 {
                    // The guest reads slowly; what it has not taken waits here, and so does the user's terminal.
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    };
    let _ = std::thread::Builder::new()
        .name("console-input".into())
        .spawn(run);
}
