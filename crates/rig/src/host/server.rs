//! A simulated server: its power, its agent, its files and commands.
//!
//! ```text
//!          start                     Hello from the agent
//!  Off ------------> On (starting) -------------------------> On (ready)
//!   ^                  |                                        |
//!   +--- kill, power off, QEMU died -----------------------------+
//!   +--- the guest restarts itself (panic, reboot) -> Off -> On by itself
//! ```

use super::qemu::{self, Hardware};
use super::qmp::Qmp;
use crate::artifacts::initramfs;
use crate::error::{IoContext, Result, RigError};
use crate::inside::ServerConfig;
use crate::link::frame::Kind;
use crate::link::messages::Hello;
use crate::link::mux::{Mux, lock};
use crate::switch::Switch;
use crate::switch::plane::Cable;
use crate::tools;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a server may take to come up.
pub const BOOT_BOUND: Duration = Duration::from_secs(90);

/// Why a server is off that is about to start again by itself, in QEMU's words.
const RESTARTS: &str = "guest-reset";

/// What a server is, over all its starts.
pub(crate) struct Plan {
    pub(crate) hardware: Hardware,
    pub(crate) config: ServerConfig,
    pub(crate) initramfs_base: Arc<Vec<u8>>,
    /// Switch and port of each NIC, in the order of the hardware.
    pub(crate) ports: Vec<(Arc<Switch>, usize)>,
}

struct Live {
    pid: i32,
    mux: Mux,
    qmp: Qmp,
    hello: Option<Hello>,
    since: Instant,
}

enum Power {
    Off(String),
    On(Live),
}

pub(crate) struct Inner {
    plan: Plan,
    power: Mutex<Power>,
    changed: Condvar,
    /// One start or stop at a time.
    switching: Mutex<()>,
    frozen: AtomicBool,
    /// Percent of a CPU's time that it gets; 100: unhindered.
    cpu_percent: AtomicU32,
    taking_turns: AtomicBool,
    starts: AtomicU32,
    rig_over: AtomicBool,
}

/// A simulated server. Clones are the same server.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

impl Server {
    pub(crate) fn new(plan: Plan) -> Server {
        Server {
            inner: Arc::new(Inner {
                plan,
                power: Mutex::new(Power::Off("it was never started".to_string())),
                changed: Condvar::new(),
                switching: Mutex::new(()),
                frozen: AtomicBool::new(false),
                cpu_percent: AtomicU32::new(100),
                taking_turns: AtomicBool::new(false),
                starts: AtomicU32::new(0),
                rig_over: AtomicBool::new(false),
            }),
        }
    }

    /// Its name: `s1`, `s2`, ...
    pub fn name(&self) -> &str {
        &self.inner.plan.hardware.name
    }

    /// Its address (without prefix length) on the NIC with this name: `repl0`, `repl1` or `client0`.
    pub fn address(&self, nic: &str) -> Option<&str> {
        let nic = self
            .inner
            .plan
            .config
            .nics
            .iter()
            .find(|found| found.name == nic)?;
        nic.address.split('/').next()
    }

    /// How often it was started.
    pub fn starts(&self) -> u32 {
        self.inner.starts.load(Ordering::Acquire)
    }

    /// True while its machine runs (also frozen, also while it starts).
    pub fn is_on(&self) -> bool {
        matches!(*lock(&self.inner.power), Power::On(_))
    }

    /// True when it is up and its agent has answered.
    pub fn is_ready(&self) -> bool {
        matches!(&*lock(&self.inner.power), Power::On(live) if live.hello.is_some())
    }

    /// Whether it stands still.
    pub fn is_frozen(&self) -> bool {
        self.inner.frozen.load(Ordering::Acquire)
    }

    /// The process id of its QEMU, while it runs.
    pub fn qemu_pid(&self) -> Option<i32> {
        match &*lock(&self.inner.power) {
            Power::On(live) => Some(live.pid),
            Power::Off(_) => None,
        }
    }

    /// The end of what it said on its serial console, over all its starts.
    pub fn console(&self, bytes_max: usize) -> String {
        let bytes = std::fs::read(&self.inner.plan.hardware.console).unwrap_or_default();
        tools::tail(&String::from_utf8_lossy(&bytes), bytes_max).to_string()
    }

    /// In one word and a bit: `off (why)`, `starting`, `ready`, `frozen`, `starved to N %`.
    pub fn state_in_words(&self) -> String {
        let state = match &*lock(&self.inner.power) {
            Power::Off(why) => return format!("off ({why})"),
            Power::On(live) if live.hello.is_none() => {
                format!("starting for {} s", live.since.elapsed().as_secs())
            }
            Power::On(_) => "ready".to_string(),
        };
        match (
            self.inner.frozen.load(Ordering::Acquire),
            self.inner.cpu_percent.load(Ordering::Acquire),
        ) {
            (true, _) => "frozen".to_string(),
            (false, 100) => state,
            (false, percent) => format!("{state}, starved to {percent} %"),
        }
    }

    /// Starts it (power on) and waits until its agent answers.
    ///
    /// # Errors
    /// [`RigError::ServerBoot`] when its start-up reported a failure; [`RigError::Timeout`] with the end of its console.
    pub fn start(&self) -> Result<()> {
        self.power_on()?;
        self.wait_ready(BOOT_BOUND)
    }

    /// Starts it and does not wait. A server that is on stays as it is.
    pub fn power_on(&self) -> Result<()> {
        let _one = lock(&self.inner.switching);
        if self.is_on() {
            return Ok(());
        }
        let plan = &self.inner.plan;
        let name = plan.hardware.name.clone();
        let image = &plan.hardware.initramfs;
        let mut file = std::fs::File::create(image).what(|| format!("make {}", image.display()))?;
        let own = initramfs::of_server(&plan.config)?;
        file.write_all(&plan.initramfs_base)
            .and_then(|()| file.write_all(&own))
            .what(|| format!("write {}", image.display()))?;
        let started = qemu::start(&plan.hardware)?;
        for ((switch, port), fd) in plan.ports.iter().zip(started.nics) {
            switch.plug_cable(*port, Cable::Stream(fd));
        }
        let writer = started
            .agent
            .try_clone()
            .what(|| format!("server {name}: agent socket"))?;
        // A server that is frozen does not read; a write to it must not last for ever.
        writer
            .set_write_timeout(Some(Duration::from_secs(60)))
            .what(|| format!("server {name}: agent socket"))?;
        let mux = Mux::new(Box::new(writer));
        let qmp = Qmp::start(&name, started.qmp).what(|| format!("server {name}: qmp"))?;
        let pid = started.child.id() as i32;
        let live = Live {
            pid,
            mux: mux.clone(),
            qmp: qmp.clone(),
            hello: None,
            since: Instant::now(),
        };
        *lock(&self.inner.power) = Power::On(live);
        self.inner.frozen.store(false, Ordering::Release);
        self.inner.cpu_percent.store(100, Ordering::Release);
        self.inner.starts.fetch_add(1, Ordering::AcqRel);
        self.inner.changed.notify_all();
        let (reader, listener) = (started.agent, self.clone());
        let spawn = |what: &str, job: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(format!("{what}-{name}"));
            thread.spawn(job).what(|| format!("server {name}: thread"))
        };
        spawn("agent", Box::new(move || listener.listen(reader, &mux, pid)))?;
        let watcher = self.clone();
        let child = started.child;
        spawn("watch", Box::new(move || watcher.watch(child, &qmp)))?;
        Ok(())
    }

    fn listen(&self, mut reader: UnixStream, mux: &Mux, pid: i32) {
        mux.pump(&mut reader, &mut |frame| {
            if frame.kind == Kind::Hello
                && let Ok(hello) = serde_json::from_slice::<Hello>(&frame.payload)
                && let Power::On(live) = &mut *lock(&self.inner.power)
                && live.pid == pid
            {
                live.hello = Some(hello);
                self.inner.changed.notify_all();
            }
        });
    }

    fn watch(&self, mut child: std::process::Child, qmp: &Qmp) {
        let pid = child.id();
        // SAFETY: `info` is a valid place for the answer. WNOWAIT: the process stays a zombie, so its number cannot become
        // somebody else's before the lock below is held.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            while libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOWAIT) < 0
                && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
            {}
        }
        qmp.wait_closed(Duration::from_secs(1));
        let reason = qmp.shutdown_reason();
        // Before the server counts as off: a start right after must not lose its new cables to this.
        for (switch, port) in &self.inner.plan.ports {
            switch.drop_cable(*port);
        }
        {
            let mut power = lock(&self.inner.power);
            let status = child.wait().map(|status| status.to_string()).unwrap_or_default();
            let complaints =
                std::fs::read_to_string(&self.inner.plan.hardware.complaints).unwrap_or_default();
            let why = match (&reason, complaints.trim()) {
                (Some(reason), _) => reason.clone(),
                (None, "") => format!("QEMU ended: {status}"),
                (None, said) => format!("QEMU ended: {status}: {}", tools::tail(said, 600)),
            };
            *power = Power::Off(why);
        }
        self.inner.changed.notify_all();
        // A host that restarts itself comes back by itself.
        if reason.as_deref() == Some(RESTARTS) && !self.inner.rig_over.load(Ordering::Acquire) {
            // A failure shows in the server's state: it stays off.
            let _ = self.power_on();
        }
    }

    /// Waits until it is up.
    pub fn wait_ready(&self, bound: Duration) -> Result<()> {
        let deadline = Instant::now() + bound;
        let mut power = lock(&self.inner.power);
        loop {
            match &*power {
                // On its way to another start, by itself.
                Power::Off(why) if why == RESTARTS && Instant::now() < deadline => {}
                Power::Off(why) => {
                    return Err(RigError::ServerOff {
                        server: self.name().to_string(),
                        why: format!("{why}; the end of its console:\n{}", self.console(1500)),
                    });
                }
                Power::On(Live {
                    hello: Some(hello), ..
                }) if hello.failures.is_empty() => return Ok(()),
                Power::On(Live {
                    hello: Some(hello), ..
                }) => {
                    let detail = hello.failures.join("; ");
                    return Err(RigError::ServerBoot {
                        server: self.name().to_string(),
                        detail,
                    });
                }
                Power::On(_) => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RigError::Timeout {
                    what: format!("the start of server {}", self.name()),
                    after_ms: bound.as_millis() as u64,
                    detail: format!("; the end of its console:\n{}", self.console(1500)),
                });
            }
            power = self
                .inner
                .changed
                .wait_timeout(power, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until it is off.
    pub fn wait_off(&self, bound: Duration) -> Result<()> {
        let power = lock(&self.inner.power);
        let waited = self
            .inner
            .changed
            .wait_timeout_while(power, bound, |power| matches!(power, Power::On(_)));
        if matches!(*waited.unwrap_or_else(PoisonError::into_inner).0, Power::Off(_)) {
            return Ok(());
        }
        Err(RigError::Timeout {
            what: format!("server {} going off", self.name()),
            after_ms: bound.as_millis() as u64,
            detail: String::new(),
        })
    }

    fn signal(&self, signal: i32) -> Result<()> {
        self.signal_when(signal, || true)
    }

    /// Sends a signal to QEMU if `still` holds, both under one lock: a frozen server is never let run by mistake.
    fn signal_when(&self, signal: i32, still: impl FnOnce() -> bool) -> Result<()> {
        match &*lock(&self.inner.power) {
            Power::Off(why) => Err(RigError::ServerOff {
                server: self.name().to_string(),
                why: why.clone(),
            }),
            Power::On(live) => {
                if still() {
                    // SAFETY: plain numbers. The watcher reaps the process only under this lock, so the number is still its.
                    unsafe { libc::kill(live.pid, signal) };
                }
                Ok(())
            }
        }
    }

    /// The axe: its power is gone at once (SIGKILL to QEMU). Waits until it is off; a server that is off stays off.
    pub fn kill(&self) -> Result<()> {
        if self.signal(libc::SIGKILL).is_err() {
            return Ok(());
        }
        self.wait_off(Duration::from_secs(10))
    }

    /// Power off and on again, and waits until it is up. Its data disk stays.
    pub fn reboot(&self) -> Result<()> {
        self.kill()?;
        self.start()
    }

    /// It stands still, whole, as if its clock had stopped (SIGSTOP to QEMU).
    pub fn freeze(&self) -> Result<()> {
        self.signal_when(libc::SIGSTOP, || {
            self.inner.frozen.store(true, Ordering::Release);
            true
        })
    }

    /// It goes on.
    pub fn thaw(&self) -> Result<()> {
        self.signal_when(libc::SIGCONT, || {
            self.inner.frozen.store(false, Ordering::Release);
            true
        })
    }

    fn signal_unless_frozen(&self, signal: i32) -> Result<()> {
        self.signal_when(signal, || !self.inner.frozen.load(Ordering::Acquire))
    }

    /// It gets so many percent of the CPU time it would have had (1 to 100; 100 ends it), in turns of 50 ms.
    pub fn starve(&self, percent: u32) -> Result<()> {
        if !self.is_on() {
            return self.signal(0);
        }
        self.inner
            .cpu_percent
            .store(percent.clamp(1, 100), Ordering::Release);
        if percent >= 100 || self.inner.taking_turns.swap(true, Ordering::AcqRel) {
            return Ok(()); // The turns being taken see the new number.
        }
        let server = self.clone();
        let thread = std::thread::Builder::new().name(format!("starve-{}", self.name()));
        let started = thread.spawn(move || server.take_turns());
        if started.is_err() {
            self.inner.taking_turns.store(false, Ordering::Release);
        }
        started.what(|| "thread for starve".to_string()).map(|_| ())
    }

    /// Stops and continues QEMU in turns while it is starved. One thread at a time does this.
    fn take_turns(&self) {
        const TURN_MS: u64 = 50;
        let percent = || u64::from(self.inner.cpu_percent.load(Ordering::Acquire));
        loop {
            let share = percent();
            let on = self.signal_unless_frozen(libc::SIGCONT).is_ok();
            if share == 100 || !on {
                self.inner.taking_turns.store(false, Ordering::Release);
                // Starved again before that store: whoever did it left the turns to this thread.
                if !on || percent() == 100 || self.inner.taking_turns.swap(true, Ordering::AcqRel) {
                    return;
                }
                continue;
            }
            std::thread::sleep(Duration::from_millis(TURN_MS * share / 100));
            // A server that is off is noticed at the next turn.
            let _ = self.signal_when(libc::SIGSTOP, || percent() != 100);
            std::thread::sleep(Duration::from_millis(TURN_MS - TURN_MS * share / 100));
        }
    }

    pub(super) fn mux(&self) -> Result<Mux> {
        match &*lock(&self.inner.power) {
            Power::On(live) if live.hello.is_some() => Ok(live.mux.clone()),
            Power::On(_) => Err(RigError::ServerOff {
                server: self.name().to_string(),
                why: "it is still starting; Server::wait_ready waits for it".to_string(),
            }),
            Power::Off(why) => Err(RigError::ServerOff {
                server: self.name().to_string(),
                why: why.clone(),
            }),
        }
    }

    /// QEMU's machine protocol, for what the rig has no verb for.
    pub fn qmp(&self) -> Result<Qmp> {
        match &*lock(&self.inner.power) {
            Power::On(live) => Ok(live.qmp.clone()),
            Power::Off(why) => Err(RigError::ServerOff {
                server: self.name().to_string(),
                why: why.clone(),
            }),
        }
    }

    /// The rig is over: no more restarts; the machine ends now.
    pub(crate) fn end(&self) {
        self.inner.rig_over.store(true, Ordering::Release);
        // Whoever is starting it finishes first; then it is killed.
        let _one = lock(&self.inner.switching);
        // Nothing more can be done here when it does not go off; the kernel ends it with this process.
        let _ = self.kill();
    }

    pub(crate) fn switches(&self) -> impl Iterator<Item = (&str, &Arc<Switch>)> {
        let nics = self.inner.plan.hardware.nics.iter();
        nics.zip(&self.inner.plan.ports)
            .map(|(nic, (switch, _))| (nic.name.as_str(), switch))
    }
}
