//! Failover: from the signal that kills or silences the primary to the first reply of the promoted guest.

use super::lab::{Home, Lab, Setup, Vm, wait};
use super::{NAME, Section};
use crate::bench::row::{Goal, Row, percentile};
use anyhow::{Context, Result, bail};
use pulse::frames::{self, Ends, Packet};
use pulse::shared::COUNTER_PORT;
use pulse::{Reply, Request, kind};
use rustix::net::{SendFlags, SocketAddrUnix, sendto};
use rustix::process::Signal;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HEADER: usize = super::lab::pulse_header::VNET;
const GUEST: ([u8; 6], Ipv4Addr) = ([0x52, 0x54, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 2));
const ME: ([u8; 6], Ipv4Addr) = ([2, 0x43, 10, 0, 0, 9], Ipv4Addr::new(10, 0, 0, 9));
/// Failovers go on for so long; how many that were is in the table.
const AT_MOST: Duration = Duration::from_secs(100);
/// After the death of the primary's process, in milliseconds.
const KILLED_MS: f64 = 50.0;
/// After the silence of a host, with the default detector.
const SILENT_MS: f64 = 250.0;

/// Whose first reply is waited for, and when it came.
#[derive(Default)]
struct Awaited {
    host: String,
    first: Option<Instant>,
}

/// A client that asks both hosts every millisecond, as behind a switch that floods.
struct Asker {
    awaited: Arc<Mutex<Awaited>>,
    /// Replies in which the guest says that its own checks failed, or whose checksum is wrong.
    wrong: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Asker {
    fn start(own: PathBuf, nics: Vec<PathBuf>) -> Result<Self> {
        let socket = UnixDatagram::bind(own)?;
        socket.set_read_timeout(Some(Duration::from_millis(1)))?;
        let mut it = Self {
            awaited: Arc::default(),
            wrong: Arc::default(),
            stop: Arc::default(),
            thread: None,
        };
        let (awaited, wrong, stop) = (
            Arc::clone(&it.awaited),
            Arc::clone(&it.wrong),
            Arc::clone(&it.stop),
        );
        let run = move || {
            let mut buf = vec![0; 66_000];
            let (mut nonce, mut sent) = (1, None::<Instant>);
            while !stop.load(Ordering::Relaxed) {
                if sent.is_none_or(|at| at.elapsed() >= Duration::from_millis(1)) {
                    let ask = Request {
                        kind: kind::READ,
                        nonce,
                    };
                    let ends = Ends { src: ME, dst: GUEST };
                    send(
                        &socket,
                        &nics,
                        &frames::udp(ends, 19_000, COUNTER_PORT, &ask.to_bytes()),
                    );
                    (nonce, sent) = (nonce + 1, Some(Instant::now()));
                }
                let Ok((n, from)) = socket.recv_from(&mut buf) else {
                    continue;
                };
                let at = Instant::now();
                let Some((_, _, packet)) = buf.get(HEADER..n).and_then(frames::parse) else {
                    continue;
                };
                match packet {
                    Packet::Arp { op: 1, target, .. } if target == ME.1 => {
                        send(&socket, &nics, &frames::arp(2, Ends { src: ME, dst: GUEST }));
                    }
                    Packet::Udp {
                        dport: 19_000, data, ..
                    } => {
                        let good = Reply::from_bytes(&data).is_some_and(|r| r.is_valid() && r.errors == 0);
                        if !good {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                        let name = from.as_pathname().and_then(|p| p.to_str()).unwrap_or("?");
                        let mut awaited = awaited.lock().unwrap_or_else(PoisonError::into_inner);
                        if awaited.first.is_none() && name.ends_with(&awaited.host) {
                            awaited.first = Some(at);
                        }
                    }
                    _ => {}
                }
            }
        };
        it.thread = Some(std::thread::spawn(run));
        Ok(it)
    }

    fn awaited(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next reply of this host is the one that counts.
    fn listen_to(&self, host: &str) {
        *self.awaited() = Awaited {
            host: host.into(),
            first: None,
        };
    }

    /// Waits for the first reply of the host that is listened to.
    fn reply(&self) -> Result<Instant> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let awaited = self.awaited();
            if let Some(at) = awaited.first {
                return Ok(at);
            }
            if Instant::now() > until {
                bail!("no reply from {} within 20 s", awaited.host);
            }
            drop(awaited);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn send(socket: &UnixDatagram, nics: &[PathBuf], frame: &[u8]) {
    let whole = [&[0; HEADER], frame].concat();
    for nic in nics {
        // A card that is not there, or is full because its process stands still, loses the frame, as any wire would.
        if let Ok(address) = SocketAddrUnix::new(nic.as_path()) {
            let _ = sendto(socket, &whole, SendFlags::DONTWAIT, &address);
        }
    }
}

/// All rows.
pub fn run(lab: &Lab, out: &mut Section) -> Result<()> {
    for (signal, case, goal) in [
        (
            Signal::KILL,
            "kill -9 of the primary's process to the first reply",
            KILLED_MS,
        ),
        (
            Signal::STOP,
            "silence of the primary (SIGSTOP) to the first reply",
            SILENT_MS,
        ),
    ] {
        let rounds = if lab.quick { 5 } else { 200 };
        let mut found = Found {
            until: Some(Instant::now() + AT_MOST),
            ..Found::default()
        };
        // A pair that came apart is replaced; that it did is counted.
        while found.wants(rounds) {
            if let Err(error) = rounds_of(lab, signal, rounds, &mut found) {
                eprintln!("{case}: {error:#}");
                found.failed += 1;
                if found.failed > rounds / 4 {
                    return Err(error);
                }
            }
        }
        let row = |metric: &str, value: f64, unit: &str| Row::new(NAME, metric, case, value, unit);
        let times = &mut found.times;
        let n = times.len() as f64;
        out.rows
            .push(row("failover p50", percentile(times, 50), "ms").goal(Goal::AtMost(goal)));
        out.rows
            .push(row("failover p99", percentile(times, 99), "ms").goal(Goal::AtMost(goal)));
        out.rows
            .push(row("promote p50", percentile(&mut found.promote, 50) / 1e3, "ms"));
        out.rows.push(row("failovers", n, "times"));
        out.rows
            .push(row("failovers that went wrong", found.failed as f64, "times").goal(Goal::AtMost(0.0)));
        out.rows
            .push(row("replies with errors", found.wrong as f64, "replies").goal(Goal::AtMost(0.0)));
    }
    Ok(())
}

#[derive(Default)]
struct Found {
    /// In milliseconds.
    times: Vec<f64>,
    /// From grant to running, in microseconds.
    promote: Vec<f64>,
    failed: usize,
    wrong: u64,
    until: Option<Instant>,
}

impl Found {
    fn wants(&self, rounds: usize) -> bool {
        let late = self.until.is_some_and(|u| Instant::now() > u);
        self.times.len() + self.failed < rounds && (!late || self.times.len() < 5)
    }
}

fn rounds_of(lab: &Lab, signal: Signal, rounds: usize, found: &mut Found) -> Result<()> {
    let home = Home::new(lab, Setup::pulse("loop=dirty pages=100 rate=200 ip=10.0.0.2"))?;
    let asker = Asker::start(home.path("client"), vec![home.nic("a"), home.nic("b")])?;
    let (mut primary, mut standby) = home.pair()?;
    let done = (|| {
        while found.wants(rounds) {
            asker.listen_to(primary.host);
            asker.reply()?;
            // Not always at the same place of an epoch.
            std::thread::sleep(Duration::from_micros(
                5000 + found.times.len() as u64 * 7919 % 40_000,
            ));
            asker.listen_to(standby.host);
            let at = primary.signal(signal);
            std::mem::swap(&mut primary, &mut standby);
            let reply = asker.reply().with_context(|| primary.said())?;
            found.times.push((reply - at).as_secs_f64() * 1e3);
            found.promote.push(Vm::number(&primary.status()?, "promote_us"));
            let host = standby.host;
            // Its sockets' names must be free before the next one begins.
            standby.end();
            standby = home.start(host, false)?;
            wait("protected again", || primary.protects())
                .with_context(|| format!("{}\n{}", primary.said(), standby.said()))?;
        }
        Ok(())
    })();
    found.wrong += asker.wrong.load(Ordering::Relaxed);
    done
}
