//! The main loop of a VM's process: it owns the machine and does one thing at a time.
//!
//! ```text
//! guest events (shutdown, reset, panic) --+
//! control requests ----------------------+--> main loop --> machine
//! console input --> serial port (direct)
//! ```

use crate::assemble::{AssembleError, Surroundings, Vm, assemble_from};
use crate::control::{self, Answers, Call, NetRate, Request, Then, failure};
use crate::guest_care::GuestCare;
use crate::happened::{End, Happened};
use crate::isolation::{Confined, Isolation, IsolationError};
use crate::last_words;
use crate::resources::{Claim, Resources};
use crate::spec::VmSpec;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_machine::devices::legacy::OutputSink;
use steadfast_machine::devices::virtio::net::NetHandle;
use steadfast_machine::machine::ThreadHooks;
use steadfast_machine::state::{SaveError, SaveReader, SaveWriter};
use steadfast_machine::vcpu::VcpuEvent;
use steadfast_types::PAGE_SIZE;

/// Exit code of a VM's process that ended with [`ProcessError::Fenced`]: what follows a handover or a takeover, and no failure.
pub const FENCED_EXIT: u8 = 4;
/// The same with [`ProcessError::DiskFault`]: the VM is better off on another host.
pub const DISK_FAULT_EXIT: u8 = 5;

/// A VM's process that ended, or could not begin.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ProcessError {
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error("the saved machine's specification does not parse: {0}")]
    Spec(serde_json::Error),
    #[error(
        "{0} holds the state of a VM without its memory; only the process that has the memory can go on with it"
    )]
    NoMemory(PathBuf),
    #[error("control socket: {0}")]
    Control(std::io::Error),
    #[error(transparent)]
    Isolation(#[from] IsolationError),
    #[error("{0}")]
    Restore(#[from] steadfast_machine::machine::MachineError),
    #[error("another host runs this VM now, this instance has stopped; start it again to mirror the VM here")]
    Fenced,
    #[error("{0}")]
    DiskFault(String),
    #[error("the guest ended with a fault: {0:?}")]
    GuestFault(VcpuEvent),
}

/// Why the process may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest turned itself off.
    Shutdown,
    /// The control socket said `stop`.
    Stopped,
    /// The VM was saved and its process is no longer needed.
    Saved,
    /// The guest asked for a reset, and whoever runs this process boots it anew.
    Reset,
    /// The process got a signal that asks it to end.
    Signalled,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Shutdown => "the guest turned itself off",
            Self::Stopped => "it was stopped by request",
            Self::Saved => "it was saved, and its file is the VM now",
            Self::Reset => "the guest asked for a reset",
            Self::Signalled => "a signal asked its process to end",
        })
    }
}

/// How a VM starts.
pub enum Start {
    /// From power-on.
    Boot(Box<VmSpec>),
    /// From a saved file.
    Restore(PathBuf),
}

/// Takes a machine's serial port, to feed it input.
pub type OnSerial = dyn Fn(&Arc<Mutex<steadfast_machine::devices::legacy::SerialPort>>) + Send;

/// What a VM's process is given.
pub struct Options {
    /// Path of the control socket; none: the VM cannot be reached.
    pub control: Option<PathBuf>,
    /// Makes the sink of the serial port; called again after a guest reset.
    pub serial: Box<dyn Fn() -> Box<dyn OutputSink> + Send>,
    /// Makes the sink of the debug console.
    pub debugcon: Box<dyn Fn() -> Option<Box<dyn OutputSink>> + Send>,
    /// Takes the serial port whenever there is a new one, to feed it input.
    pub on_serial: Box<OnSerial>,
    /// Stays paused after a boot or restore until `resume`.
    pub paused: bool,
    /// A guest that panicked, and does not start itself anew, is reset ([`crate::guest_care`]).
    pub reset_panicked: bool,
    /// Run first on each thread of the machine, under its system call filter if there is one.
    pub hooks: ThreadHooks,
    /// How the process is confined before it meets the guest; none: not at all, for tests within one process.
    pub isolation: Option<Isolation>,
}

enum Event {
    /// There is news of the guest.
    Guest,
    Control(Call),
}

/// Requests that wait for the main loop at most.
const EVENTS_MAX: usize = 64;
/// How often output that a full sink refused is offered again, and signals are looked for.
const FLUSH_EVERY: Duration = Duration::from_millis(20);
/// How long a disk may take to come to rest.
const REST_MAX: Duration = Duration::from_secs(10);
/// How long the end of the process waits for its last answers to be written.
const ANSWER_BOUND: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Running {
    Yes,
    Paused,
}

/// What one pass of the main loop came to.
enum Next {
    Ended(Ended),
    /// Power-on again.
    Reset,
}

struct Process<'a> {
    vm: Vm,
    options: &'a mut Options,
    control: Option<&'a control::Bound>,
    _confined: Option<Confined>,
    happened: Arc<Happened>,
    running: Running,
    care: GuestCare,
    resets: u64,
    started: Instant,
    last_pause_us: u64,
    /// The guest is on a new TAP, perhaps on another host: at its first step it tells the network where it is now.
    announce: bool,
    /// Another process may have the disks and sockets.
    released: bool,
    /// Of the present machine and those after it.
    net_rate: NetRate,
    /// The guest asked for a reset that waits until the disks and sockets are ours again.
    reset_waits: bool,
}

/// The machine of `spec` from what is open: at start, and again after a reset.
fn build(
    spec: &VmSpec,
    resources: &Arc<Resources>,
    options: &Options,
    happened: &Arc<Happened>,
) -> Result<Vm, AssembleError> {
    let around = Surroundings {
        events: Arc::clone(happened),
        serial: (options.serial)(),
        debugcon: (options.debugcon)(),
        hooks: options.hooks.clone(),
        wrap_net: None,
        give_disk: None,
        give_ram: None,
    };
    let vm = assemble_from(spec.clone(), Arc::clone(resources), around)?;
    (options.on_serial)(&vm.serial);
    Ok(vm)
}

/// Opens all that the VM needs, and then gives up what the process has no more need of.
fn prepare(
    spec: &mut VmSpec,
    options: &mut Options,
) -> Result<(Arc<Resources>, Option<Confined>), ProcessError> {
    let isolation = options.isolation.clone();
    let group = isolation
        .as_ref()
        .and_then(|i| i.enter_cgroup(&spec.name, spec.memory_bytes));
    let resources = Arc::new(Resources::open(spec, None, Claim::Now)?);
    let confined = match isolation {
        Some(isolation) => {
            let sockets: Vec<&Path> = options
                .control
                .iter()
                .map(PathBuf::as_path)
                .chain(resources.sockets())
                .collect();
            isolation.give(&spec.name, resources.sockets());
            let confined = isolation.confine(&spec.name, group.as_ref(), &sockets, &options.hooks)?;
            options.hooks = confined.hooks.clone();
            Some(confined)
        }
        None => None,
    };
    Ok((resources, confined))
}

/// Runs a VM until it ends.
///
/// With [`Options::isolation`] the calling process gives up its privileges for good: it is one VM's from then on.
///
/// # Errors
/// [`ProcessError`]; a guest that only resets or panics is no error.
pub fn run(start: Start, mut options: Options) -> Result<Ended, ProcessError> {
    ignore_file_size_signal();
    if options.isolation.is_some() {
        last_words::of_faults();
    }
    let control = options
        .control
        .as_deref()
        .map(control::Bound::new)
        .transpose()
        .map_err(ProcessError::Control)?;
    let mut answers = Answers::default();
    let ended = run_bound(start, &mut options, control.as_ref(), &mut answers);
    // Also when the VM could not begin.
    if let Some(control) = &control {
        control.leave();
    }
    // The queue is gone: every request is answered, if only with "the VM is ending". Who asked must hear it.
    let owed = answers.settle(ANSWER_BOUND);
    if owed > 0 {
        tracing::warn!(owed, "somebody does not take the answer that the VM ends with");
    }
    ended
}

/// A write beyond a limit on the size of files must fail like any other, not end the VM.
fn ignore_file_size_signal() {
    // SAFETY: sets a signal to be ignored; no handler of ours is replaced.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

fn run_bound(
    start: Start,
    options: &mut Options,
    control: Option<&control::Bound>,
    answers: &mut Answers,
) -> Result<Ended, ProcessError> {
    let (queue, events) = sync_channel(EVENTS_MAX);
    let wake = queue.clone();
    // A full queue wakes the main loop as well.
    let happened = Arc::new(Happened::new(move || drop(wake.try_send(Event::Guest))));
    let announce = matches!(start, Start::Restore(_));
    let (mut spec, saved) = match start {
        Start::Boot(spec) => (*spec, None),
        Start::Restore(path) => {
            let saved = SaveReader::open(&path)?;
            let spec: VmSpec = serde_json::from_slice(&saved.spec).map_err(ProcessError::Spec)?;
            if saved.ram_bytes != spec.memory_bytes {
                return Err(ProcessError::NoMemory(path));
            }
            (spec, Some(saved))
        }
    };
    let (resources, confined) = prepare(&mut spec, options)?;
    let vm = build(&spec, &resources, options, &happened)?;
    match saved {
        None => vm.boot()?,
        Some(mut saved) => {
            let state = std::mem::take(&mut saved.state);
            saved.load(vm.machine.ram())?;
            vm.machine.restore(state)?;
        }
    }
    let (calls, incoming) = sync_channel::<Call>(4);
    if let Some(listener) = control {
        let listener = listener.try_clone().map_err(ProcessError::Control)?;
        *answers = control::serve(listener, calls).map_err(ProcessError::Control)?;
        let forward = std::thread::Builder::new()
            .name("control-queue".into())
            .spawn(move || {
                for call in incoming {
                    if queue.send(Event::Control(call)).is_err() {
                        return;
                    }
                }
            });
        forward.map_err(ProcessError::Control)?;
    }
    let mut process = Process {
        vm,
        running: Running::Paused,
        happened,
        care: GuestCare::new(options.reset_panicked),
        resets: 0,
        started: Instant::now(),
        last_pause_us: 0,
        announce,
        released: false,
        reset_waits: false,
        net_rate: NetRate::default(),
        options,
        control,
        _confined: confined,
    };
    if !process.options.paused {
        process.resume();
    }
    loop {
        match process.serve(&events)? {
            Next::Reset => process = process.reset()?,
            Next::Ended(ended) => return Ok(ended),
        }
    }
}

impl Process<'_> {
    fn serve(&mut self, events: &Receiver<Event>) -> Result<Next, ProcessError> {
        loop {
            let ended = match events.recv_timeout(FLUSH_EVERY) {
                Ok(Event::Control(call)) => {
                    let (answer, ended) = self.control(&call.request, call.file);
                    if let (Some(_), Some(control)) = (ended, self.control) {
                        // Before the answer: whoever asked may start the next process of this name at once.
                        control.leave();
                    }
                    // The asker may have gone; what it asked is done all the same.
                    let _ = call.answer.send(answer);
                    ended
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.flush_console();
                    None
                }
                Ok(Event::Guest) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Ended::Stopped),
            };
            let ended = match ended {
                None if last_words::asked_to_end().is_some() => Some(Ended::Signalled),
                None => self.hear()?,
                ended => ended,
            };
            if let Some(ended) = ended {
                if ended != Ended::Saved {
                    self.flush_console();
                    self.pause();
                }
                return Ok(Next::Ended(ended));
            }
            if self.reset_waits && !self.released {
                return Ok(Next::Reset);
            }
        }
    }

    /// Looks at what the guest did.
    fn hear(&mut self) -> Result<Option<Ended>, ProcessError> {
        let news = self.happened.take();
        let now = Instant::now();
        if news.panics > 0 {
            let before = self.care.mishaps().panics;
            self.care.panicked(now, news.panics, news.crash_kernel);
            // A guest can say so in a loop: the log hears of it each time the count has doubled.
            let count = self.care.mishaps().panics;
            if before.checked_ilog2() != count.checked_ilog2() {
                tracing::warn!(count, "the guest's kernel panicked");
            }
        }
        self.look_after(now);
        match news.end {
            Some(End::Shutdown) => return Ok(Some(Ended::Shutdown)),
            Some(End::Fault(fault)) => return Err(ProcessError::GuestFault(fault)),
            Some(End::TripleFault(vcpu)) => {
                if (self.resets + 1).is_power_of_two() {
                    tracing::warn!(vcpu, resets = self.resets, "triple fault: the guest is reset");
                }
                self.reset_waits = true;
            }
            Some(End::Reset) => self.reset_waits = true,
            None => {}
        }
        Ok(None)
    }

    /// Resets a guest that cannot help itself.
    fn look_after(&mut self, now: Instant) {
        let runs = self.running == Running::Yes && !self.released;
        let fired = self.vm.watchdog_fired(now, runs);
        if runs {
            self.care.watchdog(now, fired);
        }
        if let Some(why) = self.care.due(now).filter(|_| runs && !self.reset_waits) {
            tracing::warn!("the guest is reset: {why}");
            self.reset_waits = true;
        }
    }

    /// Offers output again that the sink refused. Once another process may have the VM, that output is its to write.
    fn flush_console(&self) {
        if self.released {
            return;
        }
        self.vm
            .serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush_output();
    }

    fn resume(&mut self) {
        self.vm.machine.resume();
        self.running = Running::Yes;
        if std::mem::take(&mut self.announce) {
            self.vm.nics.iter().for_each(NetHandle::announce);
        }
    }

    fn pause(&mut self) -> bool {
        match self.vm.machine.quiesce() {
            Ok(mut stopped) => {
                let drained = stopped.drain(REST_MAX);
                if let Err(error) = &drained {
                    tracing::warn!(%error, "a device did not come to rest");
                }
                stopped.keep_stopped();
                self.running = Running::Paused;
                true
            }
            Err(error) => {
                tracing::error!(%error, "the VM cannot be stopped");
                false
            }
        }
    }

    /// Power-on again: kernel and command line are read anew, as the guest's own upgrades left them.
    ///
    /// The old machine goes before the new one is made: both use the same open disks, sockets, TAPs and memory. A VM
    /// that was paused stays so.
    fn reset(mut self) -> Result<Self, ProcessError> {
        let was = self.running;
        self.flush_console();
        self.pause();
        let spec = self.vm.spec.clone();
        let resources = Arc::clone(&self.vm.resources);
        drop(self.vm);
        // What the old machine still said on its way is not the new one's.
        let now = Instant::now();
        self.care.panicked(now, self.happened.take().panics, false);
        self.care.restarted(now);
        self.vm = build(&spec, &resources, self.options, &self.happened)?;
        self.net_rate.set(&self.vm.nics);
        self.vm.boot()?;
        self.resets += 1;
        self.reset_waits = false;
        self.running = Running::Paused;
        if was == Running::Yes {
            self.resume();
        }
        Ok(self)
    }

    fn control(&mut self, request: &Request, file: Option<File>) -> (Value, Option<Ended>) {
        match request {
            Request::Status => (self.status(), None),
            Request::Pause => match self.running == Running::Paused || self.pause() {
                true => (json!({"ok": true}), None),
                false => (failure(&"the VM could not be stopped; see its log"), None),
            },
            Request::Resume => {
                if self.released {
                    if let Err(error) = self.vm.take_back() {
                        return (failure(&error), None);
                    }
                    self.released = false;
                }
                self.resume();
                (json!({"ok": true}), None)
            }
            Request::Save {
                then: Then::Stop | Then::Resume,
                memory: false,
                ..
            } => (
                failure(&"a VM that is saved without its memory can only be paused: say `then: pause`"),
                None,
            ),
            Request::Save { path, then, memory } => match self.save(path, file, *then, *memory) {
                Ok(answer) => (answer, (*then == Then::Stop).then_some(Ended::Saved)),
                Err(error) => (failure(&error), None),
            },
            Request::Balloon { bytes } => match (&self.vm.balloon, u32::try_from(bytes / PAGE_SIZE)) {
                (Some(balloon), Ok(pages)) if *bytes < self.vm.spec.memory_bytes => {
                    balloon.set_target(pages);
                    (json!({"ok": true}), None)
                }
                (Some(_), _) => (failure(&"the guest has less memory than that"), None),
                (None, _) => (failure(&"this VM has no balloon; run it with --balloon"), None),
            },
            Request::PowerButton => {
                self.vm
                    .power
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .press_power_button();
                (json!({"ok": true}), None)
            }
            Request::Reset if self.running == Running::Paused => {
                (failure(&"a paused VM cannot be reset; resume it first"), None)
            }
            Request::Reset => {
                self.reset_waits = true;
                (json!({"ok": true}), None)
            }
            Request::NetRate(rate) => {
                self.net_rate = *rate;
                rate.set(&self.vm.nics);
                (json!({"ok": true}), None)
            }
            Request::HandOver { .. }
            | Request::AddPeer { .. }
            | Request::RemovePeer { .. }
            | Request::CopyState { .. }
            | Request::StoreEndpoints { .. }
            | Request::Class { .. }
            | Request::CopyRate { .. } => (
                failure(&"the VM is not protected: there is no host to hand it over to"),
                None,
            ),
            Request::Stop => (json!({"ok": true}), Some(Ended::Stopped)),
            Request::Type { text } => {
                let mut serial = self.vm.serial.lock().unwrap_or_else(PoisonError::into_inner);
                let taken = serial.enqueue_input(text.as_bytes());
                (json!({"ok": true, "taken": taken}), None)
            }
        }
    }

    /// Writes the VM to `path`, or to `file` if that is open already. If anything fails the VM goes on as if nothing
    /// had been asked.
    fn save(&mut self, path: &Path, file: Option<File>, then: Then, memory: bool) -> Result<Value, String> {
        self.flush_console();
        let was = self.running;
        let began = Instant::now();
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut stopped = self.vm.machine.quiesce().map_err(|e| text(&e))?;
        let result = (|| {
            stopped.drain(REST_MAX).map_err(|e| text(&e))?;
            if !memory && (self.reset_waits || self.happened.has_ended()) {
                // Whoever went on with it would not hear of it.
                return Err("the guest has just turned itself off, or wants a reset".into());
            }
            let state = stopped.save().map_err(|e| text(&e))?;
            let state_us = began.elapsed().as_micros() as u64;
            let spec = serde_json::to_vec(&self.vm.spec).map_err(|e| text(&e))?;
            let ram = self.vm.machine.ram();
            let bytes = if memory { ram.bytes() } else { 0 };
            match file {
                Some(file) => SaveWriter::into_file(file, path, &spec, &state, bytes),
                None => SaveWriter::create(path, &spec, &state, bytes),
            }
            .and_then(|w| match memory {
                true => w.finish(ram),
                false => w.finish_without_memory(),
            })
            .map_err(|e| text(&e))?;
            Ok::<_, String>((state_us, state.bytes()))
        })();
        let (state_us, state_bytes) = match result {
            Ok(done) => done,
            Err(e) => {
                if was == Running::Paused {
                    stopped.keep_stopped();
                }
                return Err(e);
            }
        };
        if then == Then::Resume && was == Running::Yes {
            drop(stopped);
        } else {
            stopped.keep_stopped();
            self.running = Running::Paused;
            if then != Then::Resume {
                // Whoever restores the file takes disks and sockets now.
                self.vm.release();
                self.released = true;
            }
        }
        self.last_pause_us = began.elapsed().as_micros() as u64;
        Ok(json!({
            "ok": true,
            "state_us": state_us,
            "state_bytes": state_bytes,
            "pause_us": self.last_pause_us,
            "ram_fd": self.vm.machine.ram().file().as_raw_fd(),
        }))
    }

    fn status(&self) -> Value {
        let disks: Vec<_> = self.vm.disks.iter().map(|d| json!(d.stats())).collect();
        let nics: Vec<_> = self.vm.nics.iter().map(|n| json!(n.stats())).collect();
        json!({
            "ok": true,
            "name": self.vm.spec.name,
            "state": if self.running == Running::Yes { "running" } else { "paused" },
            "vcpus": self.vm.spec.vcpus,
            "memory_bytes": self.vm.spec.memory_bytes,
            "exits": self.vm.machine.vcpus().exits(),
            "guest_panics": self.care.mishaps().panics,
            "mishaps": self.care.mishaps(),
            "guest_resets": self.resets,
            "uptime_ms": self.started.elapsed().as_millis() as u64,
            "last_pause_us": self.last_pause_us,
            "ram_fd": self.vm.machine.ram().file().as_raw_fd(),
            "net_rate": self.net_rate,
            "balloon_bytes": self.vm.balloon.as_ref().map(|b| u64::from(b.actual()) * PAGE_SIZE),
            "disks": disks,
            "nics": nics,
        })
    }
}
