//! The debug console of Bochs and QEMU: a byte written to port 0xE9 goes out. It reads 0xE9, which tells a guest
//! that it is there. Bytes that the sink does not take at once are dropped and counted; there is no state.

use super::sink::OutputSink;
use crate::devices::bus::BusDevice;

/// The port.
pub const PORT: u16 = 0xe9;
/// Ports.
pub const PORTS: u64 = 1;

/// The device; without a sink it only counts.
#[derive(Default)]
pub struct DebugCon {
    sink: Option<Box<dyn OutputSink>>,
    written: u64,
    dropped: u64,
}

impl DebugCon {
    /// A device with an optional sink.
    #[must_use]
    pub fn new(sink: Option<Box<dyn OutputSink>>) -> Self {
        Self {
            sink,
            ..Self::default()
        }
    }

    /// Bytes that the guest wrote in this process.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes of those that the sink did not take.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

impl BusDevice for DebugCon {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        self.written = self.written.saturating_add(len);
        if let Some(sink) = &mut self.sink {
            let taken = sink.put(data) as u64;
            self.dropped = self.dropped.saturating_add(len.saturating_sub(taken));
        }
    }
}
