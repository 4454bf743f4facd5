//! One other host: its link, what was encoded for it, what comes from it.

use crate::config::{PeerSpec, ProtectSpec};
use crate::disks::NumberedOp;
use crate::input::{Input, Inputs};
use crate::outgoing::{Outgoing, PIECE};
use std::collections::BTreeMap;
use steadfast_capture::SealedPages;
use steadfast_disk::volume::EpochOp;
use steadfast_epoch::message::{EpochRef, Message};
use steadfast_machine::cpuid::GuestCpu;
use steadfast_types::{Gfn, HostId, PAGE_SIZE, VmId};
use steadfast_wire::link::{OpenError, PathConfig, Role, Security, TlsFiles};
use steadfast_wire::record::StageConfig;
use steadfast_wire::{EncodeConfig, Encoder, Link, LinkConfig, Stager, vm_hash};

/// Pages of one chunk of a full copy: 4 MiB.
pub const CHUNK_PAGES: usize = 1024;

/// Which pages a standby that is being filled does not have yet.
pub struct Join {
    /// Number of the copy.
    pub join: u64,
    missing: Vec<u64>,
    count: u64,
    /// The next piece begins at this page. Round and round: if each began at the first page that is missing, a guest that dirties low
    /// pages faster than they are sent would keep the others from ever being sent.
    at: u64,
    /// Chunks sent, with their pages: a lost one counts as not sent.
    sent: BTreeMap<u64, Vec<Gfn>>,
    /// Pieces of disks in those chunks: volume, offset, length.
    pub sent_disk: BTreeMap<u64, (u16, u64, u64)>,
    /// Times that the machine was looked at again for pages dirtied meanwhile.
    pub rounds: u32,
}

impl Join {
    /// Everything is missing.
    pub fn new(join: u64, regions: &[(u64, u64)]) -> Self {
        let mut it = Self {
            join,
            missing: Vec::new(),
            count: 0,
            at: 0,
            sent: BTreeMap::new(),
            sent_disk: BTreeMap::new(),
            rounds: 0,
        };
        for &(start, len) in regions {
            for page in start / PAGE_SIZE..(start + len) / PAGE_SIZE {
                it.add(Gfn(page));
            }
        }
        it
    }

    /// Marks a page as missing (again).
    pub fn add(&mut self, gfn: Gfn) {
        let word = (gfn.0 / 64) as usize;
        if word >= self.missing.len() {
            self.missing.resize(word + 1, 0);
        }
        let bit = 1 << (gfn.0 % 64);
        if self.missing[word] & bit == 0 {
            self.missing[word] |= bit;
            self.count += 1;
        }
    }

    /// Bytes that are missing.
    pub fn remaining(&self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// Takes all missing pages, rising.
    pub fn take_all(&mut self) -> Vec<Gfn> {
        self.take(0, usize::MAX)
    }

    /// Missing pages from this one on, rising.
    fn take(&mut self, from: u64, most: usize) -> Vec<Gfn> {
        let mut pages = Vec::new();
        let first = (from / 64) as usize;
        for (w, word) in self.missing.iter_mut().enumerate().skip(first) {
            let mut left = *word;
            if w == first {
                left &= u64::MAX << (from % 64);
            }
            while left != 0 && pages.len() < most {
                let bit = left & left.wrapping_neg();
                pages.push(Gfn(w as u64 * 64 + u64::from(bit.trailing_zeros())));
                left &= !bit;
                *word &= !bit;
            }
            if pages.len() >= most {
                break;
            }
        }
        self.count -= pages.len() as u64;
        pages
    }

    /// Pages of chunk `seq`, at most `most`; chunks from there on that were sent before were lost.
    pub fn chunk(&mut self, seq: u64, most: usize) -> Vec<Gfn> {
        for (_, lost) in self.sent.split_off(&seq) {
            for gfn in lost {
                self.at = self.at.min(gfn.0);
                self.add(gfn);
            }
        }
        let most = most.clamp(1, CHUNK_PAGES);
        let mut pages = self.take(self.at, most);
        if pages.is_empty() {
            pages = self.take(0, most);
        }
        self.at = pages.last().map_or(0, |g| g.0 + 1);
        self.sent.insert(seq, pages.clone());
        pages
    }
}

/// A peer and its link.
pub struct Peer {
    /// Its name.
    pub host: HostId,
    /// The link.
    pub link: Link,
    /// Under which number volumes keep account of what this host lacks; stays for the life of the peer.
    pub slot: usize,
    /// To be closed once the record no longer lists the host.
    pub leaving: bool,
    /// Mirror to it when primary.
    pub wanted: bool,
    /// A session stands.
    pub connected: bool,
    /// The copy under way, when primary.
    pub join: Option<Join>,
    /// It has, or may have, all that was sealed up to some epoch and may be sent the next: from the base epoch of its copy
    /// on, listed as in sync or not, until its process dies or a new copy begins. While so, every cut takes everything.
    pub fed: bool,
    /// Its process is known to have ended since the last session.
    pub dead: bool,
    /// What it said of its disks before its last Welcome: an unfinished copy, over which epoch.
    pub unfinished: Option<(u64, EpochRef)>,
    /// As a standby of it: the CPU of its guest, in this session, and why this host cannot show that.
    pub cpu: Option<Result<GuestCpu, String>>,
    /// Why it does not answer, as it said.
    pub unfit: Option<String>,
    /// Message whose bulk is still arriving.
    pub pending: Option<Message>,
    /// Collects the bulk.
    pub stager: Stager,
    /// What goes to it.
    pub out: Outgoing,
}

impl Peer {
    /// Opens the link; events go to `inputs`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        vm: &VmId,
        spec: &ProtectSpec,
        peer: &PeerSpec,
        slot: usize,
        pages: Vec<(u64, u64)>,
        inputs: &Inputs,
    ) -> Result<Self, OpenError> {
        let role = if spec.host < peer.host {
            Role::Listen
        } else {
            Role::Connect
        };
        let paths = peer.paths.iter().map(|a| PathConfig::new(*a)).collect();
        let security = match &spec.tls {
            Some(tls) => Security::Tls(TlsFiles {
                ca: tls.ca.clone(),
                cert: tls.certificate.clone(),
                key: tls.key.clone(),
                crl: tls.crl.clone(),
            }),
            None => Security::Plain,
        };
        let mut config = LinkConfig::new(
            vm.clone(),
            spec.host.clone(),
            peer.host.clone(),
            role,
            paths,
            security,
        );
        config.manual_credit = true;
        config.silent_ms = spec.suspect_ms.max(50);
        // A path is doubted before the peer is, and not on every hiccup of a host that is known to be slow.
        config.heartbeat_ms = spec.heartbeat_ms();
        config.suspect_ms = config.suspect_ms.max(spec.suspect_ms / 3);
        config.path_timeout_ms = config.path_timeout_ms.max(spec.suspect_ms * 2);
        config.backoff_ms = (5, 100);
        let (host, to) = (peer.host.clone(), inputs.clone());
        let mut raised = false;
        let link = Link::open(config, move |event| {
            if !std::mem::replace(&mut raised, true) {
                crate::priority::raise("a link");
            }
            to.send(Input::Link(host.clone(), event));
        })?;
        // Small pieces, so that on a slow link too something arrives more often than the detector waits.
        let encode = EncodeConfig {
            chunk_bytes: 128 << 10,
            ..EncodeConfig::default()
        };
        let encoder = Encoder::new(vm_hash(vm), &encode, link.pool().clone());
        let valid = move |g: Gfn| pages.iter().any(|&(s, l)| (s..s + l).contains(&g.address()));
        Ok(Self {
            host: peer.host.clone(),
            link,
            slot,
            leaving: false,
            wanted: peer.standby,
            connected: false,
            join: None,
            fed: false,
            dead: false,
            unfinished: None,
            cpu: None,
            unfit: None,
            pending: None,
            stager: Stager::new(StageConfig::default(), valid),
            out: Outgoing::new(encoder),
        })
    }

    /// The peer has lost what it had of the stream: the next record refers to nothing before it.
    pub fn reset_stream(&mut self) {
        self.out.clear();
        self.pending = None;
        self.stager.forget();
    }

    /// This host runs the VM no more: it has nothing to send but messages, and what it hears refers to nothing before.
    pub fn step_down(&mut self) {
        (self.join, self.fed, self.pending) = (None, false, None);
        self.out.restart();
        self.stager.forget();
    }

    /// Offers what waits to the link, for a while. What was given up, and why, is in the log only: who is asked for it again
    /// sends it again.
    pub fn flush(&mut self) {
        let link = &self.link;
        if let Err(error) = self.out.pump(PIECE, |frame| link.try_send(frame)) {
            tracing::error!(peer = %self.host, "{error}");
        }
    }
}

/// A sealed epoch, kept until nobody needs it.
pub struct Record {
    /// Changed pages; none for a cut that nobody mirrors.
    pub pages: Option<SealedPages>,
    /// Machine state, encoded; empty for a cut that nobody mirrors.
    pub state: Vec<u8>,
    /// Frames that the guest had sent at the cut.
    pub boundary: u64,
    /// Operations on disks; none if they could not be read.
    pub disk: Option<Vec<NumberedOp>>,
    /// For the hosts whose full copy this epoch completes: what their disks still lack, instead.
    pub bases: BTreeMap<HostId, Vec<NumberedOp>>,
}

impl Record {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let lists = self.disk.iter().chain(self.bases.values());
        let disk = |(_, op): &NumberedOp| match op {
            EpochOp::Write { data, .. } => data.len() as u64 + 32,
            _ => 32,
        };
        self.pages.as_ref().map_or(0, SealedPages::bytes)
            + self.state.len() as u64
            + lists.flatten().map(disk).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_dirtied_again_waits_for_its_turn() {
        let mut j = Join::new(1, &[(0, 400 * 4096)]);
        let mut seen = std::collections::BTreeSet::new();
        for seq in 0..4 {
            let pages = j.chunk(seq, 100);
            assert_eq!(pages.len(), 100);
            seen.extend(pages);
            // The guest changes the lowest hundred all the while.
            (0..100).for_each(|g| j.add(Gfn(g)));
        }
        assert_eq!(seen.len(), 400, "all were sent once before any was sent twice");
        assert_eq!(j.chunk(4, 100).first(), Some(&Gfn(0)), "round");
    }

    #[test]
    fn lost_chunks_are_missing_again() {
        let mut j = Join::new(1, &[(0, 3000 * 4096), (1 << 32, 4096)]);
        assert_eq!(j.remaining(), 3001 * 4096);
        assert_eq!(j.chunk(0, CHUNK_PAGES).len(), 1024);
        assert_eq!(j.chunk(1, CHUNK_PAGES).len(), 1024);
        assert_eq!(j.chunk(2, CHUNK_PAGES).len(), 953);
        assert_eq!(j.remaining(), 0);
        let again = j.chunk(1, CHUNK_PAGES);
        assert_eq!(
            (again.len(), again[0], j.remaining()),
            (1024, Gfn(1024), 953 * 4096)
        );
        j.add(Gfn(0));
        assert_eq!(j.take_all().len(), 954);
        assert_eq!(j.remaining(), 0);
    }
}
