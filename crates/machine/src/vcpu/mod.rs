//! vCPUs: one thread each, and the means to stop them all at one instant.
//!
//! ```text
//!             start                     pause                        resume
//!   Parked ----------> Running ------------------> Stopping ---> Parked ------> ...
//!                         |   kick: immediate_exit=1, signal        (pending exits completed)
//!                         +--> Ended (shutdown, triple fault, error; the machine hears of it)
//! ```
//! A thread parks only after KVM has completed the I/O that its last exit began: it re-enters `KVM_RUN` with
//! `immediate_exit` set until that returns `EINTR` (saving right after an `out` repeated the byte, FACTS).
//! There is no polling: the controller sets the phase, raises `immediate_exit` and sends a signal; the thread
//! answers on a condition variable.

mod run;
pub mod state;

pub use run::{VcpuEvent, VcpuEvents, VcpuPeripherals};

use crate::kvm::{DirtyRing, KvmError, urgent};
use crate::state::{StateError, StateRecord};
use kvm_ioctls::VcpuFd;
use rustix::thread::Pid;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// What all vCPU threads of a machine are told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Park,
    Run,
    Exit,
}

/// One wish to have a vCPU's state saved by its own thread.
#[derive(Default)]
struct SaveSlot {
    wanted: bool,
    result: Option<Result<StateRecord, StateError>>,
}

pub(crate) struct Control {
    state: Mutex<ControlState>,
    /// vCPU threads wait here for orders.
    orders: Condvar,
    /// The controller waits here for threads to park or save.
    answers: Condvar,
    /// Threads are real-time from the kick until they have parked.
    urgent: AtomicBool,
}

struct ControlState {
    order: Order,
    /// Threads that are not parked.
    running: usize,
    /// Grows with every resume, so that a thread takes each order to run exactly once, also a late one.
    lap: u64,
    /// Threads whose vCPU will not run again.
    ended: usize,
    saves: Vec<SaveSlot>,
    saving: usize,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True while the thread should be inside `KVM_RUN`; then a kick that came too late is taken back, under
    /// the lock under which kicks are made, so that a new one is not lost.
    pub(crate) fn should_run(&self, vcpu: &mut VcpuFd) -> bool {
        let state = self.lock();
        let run = state.order == Order::Run;
        if run {
            vcpu.set_kvm_immediate_exit(0);
        }
        run
    }
}

struct Thread {
    fd: Arc<Mutex<VcpuFd>>,
    /// `immediate_exit` in the shared `kvm_run` page of the vCPU.
    immediate_exit: AtomicPtr<u8>,
    join: Option<JoinHandle<()>>,
    /// Counts exits: progress that a watcher can see.
    exits: Arc<AtomicU64>,
    /// The kernel's number of the thread, known once it runs.
    id: Arc<OnceLock<Pid>>,
}

/// vCPUs did not do as told within the bound.
#[derive(Debug, thiserror::Error)]
#[error("{stuck} of {total} vCPUs did not stop within {waited_ms} ms: the host is starved, or KVM hangs")]
pub struct VcpuStuck {
    /// How many still run.
    pub stuck: usize,
    /// How many there are.
    pub total: usize,
    /// How long the controller waited.
    pub waited_ms: u64,
}

/// Bound on the wait for all vCPUs to stop. A host under heavy load may take long; a hang must still end.
pub const STOP_BOUND: Duration = Duration::from_secs(20);
/// vCPUs park within this on a host that has a CPU for them.
const STOP_USUAL: Duration = Duration::from_micros(500);

/// A save of all vCPUs under way.
pub struct PendingSave<'a> {
    vcpus: &'a Vcpus,
}

impl PendingSave<'_> {
    /// Waits for the last vCPU, bounded; records in rising order of index.
    ///
    /// # Errors
    /// The first [`StateError`].
    pub fn finish(self) -> Result<Vec<StateRecord>, StateError> {
        self.vcpus.save_finish()
    }
}

/// All vCPUs of a machine.
pub struct Vcpus {
    control: Arc<Control>,
    threads: Vec<Thread>,
    msr_indices: Arc<Vec<u32>>,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Nothing to do: the signal's arrival makes KVM_RUN return EINTR.
}

impl Vcpus {
    /// Starts a parked thread for each vCPU. `on_start` runs first on each thread (seccomp, priority).
    ///
    /// # Errors
    /// [`KvmError::Call`] when a signal handler or thread cannot be made.
    pub fn start(
        fds: Vec<VcpuFd>,
        rings: Vec<Option<Arc<Mutex<DirtyRing>>>>,
        peripherals: &VcpuPeripherals,
        msr_indices: Arc<Vec<u32>>,
        on_start: &Arc<dyn Fn(u32) + Send + Sync>,
    ) -> Result<Self, KvmError> {
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(KvmError::call("install the kick signal's handler"))?;
        let control = Arc::new(Control {
            state: Mutex::new(ControlState {
                order: Order::Park,
                running: fds.len(),
                lap: 0,
                ended: 0,
                saves: fds.iter().map(|_| SaveSlot::default()).collect(),
                saving: 0,
            }),
            orders: Condvar::new(),
            answers: Condvar::new(),
            urgent: AtomicBool::new(false),
        });
        let mut vcpus = Self {
            control: Arc::clone(&control),
            threads: Vec::new(),
            msr_indices,
        };
        for (index, (mut fd, ring)) in (0u32..).zip(fds.into_iter().zip(rings)) {
            let immediate_exit = AtomicPtr::new(&raw mut fd.get_kvm_run().immediate_exit);
            let fd = Arc::new(Mutex::new(fd));
            let exits = Arc::new(AtomicU64::new(0));
            let id = Arc::new(OnceLock::new());
            let own = Arc::clone(&id);
            let runner = run::Runner {
                index,
                fd: Arc::clone(&fd),
                control: Arc::clone(&control),
                peripherals: peripherals.clone(),
                ring,
                exits: Arc::clone(&exits),
            };
            let on_start = Arc::clone(on_start);
            let msrs = Arc::clone(&vcpus.msr_indices);
            let join = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    let _ = own.set(rustix::thread::gettid());
                    on_start(index);
                    thread_main(runner, &msrs);
                })
                .map_err(KvmError::io(format!("start thread of vCPU {index}")))?;
            vcpus.threads.push(Thread {
                fd,
                immediate_exit,
                join: Some(join),
                exits,
                id,
            });
        }
        let late = |e| KvmError::Call {
            what: "start vCPU threads".into(),
            source: std::io::Error::other(e),
        };
        vcpus.wait_parked(|| {}).map_err(late)?;
        Ok(vcpus)
    }

    /// Stops come first from now on: threads are real-time from the kick until they have parked, and have short turns
    /// otherwise. Where the host does not allow that, nothing changes. Only for threads of an ordinary policy.
    pub fn hurry_stops(&self) {
        self.control.urgent.store(true, Ordering::Relaxed);
        for id in self.urgent_threads() {
            if let Err(error) = urgent::short_turns(id) {
                tracing::debug!(%error, "a vCPU's thread keeps the host's usual slices");
            }
        }
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Exits that the monitor has handled, per vCPU: a hint of progress (a guest that computes has few).
    #[must_use]
    pub fn exits(&self) -> Vec<u64> {
        self.threads
            .iter()
            .map(|t| t.exits.load(Ordering::Relaxed))
            .collect()
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        let mut state = self.control.lock();
        if state.order == Order::Park {
            state.order = Order::Run;
            state.lap += 1;
            state.running = self.threads.len() - state.ended;
            self.control.orders.notify_all();
        }
    }

    /// Stops all vCPUs, all kicked before any is waited for. Returns when every one has parked; calls `late` if that takes longer
    /// than usual.
    ///
    /// # Errors
    /// [`VcpuStuck`] after [`STOP_BOUND`]; the vCPUs are told to run on.
    pub fn pause(&self, late: impl FnOnce()) -> Result<(), VcpuStuck> {
        {
            let mut state = self.control.lock();
            if state.order == Order::Exit {
                return Ok(());
            }
            if state.order == Order::Run {
                state.order = Order::Park;
                self.kick();
            }
        }
        self.wait_parked(late)
            .inspect(|()| self.urgent_threads().for_each(urgent::lower))
            .inspect_err(|_| {
                // Those that parked run again and count again; the stuck ones never stopped counting.
                let mut state = self.control.lock();
                self.urgent_threads().for_each(urgent::lower);
                state.lap += 1;
                state.running = self.threads.len() - state.ended;
                state.order = Order::Run;
                self.control.orders.notify_all();
            })
    }

    fn wait_parked(&self, late: impl FnOnce()) -> Result<(), VcpuStuck> {
        let started = Instant::now();
        let mut late = Some(late);
        let mut state = self.control.lock();
        while state.running > 0 {
            let mut left = STOP_BOUND.saturating_sub(started.elapsed());
            if started.elapsed() < STOP_USUAL {
                left = STOP_USUAL;
            } else if let Some(late) = late.take() {
                late();
            }
            if left.is_zero() {
                return Err(VcpuStuck {
                    stuck: state.running,
                    total: self.threads.len(),
                    waited_ms: STOP_BOUND.as_millis() as u64,
                });
            }
            state = self
                .control
                .answers
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Whether stops come first.
    pub(crate) fn is_urgent(&self) -> bool {
        self.control.urgent.load(Ordering::Relaxed)
    }

    /// Threads that are to be real-time while they stop.
    fn urgent_threads(&self) -> impl Iterator<Item = Pid> {
        let wanted = self.control.urgent.load(Ordering::Relaxed);
        let alive = move |t: &&Thread| wanted && t.join.as_ref().is_some_and(|j| !j.is_finished());
        self.threads
            .iter()
            .filter(alive)
            .filter_map(|t| t.id.get().copied())
    }

    /// Makes every thread leave `KVM_RUN`. Called with the control lock held, so no thread can take an order between
    /// the store and the signal.
    fn kick(&self) {
        for t in &self.threads {
            set_immediate_exit(&t.immediate_exit);
        }
        for t in &self.threads {
            if let Some(join) = &t.join {
                // ESRCH means that the thread has ended, which is as good.
                let _ = join.kill(SIGRTMIN());
            }
        }
        // Last: a raised thread may take this one's CPU at once, and without the signal it would run its guest there.
        for id in self.urgent_threads() {
            if let Err(error) = urgent::raise(id) {
                tracing::warn!(%error, "vCPUs cannot be stopped with real-time priority; a busy host makes pauses long");
                self.control.urgent.store(false, Ordering::Relaxed);
                break;
            }
        }
    }

    /// Begins to take the state of all vCPUs; they must be parked. One vCPU is saved by whoever finishes, several
    /// by their own threads in parallel.
    #[must_use]
    pub fn save_begin(&self) -> PendingSave<'_> {
        if self.threads.len() > 1 {
            let mut control = self.control.lock();
            for slot in &mut control.saves {
                *slot = SaveSlot {
                    wanted: true,
                    result: None,
                };
            }
            control.saving = self.threads.len();
            self.control.orders.notify_all();
        }
        PendingSave { vcpus: self }
    }

    fn save_finish(&self) -> Result<Vec<StateRecord>, StateError> {
        if let [only] = self.threads.as_slice() {
            return Ok(vec![state::save(&lock(&only.fd), 0, &self.msr_indices)?]);
        }
        let mut control = self.control.lock();
        let started = Instant::now();
        while control.saving > 0 {
            let left = STOP_BOUND.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(StateError::Refused(
                    "a vCPU thread did not save its state in time".into(),
                ));
            }
            control = self
                .control
                .answers
                .wait_timeout(control, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        control
            .saves
            .iter_mut()
            .map(|s| {
                s.result
                    .take()
                    .unwrap_or_else(|| Err(StateError::Refused("a vCPU thread has ended".into())))
            })
            .collect()
    }

    /// Gives a parked vCPU its state.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore(&self, index: u32, record: &StateRecord) -> Result<(), StateError> {
        let thread = self
            .threads
            .get(index as usize)
            .ok_or(StateError::Surplus(record.kind, record.instance))?;
        state::restore(&lock(&thread.fd), record)
    }

    /// Runs `f` on a parked vCPU's descriptor, to set its first registers.
    pub fn with<R>(&self, index: u32, f: impl FnOnce(&VcpuFd) -> R) -> Option<R> {
        self.threads.get(index as usize).map(|t| f(&lock(&t.fd)))
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        {
            let mut state = self.control.lock();
            state.order = Order::Exit;
            self.kick();
            self.control.orders.notify_all();
        }
        for t in &mut self.threads {
            if let Some(join) = t.join.take() {
                let _ = join.join();
            }
        }
    }
}

fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_immediate_exit(at: &AtomicPtr<u8>) {
    crate::kvm::store_shared_byte(at, 1);
}

/// The life of a vCPU thread: park, save when asked, run, until told to exit.
fn thread_main(mut runner: run::Runner, msrs: &[u32]) {
    let control = Arc::clone(&runner.control);
    let index = runner.index;
    let mut ended = false;
    let mut lap = 0;
    let mut state = control.lock();
    state.running -= 1;
    control.answers.notify_all();
    loop {
        let slot_wanted = state.saves.get(index as usize).is_some_and(|s| s.wanted);
        if state.order == Order::Exit {
            return;
        } else if slot_wanted {
            drop(state);
            let result = state::save(&lock(&runner.fd), index, msrs);
            state = control.lock();
            if let Some(slot) = state.saves.get_mut(index as usize) {
                *slot = SaveSlot {
                    wanted: false,
                    result: Some(result),
                };
            }
            state.saving -= 1;
            control.answers.notify_all();
        } else if state.lap != lap && !ended {
            // Also when the order has changed to `Park` meanwhile: this thread was counted as running.
            if state.order == Order::Run {
                runner.arm();
            }
            drop(state);
            ended = !runner.run();
            state = control.lock();
            // Laps that began while this thread could not be stopped are behind it, too.
            lap = state.lap;
            state.running -= 1;
            state.ended += usize::from(ended);
            control.answers.notify_all();
        } else {
            state = control.orders.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
