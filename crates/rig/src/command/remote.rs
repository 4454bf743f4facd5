//! The command line's side of the control socket.

use super::protocol::{Ask, Status, control_folder};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use steadfast_rig::error::IoContext;
use steadfast_rig::host::client::Client;
use steadfast_rig::link::frame::Kind;
use steadfast_rig::link::messages::{Control, Outcome};
use steadfast_rig::link::mux::{Channel, Mux};
use steadfast_rig::{CLIENT_ADDRESS, Exec, Result, RigError};

const BOUND: Duration = Duration::from_secs(600);

/// Connects to the supervisor.
///
/// # Errors
/// [`RigError::Unknown`] that says how to start one.
pub fn connect() -> Result<Mux> {
    let path = control_folder()?.join("control.sock");
    let stream = UnixStream::connect(&path)
        .map_err(|_| RigError::Unknown("no rig is running; `steadfast-rig up` starts one".to_string()))?;
    let writer = stream.try_clone().what(|| "control socket".to_string())?;
    let mux = Mux::new(Box::new(writer));
    let pumped = mux.clone();
    let mut reader = stream;
    std::thread::spawn(move || pumped.pump(&mut reader, &mut |_| {}));
    Ok(mux)
}

fn open(mux: &Mux, ask: &Ask) -> Result<Channel> {
    let text = serde_json::to_vec(ask).map_err(|e| RigError::Unknown(e.to_string()))?;
    mux.open(&text).what(|| "ask the supervisor".to_string())
}

/// Copies a channel's output to `out` and standard error until its end.
fn follow(channel: &Channel, out: &mut dyn Write, bound: Duration) -> Result<Outcome> {
    loop {
        let frame = channel.recv(bound).what(|| "the supervisor".to_string())?;
        let (kind, bytes) = frame.ok_or_else(|| RigError::Timeout {
            what: "the supervisor's answer".to_string(),
            after_ms: bound.as_millis() as u64,
            detail: String::new(),
        })?;
        match kind {
            Kind::Output => out
                .write_all(&bytes)
                .and_then(|()| out.flush())
                .what(|| "write".to_string())?,
            Kind::ErrorOutput => std::io::stderr().write_all(&bytes).what(|| "write".to_string())?,
            Kind::End => {
                let outcome = serde_json::from_slice(&bytes).map_err(|e| RigError::Unknown(e.to_string()))?;
                return match outcome {
                    Outcome::Failed(why) => Err(RigError::Unknown(why)),
                    outcome => Ok(outcome),
                };
            }
            _ => {}
        }
    }
}

/// Asks for something that answers with text only; gives the text.
pub fn ask(ask: &Ask) -> Result<Vec<u8>> {
    let mux = connect()?;
    let channel = open(&mux, ask)?;
    let mut said = Vec::new();
    follow(&channel, &mut said, BOUND)?;
    Ok(said)
}

/// The state of the rig.
pub fn status() -> Result<Status> {
    serde_json::from_slice(&ask(&Ask::Status)?).map_err(|e| RigError::Unknown(format!("status: {e}")))
}

/// Prints the state; the exit code tells whether all servers are ready.
pub fn print_status(json: bool) -> Result<ExitCode> {
    let status = status()?;
    if json {
        println!(
            "{}",
            serde_json::to_string(&status).map_err(|e| RigError::Unknown(e.to_string()))?
        );
    } else {
        println!(
            "supervisor {}   files {}",
            status.supervisor,
            status.folder.display()
        );
        for server in &status.servers {
            let addresses = server.addresses.join(" ");
            println!(
                "{:<5} {:<22} {addresses}   started {} times",
                server.name, server.state, server.starts
            );
        }
        for switch in &status.switches {
            let faults = if switch.faults.is_empty() {
                "whole".to_string()
            } else {
                switch.faults.join("; ")
            };
            let bytes: u64 = switch.ports.iter().map(|(_, counters)| counters.in_bytes).sum();
            let lost: u64 = switch
                .ports
                .iter()
                .map(|(_, counters)| counters.lost_frames)
                .sum();
            println!("{:<8} {faults}   {bytes} bytes, {lost} frames lost", switch.name);
        }
        if let Some(address) = status.client_address {
            println!("client   {address}   `steadfast-rig client COMMAND` runs there");
        }
    }
    let all_ready = status.servers.iter().all(|server| server.ready);
    Ok(if all_ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}

/// The exit code of a command that ran elsewhere.
fn exit_code(outcome: &Outcome) -> ExitCode {
    match outcome {
        Outcome::Exited(code) => ExitCode::from((*code & 0xff) as u8),
        Outcome::Signalled(signal) => ExitCode::from((128 + (*signal & 0x7f)) as u8),
        Outcome::TimedOut => ExitCode::from(124),
        Outcome::Detached(_) => ExitCode::SUCCESS,
        Outcome::Failed(_) => ExitCode::FAILURE,
    }
}

/// The terminal in raw mode; as it was when dropped.
struct RawTerminal(libc::termios);

impl RawTerminal {
    fn take() -> Option<RawTerminal> {
        // SAFETY: `settings` is valid to write to; descriptor 0 is open as long as the process is.
        unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(0, &mut settings) < 0 {
                return None;
            }
            let mut raw = settings;
            libc::cfmakeraw(&mut raw);
            libc::tcsetattr(0, libc::TCSANOW, &raw);
            Some(RawTerminal(settings))
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: the settings are those that the kernel gave.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, &self.0) };
    }
}

fn window() -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: `size` is valid to write to.
    let known = unsafe { libc::ioctl(1, libc::TIOCGWINSZ, &mut size) } == 0 && size.ws_row > 0;
    known.then_some((size.ws_row, size.ws_col))
}

/// A shell on a server, or one command; its exit code is ours.
pub fn shell(server: &str, command: &[String]) -> Result<ExitCode> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let argv = match command {
        [] => vec!["bash".to_string(), "-l".to_string()],
        [one] => vec!["bash".to_string(), "-c".to_string(), one.clone()],
        several => several.to_vec(),
    };
    let pty = (terminal || command.is_empty()).then(|| window().unwrap_or((24, 80)));
    // A day: a shell is left by its user.
    let exec = Exec {
        argv,
        pty,
        input: true,
        timeout_ms: 24 * 3600 * 1000,
        ..Exec::default()
    };
    let mux = connect()?;
    let channel = open(&mux, &Ask::Exec(server.to_string(), exec))?;
    let raw = if terminal && pty.is_some() {
        RawTerminal::take()
    } else {
        None
    };
    let channel = std::sync::Arc::new(channel);
    let for_input = std::sync::Arc::clone(&channel);
    // Not joined: a read of the terminal cannot be ended, the process can.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut size = window();
        loop {
            let n = std::io::stdin().read(&mut buffer).unwrap_or(0);
            let sent = if n == 0 {
                for_input.send_small(Kind::InputEnd, &[])
            } else {
                for_input.send_bulk(Kind::Input, &buffer[..n], BOUND)
            };
            if let (Some((rows, columns)), true) = (window(), window() != size) {
                size = Some((rows, columns));
                let control = serde_json::to_vec(&Control::Window(rows, columns)).unwrap_or_default();
                let _ = for_input.send_small(Kind::Control, &control);
            }
            if n == 0 || sent.is_err() {
                return;
            }
        }
    });
    let outcome = follow(&channel, &mut std::io::stdout(), Duration::from_secs(24 * 3600));
    drop(raw);
    Ok(exit_code(&outcome?))
}

/// Runs a command of this machine in the client's namespace, in place of this process.
pub fn client(command: &[String]) -> Result<ExitCode> {
    let status = status()?;
    let number = status.client_namespace.ok_or_else(|| RigError::NotHere {
        what: "the client".to_string(),
        why: "this rig has none (it takes root)".to_string(),
    })?;
    let path = format!("/proc/{}/fd/{number}", status.supervisor);
    let namespace = std::fs::File::open(&path).what(|| format!("open the client's namespace {path}"))?;
    let client = Client::of_namespace(namespace, CLIENT_ADDRESS);
    let Some((program, arguments)) = command.split_first() else {
        return Ok(ExitCode::SUCCESS);
    };
    Err(client.command(program).args(arguments).exec()).what(|| format!("run {program}"))
}

/// Copies a file into a server.
pub fn put(server: &str, local: &Path, path: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut file = std::fs::File::open(local).what(|| format!("read {}", local.display()))?;
    let mode = file
        .metadata()
        .map(|data| data.permissions().mode() & 0o7777)
        .unwrap_or(0o644);
    let mux = connect()?;
    let channel = open(&mux, &Ask::Put(server.to_string(), path.to_string(), mode))?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = file
            .read(&mut buffer)
            .what(|| format!("read {}", local.display()))?;
        // When the other side gave up, its outcome says why.
        if n == 0 || channel.send_bulk(Kind::Input, &buffer[..n], BOUND).is_err() {
            break;
        }
    }
    channel
        .send_small(Kind::InputEnd, &[])
        .what(|| "ask the supervisor".to_string())?;
    follow(&channel, &mut std::io::sink(), BOUND).map(|_| ())
}

/// Copies a file out of a server. A file appears only when all of it is there.
pub fn get(server: &str, path: &str, local: &Path) -> Result<()> {
    let mux = connect()?;
    let channel = open(&mux, &Ask::Get(server.to_string(), path.to_string()))?;
    let partial = local.with_extension("rig-partial");
    let mut file = std::fs::File::create(&partial).what(|| format!("write {}", partial.display()))?;
    let got = follow(&channel, &mut file, BOUND);
    if got.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    got?;
    std::fs::rename(&partial, local).what(|| format!("write {}", local.display()))
}

/// Ends the rig, and waits until its supervisor is gone.
pub fn down() -> Result<()> {
    let supervisor = status()?.supervisor;
    ask(&Ask::Down)?;
    let process = format!("/proc/{supervisor}");
    for _ in 0..200 {
        if !Path::new(&process).exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(RigError::Timeout {
        what: format!("the end of the supervisor (process {supervisor})"),
        after_ms: 10_000,
        detail: String::new(),
    })
}
