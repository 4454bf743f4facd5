//! A host of a pool: a simulated server with the daemon.

use crate::error::{Result, RigError};
use crate::failover::ensure;
use crate::host::server::Server;
use serde_json::Value;
use std::time::{Duration, Instant};

const BOUND: Duration = Duration::from_secs(120);
/// Simulated servers that share few real CPUs with many VMs answer late.
const HEARTBEAT: Duration = Duration::from_millis(600);
const WATCHDOG: &str = "/dev/watchdog0";
/// What the daemon says.
const LOG: &str = "/data/steadfast-node.log";
const OWN_PROGRAM: &str = "/data/steadfast-program";
/// The daemon's folders. What must outlive the server's power is on its data disk.
const FOLDERS: &str = "STEADFAST_DATA_DIR=/data/steadfast STEADFAST_RUN_DIR=/run/steadfast";

/// See the module.
#[derive(Clone)]
pub struct PoolHost<'r> {
    /// Where.
    pub server: &'r Server,
    heartbeat: Duration,
    /// The program there.
    program: &'static str,
    watchdog: bool,
}

impl<'r> PoolHost<'r> {
    /// On this server.
    #[must_use]
    pub fn new(server: &'r Server) -> Self {
        Self {
            server,
            heartbeat: HEARTBEAT,
            program: "steadfast",
            watchdog: false,
        }
    }

    /// With a watchdog device, the kernel's own.
    ///
    /// # Errors
    /// The server's.
    pub fn watchdog(mut self) -> Result<Self> {
        self.server
            .exec(&format!("modprobe softdog && test -c {WATCHDOG}"))?;
        self.watchdog = true;
        Ok(self)
    }

    /// With a program of its own, which an upgrade can replace: the common one is on a disk that cannot be written.
    ///
    /// # Errors
    /// It cannot be put there.
    pub fn own_program(mut self, bytes: &[u8]) -> Result<Self> {
        self.program = OWN_PROGRAM;
        self.server.put_bytes(bytes, OWN_PROGRAM, 0o755)?;
        Ok(self)
    }

    /// With another time between two heartbeats of its store.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.heartbeat = every;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'r str {
        self.server.name()
    }

    /// `steadfast ARGUMENTS`, which must succeed.
    ///
    /// # Errors
    /// What it said.
    pub fn run(&self, arguments: &str) -> Result<String> {
        self.server
            .exec_within(&format!("{FOLDERS} {} {arguments}", self.program), BOUND)
    }

    /// `steadfast --json ARGUMENTS`, whatever its exit code; nothing while it does not answer.
    ///
    /// # Errors
    /// The server cannot be asked.
    pub fn json(&self, arguments: &str) -> Result<Option<Value>> {
        let command = format!("{FOLDERS} {} --json {arguments}", self.program);
        let output = self.server.shell(&command, BOUND)?;
        Ok(serde_json::from_slice(&output.stdout).ok())
    }

    fn own_arguments(&self) -> Result<String> {
        let address = |nic: &str| {
            let found = self.server.address(nic);
            found.ok_or_else(|| RigError::Unknown(format!("server {} has no NIC {nic}", self.name())))
        };
        let (one, other) = (address("repl0")?, address("repl1")?);
        let watchdog = match self.watchdog {
            true => format!("--watchdog {WATCHDOG}"),
            false => String::new(),
        };
        Ok(format!(
            "{watchdog} --name {} --address {one} --replication {one} --replication {other} --etcd-heartbeat-ms {}",
            self.name(),
            self.heartbeat.as_millis()
        ))
    }

    /// Makes a pool of it, and starts its daemon. `suspect` is the silence after which one instance of a VM suspects the other.
    ///
    /// # Errors
    /// What `pool init` said.
    pub fn init(&self, lease: Duration, suspect: Duration) -> Result<()> {
        self.run(&format!(
            "pool init rig --lease-ms {} --vm-suspect-ms {} {}",
            lease.as_millis(),
            suspect.as_millis(),
            self.own_arguments()?
        ))?;
        self.start_daemon()
    }

    /// Lets it join the pool of `first`: the token there, the command here.
    ///
    /// # Errors
    /// What `pool join` said last.
    pub fn join(&self, first: &PoolHost<'_>, witness: bool) -> Result<()> {
        let token = first.json("pool token")?.unwrap_or_default();
        let (Some(at), Some(secret)) = (token["address"].as_str(), token["token"].as_str()) else {
            return Err(RigError::malformed("pool token", token));
        };
        let witness = if witness { "--witness" } else { "" };
        let join = format!(
            "pool join {at} --token {secret} {witness} {}",
            self.own_arguments()?
        );
        // One member of etcd after the other has to catch up.
        let began = Instant::now();
        while let Err(error) = self.run(&join) {
            ensure(began.elapsed() < BOUND, || error.to_string())?;
            std::thread::sleep(Duration::from_millis(500));
        }
        self.start_daemon()
    }

    /// Whether a token lets it in.
    ///
    /// # Errors
    /// It could not be tried.
    pub fn is_let_in(&self, first: &PoolHost<'_>, token: &str) -> Result<bool> {
        let at = first.json("pool token")?.unwrap_or_default();
        let at = at["address"].as_str().unwrap_or_default();
        let own = self.own_arguments()?;
        Ok(self.run(&format!("pool join {at} --token {token} {own}")).is_ok())
    }

    /// Starts the daemon.
    ///
    /// # Errors
    /// The server's.
    pub fn spawn_daemon(&self) -> Result<()> {
        if self.watchdog {
            // Gone with the server's power.
            self.server.exec("modprobe softdog")?;
        }
        let node = format!(
            "env {FOLDERS} STEADFAST_LOG=info NO_COLOR=1 {} node",
            self.program
        );
        self.server.spawn(&node, LOG).map(|_| ())
    }

    /// Starts the daemon, and waits until it answers.
    ///
    /// # Errors
    /// It does not; with the end of its log.
    pub fn start_daemon(&self) -> Result<()> {
        self.spawn_daemon()?;
        let began = Instant::now();
        while self.json("pool status")?.is_none() {
            ensure(began.elapsed() < BOUND, || {
                let said = self.server.shell(&format!("tail -n 20 {LOG}"), BOUND);
                let said = said.map_or_else(|e| e.to_string(), |o| o.text());
                format!("the daemon of {} does not answer; it said: {said}", self.name())
            })?;
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }
}
