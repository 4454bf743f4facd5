//! The agent of a server: takes requests from the rig over the virtio-serial port and answers each on its own channel.

use super::{AGENT_PORT, exec, sys};
use crate::link::frame::{Frame, Kind};
use crate::link::messages::{Hello, Outcome, Request};
use crate::link::mux::{Channel, Mux};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a peer may take to consume a window of bytes before the agent gives a transfer up.
const STALL_BOUND: Duration = Duration::from_secs(120);

/// Finds the device of the agent's port.
fn port() -> io::Result<PathBuf> {
    let start = Instant::now();
    loop {
        if let Ok(ports) = std::fs::read_dir("/sys/class/virtio-ports") {
            for entry in ports.flatten() {
                let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
                if name.trim() == AGENT_PORT {
                    return Ok(Path::new("/dev").join(entry.file_name()));
                }
            }
        }
        if start.elapsed() > Duration::from_secs(10) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no virtio-serial port for the agent",
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Serves requests until the port breaks; returns why.
pub fn serve(name: &str, failures: Vec<String>) -> String {
    let opened = port().and_then(|path| {
        // The port can be opened once only, so one open serves both directions.
        let port = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok((port.try_clone()?, port))
    });
    let (mut reader, writer) = match opened {
        Ok(both) => both,
        Err(e) => return e.to_string(),
    };
    let mux = Mux::new(Box::new(writer));
    let hello = Hello {
        server: name.to_string(),
        boot_ms: sys::uptime_ms(),
        failures,
    };
    let hello = serde_json::to_vec(&hello).unwrap_or_default();
    if let Err(e) = mux.send(Kind::Hello, 0, &hello) {
        return format!("hello: {e}");
    }
    let for_requests = mux.clone();
    mux.pump(&mut reader, &mut |frame| open(&for_requests, frame));
    mux.closed().unwrap_or_default()
}

fn open(mux: &Mux, frame: Frame) {
    if frame.kind != Kind::Open {
        return;
    }
    let channel = match mux.accept(frame.channel) {
        Ok(channel) => channel,
        Err(e) => {
            let outcome = serde_json::to_vec(&Outcome::Failed(e.to_string())).unwrap_or_default();
            let _ = mux.send(Kind::End, frame.channel, &outcome);
            return;
        }
    };
    std::thread::spawn(move || {
        let outcome = match serde_json::from_slice::<Request>(&frame.payload) {
            Ok(request) => handle(request, &channel),
            Err(e) => Outcome::Failed(format!("request: {e}")),
        };
        // When the link is gone there is nobody to tell.
        let _ = channel.send_small(Kind::End, &serde_json::to_vec(&outcome).unwrap_or_default());
    });
}

fn handle(request: Request, channel: &Channel) -> Outcome {
    let done = match request {
        Request::Exec(request) => return exec::run(&request, channel),
        Request::Put { path, mode } => put(&path, mode, channel),
        Request::Get { path } => get(&path, channel),
        Request::ClockJump { by_ms } => sys::jump_clock(by_ms),
    };
    match done {
        Ok(()) => Outcome::Exited(0),
        Err(e) => Outcome::Failed(e.to_string()),
    }
}

fn put(path: &str, mode: u32, channel: &Channel) -> io::Result<()> {
    let partial = format!("{path}.rig-partial");
    let write = || -> io::Result<()> {
        if let Some(folder) = Path::new(path).parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&partial)?;
        loop {
            match channel.recv(STALL_BOUND)? {
                None => return Err(io::ErrorKind::TimedOut.into()),
                Some((Kind::Input, bytes)) => file.write_all(&bytes)?,
                Some((Kind::InputEnd, _)) => break,
                Some(_) => {}
            }
        }
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        // Whoever put it may cut the power next: it must be there then.
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        if let Some(folder) = Path::new(path).parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    let done = write();
    if done.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    done
}

fn get(path: &str, channel: &Channel) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        channel.send_bulk(Kind::Output, &buffer[..n], STALL_BOUND)?;
    }
}
