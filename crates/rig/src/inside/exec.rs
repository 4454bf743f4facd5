//! Programs that the agent runs: with pipes or a terminal, with a time limit, or in the background.
//!
//! Each program leads its own process group (its own session with a terminal or in the background), so a time limit or a
//! signal reaches its children too.

use crate::link::frame::Kind;
use crate::link::messages::{Control, Exec, Outcome};
use crate::link::mux::Channel;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const STALL_BOUND: Duration = Duration::from_secs(120);

/// Runs a program as asked; the outcome is what the channel ends with.
pub fn run(request: &Exec, channel: &Channel) -> Outcome {
    let Some((program, arguments)) = request.argv.split_first() else {
        return Outcome::Failed("an empty command".to_string());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(request.cwd.as_deref().unwrap_or("/root"));
    for (name, value) in &request.env {
        command.env(name, value);
    }
    let ran = match (&request.detach_log, request.pty) {
        (Some(log), _) => detach(command, log),
        (None, Some(size)) => with_terminal(command, size, request, channel),
        (None, None) => with_pipes(command, request, channel),
    };
    ran.unwrap_or_else(|e| Outcome::Failed(format!("{program}: {e}")))
}

fn kill_group(pid: u32, signal: i32) {
    if let Ok(pid) = i32::try_from(pid) {
        // SAFETY: plain numbers, no memory. A group that is gone gives ESRCH, which is fine; its number stays taken while
        // one of its processes lives.
        unsafe { libc::kill(-pid, signal) };
    }
}

fn detach(mut command: Command, log: &str) -> io::Result<Outcome> {
    if let Some(folder) = std::path::Path::new(log).parent() {
        std::fs::create_dir_all(folder)?;
    }
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: setsid is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    let mut child = command.spawn()?;
    let pid = child.id();
    // Reap it when it ends, so that `kill -0 PID` tells the truth.
    std::thread::spawn(move || child.wait());
    Ok(Outcome::Detached(pid))
}

fn outcome(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exited(code),
        (None, Some(signal)) => Outcome::Signalled(signal),
        (None, None) => Outcome::Failed("no exit status".to_string()),
    }
}

/// True when the stream has bytes or has ended, within 50 ms.
fn readable(stream: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd, and its count.
    unsafe { libc::poll(&mut poll, 1, 50) > 0 }
}

/// Sends a stream's bytes to the rig until its end, or until `over` (somebody left behind may hold it open for ever).
fn forward(mut stream: impl Read + AsRawFd, kind: Kind, channel: &Channel, over: &AtomicBool) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        if !readable(&stream) {
            if over.load(Ordering::Acquire) {
                return;
            }
            continue;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                if channel.send_bulk(kind, &buffer[..n], STALL_BOUND).is_err() {
                    return;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A terminal gives EIO when its last program is gone.
            Err(_) => return,
        }
    }
}

/// Hands input and controls from the rig to the program until `over`.
fn feed(
    mut input: Option<Box<dyn Write + Send>>,
    terminal: Option<i32>,
    pid: u32,
    channel: &Channel,
    over: &AtomicBool,
) {
    while !over.load(Ordering::Acquire) {
        match channel.recv(Duration::from_millis(50)) {
            Ok(None) => {}
            Ok(Some((Kind::Input, bytes))) => {
                // A program that closed its input is no error of ours; stop feeding it.
                if input
                    .as_mut()
                    .is_some_and(|stream| stream.write_all(&bytes).is_err())
                {
                    input = None;
                }
            }
            Ok(Some((Kind::InputEnd, _))) => input = None,
            Ok(Some((Kind::Control, bytes))) => match serde_json::from_slice(&bytes) {
                Ok(Control::Signal(signal)) => kill_group(pid, signal),
                Ok(Control::Window(rows, columns)) => {
                    if let Some(fd) = terminal {
                        set_window(fd, rows, columns);
                    }
                }
                Err(_) => {}
            },
            Ok(Some(_)) => {}
            Err(_) => {
                // The rig is gone: so is the reason for the program.
                kill_group(pid, libc::SIGKILL);
                return;
            }
        }
    }
}

/// Waits for the child within its limit; kills the group when it passes. True when it did.
fn wait_limited(child: &mut std::process::Child, timeout_ms: u64) -> io::Result<(ExitStatus, bool)> {
    let start = Instant::now();
    let bound = Duration::from_millis(timeout_ms.max(1));
    let mut nap = Duration::from_millis(1);
    let mut timed_out = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((status, timed_out));
        }
        if !timed_out && start.elapsed() > bound {
            timed_out = true;
            kill_group(child.id(), libc::SIGKILL);
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(10));
    }
}

fn with_pipes(mut command: Command, request: &Exec, channel: &Channel) -> io::Result<Outcome> {
    command.stdin(if request.input {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn()?;
    let pid = child.id();
    let input = child
        .stdin
        .take()
        .map(|stream| Box::new(stream) as Box<dyn Write + Send>);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| feed(input, None, pid, channel, &over));
        let out = scope.spawn(|| stdout.map(|stream| forward(stream, Kind::Output, channel, &over)));
        let err = scope.spawn(|| stderr.map(|stream| forward(stream, Kind::ErrorOutput, channel, &over)));
        let waited = wait_limited(&mut child, request.timeout_ms);
        // A grandchild may hold the pipes open after the program ended (`sh -c 'daemon &'`): take what it says for a
        // moment, then leave it be.
        let grace = Instant::now();
        while !(out.is_finished() && err.is_finished()) && grace.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(2));
        }
        over.store(true, Ordering::Release);
        let (status, timed_out) = waited?;
        Ok(if timed_out {
            Outcome::TimedOut
        } else {
            outcome(status)
        })
    })
}

fn set_window(fd: i32, rows: u16, columns: u16) {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `fd` is an open terminal for as long as its program runs; `size` is valid to read.
    unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &size) };
}

fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let (mut main, mut other) = (0, 0);
    // SAFETY: both are valid places for descriptors; name, settings and size may be null.
    let result = unsafe {
        libc::openpty(
            &mut main,
            &mut other,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: openpty just gave both descriptors to us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(main), OwnedFd::from_raw_fd(other)) })
}

fn with_terminal(
    mut command: Command,
    (rows, columns): (u16, u16),
    request: &Exec,
    channel: &Channel,
) -> io::Result<Outcome> {
    let (main, other) = terminal()?;
    set_window(main.as_raw_fd(), rows, columns);
    command.env("TERM", "xterm-256color");
    command
        .stdin(other.try_clone()?)
        .stdout(other.try_clone()?)
        .stderr(other);
    // SAFETY: setsid and ioctl are async-signal-safe; descriptor 0 is the terminal at that point.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    // The command holds copies of the terminal's other end; while they are open, reading never ends.
    drop(command);
    let pid = child.id();
    let main = Arc::new(File::from(main));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let input: Box<dyn Write + Send> = Box::new(main.try_clone()?);
        let fd = main.as_raw_fd();
        let over = &over;
        scope.spawn(move || feed(Some(input), Some(fd), pid, channel, over));
        let reader = main.try_clone()?;
        let out = scope.spawn(move || forward(reader, Kind::Output, channel, over));
        let waited = wait_limited(&mut child, request.timeout_ms);
        // A background job of the shell may hold the terminal: hang up, as a terminal does when its user leaves.
        let grace = Instant::now();
        while !out.is_finished() && grace.elapsed() < Duration::from_millis(500) {
            std::thread::sleep(Duration::from_millis(2));
        }
        if !out.is_finished() {
            kill_group(pid, libc::SIGHUP);
        }
        over.store(true, Ordering::Release);
        let (status, timed_out) = waited?;
        Ok(if timed_out {
            Outcome::TimedOut
        } else {
            outcome(status)
        })
    })
}
