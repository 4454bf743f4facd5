//! Unit tests of the legacy devices.

use super::*;
use crate::devices::bus::{BusDevice, Stateful};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Default)]
struct Events(Mutex<Vec<GuestEvent>>);

impl EventSink for Events {
    fn guest_event(&self, event: GuestEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Events {
    fn take(&self) -> Vec<GuestEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Takes bytes while it has room.
#[derive(Clone, Default)]
struct Screen {
    text: Arc<Mutex<Vec<u8>>>,
    room: Arc<Mutex<usize>>,
}

impl Screen {
    fn with_room(room: usize) -> Self {
        let screen = Self::default();
        *screen.room.lock().unwrap() = room;
        screen
    }
}

impl OutputSink for Screen {
    fn put(&mut self, bytes: &[u8]) -> usize {
        let mut room = self.room.lock().unwrap();
        let n = bytes.len().min(*room);
        *room -= n;
        self.text.lock().unwrap().extend(&bytes[..n]);
        n
    }
}

fn irq() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn port(screen: &Screen) -> (SerialPort, EventFd) {
    let line = irq();
    let port = SerialPort::new(line.try_clone().unwrap(), Box::new(screen.clone())).unwrap();
    (port, line)
}

fn get(device: &mut dyn BusDevice, offset: u64) -> u8 {
    let mut byte = [0xff];
    device.read(offset, &mut byte);
    byte[0]
}

/// Reads input as a driver does: while the line status says that there is some.
fn drain(port: &mut SerialPort) -> Vec<u8> {
    let mut out = Vec::new();
    while get(port, 5) & 1 != 0 {
        out.push(get(port, 0));
    }
    out
}

#[test]
fn serial_interrupts_and_passes_more_input_than_its_fifo_holds() {
    let screen = Screen::with_room(1000);
    let (mut port, line) = port(&screen);
    port.write(1, &[1]); // receive interrupt
    let text: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
    assert_eq!(port.enqueue_input(&text), 1000);
    assert_eq!(line.read().unwrap(), 1);
    assert_eq!(drain(&mut port), text);
    let many = vec![1; serial::INPUT_MAX + 200];
    assert_eq!(port.enqueue_input(&many), serial::INPUT_MAX);
    assert_eq!(port.input_room(), 64, "the FIFO took some at once");
    assert_eq!(port.enqueue_input(&many), 64);
    assert_eq!(port.enqueue_input(&many), 0);
    for byte in b"hello" {
        port.write(0, &[*byte]);
    }
    assert_eq!(*screen.text.lock().unwrap(), b"hello");
}

#[test]
fn serial_output_is_bounded_and_drops_are_counted() {
    let screen = Screen::with_room(0);
    let (mut port, _line) = port(&screen);
    for i in 0..serial::OUTPUT_MAX + 10 {
        port.write(0, &[i as u8]);
    }
    assert_eq!((port.output_pending(), port.dropped()), (serial::OUTPUT_MAX, 10));
    *screen.room.lock().unwrap() = usize::MAX;
    port.flush_output();
    let text = screen.text.lock().unwrap();
    assert_eq!(text.len(), serial::OUTPUT_MAX);
    assert!(text.iter().zip(0usize..).all(|(b, i)| *b == i as u8));
}

#[test]
fn serial_reads_of_other_widths_are_harmless() {
    let (mut port, _line) = port(&Screen::default());
    for len in [2, 4, 8] {
        let mut wide = vec![0xff; len];
        port.read(0, &mut wide);
        assert_eq!(wide, vec![0xff; len]);
        port.write(0, &wide);
    }
    assert_eq!(port.output_pending(), 0);
    assert_eq!(get(&mut port, 7), 0);
}

proptest! {
    /// Any mix of guest and console activity, with a save and restore into a new device at any point: the guest reads
    /// what was typed and the screen shows what was printed, each byte once and in order.
    #[test]
    fn serial_neither_loses_nor_repeats_a_byte_over_save_and_restore(
        steps in proptest::collection::vec(0u8..7, 1..120),
    ) {
        let screen = Screen::with_room(0);
        let (mut device, _line) = port(&screen);
        device.write(1, &[3]);
        let (mut typed, mut seen, mut printed) = (0u8, Vec::new(), 0u8);
        let mut typed_all = Vec::new();
        let mut printed_all = Vec::new();
        for step in steps {
            match step {
                0 | 1 => {
                    for _ in 0..37 {
                        if device.enqueue_input(&[typed]) == 1 {
                            typed_all.push(typed);
                            typed = typed.wrapping_add(1);
                        }
                    }
                }
                2 => {
                    if get(&mut device, 5) & 1 != 0 {
                        seen.push(get(&mut device, 0));
                    }
                }
                3 => {
                    device.write(0, &[printed]);
                    printed_all.push(printed);
                    printed = printed.wrapping_add(1);
                }
                4 => *screen.room.lock().unwrap() += 2,
                5 => device.flush_output(),
                _ => {
                    let record = device.save().unwrap();
                    let (mut next, _line) = port(&screen);
                    next.restore(&record).unwrap();
                    prop_assert_eq!(next.save().unwrap(), record);
                    device = next;
                }
            }
        }
        *screen.room.lock().unwrap() = usize::MAX;
        device.flush_output();
        seen.extend(drain(&mut device));
        prop_assert_eq!(seen, typed_all);
        prop_assert_eq!(&*screen.text.lock().unwrap(), &printed_all);
    }
}

#[test]
fn serial_restores_its_interrupt_and_refuses_foreign_state() {
    let (mut first, line) = port(&Screen::default());
    first.write(1, &[1]);
    first.enqueue_input(b"x");
    assert_eq!(line.read().unwrap(), 1);
    let record = first.save().unwrap();
    let (mut second, line) = port(&Screen::default());
    second.restore(&record).unwrap();
    assert_eq!(line.read().unwrap(), 1, "raised again for the new machine");
    assert_eq!(get(&mut second, 2) & 0xf, 4, "received data");
    assert_eq!(drain(&mut second), b"x");
    let mut other = record.clone();
    other.kind = StateKind::Rtc;
    assert!(second.restore(&other).is_err());
    let mut cut = record.clone();
    cut.payload.pop();
    assert!(second.restore(&cut).is_err());
    let mut newer = record;
    newer.version = 2;
    assert!(matches!(second.restore(&newer), Err(StateError::Version { .. })));
}

#[test]
fn events_reach_the_sink() {
    let events = Arc::new(Events::default());
    let mut kbd = I8042::new(Arc::clone(&events) as _);
    assert_eq!(get(&mut kbd, 0), 0xff);
    kbd.write(0, &[0xaa]);
    kbd.write(0, &[0xfe]);
    assert_eq!(events.take(), [GuestEvent::Reset]);
    let mut panic = PvPanic::new(Arc::clone(&events) as _);
    assert_eq!(get(&mut panic, 0), 3);
    panic.write(0, &[1]);
    panic.write(0, &[2]);
    panic.write(0, &[0xfc]);
    assert_eq!(events.take(), [GuestEvent::Panic, GuestEvent::CrashLoaded]);
    let mut power = Power::new(irq(), Arc::clone(&events) as _);
    power.write(0, &[5 << 2]);
    power.write(0, &[3 << 2 | 0x20]);
    power.write(2, &[0]);
    assert_eq!(events.take(), []);
    power.write(0, &[5 << 2 | 0x20]);
    power.write(2, &[power::RESET_VALUE]);
    assert_eq!(events.take(), [GuestEvent::Shutdown, GuestEvent::Reset]);
}

#[test]
fn the_power_button_rings_once_also_over_restore() {
    let events = Arc::new(Events::default());
    let line = irq();
    let mut power = Power::new(line.try_clone().unwrap(), Arc::clone(&events) as _);
    assert_eq!(get(&mut power, 3), 0);
    power.press_power_button();
    assert_eq!(line.read().unwrap(), 1);
    let record = power.save().unwrap();
    let line = irq();
    let mut next = Power::new(line.try_clone().unwrap(), events as _);
    next.restore(&record).unwrap();
    assert_eq!(line.read().unwrap(), 1);
    assert_eq!((get(&mut next, 3), get(&mut next, 3)), (1, 0));
    assert_eq!((get(&mut next, 0), get(&mut next, 1)), (0, 0));
    let bad = StateRecord::encode(StateKind::AcpiPower, 0, 1, &0xffu8).unwrap();
    assert!(next.restore(&bad).is_err());
}

#[test]
fn the_clock_tells_the_date() {
    let show = |now: fn() -> i64| {
        let mut rtc = Rtc::with_clock(now);
        [0x32u8, 9, 8, 7, 6, 4, 2, 0].map(|index| {
            rtc.write(0, &[index | 0x80]);
            get(&mut rtc, 1)
        })
    };
    assert_eq!(show(|| 0), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
    // 2024-02-29 23:59:58, a Thursday
    assert_eq!(
        show(|| 1_709_251_198),
        [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]
    );
    // 2026-11-20 12:34:56, a Friday
    assert_eq!(
        show(|| 1_795_178_096),
        [0x20, 0x26, 0x11, 0x20, 6, 0x12, 0x34, 0x56]
    );
    assert_eq!(show(|| 951_782_400)[1..4], [0x00, 0x02, 0x29]); // 2000-02-29
    let mut rtc = Rtc::default();
    for index in 0..=255u8 {
        rtc.write(0, &[index]);
        get(&mut rtc, 1);
    }
    rtc.write(0, &[0x0d]);
    let record = rtc.save().unwrap();
    let mut next = Rtc::default();
    next.restore(&record).unwrap();
    assert_eq!(get(&mut next, 1), 0x80);
}

#[test]
fn empty_states_still_refuse_what_is_not_theirs() {
    let events = Arc::new(Events::default());
    let mut kbd = I8042::new(Arc::clone(&events) as _);
    let mut panic = PvPanic::new(events as _);
    let record = kbd.save().unwrap();
    kbd.restore(&record).unwrap();
    assert!(panic.restore(&record).is_err());
}

#[test]
fn debug_console_counts() {
    let screen = Screen::with_room(2);
    let mut con = DebugCon::new(Some(Box::new(screen.clone())));
    for byte in b"abc" {
        con.write(0, &[*byte]);
    }
    assert_eq!((con.written(), con.dropped()), (3, 1));
    assert_eq!(*screen.text.lock().unwrap(), b"ab");
    assert_eq!(get(&mut con, 0), 0xe9);
    DebugCon::default().write(0, b"x");
}

#[test]
fn a_broken_descriptor_swallows_and_a_full_one_waits() {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    let mut sink = FdSink::new(write);
    assert_eq!(sink.put(b"abc"), 3);
    let big = vec![0; 1 << 20];
    let taken = sink.put(&big);
    assert!(taken < big.len());
    assert_eq!(sink.put(&big), 0);
    drop(read);
    assert_eq!(sink.put(&big), big.len());
}
