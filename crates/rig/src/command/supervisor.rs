//! The supervisor: a process in the background that holds a rig and does what the command line asks.
//!
//! Invariant: when it ends, however it ends, its servers end (the kernel sees to it). Requests are served side by side; `down` waits
//! for none of them.

use super::protocol::{Ask, ServerStatus, Status, SwitchStatus, control_folder};
use super::{DiskAct, SwitchAct, UpOptions};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;
use steadfast_rig::error::IoContext;
use steadfast_rig::link::frame::{Frame, Kind};
use steadfast_rig::link::messages::{Outcome, Request};
use steadfast_rig::link::mux::{Channel, Mux};
use steadfast_rig::{DiskFault, NICS, Result, Rig, RigBuilder, RigError, Server, etcd};

const STALL_BOUND: Duration = Duration::from_secs(300);
const CONNECTIONS_MAX: usize = 64;

/// The rig that the options describe.
pub fn builder(options: &UpOptions) -> RigBuilder {
    let packages: Vec<&str> = options.packages.iter().map(String::as_str).collect();
    let mut builder = Rig::builder()
        .servers(options.servers)
        .memory_mib(options.mem)
        .cpus(options.smp)
        .data_gib(options.data)
        .seed(options.seed)
        .debian_guest(options.debian)
        .service_disk(options.service)
        .client(with_client(options))
        .packages(&packages);
    if let Some(program) = &options.steadfast {
        builder = builder.steadfast(program);
    }
    if let Some(folder) = &options.keep {
        builder = builder.run_folder(folder);
    }
    builder
}

/// True when the rig shall have a client, and can.
pub fn with_client(options: &UpOptions) -> bool {
    // SAFETY: no memory is passed, it cannot fail.
    !options.no_client && unsafe { libc::geteuid() } == 0
}

/// Holds a rig until `down`.
pub fn run(options: &str) -> Result<()> {
    let options: UpOptions =
        serde_json::from_str(options).map_err(|e| RigError::Unknown(format!("supervisor options: {e}")))?;
    let folder = control_folder()?;
    let rig = Arc::new(builder(&options).start()?);
    if options.etcd {
        etcd::start(rig.servers())?;
    }
    let socket = folder.join("control.sock");
    // The caller holds the lock of this folder, so a socket that is there is of a supervisor that is gone.
    let _ = std::fs::remove_file(&socket);
    // Bound under another name, so that whoever sees the socket finds somebody listening.
    let early = folder.join("control.sock.new");
    let _ = std::fs::remove_file(&early);
    let listener = UnixListener::bind(&early).what(|| format!("bind {}", early.display()))?;
    std::fs::rename(&early, &socket).what(|| format!("publish {}", socket.display()))?;
    let (down, asked_down) = channel();
    let for_listener = Arc::clone(&rig);
    std::thread::spawn(move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming().flatten() {
            if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                open.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let (rig, down, open) = (Arc::clone(&for_listener), down.clone(), Arc::clone(&open));
            std::thread::spawn(move || {
                serve(&rig, stream, &down);
                open.fetch_sub(1, Ordering::AcqRel);
            });
        }
    });
    // A listener that is gone ends the rig too.
    let finish = asked_down.recv();
    let _ = std::fs::remove_file(&socket);
    rig.end();
    if let Ok(finish) = finish {
        finish();
    }
    Ok(())
}

type Finish = Box<dyn FnOnce() + Send>;

fn serve(rig: &Arc<Rig>, stream: UnixStream, down: &Sender<Finish>) {
    let Ok(writer) = stream.try_clone() else { return };
    let mux = Mux::new(Box::new(writer));
    let for_requests = mux.clone();
    let mut reader = stream;
    mux.pump(&mut reader, &mut |frame: Frame| {
        let Ok(channel) = for_requests.accept(frame.channel) else {
            return;
        };
        let (rig, down) = (Arc::clone(rig), down.clone());
        std::thread::spawn(move || {
            let end = |channel: &Channel, outcome: &Outcome| {
                // A command line that is gone hears nothing.
                let _ = channel.send_small(Kind::End, &serde_json::to_vec(outcome).unwrap_or_default());
            };
            let ask = serde_json::from_slice::<Ask>(&frame.payload);
            let outcome = match ask {
                Ok(Ask::Down) => {
                    let finish: Finish = Box::new(move || {
                        end(&channel, &Outcome::Exited(0));
                        // The words must be out before the process ends.
                        std::thread::sleep(Duration::from_millis(50));
                    });
                    let _ = down.send(finish);
                    return;
                }
                Ok(ask) => act(&rig, ask, &channel).unwrap_or_else(|e| Outcome::Failed(e.to_string())),
                Err(e) => Outcome::Failed(format!("request: {e}")),
            };
            end(&channel, &outcome);
        });
    });
}

fn say(channel: &Channel, text: &str) -> Result<()> {
    channel
        .send_bulk(Kind::Output, text.as_bytes(), STALL_BOUND)
        .what(|| "answer the command line".to_string())
}

fn act(rig: &Rig, ask: Ask, channel: &Channel) -> Result<Outcome> {
    let server = |name: &str| rig.server_named(name);
    match ask {
        Ask::Down => {}
        Ask::Status => {
            let text = serde_json::to_string(&status(rig)).map_err(|e| RigError::Unknown(e.to_string()))?;
            say(channel, &text)?;
        }
        Ask::Start(name) => server(&name)?.start()?,
        Ask::Kill(name) => server(&name)?.kill()?,
        Ask::Reboot(name) => server(&name)?.reboot()?,
        Ask::Freeze(name) => server(&name)?.freeze()?,
        Ask::Thaw(name) => server(&name)?.thaw()?,
        Ask::Unplug(name, nic) => rig.unplug(&name, &nic)?,
        Ask::Plug(name, nic) => rig.plug(&name, &nic)?,
        Ask::Switch(name, change) => switch(rig, &name, change)?,
        Ask::Disk(name, change) => disk(server(&name)?, &change)?,
        Ask::Starve(name, percent) => server(&name)?.starve(percent)?,
        Ask::Clock(name, by_ms) => server(&name)?.clock_jump(by_ms)?,
        Ask::Heal => rig.heal_network()?,
        Ask::Console(name) => say(channel, &server(&name)?.console(1 << 20))?,
        Ask::Exec(name, exec) => return relay(&server(&name)?.open(&Request::Exec(exec))?, channel),
        Ask::Put(name, path, mode) => {
            return relay(&server(&name)?.open(&Request::Put { path, mode })?, channel);
        }
        Ask::Get(name, path) => return relay(&server(&name)?.open(&Request::Get { path })?, channel),
    }
    Ok(Outcome::Exited(0))
}

/// Carries frames between the command line and a server's agent until the agent says the end.
fn relay(agent: &Channel, caller: &Channel) -> Result<Outcome> {
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let passed = match caller.recv(Duration::from_millis(50)) {
                    Ok(None) => Ok(()),
                    Ok(Some((kind, bytes))) if kind.is_bulk() => agent.send_bulk(kind, &bytes, STALL_BOUND),
                    Ok(Some((kind, bytes))) => agent.send_small(kind, &bytes),
                    Err(e) => {
                        // The caller left: what it started ends with it.
                        let kill = steadfast_rig::link::messages::Control::Signal(libc::SIGKILL);
                        let _ =
                            agent.send_small(Kind::Control, &serde_json::to_vec(&kill).unwrap_or_default());
                        Err(e)
                    }
                };
                if passed.is_err() {
                    return;
                }
            }
        });
        let result = loop {
            match agent.recv(Duration::from_secs(3600)) {
                Ok(None) => {}
                Ok(Some((Kind::End, bytes))) => {
                    break serde_json::from_slice(&bytes)
                        .map_err(|e| RigError::Unknown(format!("outcome: {e}")));
                }
                Ok(Some((kind, bytes))) => {
                    if let Err(e) = caller.send_bulk(kind, &bytes, STALL_BOUND) {
                        break Err(e).what(|| "answer the command line".to_string());
                    }
                }
                Err(e) => break Err(e).what(|| "the server's agent".to_string()),
            }
        };
        over.store(true, Ordering::Release);
        result
    })
}

fn switch(rig: &Rig, name: &str, act: SwitchAct) -> Result<()> {
    let switch = rig.switch(name)?;
    let us = |ms: f64| (ms.max(0.0) * 1000.0) as u64;
    let ppm = |percent: f64| (percent.clamp(0.0, 100.0) * 10_000.0) as u32;
    match act {
        SwitchAct::Down => switch.set_down(true),
        SwitchAct::Up => switch.set_down(false),
        SwitchAct::Delay { ms, port } => switch.change_fault(port.as_deref(), |f| f.delay_us = us(ms))?,
        SwitchAct::Jitter { ms, port } => switch.change_fault(port.as_deref(), |f| f.jitter_us = us(ms))?,
        SwitchAct::Loss { percent, port } => {
            switch.change_fault(port.as_deref(), |f| f.loss_ppm = ppm(percent))?
        }
        SwitchAct::Duplicate { percent, port } => {
            switch.change_fault(port.as_deref(), |f| f.duplicate_ppm = ppm(percent))?;
        }
        SwitchAct::Reorder { percent, port } => {
            switch.change_fault(port.as_deref(), |f| f.reorder_ppm = ppm(percent))?;
        }
        SwitchAct::Corrupt { percent, port } => {
            switch.change_fault(port.as_deref(), |f| f.corrupt_ppm = ppm(percent))?;
        }
        SwitchAct::Rate { kbit, port } => switch.change_fault(port.as_deref(), |f| f.rate_kbit = kbit)?,
        SwitchAct::Partition { a, b } => switch.partition(&a, &b)?,
        SwitchAct::OneWay { from, to } => switch.partition_one_way(&from, &to)?,
        SwitchAct::Heal => switch.heal(),
    }
    Ok(())
}

fn disk(server: &Server, act: &DiskAct) -> Result<()> {
    match *act {
        DiskAct::Fail => server.disk_fault(DiskFault::Fail),
        DiskAct::FailWrites => server.disk_fault(DiskFault::FailWrites),
        DiskAct::LoseWrites => server.disk_fault(DiskFault::LoseWrites),
        DiskAct::Slow { ms } => server.disk_fault(DiskFault::Slow(ms)),
        DiskAct::Hang => server.disk_fault(DiskFault::Hang),
        DiskAct::Full { left_mib } => server.disk_fault(DiskFault::Full(left_mib)),
        DiskAct::Heal => server.disk_heal(),
    }
}

fn status(rig: &Rig) -> Status {
    let client = rig.client().ok();
    let server = |server: &Server| ServerStatus {
        name: server.name().to_string(),
        state: server.state_in_words(),
        ready: server.is_ready(),
        starts: server.starts(),
        qemu_pid: server.qemu_pid(),
        addresses: NICS
            .iter()
            .filter_map(|nic| server.address(nic))
            .map(str::to_string)
            .collect(),
    };
    Status {
        supervisor: std::process::id(),
        client_namespace: client.map(|client| client.namespace().as_raw_fd()),
        client_address: client.map(|client| client.address().to_string()),
        folder: rig.folder().to_path_buf(),
        servers: rig.servers().iter().map(server).collect(),
        switches: rig
            .switches()
            .iter()
            .map(|switch| SwitchStatus {
                name: switch.name().to_string(),
                faults: switch.faults_in_words(),
                ports: switch
                    .ports()
                    .into_iter()
                    .map(|port| {
                        let counters = switch.counters(&port).unwrap_or_default();
                        (port, counters)
                    })
                    .collect(),
            })
            .collect(),
    }
}
