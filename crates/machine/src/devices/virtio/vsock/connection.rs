//! One stream between a port of the guest and a unix socket of the host, with credit in both directions
//! (virtio 1.2, 5.10.6.3).
//!
//! ```text
//!   host connects:  Requested ── RESPONSE ──> Open        guest connects:  Open
//!   Open: guest bytes ─> backlog (at most BUF_ALLOC) ─> socket;   socket ─> packets (at most the guest's credit)
//! ```

use super::packet::{
    HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, SHUT_RECEIVE, SHUT_SEND, TYPE_STREAM,
};
use crate::devices::virtio::common::Registration;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// Bytes that one connection holds for a host that does not read.
pub(super) const BUF_ALLOC: u32 = 64 << 10;
/// Largest payload of a packet to the guest.
pub(super) const PAYLOAD_MAX: usize = 64 << 10;

/// Names a connection: port of the host's side, port of the guest's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requested,
    Open,
}

pub(super) struct Connection {
    // Dropped before the stream that it names.
    pub(super) registration: Option<Registration>,
    stream: UnixStream,
    pub(super) slot: usize,
    /// In the list of connections that may have a packet for the guest.
    pub(super) queued: bool,
    phase: Phase,
    backlog: VecDeque<u8>,
    /// Bytes handed to the socket, and what of it the guest was told.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    asked_for_credit: bool,
    readable: bool,
    eof_told: bool,
    guest_shut: u32,
    /// Packets owed to the guest, one bit per operation.
    owed: u16,
}

/// The connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over;

impl Connection {
    /// A connection that the guest asked for and the host accepted.
    pub(super) fn accepted(stream: UnixStream, slot: usize, request: &Header) -> Self {
        let mut this = Self::new(stream, slot, Phase::Open);
        this.owed = 1 << OP_RESPONSE;
        this.credit(request);
        this
    }

    /// A connection that the host asks the guest for.
    pub(super) fn requested(stream: UnixStream, slot: usize) -> Self {
        let mut this = Self::new(stream, slot, Phase::Requested);
        this.owed = 1 << OP_REQUEST;
        this
    }

    fn new(stream: UnixStream, slot: usize, phase: Phase) -> Self {
        Self {
            registration: None,
            stream,
            slot,
            queued: false,
            phase,
            backlog: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            asked_for_credit: false,
            readable: true,
            eof_told: false,
            guest_shut: 0,
            owed: 0,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.free() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// Bytes that the guest can take. A guest that claims to have read more than was sent gets none.
    fn free(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_alloc.saturating_sub(in_flight)
    }

    /// The socket may be readable or writable again.
    pub(super) fn ready(&mut self) -> Result<(), Over> {
        self.readable = true;
        self.flush()
    }

    /// Handles a packet of the guest for this connection.
    pub(super) fn packet(&mut self, header: &Header, data: &[u8]) -> Result<(), Over> {
        self.credit(header);
        match (header.op, self.phase) {
            (OP_RESPONSE, Phase::Requested) => {
                self.phase = Phase::Open;
                self.queue(format!("OK {}\n", header.dst_port).as_bytes())?;
                // This line is not the guest's and earns it no credit.
                self.forwarded = 0;
                Ok(())
            }
            (OP_RW, Phase::Open) => {
                if self.guest_shut & SHUT_SEND != 0 || data.len() + self.backlog.len() > BUF_ALLOC as usize {
                    return Err(Over);
                }
                self.queue(data)
            }
            (OP_CREDIT_UPDATE, Phase::Open) => Ok(()),
            (OP_CREDIT_REQUEST, Phase::Open) => {
                self.owed |= 1 << OP_CREDIT_UPDATE;
                Ok(())
            }
            (OP_SHUTDOWN, Phase::Open) => {
                self.guest_shut |= header.flags & (SHUT_RECEIVE | SHUT_SEND);
                if self.guest_shut & SHUT_RECEIVE != 0 {
                    let _ = self.stream.shutdown(Shutdown::Read);
                }
                self.flush()
            }
            // RST, a second request or response, anything unknown.
            _ => Err(Over),
        }
    }

    fn queue(&mut self, data: &[u8]) -> Result<(), Over> {
        self.backlog.extend(data);
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Over> {
        while !self.backlog.is_empty() {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(0) => return Err(Over),
                Ok(n) => {
                    self.backlog.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(Over),
            }
        }
        if self.forwarded.wrapping_sub(self.told) >= BUF_ALLOC / 2 {
            self.owed |= 1 << OP_CREDIT_UPDATE;
        }
        if self.backlog.is_empty() && self.guest_shut & SHUT_SEND != 0 {
            if self.guest_shut & SHUT_RECEIVE != 0 {
                return Err(Over);
            }
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Whether [`Connection::next`] may have something.
    pub(super) fn wants(&self) -> bool {
        self.owed != 0 || self.can_read() && (self.free() > 0 || !self.asked_for_credit)
    }

    fn can_read(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && !self.eof_told
            && self.guest_shut & SHUT_RECEIVE == 0
            && self.guest_alloc > 0
    }

    /// The next packet for the guest: its header, with the payload put into `payload`.
    pub(super) fn next(
        &mut self,
        key: Key,
        guest_cid: u64,
        payload: &mut [u8],
    ) -> Result<Option<Header>, Over> {
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        if let Some(op) = [OP_REQUEST, OP_RESPONSE, OP_CREDIT_UPDATE]
            .into_iter()
            .find(|op| self.owed & (1 << op) != 0)
        {
            self.owed &= !(1 << op);
            header.op = op;
        } else if self.can_read() {
            let room = payload.len().min(self.free() as usize).min(PAYLOAD_MAX);
            if room == 0 {
                if self.asked_for_credit || self.free() > 0 {
                    return Ok(None);
                }
                self.asked_for_credit = true;
                header.op = OP_CREDIT_REQUEST;
            } else {
                let got = loop {
                    match self.stream.read(&mut payload[..room]) {
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        other => break other,
                    }
                };
                match got {
                    Ok(0) => {
                        self.eof_told = true;
                        header.op = OP_SHUTDOWN;
                        header.flags = SHUT_SEND;
                    }
                    Ok(n) => {
                        header.op = OP_RW;
                        header.len = n as u32;
                        self.sent = self.sent.wrapping_add(n as u32);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        return Ok(None);
                    }
                    Err(_) => return Err(Over),
                }
            }
        } else {
            return Ok(None);
        }
        header.buf_alloc = BUF_ALLOC;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
        Ok(Some(header))
    }
}

/// A reset for a connection that is over, or never was.
pub(super) fn reset(key: Key, guest_cid: u64) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: key.host_port,
        dst_port: key.guest_port,
        kind: TYPE_STREAM,
        op: OP_RST,
        ..Header::default()
    }
}
