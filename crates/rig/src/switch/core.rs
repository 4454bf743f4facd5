//! What a switch decides about a frame: to which ports it goes, when, and whether it is lost. No sockets, no clock.
//!
//! Faults of a port act on what the server behind it sends (`ingress`) and on what it is sent (`egress`), so both directions
//! of a cable can be worsened separately. Partitions are directed pairs of ports. Invariants: frames of one port to another
//! keep their order unless jitter or reordering is set; the queue of delayed frames is bounded in bytes.

use super::random::Random;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

/// A port of a switch.
pub type PortId = usize;
/// The address of a NIC.
pub type Mac = [u8; 6];
/// The shortest frame a switch takes: two addresses and a type.
pub const FRAME_MIN: usize = 14;
/// The longest, with room for jumbo frames and merged segments.
pub const FRAME_MAX: usize = 69_632;
/// Bytes of delayed frames that a switch keeps at most.
pub const DELAYED_BYTES_MAX: usize = 64 << 20;
/// Addresses that a switch remembers at most.
pub const MACS_MAX: usize = 4096;

/// How a direction of a port is worsened. All zero: nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Each frame waits so long.
    pub delay_us: u64,
    /// And up to so much longer, at random (this reorders).
    pub jitter_us: u64,
    /// So many in a million frames are lost.
    pub loss_ppm: u32,
    /// So many in a million frames come twice.
    pub duplicate_ppm: u32,
    /// So many in a million frames wait [`Fault::REORDER_US`] longer, so that later ones pass them.
    pub reorder_ppm: u32,
    /// So many in a million frames have one bit flipped.
    pub corrupt_ppm: u32,
    /// Bits per second in thousands; 0: as fast as it goes.
    pub rate_kbit: u64,
}

impl Fault {
    /// How long a reordered frame is held back.
    pub const REORDER_US: u64 = 5_000;
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |ppm: u32| f64::from(ppm) / 10_000.0;
        let parts = [
            (
                self.delay_us > 0,
                format!("delay {} ms", self.delay_us as f64 / 1000.0),
            ),
            (
                self.jitter_us > 0,
                format!("jitter {} ms", self.jitter_us as f64 / 1000.0),
            ),
            (self.loss_ppm > 0, format!("loss {} %", percent(self.loss_ppm))),
            (
                self.duplicate_ppm > 0,
                format!("duplicate {} %", percent(self.duplicate_ppm)),
            ),
            (
                self.reorder_ppm > 0,
                format!("reorder {} %", percent(self.reorder_ppm)),
            ),
            (
                self.corrupt_ppm > 0,
                format!("corrupt {} %", percent(self.corrupt_ppm)),
            ),
            (self.rate_kbit > 0, format!("rate {} kbit/s", self.rate_kbit)),
        ];
        let said: Vec<String> = parts
            .into_iter()
            .filter(|part| part.0)
            .map(|part| part.1)
            .collect();
        f.write_str(&said.join(" "))
    }
}

/// What went through a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames from the server.
    pub in_frames: u64,
    /// Bytes from the server.
    pub in_bytes: u64,
    /// Frames to the server.
    pub out_frames: u64,
    /// Bytes to the server.
    pub out_bytes: u64,
    /// Frames lost on the way in or out: by a fault, by a partition, because a port or the switch is down, or for want of room.
    pub lost_frames: u64,
}

#[derive(Debug, Default)]
struct Port {
    name: String,
    unplugged: bool,
    ingress: Fault,
    egress: Fault,
    ingress_free_us: u64,
    egress_free_us: u64,
    counters: Counters,
}

/// A frame that is due at a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// The port it goes out of.
    pub port: PortId,
    /// Its bytes.
    pub frame: Arc<[u8]>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    at_us: u64,
    order: u64,
    port: PortId,
    frame: Arc<[u8]>,
}

/// The deciding half of a switch.
#[derive(Debug)]
pub struct Core {
    ports: Vec<Port>,
    macs: HashMap<Mac, PortId>,
    cut: HashSet<(PortId, PortId)>,
    down: bool,
    random: Random,
    waiting: BinaryHeap<Reverse<Waiting>>,
    waiting_bytes: usize,
    order: u64,
}

impl Core {
    /// A switch without ports; `seed` decides which frames faults hit.
    pub fn new(seed: u64) -> Core {
        Core {
            ports: Vec::new(),
            macs: HashMap::new(),
            cut: HashSet::new(),
            down: false,
            random: Random::new(seed),
            waiting: BinaryHeap::new(),
            waiting_bytes: 0,
            order: 0,
        }
    }

    /// Adds a port.
    pub fn add_port(&mut self, name: &str) -> PortId {
        self.ports.push(Port {
            name: name.to_string(),
            ..Port::default()
        });
        self.ports.len() - 1
    }

    /// The port with this name.
    pub fn port_named(&self, name: &str) -> Option<PortId> {
        self.ports.iter().position(|port| port.name == name)
    }

    /// Names of the ports, by number.
    pub fn port_names(&self) -> Vec<String> {
        self.ports.iter().map(|port| port.name.clone()).collect()
    }

    /// What went through a port.
    pub fn counters(&self, port: PortId) -> Counters {
        self.ports.get(port).map(|port| port.counters).unwrap_or_default()
    }

    /// Sets the faults of a port: what its server sends, and what it is sent.
    pub fn set_fault(&mut self, port: PortId, ingress: Fault, egress: Fault) {
        if let Some(port) = self.ports.get_mut(port) {
            (port.ingress, port.egress) = (ingress, egress);
            (port.ingress_free_us, port.egress_free_us) = (0, 0);
        }
    }

    /// The faults of a port: (ingress, egress).
    pub fn fault(&self, port: PortId) -> (Fault, Fault) {
        self.ports
            .get(port)
            .map(|port| (port.ingress, port.egress))
            .unwrap_or_default()
    }

    /// Pulls or plugs the cable of a port. What was on its way to it is lost, and its addresses are forgotten.
    pub fn set_unplugged(&mut self, port: PortId, unplugged: bool) {
        if let Some(found) = self.ports.get_mut(port) {
            found.unplugged = unplugged;
            self.macs.retain(|_, at| *at != port);
        }
    }

    /// True when the cable of a port is pulled.
    pub fn unplugged(&self, port: PortId) -> bool {
        self.ports.get(port).is_some_and(|port| port.unplugged)
    }

    /// Turns the whole switch off or on. Off, it forgets everything that was on its way and every address.
    pub fn set_down(&mut self, down: bool) {
        self.down = down;
        if down {
            self.waiting.clear();
            self.waiting_bytes = 0;
            self.macs.clear();
        }
    }

    /// True when the switch is off.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Cuts the way from one port to another, this direction only.
    pub fn cut_way(&mut self, from: PortId, to: PortId) {
        self.cut.insert((from, to));
    }

    /// Heals every partition.
    pub fn heal(&mut self) {
        self.cut.clear();
    }

    /// The cut ways.
    pub fn cuts(&self) -> Vec<(PortId, PortId)> {
        let mut cuts: Vec<_> = self.cut.iter().copied().collect();
        cuts.sort_unstable();
        cuts
    }

    /// A frame came in at a port at `now_us`. What is due at once goes to `out`; the rest waits.
    pub fn frame_in(&mut self, now_us: u64, from: PortId, frame: &[u8], out: &mut Vec<Due>) {
        let Some(port) = self.ports.get_mut(from) else {
            return;
        };
        port.counters.in_frames += 1;
        port.counters.in_bytes += frame.len() as u64;
        if self.down || port.unplugged || !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) {
            port.counters.lost_frames += 1;
            return;
        }
        let (mut destination, mut source) = ([0; 6], [0; 6]);
        destination.copy_from_slice(&frame[0..6]);
        source.copy_from_slice(&frame[6..12]);
        // The lowest bit of the first byte marks a group address: never learnt, always flooded.
        if source[0] & 1 == 0 && (self.macs.len() < MACS_MAX || self.macs.contains_key(&source)) {
            self.macs.insert(source, from);
        }
        let ingress = port.ingress;
        let Some(entry_us) = self.pass_ingress(now_us, from, &ingress, frame.len()) else {
            return;
        };
        let known = if destination[0] & 1 == 0 {
            self.macs.get(&destination).copied()
        } else {
            None
        };
        let frame: Arc<[u8]> = Arc::from(frame);
        let copies = 1 + u32::from(self.random.chance(ingress.duplicate_ppm));
        for _ in 0..copies {
            let frame = self.maybe_corrupt(&ingress, &frame);
            match known {
                // A frame for its own side of the switch stays there.
                Some(to) if to == from => {}
                Some(to) => self.frame_out(now_us, entry_us, from, to, &frame, out),
                None => {
                    for to in (0..self.ports.len()).filter(|to| *to != from) {
                        self.frame_out(now_us, entry_us, from, to, &frame, out);
                    }
                }
            }
        }
    }

    /// The instant at which a frame is through the incoming half of a port; none when it is lost there.
    fn pass_ingress(&mut self, now_us: u64, port: PortId, fault: &Fault, bytes: usize) -> Option<u64> {
        if *fault == Fault::default() {
            return Some(now_us);
        }
        if self.random.chance(fault.loss_ppm) {
            self.ports[port].counters.lost_frames += 1;
            return None;
        }
        let at = rate(
            now_us,
            fault.rate_kbit,
            bytes,
            &mut self.ports[port].ingress_free_us,
        );
        Some(at + self.wait_us(fault))
    }

    fn wait_us(&mut self, fault: &Fault) -> u64 {
        let reorder = if self.random.chance(fault.reorder_ppm) {
            Fault::REORDER_US
        } else {
            0
        };
        fault.delay_us + self.random.below(fault.jitter_us) + reorder
    }

    fn maybe_corrupt(&mut self, fault: &Fault, frame: &Arc<[u8]>) -> Arc<[u8]> {
        if !self.random.chance(fault.corrupt_ppm) {
            return Arc::clone(frame);
        }
        let mut bytes = frame.to_vec();
        // Behind the addresses, so that it still arrives where it should.
        let at = 12 + self.random.below(bytes.len() as u64 - 12) as usize;
        bytes[at] ^= 1 << self.random.below(8);
        Arc::from(bytes)
    }

    fn frame_out(
        &mut self,
        now: u64,
        at: u64,
        from: PortId,
        to: PortId,
        frame: &Arc<[u8]>,
        out: &mut Vec<Due>,
    ) {
        let port = &mut self.ports[to];
        if port.unplugged || self.cut.contains(&(from, to)) {
            port.counters.lost_frames += 1;
            return;
        }
        let egress = port.egress;
        let (mut at, mut copies) = (at, 1);
        let mut frame = Arc::clone(frame);
        if egress != Fault::default() {
            if self.random.chance(egress.loss_ppm) {
                self.ports[to].counters.lost_frames += 1;
                return;
            }
            at = rate(
                at,
                egress.rate_kbit,
                frame.len(),
                &mut self.ports[to].egress_free_us,
            );
            at += self.wait_us(&egress);
            copies += u32::from(self.random.chance(egress.duplicate_ppm));
            frame = self.maybe_corrupt(&egress, &frame);
        }
        for _ in 0..copies {
            if at <= now {
                self.count_out(to, frame.len());
                out.push(Due {
                    port: to,
                    frame: Arc::clone(&frame),
                });
            } else if self.waiting_bytes + frame.len() > DELAYED_BYTES_MAX {
                self.ports[to].counters.lost_frames += 1;
            } else {
                self.order += 1;
                self.waiting_bytes += frame.len();
                let frame = Arc::clone(&frame);
                self.waiting.push(Reverse(Waiting {
                    at_us: at,
                    order: self.order,
                    port: to,
                    frame,
                }));
            }
        }
    }

    fn count_out(&mut self, port: PortId, bytes: usize) {
        let counters = &mut self.ports[port].counters;
        counters.out_frames += 1;
        counters.out_bytes += bytes as u64;
    }

    /// Takes the frames whose time has come.
    pub fn take_due(&mut self, now_us: u64, out: &mut Vec<Due>) {
        while self
            .waiting
            .peek()
            .is_some_and(|Reverse(first)| first.at_us <= now_us)
        {
            let Some(Reverse(first)) = self.waiting.pop() else {
                return;
            };
            self.waiting_bytes -= first.frame.len();
            if self.ports[first.port].unplugged {
                self.ports[first.port].counters.lost_frames += 1;
            } else {
                self.count_out(first.port, first.frame.len());
                out.push(Due {
                    port: first.port,
                    frame: first.frame,
                });
            }
        }
    }

    /// When the next delayed frame is due.
    pub fn next_due_us(&self) -> Option<u64> {
        self.waiting.peek().map(|Reverse(first)| first.at_us)
    }

    /// A frame that was due could not be handed over.
    pub fn count_lost(&mut self, port: PortId, bytes: usize) {
        if let Some(port) = self.ports.get_mut(port) {
            port.counters.out_frames -= 1;
            port.counters.out_bytes -= bytes as u64;
            port.counters.lost_frames += 1;
        }
    }
}

/// When a frame has passed a line of so many kbit/s that is busy until `free_us`.
fn rate(at_us: u64, rate_kbit: u64, bytes: usize, free_us: &mut u64) -> u64 {
    if rate_kbit == 0 {
        return at_us;
    }
    let start = at_us.max(*free_us);
    *free_us = start + (bytes as u64 * 8 * 1000).div_ceil(rate_kbit);
    *free_us
}
