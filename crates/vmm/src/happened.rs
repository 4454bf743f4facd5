//! What the guest did, kept until the main loop looks.
//!
//! A guest can repeat itself as fast as it can write a port, so what it says takes no room in a queue: panics are counted, and of
//! what ends a machine the first is kept (on a real machine nothing could follow it). Nothing is lost however much is said.

use std::sync::{Mutex, MutexGuard, PoisonError};
use steadfast_machine::devices::legacy::{EventSink, GuestEvent};
use steadfast_machine::vcpu::{VcpuEvent, VcpuEvents};

/// What ends the machine as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest turned itself off.
    Shutdown,
    /// The guest wants to start again.
    Reset,
    /// A triple fault on this vCPU: how a PC resets itself when all else fails.
    TripleFault(u32),
    /// KVM cannot go on.
    Fault(VcpuEvent),
}

/// What happened since the last [`Happened::take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct News {
    /// How often the guest's kernel said that it panicked.
    pub panics: u64,
    /// One of them said that another kernel has taken over, to write the memory down.
    pub crash_kernel: bool,
    /// The first end.
    pub end: Option<End>,
}

/// See the module.
pub(crate) struct Happened {
    news: Mutex<News>,
    /// Called after each change, with no lock held; must not block.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Happened {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            news: Mutex::default(),
            wake: Box::new(wake),
        }
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happened, which is forgotten here.
    pub(crate) fn take(&self) -> News {
        std::mem::take(&mut self.news())
    }

    /// Whether the machine, as it is, has come to its end, and nobody has looked yet.
    pub(crate) fn has_ended(&self) -> bool {
        self.news().end.is_some()
    }

    fn ends(&self, end: End) {
        self.news().end.get_or_insert(end);
        (self.wake)();
    }
}

impl EventSink for Happened {
    fn guest_event(&self, event: GuestEvent) {
        match event {
            GuestEvent::Shutdown => self.ends(End::Shutdown),
            GuestEvent::Reset => self.ends(End::Reset),
            GuestEvent::Panic | GuestEvent::CrashLoaded => {
                let mut news = self.news();
                news.panics += 1;
                news.crash_kernel |= event == GuestEvent::CrashLoaded;
                drop(news);
                (self.wake)();
            }
        }
    }
}

impl VcpuEvents for Happened {
    fn vcpu_event(&self, event: VcpuEvent) {
        self.ends(match event {
            VcpuEvent::Reset => End::Reset,
            VcpuEvent::Shutdown => End::Shutdown,
            VcpuEvent::TripleFault(vcpu) => End::TripleFault(vcpu),
            VcpuEvent::Broken(_) => End::Fault(event),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_hides_nothing_and_the_first_end_counts() {
        let happened = Happened::new(|| ());
        for _ in 0..10_000 {
            happened.guest_event(GuestEvent::Panic);
        }
        happened.guest_event(GuestEvent::Shutdown);
        happened.vcpu_event(VcpuEvent::TripleFault(1));
        happened.guest_event(GuestEvent::CrashLoaded);
        let news = happened.take();
        assert_eq!((news.panics, news.end), (10_001, Some(End::Shutdown)));
        assert_eq!(happened.take(), News::default());
    }
}
