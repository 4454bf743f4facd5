//! Programs of the machine under the rig: finding them (with a hint when one is missing) and running them to an end
//! within a bound.

use crate::error::{IoContext, Result, RigError};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Each program the rig calls and the Debian package it comes from.
pub const TOOLS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("depmod", "kmod"),
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
];

/// The end of a text, at most `bytes_max` bytes, cut at a character boundary.
pub fn tail(text: &str, bytes_max: usize) -> &str {
    let mut start = text.len().saturating_sub(bytes_max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// Finds a program of [`TOOLS`] in `PATH` and the system's own folders (`/usr/sbin` is not in everybody's `PATH`).
pub fn find(tool: &'static str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    for folder in std::env::split_paths(&path).chain(system) {
        let candidate = folder.join(tool);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    let package = TOOLS
        .iter()
        .find(|(name, _)| *name == tool)
        .map_or("(unknown)", |(_, package)| package);
    Err(RigError::ToolMissing { tool, package })
}

/// True when QEMU is there, so that tests can say loudly why they are skipped when it is not.
pub fn qemu_present() -> bool {
    find("qemu-system-x86_64").is_ok()
}

/// Waits for a child within a bound; kills it when the bound passes.
///
/// # Errors
/// [`RigError::Timeout`] after the kill, [`RigError::Io`] when waiting fails.
pub fn wait_bounded(child: &mut Child, what: &str, bound: Duration) -> Result<ExitStatus> {
    let start = Instant::now();
    let mut nap = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait().what(|| format!("wait for {what}"))? {
            return Ok(status);
        }
        if start.elapsed() > bound {
            // The child may have ended meanwhile; then there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
            return Err(RigError::Timeout {
                what: format!("the end of {what}"),
                after_ms: bound.as_millis() as u64,
                detail: String::new(),
            });
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(50));
    }
}

/// Runs a program to its end and gives its standard output. Bounded in time and in output (16 MiB).
///
/// # Errors
/// [`RigError::Program`] with the end of its output when it fails, [`RigError::Timeout`] when it takes too long.
pub fn run(command: &mut Command, bound: Duration) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().what(|| format!("start {name}"))?;
    let collect = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            if let Some(mut stream) = stream {
                // Keep a bounded head, but read on to the end so that the program never blocks on us.
                let _ = (&mut stream).take(16 << 20).read_to_end(&mut kept);
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            }
            String::from_utf8_lossy(&kept).into_owned()
        })
    };
    let out = collect(child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let err = collect(child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let status = wait_bounded(&mut child, &name, bound)?;
    let out = out.join().unwrap_or_default();
    let err = err.join().unwrap_or_default();
    if status.success() {
        return Ok(out);
    }
    let said = if err.trim().is_empty() {
        out.trim()
    } else {
        err.trim()
    };
    Err(RigError::Program {
        program: name,
        status: status.to_string(),
        detail: tail(said, 1500).to_string(),
    })
}
