//! Everything that the engine hears, in one queue.

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
}

/// The queue's sending side.
#[derive(Clone)]
pub struct Inputs {
    queue: Sender<Input>,
    shutdown: Arc<AtomicBool>,
    reset: Arc<AtomicBool>,
    panic: Arc<AtomicBool>,
}

impl Inputs {
    /// Wraps the queue.
    pub fn new(queue: Sender<Input>) -> Self {
        Self {
            queue,
            shutdown: Arc::default(),
            reset: Arc::default(),
            panic: Arc::default(),
        }
    }

    /// Puts something into the queue. After the engine ended it goes nowhere.
    pub fn send(&self, input: Input) {
        let _ = self.queue.send(input);
    }

    /// The engine has heard this guest event: the next of its kind may come.
    pub fn heard(&self, event: GuestEvent) {
        self.flag(event).store(false, Ordering::Release);
    }

    fn flag(&self, event: GuestEvent) -> &AtomicBool {
        match event {
            GuestEvent::Shutdown => &self.shutdown,
            GuestEvent::Reset => &self.reset,
            GuestEvent::Panic | GuestEvent::CrashLoaded => &self.panic,
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
