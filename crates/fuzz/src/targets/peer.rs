//! What a peer, a local client or a file can say to the process that holds a VM: messages of the epoch protocol to a real
//! replica, lines on the control socket, a saved VM.
//!
//! A peer is authenticated, but it may be broken or taken over: whatever it says, the replica must not panic. Its
//! invariants are asserted in release builds, so a message that breaks one would end the process of a running VM.

use super::{Target, runs_anywhere};
use crate::mutate::Random;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::mpsc::sync_channel;
use std::time::Duration;
use steadfast_epoch::arbiter::{Instance, StoreId, StoreReply, VmRecord, compare_and_swap};
use steadfast_epoch::message::{Base, Body, Cursors, EpochHeader, EpochRef, Message, Welcome};
use steadfast_epoch::{Action, Event, Replica, SealedEpoch, Settings};
use steadfast_machine::memory::{Ram, RamBacking};
use steadfast_machine::state::{MachineState, SaveReader, SaveWriter, StateKind, StateRecord};
use steadfast_protect::codec;
use steadfast_types::{Epoch, HostId, Term};
use steadfast_vmm::control;
use vm_memory::{Bytes, GuestAddress};

pub(super) fn targets() -> Vec<Target> {
    let target = |name, what, run, seeds| Target {
        name,
        what,
        run,
        seeds,
        dictionary: &[],
        cannot_run: runs_anywhere,
    };
    vec![
        target(
            "protect-message",
            "the epoch protocol's messages as bytes",
            message as fn(&[u8]),
            messages as fn() -> Vec<Vec<u8>>,
        ),
        target(
            "protect-primary",
            "a hostile standby's messages to a primary",
            |data| play(data, true),
            plays,
        ),
        target(
            "protect-standby",
            "a hostile primary's messages to a standby",
            |data| play(data, false),
            plays,
        ),
        Target {
            dictionary: &[
                b"{\"verb\":\"",
                b"\"}\n",
                b"status",
                b"add-peer",
                b"\"paths\":[",
                b"\n",
            ],
            ..target("control", "lines on a VM's control socket", line, lines)
        },
        target("save", "a saved VM's file", save, saves),
    ]
}

/// Bytes as numbers; zeroes when they run out.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// Mostly near `near`, where checks are off by one; now and then anything.
    fn near(&mut self, near: u64) -> u64 {
        match self.byte() {
            b @ 0..=200 => near.wrapping_add(u64::from(b % 9)).wrapping_sub(4),
            201..=220 => u64::MAX - u64::from(self.byte()),
            221..=240 => u64::from(self.byte()),
            _ => (0..8).fold(0, |v, _| v << 8 | u64::from(self.byte())),
        }
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }
}

/// The replica under attack, and the benign rest of its host: a store that grants, a runtime that does as it is told.
struct Host {
    replica: Replica,
    record: VmRecord,
    now: u64,
    /// Newest epoch seen in any action, so that hostile numbers are near it.
    epoch: u64,
    term: u64,
    session: u64,
    join: u64,
    seq: u64,
    /// Steps that are left; actions that beget actions must end.
    fuel: u32,
}

const STORE: StoreId = StoreId(7);

impl Host {
    fn new(primary: bool) -> Self {
        let (me, peer) = if primary { (a(), b()) } else { (b(), a()) };
        let settings = Settings::default();
        let mut record = VmRecord::new(a(), STORE);
        if !primary {
            record.term = Term(1);
            record.in_sync = vec![b()];
            record.acks = 1;
        }
        let mut host = Self {
            replica: Replica::new(0, me, Instance(11), settings, EpochRef::ZERO),
            record,
            now: 1,
            epoch: 1,
            term: 1,
            session: 1,
            join: 1,
            seq: 0,
            fuel: 4000,
        };
        if primary {
            host.give(Event::ColdStart);
            host.give(Event::AddStandby(peer.clone()));
        }
        host.give(Event::Connected(peer));
        host
    }

    fn give(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            if self.fuel == 0 {
                return;
            }
            self.fuel -= 1;
            for action in self.replica.handle(self.now, event) {
                self.carry_out(action, &mut events);
            }
            // What a status page reads must be answerable in any state too.
            let _ = (self.replica.status(), self.replica.deadline());
        }
    }

    fn carry_out(&mut self, action: Action, events: &mut Vec<Event>) {
        match action {
            Action::StoreRead { id } => events.push(Event::Store(StoreReply::Read {
                id,
                store: STORE,
                record: Some(self.record.clone()),
            })),
            Action::StoreCas { id, expect, record } => {
                let outcome = compare_and_swap(&self.record, STORE, &expect, &record);
                if outcome == steadfast_epoch::arbiter::CasOutcome::Done {
                    self.term = record.term.0;
                    self.record = record;
                }
                events.push(Event::Store(StoreReply::Cas { id, outcome }));
            }
            Action::Cut { epoch, .. } => {
                self.epoch = epoch.0;
                events.push(Event::Sealed(SealedEpoch {
                    epoch,
                    bytes: 4096,
                    flush: epoch.0.is_multiple_of(3),
                    pause_us: 100,
                    whole: true,
                }));
            }
            Action::SyncJournal { through } => events.push(Event::JournalSynced { through }),
            Action::Stage { epoch, flush } => {
                self.epoch = epoch.epoch.0;
                if flush {
                    events.push(Event::JournalSynced { through: epoch.epoch });
                }
                events.push(Event::Staged { epoch });
            }
            Action::Apply { through } => events.push(Event::Applied { through }),
            Action::DiscardSpeculation => events.push(Event::SpeculationDiscarded { intact: true }),
            Action::SendChunk {
                to,
                message,
                join,
                seq,
                ..
            } => {
                self.session = message.session;
                (self.join, self.seq) = (join, seq);
                let remaining = if seq < 2 { 64 << 20 } else { 0 };
                events.push(Event::ChunkSent {
                    to,
                    join,
                    seq,
                    remaining,
                });
            }
            Action::Send { message, .. } => {
                self.session = message.session;
                self.term = self
                    .term
                    .max(message.term.0.min(self.record.term.0.saturating_add(2)));
            }
            _ => {}
        }
    }
}

fn a() -> HostId {
    HostId::new("a").expect("a host's name")
}

fn b() -> HostId {
    HostId::new("b").expect("a host's name")
}

/// One attack: what the peer says and when, among events of a guest that works.
fn play(data: &[u8], primary: bool) {
    let mut input = Input(data);
    let mut host = Host::new(primary);
    let peer = if primary { b() } else { a() };
    while !input.0.is_empty() && host.fuel > 0 {
        host.now += match input.byte() {
            t @ 0..=127 => u64::from(t) * 10,
            t @ 128..=250 => u64::from(t) * 1000,
            _ => 400_000,
        };
        let event = match input.byte() {
            0..=150 => Event::Message {
                from: peer.clone(),
                message: say(&mut input, &host),
            },
            151..=165 => Event::Tick,
            166..=175 => Event::Output,
            176..=180 => Event::Flush,
            181..=185 => Event::CutWanted,
            186..=190 => Event::Dirty { bytes: 1 << 20 },
            191..=195 => Event::Corrupt { from: peer.clone() },
            196..=205 => Event::Bulk {
                from: peer.clone(),
                term: Term(input.near(host.term)),
            },
            206..=215 => Event::Disconnected(peer.clone()),
            216..=230 => Event::Connected(peer.clone()),
            231..=235 => Event::PeerDied(peer.clone()),
            236..=240 => Event::HandOver(peer.clone()),
            241..=245 => Event::CancelHandOver,
            246..=248 => Event::StateLost,
            249..=251 => Event::RemoveStandby(peer.clone()),
            _ => Event::AddStandby(peer.clone()),
        };
        host.give(event);
    }
    // Whatever was said, the replica goes on.
    for _ in 0..20 {
        host.now += 50_000;
        host.give(Event::Tick);
    }
}

fn say(input: &mut Input<'_>, host: &Host) -> Message {
    let e = |input: &mut Input<'_>| Epoch(input.near(host.epoch));
    let r = |input: &mut Input<'_>| EpochRef {
        epoch: Epoch(input.near(host.epoch)),
        term: Term(input.near(host.term)),
    };
    let cursors = |input: &mut Input<'_>| Cursors {
        sent: e(input),
        committed: e(input),
        released: e(input),
        stable: e(input),
    };
    let body = match input.byte() % 16 {
        0 => Body::Hello,
        1 => Body::Resume { after: r(input) },
        2 => Body::Join {
            join: input.near(host.join),
            next: input.near(host.seq),
        },
        3 => Body::Chunk {
            join: input.near(host.join),
            seq: input.near(host.seq),
        },
        4 => Body::Epoch(EpochHeader {
            epoch: r(input),
            prev: r(input),
            flush: input.flag(),
            bytes: input.near(4096),
            base: input.flag().then(|| Base {
                join: input.near(host.join),
                chunks: input.near(host.seq),
            }),
            cursors: cursors(input),
        }),
        5 => Body::Heartbeat {
            seq: input.near(host.seq),
            cursors: cursors(input),
            rank: input.flag().then(|| input.byte()),
        },
        6 => Body::Handover {
            at: r(input),
            released: e(input),
        },
        7 => Body::Welcome(Welcome {
            staged: input.flag().then(|| r(input)),
            applied: r(input),
            durable: e(input),
            join: input
                .flag()
                .then(|| (input.near(host.join), input.near(host.seq))),
            instance: Instance(input.near(11)),
            disk: r(input),
        }),
        8 | 9 => Body::Ack {
            staged: r(input),
            durable: e(input),
            echo: input.near(host.seq),
            top: Term(input.near(host.term)),
        },
        10 => Body::ChunkAck {
            join: input.near(host.join),
            next: input.near(host.seq),
            echo: input.near(host.seq),
        },
        11 => Body::Resend { after: r(input) },
        12 => Body::NoSession,
        13 => Body::Fenced,
        14 => Body::Poll,
        _ => Body::PollReply {
            staged: r(input),
            promised: input.flag(),
        },
    };
    // Mostly in the session and term that the replica is in: elsewhere everything is refused at once.
    let session = match input.byte() {
        0..=220 => host.session,
        _ => input.near(host.session),
    };
    let term = match input.byte() {
        0..=220 => host.term,
        _ => input.near(host.term),
    };
    Message {
        term: Term(term),
        session,
        body,
    }
}

fn plays() -> Vec<Vec<u8>> {
    let mut random = Random::new(5);
    (0..24)
        .map(|_| (0..400).map(|_| random.word() as u8).collect())
        .collect()
}

/// Decoding is total, and what it takes is what it would write or a longer spelling of it.
fn message(data: &[u8]) {
    if let Some(m) = codec::decode(data) {
        let again = codec::encode(&m);
        assert_eq!(codec::decode(&again), Some(m), "a message is not what it was");
    }
}

fn messages() -> Vec<Vec<u8>> {
    let host = Host::new(true);
    let mut random = Random::new(3);
    (0..32)
        .map(|_| {
            let bytes: Vec<u8> = (0..64).map(|_| random.word() as u8).collect();
            codec::encode(&say(&mut Input(&bytes), &host))
        })
        .collect()
}

/// A control socket whose VM answers everything. One for the whole process, as a VM's is.
fn control_socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a folder").keep();
        let path = dir.join("control");
        let (calls, todo) = sync_channel::<control::Call>(16);
        let listener = control::bind(&path).expect("a socket");
        control::serve(listener, calls).expect("a thread");
        std::thread::spawn(move || {
            for call in todo {
                let _ = call.answer.send(serde_json::json!({"ok": true}));
            }
        });
        path
    })
}

/// Any bytes get an answer or an end, soon, and the next client is served.
fn line(data: &[u8]) {
    let path = control_socket();
    let talk = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(path).expect("the socket is served");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a bound");
        // It may hang up before it has read all.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut said = Vec::new();
        let late = stream
            .read_to_end(&mut said)
            .is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!late, "no answer and no end");
        said
    };
    talk(data);
    let said = talk(b"{\"verb\":\"status\"}\n");
    assert!(said.starts_with(b"{\"ok\":true"), "the next client: {said:?}");
}

fn lines() -> Vec<Vec<u8>> {
    [
        "{\"verb\":\"status\"}\n{\"verb\":\"pause\"}\n",
        "{\"verb\":\"save\",\"path\":\"/x\",\"then\":\"resume\"}\n",
        "{\"verb\":\"add-peer\",\"host\":\"b\",\"paths\":[\"127.0.0.1:7\"],\"standby\":true}\n",
        "{\"verb\":\"copy-rate\",\"bytes_per_s\":18446744073709551615}\n",
        "{\"verb\":\"type\",\"text\":\"\\u0000\\ud83d\\ude00\"}\n",
        "\n\n[[[[[[[[[[",
    ]
    .iter()
    .map(|s| s.as_bytes().to_vec())
    .collect()
}

/// A file that calls itself a saved VM. The checksum of its header is made right: whoever forges a file does that too.
fn save(data: &[u8]) {
    let mut data = data.to_vec();
    if let Some(len) = data
        .get(12..16)
        .and_then(|l| l.try_into().ok())
        .map(u32::from_le_bytes)
        && let Some(header) = data.get(20..20 + len as usize)
    {
        let crc = crc32fast::hash(header).to_le_bytes();
        data[16..20].copy_from_slice(&crc);
    }
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&data).expect("room");
    let Ok(reader) = SaveReader::open(file.path()) else {
        return;
    };
    // A file may ask for any size; who restores gives it what the host has.
    if let Ok(ram) = Ram::new(reader.ram_bytes.min(256 << 20), &RamBacking::Memfd) {
        let _ = reader.load(&ram);
    }
}

fn saves() -> Vec<Vec<u8>> {
    let mut random = Random::new(9);
    let noise: Vec<u8> = (0..8192).map(|_| random.word() as u8).collect();
    let mut all = vec![noise];
    all.extend(saved_vm());
    all
}

/// The file of a small VM with one record of a device.
fn saved_vm() -> Option<Vec<u8>> {
    let ram = Ram::new(64 << 20, &RamBacking::Memfd).ok()?;
    for page in [0_u64, 1, 2, 900, 16_383] {
        ram.memory()
            .write_slice(&[7; 64], GuestAddress(page * 4096))
            .ok()?;
    }
    let mut state = MachineState::default();
    state.push(StateRecord {
        kind: StateKind::VirtioRng,
        instance: 3,
        version: 1,
        payload: vec![1; 40],
    });
    let dir = tempfile::tempdir().ok()?;
    let path = dir.path().join("vm");
    let writer = SaveWriter::create(&path, b"{}", &state, 64 << 20).ok()?;
    writer.finish(&ram).ok()?;
    std::fs::read(&path).ok()
}
