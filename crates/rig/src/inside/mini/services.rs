//! The mini guest's services: echo, counter, status, control. Connections are bounded; what a stranger sends is lines of at most
//! 4 KiB or bytes to echo.

use super::{Guest, agent, control, vsock};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};

const CONNECTIONS_MAX: u64 = 128;
const LINE_BYTES_MAX: u64 = 4096;

type Start<'a> = &'a dyn Fn(&str, Box<dyn FnOnce() + Send>);

/// Starts all services.
pub fn start(guest: &'static Guest, start: Start) {
    let listen = |port: u16, serve: fn(&Guest, TcpStream) -> io::Result<()>| {
        let name = format!("tcp-{port}");
        start(
            &name,
            Box::new(move || {
                if let Err(e) = accept(guest, port, serve) {
                    guest.fault(format!("TROUBLE tcp port {port}: {e}"));
                }
            }),
        );
    };
    listen(7, |_, stream| echo(stream));
    listen(8, count);
    listen(9, |guest, mut stream| {
        let mut line = serde_json::to_vec(&guest.status())?;
        line.push(b'\n');
        stream.write_all(&line)
    });
    listen(10, |guest, stream| {
        lines(stream, |line| control::act(guest, line))
    });
    listen(11, |_, stream| super::bench::bulk(stream));
    start(
        "udp-7",
        Box::new(move || {
            if let Err(e) = udp_echo() {
                guest.fault(format!("TROUBLE udp port 7: {e}"));
            }
        }),
    );
    start(
        "vsock-7",
        Box::new(move || vsock::serve(guest, 7, |_, stream| echo(stream))),
    );
    start(
        "agent",
        Box::new(move || vsock::serve(guest, agent::PORT, agent::answer)),
    );
    start("power", Box::new(move || power_button(guest)));
}

fn accept(
    guest: &'static Guest,
    port: u16,
    serve: fn(&Guest, TcpStream) -> io::Result<()>,
) -> io::Result<()> {
    static OPEN: AtomicU64 = AtomicU64::new(0);
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    loop {
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        if OPEN.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            OPEN.fetch_sub(1, Ordering::AcqRel);
            continue; // Dropping it tells the peer.
        }
        std::thread::spawn(move || {
            // The peer's leaving, in whatever way, is no fault of the guest.
            let _ = stream.set_nodelay(true);
            let _ = serve(guest, stream);
            OPEN.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

fn echo(mut stream: impl Read + Write) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..n])?;
    }
}

/// Answers each line by what `answer` gives.
fn lines(stream: TcpStream, mut answer: impl FnMut(&str) -> String) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut line = String::new();
    loop {
        line.clear();
        if (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut said = answer(line.trim_end());
        said.push('\n');
        writer.write_all(said.as_bytes())?;
    }
}

fn count(guest: &Guest, stream: TcpStream) -> io::Result<()> {
    let mut own = 0u64;
    lines(stream, |_| {
        own += 1;
        format!("COUNT {} {own}", guest.count.fetch_add(1, Ordering::AcqRel) + 1)
    })
}

fn udp_echo() -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:7")?;
    let mut buffer = [0; 65_536];
    loop {
        if let Ok((n, from)) = socket.recv_from(&mut buffer) {
            // A datagram that cannot be answered is lost, as datagrams are.
            let _ = socket.send_to(&buffer[..n], from);
        }
    }
}

/// Turns the guest off when its power button is pressed (an input event of type key, code 116, value 1).
fn power_button(guest: &'static Guest) {
    let Ok(entries) = std::fs::read_dir("/dev/input") else {
        return;
    };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
    {
        std::thread::spawn(move || {
            let Ok(mut device) = std::fs::File::open(entry.path()) else {
                return;
            };
            let mut event = [0; 24];
            while device.read_exact(&mut event).is_ok() {
                if event[16..18] == [1, 0] && event[18..20] == [116, 0] && event[20..24] == [1, 0, 0, 0] {
                    guest.power_off();
                }
            }
        });
    }
}
