//! A VM on a simulated server, run there by `steadfast vm`: what tests and the demo do with one.
//!
//! ```text
//! rig process --agent--> server: `steadfast vm run|save|restore ...` (one process per VM)
//!      client --client switch, br0, TAP--> guest
//! ```
//! Its console is the file [`Vm::console`] of the server, appended to by every process that runs the VM, so that the whole
//! file is what the guest has said, byte for byte. Every wait has a bound and ends early when the VM's process is gone.

use crate::error::{IoContext, Result, RigError};
use crate::host::client::Client;
use crate::host::server::Server;
use crate::inside::mini::Status;
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The CPU that guests on simulated servers see: software emulation has an XSAVE that no real CPU has.
pub const CPU: &str = "x86-64-v2";
/// Mini guest's port that counts lines.
pub const COUNT_PORT: u16 = 8;
const STATUS_PORT: u16 = 9;
const CONTROL_PORT: u16 = 10;
/// How long a control request may take; a save writes all of RAM.
const CONTROL_BOUND: Duration = Duration::from_secs(120);
/// How long one look at a console lasts at most.
const WATCH: Duration = Duration::from_secs(10);
const STATUS_BYTES_MAX: u64 = 64 << 10;

/// Arguments of `steadfast vm run` for the mini guest, started from kernel and initrd on bridge br0. `words` are added to its
/// kernel command line (see [`crate::inside::mini`]).
pub fn mini_arguments(vcpus: u32, memory_mib: u32, address: Ipv4Addr, words: &str) -> String {
    format!(
        "--kernel /guests/mini/bzImage --initrd /guests/mini/initrd \
         --cmdline \"$(cat /guests/mini/cmdline) mini.ip={address}/24 {words}\" \
         --cpus {vcpus} --memory {memory_mib}MiB --nic br0 --cpu {CPU}"
    )
}

/// A VM on a simulated server. Dropping it ends its process.
pub struct Vm<'r> {
    server: &'r Server,
    name: String,
    processes: u32,
    pid: Option<u32>,
}

impl<'r> Vm<'r> {
    /// Starts `steadfast vm run ARGUMENTS` in the background; it does not wait for the guest.
    ///
    /// # Errors
    /// Those of the agent. A VM that cannot start is noticed by the first wait.
    pub fn run(server: &'r Server, name: &str, arguments: &str) -> Result<Vm<'r>> {
        let mut vm = Vm {
            server,
            name: name.to_string(),
            processes: 0,
            pid: None,
        };
        server.exec(&format!("rm -f {}", vm.console()))?;
        vm.spawn(&format!("run {arguments} --name {name}"))?;
        Ok(vm)
    }

    fn spawn(&mut self, words: &str) -> Result<()> {
        self.processes += 1;
        let command = format!("steadfast vm {words} --console {}", self.console());
        self.pid = Some(self.server.spawn(&command, &self.log())?);
        Ok(())
    }

    /// Path of its console's file in the server.
    pub fn console(&self) -> String {
        format!("/run/{}.console", self.name)
    }

    /// Path of what its newest process has said, in the server.
    pub fn log(&self) -> String {
        format!("/run/{}.{}.log", self.name, self.processes)
    }

    /// The number in the server of the process that runs it.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// True while its process is there.
    pub fn is_alive(&self) -> Result<bool> {
        match self.pid {
            Some(pid) => Ok(self
                .server
                .shell(&format!("kill -0 {pid}"), Duration::from_secs(20))?
                .success()),
            None => Ok(false),
        }
    }

    /// The error of a VM that is gone or late, with what it and its monitor said last.
    fn trouble(&self, what: &str, after: Duration) -> RigError {
        let tail = format!("tail -n 5 {}; tail -c 1200 {}", self.log(), self.console());
        let said = self
            .server
            .shell(&tail, Duration::from_secs(20))
            .map_or_else(|e| e.to_string(), |output| output.text());
        RigError::Timeout {
            what: format!("{what} of VM {} on {}", self.name, self.server.name()),
            after_ms: after.as_millis() as u64,
            detail: format!("; log and console end with:\n{said}"),
        }
    }

    /// Asks again and again until there is an answer; ends early when the VM's process ends.
    fn wait<T>(&self, what: &str, bound: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = ask()? {
                return Ok(found);
            }
            if start.elapsed() > bound || !self.is_alive()? {
                // It may have said so right before it ended.
                return ask()?.ok_or_else(|| self.trouble(what, start.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits for the `count`th console line that contains `text` (from the VM's beginning); gives it back.
    pub fn wait_console(&self, text: &str, count: usize, bound: Duration) -> Result<String> {
        let grep = format!(
            "grep -aF -m {count} -- '{text}' {} | tail -n +{count}",
            self.console()
        );
        let alive = self
            .pid
            .map_or("false".to_string(), |pid| format!("kill -0 {pid}"));
        let begin = Instant::now();
        loop {
            // Looked for by one command on the server: each that is started there takes CPU from the guest.
            let left = bound.saturating_sub(begin.elapsed());
            let turns = left.min(WATCH).as_millis() / 500 + 1;
            let watch = format!(
                "for turn in $(seq {turns}); do {alive} 2>/dev/null; gone=$?; line=$({grep}); \
                 [ -n \"$line\" ] || [ $gone -ne 0 ] && break; sleep 0.5; done; echo \"$line\""
            );
            let line = self.server.shell(&watch, WATCH + CONTROL_BOUND)?.text();
            if !line.trim().is_empty() {
                return Ok(line);
            }
            if begin.elapsed() >= bound || !self.is_alive()? {
                return Err(self.trouble(&format!("`{text}` on the console"), begin.elapsed()));
            }
        }
    }

    /// As [`Vm::wait_console`], for a start, whose time depends on how busy this machine is more than on anything else: it may
    /// last up to `bound`, as long as the guest is never silent for longer than `silence`.
    pub fn wait_start(&self, text: &str, count: usize, silence: Duration, bound: Duration) -> Result<String> {
        let begin = Instant::now();
        let (mut size, mut grew) = (String::new(), Instant::now());
        loop {
            match self.wait_console(text, count, Duration::from_secs(10)) {
                Ok(line) => return Ok(line),
                Err(e) if !self.is_alive()? || begin.elapsed() > bound => return Err(e),
                Err(_) => {}
            }
            let sized = format!("stat -c %s {}", self.console());
            let now = self.server.shell(&sized, Duration::from_secs(60))?.text();
            if now != size {
                (size, grew) = (now, Instant::now());
            } else if grew.elapsed() > silence {
                return Err(self.trouble(&format!("`{text}` (the guest is silent)"), begin.elapsed()));
            }
        }
    }

    /// Everything the guest has said on its console.
    pub fn console_bytes(&self) -> Result<Vec<u8>> {
        self.server.get_bytes(&self.console())
    }

    /// `steadfast vm VERB NAME ARGUMENTS`; gives back its answer.
    pub fn control(&self, verb: &str, arguments: &str) -> Result<Value> {
        let command = format!("steadfast vm {verb} {} {arguments} --json", self.name);
        let said = self.server.exec_within(&command, CONTROL_BOUND)?;
        serde_json::from_str(&said).map_err(|e| RigError::malformed(format!("answer of `{command}`"), e))
    }

    /// Waits until its process answers and says that it runs.
    pub fn wait_running(&self, bound: Duration) -> Result<Value> {
        self.wait("running", bound, || match self.control("status", "") {
            Ok(status) => Ok((status["state"] == "running").then_some(status)),
            Err(RigError::CommandFailed { .. }) => Ok(None),
            Err(other) => Err(other),
        })
    }

    /// Waits for its process to end; it is forgotten then.
    pub fn wait_gone(&mut self, bound: Duration) -> Result<()> {
        let Some(pid) = self.pid else { return Ok(()) };
        let gone = format!(
            "for i in $(seq {}); do kill -0 {pid} 2>/dev/null || exit 0; sleep 0.05; done; exit 1",
            bound.as_millis() / 50
        );
        let output = self.server.shell(&gone, bound * 2 + Duration::from_secs(20))?;
        if !output.success() {
            return Err(self.trouble("the end", bound));
        }
        self.pid = None;
        Ok(())
    }

    /// Saves it into `file` of the server and waits for its process to end; gives back what `vm save` said.
    pub fn save(&mut self, file: &str) -> Result<Value> {
        let said = self.control("save", file)?;
        self.wait_gone(Duration::from_secs(30))?;
        Ok(said)
    }

    /// Goes on from `file` in a new process; it does not wait for it.
    pub fn restore(&mut self, file: &str) -> Result<()> {
        self.spawn(&format!("restore {file}"))
    }

    /// Ends its process at once, as if its power failed.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(pid) = self.pid {
            self.server
                .shell(&format!("kill -9 {pid}"), Duration::from_secs(20))?;
            self.wait_gone(Duration::from_secs(20))?;
        }
        Ok(())
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        // A server that is off has no process of it either.
        let _ = self.stop();
    }
}

/// The mini guest at this address, as its client sees it.
#[derive(Clone, Debug)]
pub struct Mini {
    client: Client,
    address: Ipv4Addr,
}

impl Mini {
    /// It need not run yet.
    pub fn new(client: &Client, address: Ipv4Addr) -> Mini {
        Mini {
            client: client.clone(),
            address,
        }
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    fn connect(&self, port: u16, bound: Duration) -> Result<TcpStream> {
        let what = || format!("connect to {}:{port}", self.address);
        let stream = self
            .client
            .tcp_retry(SocketAddr::from((self.address, port)), bound)
            .what(what)?;
        stream.set_read_timeout(Some(bound)).what(what)?;
        Ok(stream)
    }

    /// What it knows about itself.
    pub fn status(&self, bound: Duration) -> Result<Status> {
        let mut text = String::new();
        self.connect(STATUS_PORT, bound)?
            .take(STATUS_BYTES_MAX)
            .read_to_string(&mut text)
            .what(|| format!("status of {}", self.address))?;
        serde_json::from_str(&text)
            .map_err(|e| RigError::malformed(format!("status of {}", self.address), format!("{e}: {text}")))
    }

    /// Has it do something (see [`crate::inside::mini::control`]); gives back its answer.
    pub fn command(&self, line: &str, bound: Duration) -> Result<String> {
        let what = || format!("`{line}` to {}", self.address);
        let mut stream = self.connect(CONTROL_PORT, bound)?;
        stream.write_all(format!("{line}\n").as_bytes()).what(what)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).what(what)?;
        Ok(answer.trim_end().to_string())
    }

    /// Opens a connection that counts.
    pub fn counter(&self, bound: Duration) -> Result<Counter> {
        let stream = self.connect(COUNT_PORT, bound)?;
        Counter::of(stream).what(|| format!("counter of {}", self.address))
    }
}

/// One TCP connection to the mini guest's counter. Each step is a line there and a line back, and the guest's own count of
/// this connection must be ours: a step lost or done twice is an error.
#[derive(Debug)]
pub struct Counter {
    reader: BufReader<TcpStream>,
    steps: u64,
}

impl Counter {
    fn of(stream: TcpStream) -> io::Result<Counter> {
        Ok(Counter {
            reader: BufReader::new(stream),
            steps: 0,
        })
    }

    /// One step; gives the guest's count over this connection.
    ///
    /// # Errors
    /// The connection's, and `InvalidData` for a wrong count.
    pub fn step(&mut self) -> io::Result<u64> {
        self.reader.get_mut().write_all(b"next\n")?;
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.steps += 1;
        let own = line.split_whitespace().nth(2).and_then(|word| word.parse().ok());
        if own == Some(self.steps) {
            Ok(self.steps)
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("step {} was answered by {line:?}", self.steps),
            ))
        }
    }

    /// Goes on in the background, a step every `every`, until stopped or in error.
    pub fn go_on(mut self, every: Duration) -> io::Result<Counting> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        shared.steps.store(self.steps, Ordering::Release);
        let thread = std::thread::Builder::new()
            .name("counter".to_string())
            .spawn(move || {
                while !theirs.stop.load(Ordering::Acquire) {
                    let start = Instant::now();
                    theirs.steps.store(self.step()?, Ordering::Release);
                    let took = start.elapsed();
                    theirs
                        .gap_max_us
                        .fetch_max(took.as_micros() as u64, Ordering::AcqRel);
                    std::thread::sleep(every.saturating_sub(took));
                }
                Ok(self)
            })?;
        Ok(Counting { shared, thread })
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    steps: AtomicU64,
    gap_max_us: AtomicU64,
}

/// A [`Counter`] that goes on in the background.
#[derive(Debug)]
pub struct Counting {
    shared: Arc<Shared>,
    thread: JoinHandle<io::Result<Counter>>,
}

impl Counting {
    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.shared.steps.load(Ordering::Acquire)
    }

    /// The longest time a step took since the last [`Counting::take_longest`].
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.shared.gap_max_us.load(Ordering::Acquire))
    }

    /// It had an error and ended; [`Counting::stop`] says which.
    pub fn ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// The longest time a step took since the last call.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.shared.gap_max_us.swap(0, Ordering::AcqRel))
    }

    /// Waits for a number of steps.
    ///
    /// # Errors
    /// The connection's own error, or `TimedOut`.
    pub fn wait_steps(&self, steps: u64, bound: Duration) -> io::Result<()> {
        let deadline = Instant::now() + bound;
        while self.steps() < steps {
            if self.thread.is_finished() {
                return Err(io::Error::other("the connection ended; Counting::stop says why"));
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends the thread; gives the connection back, or what went wrong with it.
    pub fn stop(self) -> io::Result<Counter> {
        self.shared.stop.store(true, Ordering::Release);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the counter's thread panicked")))
    }
}
