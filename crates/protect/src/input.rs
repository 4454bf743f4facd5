//! Everything that the engine hears, in one queue.

use crate::life::Remade;
use crate::shared_mark::Mark;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use steadfast_epoch::arbiter::StoreReply;
use steadfast_machine::devices::legacy::{EventSink, GuestEvent};
use steadfast_machine::vcpu::{VcpuEvent, VcpuEvents};
use steadfast_types::HostId;
use steadfast_vmm::control::Call;

/// Something the engine hears.
pub enum Input {
    /// From a link. Frames are bounded by the link's window of credit.
    Link(HostId, steadfast_wire::Event),
    /// From the store; one answer per question.
    Store(StoreReply),
    /// A NIC holds output; once per burst.
    Output,
    /// From the guest; at most one of each kind waits.
    Guest(GuestEvent),
    /// A vCPU has ended.
    Vcpu(VcpuEvent),
    /// From the control socket, which waits for its answer.
    Control(Call),
    /// The guest flushed a disk; once until it is heard.
    DiskFlush,
    /// The guest waits for room in a disk; once until it is heard.
    DiskFull,
    /// A cursor of a volume moved; once until it is heard.
    DiskMoved,
    /// The machine that follows a guest's reset is built, or cannot be.
    Remade(Box<Remade>),
    /// The machine of a standby that ran the VM before is built, or cannot be: the engine knows where to find it.
    Built,
    /// A thread wants a block of another host's replica: number, disk, offset, length.
    DiskAsk {
        /// To be repeated.
        id: u64,
        /// Number among the writable disks.
        volume: u16,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
    },
    /// The answer to a question of another host.
    DiskServed(HostId, u64, crate::ask::Answer),
    /// The end of this full copy of all disks is done, or why not.
    DiskCopied(u64, Result<(), String>),
    /// The copy of what a standby holds is made, or why not.
    CopiedOut(Result<serde_json::Value, String>),
    /// The shared disks have been let go, and what they are told by; or why not all of them.
    LetGo(Result<Vec<Mark>, String>),
    /// What the guest wrote to them is written, or not; it is to be handed over to this host.
    SharedFlushed(HostId, Result<(), String>),
    /// The answer to another host's question about them: its number, and whether they are the same.
    SharedSeen(HostId, u64, Result<(), String>),
}

impl Input {
    /// What it is, in words.
    pub fn name(&self) -> &'static str {
        match self {
            Input::Link(..) => "an event of a link",
            Input::Store(_) => "an answer of the store",
            Input::Output => "output of the guest",
            Input::Guest(_) => "an event of the guest",
            Input::Vcpu(_) => "the end of a vCPU",
            Input::Control(_) => "a request to the control socket",
            Input::DiskFlush => "a flush",
            Input::DiskFull => "a request that waits for room",
            Input::DiskMoved => "a cursor of a disk",
            Input::Remade(_) => "the machine after a reset",
            Input::Built => "the machine after a handover",
            Input::DiskAsk { .. } | Input::DiskServed(..) => "a block of another host",
            Input::DiskCopied(..) => "the end of a copy of disks",
            Input::CopiedOut(_) => "the copy of a standby",
            Input::LetGo(_) | Input::SharedSeen(..) | Input::SharedFlushed(..) => {
                "shared disks in a handover"
            }
        }
    }
}

/// The queue's sending side.
#[derive(Clone)]
pub struct Inputs {
    queue: Sender<Input>,
    shutdown: Arc<AtomicBool>,
    reset: Arc<AtomicBool>,
    panic: Arc<AtomicBool>,
    crash_loaded: Arc<AtomicBool>,
    flushed: Arc<AtomicBool>,
    full: Arc<AtomicBool>,
    moved: Arc<AtomicBool>,
}

impl Inputs {
    /// Wraps the queue.
    pub fn new(queue: Sender<Input>) -> Self {
        Self {
            queue,
            shutdown: Arc::default(),
            reset: Arc::default(),
            panic: Arc::default(),
            crash_loaded: Arc::default(),
            flushed: Arc::default(),
            full: Arc::default(),
            moved: Arc::default(),
        }
    }

    /// Puts something into the queue. After the engine ended it goes nowhere.
    pub fn send(&self, input: Input) {
        let _ = self.queue.send(input);
    }

    /// The guest flushed a disk.
    pub fn disk_flushed(&self) {
        if !self.flushed.swap(true, Ordering::AcqRel) {
            self.send(Input::DiskFlush);
        }
    }

    /// A request waits for room in a disk: that comes with a cut.
    pub fn disk_full(&self) {
        if !self.full.swap(true, Ordering::AcqRel) {
            self.send(Input::DiskFull);
        }
    }

    /// A cursor of a volume moved.
    pub fn disk_moved(&self) {
        if !self.moved.swap(true, Ordering::AcqRel) {
            self.send(Input::DiskMoved);
        }
    }

    /// The engine has heard of flushes: the next may come.
    pub fn heard_flush(&self) {
        self.flushed.store(false, Ordering::Release);
    }

    /// The engine has heard of requests that wait.
    pub fn heard_full(&self) {
        self.full.store(false, Ordering::Release);
    }

    /// The engine has heard of moved cursors.
    pub fn heard_moved(&self) {
        self.moved.store(false, Ordering::Release);
    }

    /// The engine has heard this guest event: the next of its kind may come.
    pub fn heard(&self, event: GuestEvent) {
        self.flag(event).store(false, Ordering::Release);
    }

    fn flag(&self, event: GuestEvent) -> &AtomicBool {
        match event {
            GuestEvent::Shutdown => &self.shutdown,
            GuestEvent::Reset => &self.reset,
            GuestEvent::Panic => &self.panic,
            GuestEvent::CrashLoaded => &self.crash_loaded,
        }
    }
}

impl EventSink for Inputs {
    fn guest_event(&self, event: GuestEvent) {
        if !self.flag(event).swap(true, Ordering::AcqRel) {
            self.send(Input::Guest(event));
        }
    }
}

impl VcpuEvents for Inputs {
    fn vcpu_event(&self, event: VcpuEvent) {
        match event {
            VcpuEvent::Reset => self.guest_event(GuestEvent::Reset),
            VcpuEvent::Shutdown => self.guest_event(GuestEvent::Shutdown),
            fault => self.send(Input::Vcpu(fault)),
        }
    }
}
