//! Clients of a service that must not notice anything: redis writers, a web client, a TCP session, and what they saw.
//!
//! | client | does | notices |
//! |---|---|---|
//! | [`redis`] | `INCR` and `RPUSH` of the same number over one connection, reads back | a write lost, or done twice |
//! | [`web`] | `GET /` over a new connection each time | a page that does not come, or comes wrong |
//! | session | a line there and a counted line back, over one connection for all the time | a step lost or done twice, a reset |
//! | [`frames`] | looks at the client's cable | when the guest was silent, and what it said first |
//!
//! No client ever tries anything twice: what TCP does not carry through shows as an error. Whoever reads [`Seen`] of a load that
//! ended without error may believe: nothing lost, nothing repeated, no connection reset.

pub mod frames;
pub mod redis;
pub mod waits;
pub mod web;

use crate::error::{IoContext, Result, RigError};
use crate::host::client::Client;
use crate::vm::{Counting, Mini};
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use frames::Frames;
use waits::{Waits, WaitsSeen};

/// An operation that takes longer than this counts as a lost connection.
pub const OPERATION_BOUND: Duration = Duration::from_secs(60);

/// How much load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// redis clients, each with a connection and keys of its own.
    pub writers: u64,
    /// Rest of a writer between two writes.
    pub write_every: Duration,
    /// Rest of the web client between two pages.
    pub page_every: Duration,
    /// Rest of the session between two steps.
    pub step_every: Duration,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            writers: 2,
            write_every: Duration::from_millis(20),
            page_every: Duration::from_millis(500),
            step_every: Duration::from_millis(50),
        }
    }
}

/// What the clients saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// redis writes that were answered, each with the number that it should have.
    pub writes: WaitsSeen,
    /// Pages that came, whole.
    pub pages: WaitsSeen,
    /// Steps of the session.
    pub steps: u64,
    /// The longest a step took.
    pub step_longest: Duration,
}

impl Seen {
    /// The longest that any client waited for anything.
    pub fn longest(&self) -> Duration {
        self.writes.longest.max(self.pages.longest).max(self.step_longest)
    }
}

/// What a load leaves behind, when all of it held.
#[derive(Clone, Copy, Debug, Default)]
pub struct Audited {
    /// Writes that redis has, each once and in order.
    pub writes: u64,
    /// Pages that were fetched.
    pub pages: u64,
    /// Steps of the one session.
    pub steps: u64,
}

struct Background {
    name: String,
    thread: JoinHandle<io::Result<()>>,
}

/// Clients at work.
pub struct Load {
    client: Client,
    address: Ipv4Addr,
    stop: Arc<AtomicBool>,
    writers: Vec<Arc<redis::Progress>>,
    writes: Arc<Waits>,
    pages: Arc<Waits>,
    session: Counting,
    threads: Vec<Background>,
    frames: Frames,
}

impl Load {
    /// Connects all clients to the mini guest with its service disk, and lets them work.
    ///
    /// # Errors
    /// A client that cannot connect within `bound`.
    pub fn start(
        client: &Client,
        address: Ipv4Addr,
        mac: [u8; 6],
        options: &LoadOptions,
        bound: Duration,
    ) -> Result<Load> {
        let frames = Frames::watch(client, mac).what(|| "watch the client's cable".to_string())?;
        let stop = Arc::<AtomicBool>::default();
        let (writes, pages) = (Arc::<Waits>::default(), Arc::<Waits>::default());
        let (mut threads, mut writers) = (Vec::new(), Vec::new());
        for number in 0..options.writers {
            let mut writer = redis::Writer::connect(client, address, number, bound)
                .what(|| format!("redis client {number}"))?;
            writers.push(writer.progress());
            let (stop, writes, rest) = (Arc::clone(&stop), Arc::clone(&writes), options.write_every);
            threads.push(background(format!("redis client {number}"), move || {
                while !stop.load(Ordering::Acquire) {
                    let began = Instant::now();
                    writer.write()?;
                    writes.done(began);
                    std::thread::sleep(rest);
                }
                Ok(())
            })?);
        }
        {
            let (stop, pages, rest) = (Arc::clone(&stop), Arc::clone(&pages), options.page_every);
            let client = client.clone();
            // The first here, so that a service that is not up yet is waited for.
            web::get_retry(&client, address, bound).what(|| "the first page".to_string())?;
            threads.push(background("web client".to_string(), move || {
                while !stop.load(Ordering::Acquire) {
                    let began = Instant::now();
                    web::get(&client, address)?;
                    pages.done(began);
                    std::thread::sleep(rest);
                }
                Ok(())
            })?);
        }
        let session = Mini::new(client, address)
            .counter(OPERATION_BOUND)?
            .go_on(options.step_every)
            .what(|| "the session".to_string())?;
        Ok(Load {
            client: client.clone(),
            address,
            stop,
            writers,
            writes,
            pages,
            session,
            threads,
            frames,
        })
    }

    /// What they saw since the last [`Load::look_away`].
    pub fn seen(&self) -> Seen {
        Seen {
            writes: self.writes.seen(),
            pages: self.pages.seen(),
            steps: self.session.steps(),
            step_longest: self.session.longest(),
        }
    }

    /// Waits are measured from now on; what was counted stays counted.
    pub fn look_away(&self) {
        self.writes.begin();
        self.pages.begin();
        self.session.take_longest();
    }

    /// The client's cable.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Waits until every client has had `count` more answers.
    ///
    /// # Errors
    /// A client that ended, or that had too few answers within `bound`.
    pub fn wait_answers(&self, count: u64, bound: Duration) -> Result<()> {
        let deadline = Instant::now() + bound;
        let now = || {
            let mut all: Vec<u64> = self.writers.iter().map(|w| w.answered()).collect();
            all.extend([self.pages.count(), self.session.steps()]);
            all
        };
        let before = now();
        loop {
            self.alive()?;
            if now().iter().zip(&before).all(|(n, b)| *n >= b + count) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(RigError::Timeout {
                    what: format!("{count} more answers for every client"),
                    after_ms: bound.as_millis() as u64,
                    detail: format!("; answers before {before:?}, now {:?}", now()),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// All clients are at work still.
    ///
    /// # Errors
    /// Which is not; [`Load::end`] says why.
    pub fn alive(&self) -> Result<()> {
        let ended = self.threads.iter().find(|t| t.thread.is_finished());
        let name = match ended {
            Some(background) => background.name.as_str(),
            None if self.session.ended() => "the session",
            None => return Ok(()),
        };
        Err(RigError::Unknown(format!("{name} had an error and gave up")))
    }

    /// Ends the clients and audits: every write that was answered is there once, and nothing else.
    ///
    /// # Errors
    /// The first thing that any client saw wrong: a reset, a write lost or repeated, a page that did not come.
    pub fn end(self) -> Result<Audited> {
        self.stop.store(true, Ordering::Release);
        let mut wrong = Vec::new();
        for Background { name, thread } in self.threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => wrong.push(format!("{name}: {e}")),
                Err(_) => wrong.push(format!("{name}: its thread panicked")),
            }
        }
        let steps = self.session.steps();
        if let Err(e) = self.session.stop() {
            wrong.push(format!("the session, at step {steps}: {e}"));
        }
        let mut writes = 0;
        for progress in &self.writers {
            match redis::audit(&self.client, self.address, progress) {
                Ok(found) => writes += found,
                Err(e) => wrong.push(e.to_string()),
            }
        }
        if wrong.is_empty() {
            Ok(Audited {
                writes,
                pages: self.pages.count(),
                steps,
            })
        } else {
            Err(RigError::Unknown(wrong.join("; ")))
        }
    }
}

impl Load {
    /// Ends the clients of a guest that lost its power: their errors are no news. Waits for the service, and audits: every write
    /// that was answered is there, once. Gives their count.
    ///
    /// # Errors
    /// A write that was answered and is not there, or twice; a service that does not come back within `bound`.
    pub fn audit_after_loss(self, bound: Duration) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        // Their connections end with a reset of the new guest, or with the bound of an operation.
        for Background { thread, .. } in self.threads {
            let _ = thread.join();
        }
        let _ = self.session.stop();
        redis::wait_loaded(&self.client, self.address, bound).what(|| "redis, after the loss".to_string())?;
        let mut writes = 0;
        for progress in &self.writers {
            writes += redis::audit(&self.client, self.address, progress).what(|| "the audit".to_string())?;
        }
        Ok(writes)
    }
}

fn background(name: String, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<Background> {
    let thread = std::thread::Builder::new()
        .name(name.clone())
        .spawn(work)
        .what(|| format!("thread for {name}"))?;
    Ok(Background { name, thread })
}
