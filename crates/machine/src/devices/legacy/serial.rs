//! COM1: a 16550 on vm-superio, with a bounded queue in front of and behind it.
//!
//! ```text
//! guest -> THR -> pending output (64 KiB) -> OutputSink
//! guest <- RBR <- FIFO (64 bytes, vm-superio) <- pending input (4 KiB) <- console
//! ```
//!
//! A byte is in exactly one place. What the sink has not taken and what the guest has not read is part of the
//! state, so a save and restore neither loses nor repeats a byte. When the output queue is full, new bytes are
//! dropped and counted: a guest cannot make the monitor wait or grow.

use super::check_key;
use super::sink::OutputSink;
use crate::devices::bus::{BusDevice, Stateful};
use crate::state::{StateError, StateKind, StateRecord};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// First port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of a 16550.
pub const PORTS: u64 = 8;
/// Interrupt of COM1.
pub const COM1_IRQ: u32 = 4;
/// Output bytes that wait for the sink, at most.
pub const OUTPUT_MAX: usize = 64 << 10;
/// Input bytes that wait for the guest, at most, beside the FIFO of 64.
pub const INPUT_MAX: usize = 4 << 10;
/// Version of the state. History: 1 = first.
const STATE_VERSION: u16 = 1;
const FIFO: usize = 64;

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // A full counter means that the interrupt is already on its way.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// The bytes that vm-superio writes while it handles one register access: at most one.
#[derive(Default)]
struct Taken(Vec<u8>);

impl io::Write for Taken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// State of the port. The registers are those of `vm_superio::SerialState`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    input: Vec<u8>,
    output: Vec<u8>,
    dropped: u64,
}

/// The serial port with its queues.
pub struct SerialPort {
    uart: Serial<Irq, NoEvents, Taken>,
    irq: EventFd,
    sink: Box<dyn OutputSink>,
    output: VecDeque<u8>,
    input: VecDeque<u8>,
    dropped: u64,
    instance: u16,
}

impl SerialPort {
    /// A port that interrupts through `irq` (nonblocking, an irqfd on [`COM1_IRQ`]) and writes to `sink`.
    ///
    /// # Errors
    /// If the event descriptor cannot be duplicated.
    pub fn new(irq: EventFd, sink: Box<dyn OutputSink>) -> io::Result<Self> {
        Ok(Self {
            uart: Serial::new(Irq(irq.try_clone()?), Taken::default()),
            irq,
            sink,
            output: VecDeque::new(),
            input: VecDeque::new(),
            dropped: 0,
            instance: 0,
        })
    }

    /// Replaces the sink and gives it what waits.
    pub fn set_sink(&mut self, sink: Box<dyn OutputSink>) {
        self.sink = sink;
        self.flush_output();
    }

    /// Queues bytes for the guest; says how many it took (0 to `bytes.len()`). The rest may be offered again later.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(INPUT_MAX.saturating_sub(self.input.len()));
        self.input.extend(bytes.iter().take(n));
        self.refill();
        n
    }

    /// Room for [`SerialPort::enqueue_input`] in bytes.
    #[must_use]
    pub fn input_room(&self) -> usize {
        INPUT_MAX.saturating_sub(self.input.len())
    }

    /// Gives waiting output to the sink again: to be called when the sink has room once more.
    pub fn flush_output(&mut self) {
        while !self.output.is_empty() {
            let (front, _) = self.output.as_slices();
            let n = self.sink.put(front).min(front.len());
            if n == 0 {
                return;
            }
            self.output.drain(..n);
        }
    }

    /// Output bytes that wait for the sink.
    #[must_use]
    pub fn output_pending(&self) -> usize {
        self.output.len()
    }

    /// Output bytes that were dropped because the sink did not keep up, since the machine was first started.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Moves input into the FIFO as far as there is room; raises the interrupt.
    fn refill(&mut self) {
        let n = self.uart.fifo_capacity().min(self.input.len());
        if n == 0 {
            return;
        }
        let bytes: Vec<u8> = self.input.iter().take(n).copied().collect();
        // In loopback mode it takes none; they stay queued.
        let taken = self.uart.enqueue_raw_bytes(&bytes).unwrap_or(0);
        self.input.drain(..taken.min(self.input.len()));
    }

    fn collect_output(&mut self) {
        let taken = std::mem::take(&mut self.uart.writer_mut().0);
        for byte in taken {
            if self.output.len() < OUTPUT_MAX {
                self.output.push_back(byte);
            } else {
                self.dropped = self.dropped.saturating_add(1);
            }
        }
        self.flush_output();
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.uart.read(register);
            if register == 0 {
                self.refill();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(register)) = (data, u8::try_from(offset)) {
            // Errors are those of the event descriptor: the byte itself is in `Taken` by then.
            if let Err(e) = self.uart.write(register, byte) {
                tracing::debug!(error = %e, "serial interrupt not delivered");
            }
            self.collect_output();
            self.refill();
        }
    }
}

impl Stateful for SerialPort {
    fn state_key(&self) -> (StateKind, u16) {
        (StateKind::Serial, self.instance)
    }

    fn save(&mut self) -> Result<StateRecord, StateError> {
        let s = self.uart.state();
        let state = State {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            fifo: s.in_buffer,
            input: self.input.iter().copied().collect(),
            output: self.output.iter().copied().collect(),
            dropped: self.dropped,
        };
        StateRecord::encode(StateKind::Serial, self.instance, STATE_VERSION, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        check_key(record, StateKind::Serial, self.instance)?;
        let s: State = record.decode(STATE_VERSION)?;
        let refused = |why: String| StateError::Refused(format!("serial port: {why}"));
        if s.fifo.len() > FIFO || s.input.len() > INPUT_MAX || s.output.len() > OUTPUT_MAX {
            return Err(refused(format!(
                "queues of {}, {} and {} bytes are longer than the device's",
                s.fifo.len(),
                s.input.len(),
                s.output.len()
            )));
        }
        let registers = SerialState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.fifo,
        };
        let irq = self.irq.try_clone().map_err(|e| refused(e.to_string()))?;
        self.uart = Serial::from_state(&registers, Irq(irq), NoEvents, Taken::default())
            .map_err(|e| refused(format!("{e}")))?;
        self.input = s.input.into();
        self.output = s.output.into();
        self.dropped = s.dropped;
        // Waiting output stays where it is: a standby that is restored must not speak before it is the primary.
        Ok(())
    }
}
