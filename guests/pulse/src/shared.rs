//! What the guest and the host agree on: addresses, packets, the shared pages, the blocks on disk.
//!
//! This file is compiled twice: into the `pulse` library (host) and, by `build.rs`, into the guest itself.
//! So it uses nothing but `core`, and no floating point. All integers are little-endian and, but for the
//! two 32-bit words that open a packet, 64 bits wide; the layout of every structure is simply its words in order.

/// Guest physical address of the boot-info page that the monitor fills.
pub const BOOT_INFO_GPA: u64 = 0x7000;
/// First word of the boot-info page: the bytes `PULSEBI1`.
pub const BOOT_INFO_MAGIC: u64 = u64::from_le_bytes(*b"PULSEBI1");
/// The only version of the boot-info page.
pub const BOOT_INFO_VERSION: u32 = 1;
/// Offset of the command line in the boot-info page.
pub const BOOT_INFO_CMDLINE: usize = 32;
/// Longest command line, in bytes.
pub const CMDLINE_MAX: usize = 3072;
/// Where the guest's image is linked and must be loaded.
pub const LOAD_GPA: u64 = 0x10_0000;
/// Guest physical address of the shared pages ([`Shared`], then the lanes).
pub const SHARED_GPA: u64 = 0x20_0000;
/// Offset of the first [`Lane`] from [`SHARED_GPA`].
pub const LANES_OFFSET: u64 = 0x1000;
/// Bytes from one [`Lane`] to the next (one cache line).
pub const LANE_BYTES: u64 = 64;
/// Buffers of the disk benchmark: 8 MiB that nothing else uses.
pub const BENCH_GPA: u64 = 0x80_0000;
/// Size of the region at [`BENCH_GPA`].
pub const BENCH_BYTES: u64 = 0x80_0000;
/// First page that the dirty loops may touch.
pub const DIRTY_GPA: u64 = 0x100_0000;
/// End of RAM below the hole for devices: RAM beyond this continues at 4 GiB.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Most vCPUs.
pub const MAX_VCPUS: usize = 64;
/// Size of a page.
pub const PAGE: u64 = 4096;

/// UDP and TCP port that returns what it is sent.
pub const ECHO_PORT: u16 = 7;
/// UDP and TCP port of the counter.
pub const COUNTER_PORT: u16 = 9;
/// Local port from which datagrams to the collector are sent.
pub const EVENT_PORT: u16 = 9099;
/// vsock port on the host (CID 2) that the guest tries to reach.
pub const VSOCK_HOST_PORT: u32 = 1024;

/// Sector (512 bytes) of the counter's block.
pub const COUNTER_LBA: u64 = 2048;
/// Sector of the block that `loop=flush` writes.
pub const FLUSH_LBA: u64 = 2056;
/// First sector of the ring of `disk=verify`.
pub const RING_LBA: u64 = 4096;
/// Most blocks in the ring (4 KiB each).
pub const RING_MAX: usize = 1024;
/// First sector that `loop=diskbench` may touch (4 MiB past the largest ring).
pub const BENCH_LBA: u64 = 16384;

/// Opens the counter's block on disk.
pub const DISK_MAGIC: u64 = u64::from_le_bytes(*b"PULSEDSK");
/// Opens the block of the flush loop.
pub const FLUSH_MAGIC: u64 = u64::from_le_bytes(*b"PULSEFLS");
/// Opens a block of the verify ring.
pub const RING_MAGIC: u64 = u64::from_le_bytes(*b"PULSERNG");
/// Opens the shared pages once the guest is ready.
pub const SHARED_MAGIC: u64 = u64::from_le_bytes(*b"PULSESH1");
/// Opens a request.
pub const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"PLSQ");
/// Opens a reply.
pub const REPLY_MAGIC: u32 = u32::from_le_bytes(*b"PLSR");
/// Bytes of a request (a longer datagram is accepted, the rest ignored).
pub const REQUEST_BYTES: usize = 16;

/// What a request asks for (and what a reply answers).
pub mod kind {
    /// Add one to the counter.
    pub const INC: u32 = 1;
    /// Change nothing.
    pub const READ: u32 = 2;
    /// Add one, write the counter's block, flush, then reply.
    pub const FLUSH_INC: u32 = 3;
    /// As READ.
    pub const STATUS: u32 = 4;
    /// Triple fault (no reply).
    pub const PANIC: u32 = 5;
    /// Spin for ever without polling (no reply).
    pub const HANG: u32 = 6;
    /// Write 1 to port 0x505 and go on.
    pub const PVPANIC: u32 = 7;
    /// Unasked, to the collector: another 100 flushes are done.
    pub const EVENT: u32 = 0x100;
}

/// `status` of a reply.
pub mod status {
    /// Done as asked.
    pub const OK: u64 = 0;
    /// FLUSH_INC without a disk: nothing was changed.
    pub const NO_DISK: u64 = 1;
    /// The counter was added to, but writing it failed.
    pub const IO_ERROR: u64 = 2;
    /// Unknown kind: nothing was changed.
    pub const BAD_REQUEST: u64 = 3;
}

/// Bits of the sticky error word.
pub mod error {
    /// A word of a dirty page was not what the loop left there.
    pub const MEMORY: u64 = 1;
    /// A block read back was not what was written.
    pub const DISK_CONTENT: u64 = 2;
    /// The device reported an error, or a used element made no sense.
    pub const DISK_IO: u64 = 4;
    /// A request got no answer for a minute.
    pub const DISK_TIMEOUT: u64 = 8;
    /// The random device gave the same 64 bytes twice, or 64 equal bytes.
    pub const RNG: u64 = 16;
    /// The counter and its copies disagree.
    pub const COUNTER: u64 = 32;
    /// A device broke the virtio protocol.
    pub const DEVICE: u64 = 64;
    /// The CPU is not the one that was there at boot.
    pub const CPU: u64 = 128;
}

/// How the dirty loop changes a page (`Shared::content`).
pub mod content {
    /// One word.
    pub const WORD: u64 = 0;
    /// The whole page, pseudo-random.
    pub const RANDOM: u64 = 1;
    /// The whole page, words of ASCII text (compresses about as text does).
    pub const TEXT: u64 = 2;
    /// One word, not checked by the guest before it is changed (`check=0`).
    pub const UNCHECKED: u64 = 3;
}

/// Defines a structure of 64-bit words with conversions to and from little-endian bytes.
macro_rules! words {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* $field:ident,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$fmeta])* pub $field: u64,)* }

        impl $name {
            /// Number of 64-bit words.
            pub const WORDS: usize = core::mem::size_of::<$name>() / 8;
            /// Size in bytes.
            pub const BYTES: usize = core::mem::size_of::<$name>();

            /// The words in order.
            pub fn to_words(&self) -> [u64; Self::WORDS] {
                [$(self.$field),*]
            }

            /// From the words in order.
            pub fn from_words(w: &[u64; Self::WORDS]) -> Self {
                let [$($field),*] = *w;
                Self { $($field),* }
            }

            /// Little-endian bytes.
            pub fn to_bytes(&self) -> [u8; Self::BYTES] {
                let mut out = [0u8; Self::BYTES];
                for (chunk, w) in out.chunks_exact_mut(8).zip(self.to_words()) {
                    chunk.copy_from_slice(&w.to_le_bytes());
                }
                out
            }

            /// From little-endian bytes; `None` if there are too few.
            pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
                let mut w = [0u64; Self::WORDS];
                let bytes = bytes.get(..Self::BYTES)?;
                for (w, chunk) in w.iter_mut().zip(bytes.chunks_exact(8)) {
                    let mut b = [0u8; 8];
                    b.copy_from_slice(chunk);
                    *w = u64::from_le_bytes(b);
                }
                Some(Self::from_words(&w))
            }
        }
    };
}

words! {
    /// The first shared page, at [`SHARED_GPA`]. Every word is written with one store, so a snapshot taken at any
    /// instruction shows each word whole. Only vCPU 0 writes here.
    pub struct Shared {
        /// [`SHARED_MAGIC`], written last during initialisation.
        magic,
        /// Layout version: 1.
        version,
        /// vCPUs that run.
        ncpus,
        /// Pages in each vCPU's range (0: no dirty loop).
        pages,
        /// Bytes from one touched page to the next.
        stride,
        /// Bytes from one vCPU's range to the next.
        span,
        /// Guest physical address of vCPU 0's range.
        base,
        /// Ranges beyond this address are moved up by `hole_bytes` (0: no such range).
        hole_at,
        /// See `hole_at`.
        hole_bytes,
        /// One of [`content`].
        content,
        /// TSC ticks per millisecond that the guest assumes.
        tsc_khz,
        /// TSC when the guest started.
        start_tsc,
        /// The counter.
        counter,
        /// Its complement, written right after it.
        counter_inv,
        /// What the counter was resumed from.
        boot_counter,
        /// INC done since boot, written after `counter_inv`.
        inc_ops,
        /// FLUSH_INC begun since boot, written after `counter_inv`.
        flush_ops,
        /// The counter in the last block that was written and flushed.
        disk_counter,
        /// Sequence number of that block.
        disk_seq,
        /// Flushes done by `loop=flush`, continued from the disk at boot.
        flush_loops,
        /// Highest sequence number written and read back by `disk=verify`.
        verify_seq,
        /// Sticky bits of [`error`].
        errors,
        /// First error: which bit.
        error_bit,
        /// First error: where (address or sector).
        error_at,
        /// First error: what was expected.
        error_want,
        /// First error: what was found.
        error_found,
        /// Requests answered on the counter port, UDP and TCP.
        replies,
        /// Frames received.
        rx_frames,
        /// Frames given to the device.
        tx_frames,
        /// Frames dropped because the transmit queue was full.
        tx_dropped,
        /// TCP segments sent again.
        tcp_resent,
        /// TCP connections accepted.
        tcp_accepted,
        /// Disk reads completed.
        disk_reads,
        /// Disk writes completed.
        disk_writes,
        /// Disk flushes completed.
        disk_flushes,
        /// Bytes read and written.
        disk_bytes,
        /// Rounds of the poll loop.
        polls,
        /// Lines written to the virtio console.
        console_lines,
        /// Answers of the random device.
        rng_reads,
        /// Pages now in the balloon.
        balloon_pages,
        /// Answers (RESPONSE or RST) of the vsock device.
        vsock_answers,
        /// Bit n set: a virtio device of type n was found and initialised (1 net, 2 block, 3 console, 4 rng, 5 balloon, 19 vsock).
        devices,
        /// 1 once `exit_after_loops` was reached.
        done,
    }
}

words! {
    /// One per vCPU, at [`SHARED_GPA`] + [`LANES_OFFSET`] + index * [`LANE_BYTES`].
    pub struct Lane {
        /// `loops << 24 | pages done in this loop`, stored after the pages it speaks of.
        progress,
        /// 1 once the vCPU runs.
        running,
        /// Bits of [`error`] seen by this vCPU.
        errors,
        /// Where the first was.
        error_at,
        /// What was expected there.
        error_want,
        /// What was found there.
        error_found,
        /// Pages after which `progress` is stored.
        chunk,
        /// 1 once it stopped by `exit_after_loops`.
        stopped,
    }
}

words! {
    /// What the counter port answers, and what is sent to the collector.
    pub struct Reply {
        /// [`REPLY_MAGIC`] in the low half, the kind in the high half.
        head,
        /// The request's nonce.
        nonce,
        /// One of [`status`].
        status,
        /// The counter after this request.
        counter,
        /// The counter last written to disk and flushed.
        disk_counter,
        /// Sequence of that block.
        disk_seq,
        /// Loops completed by vCPU 0.
        loops,
        /// Loops completed by all vCPUs together.
        loops_all,
        /// TSC ticks since the guest started.
        uptime_ticks,
        /// TSC ticks per millisecond that the guest assumes.
        tsc_khz,
        /// Sticky error bits of all vCPUs.
        errors,
        /// What the counter was resumed from at boot.
        boot_counter,
        /// INC done since boot.
        inc_ops,
        /// FLUSH_INC begun since boot.
        flush_ops,
        /// Requests answered before this one.
        replies,
        /// Flushes done by `loop=flush`.
        flush_loops,
        /// Last sequence of `disk=verify`.
        verify_seq,
        /// Disk reads completed.
        disk_reads,
        /// Disk writes completed.
        disk_writes,
        /// Disk flushes completed.
        disk_flushes,
        /// Bytes read and written.
        disk_bytes,
        /// Frames received.
        rx_frames,
        /// Frames sent.
        tx_frames,
        /// Frames dropped because the transmit queue was full.
        tx_dropped,
        /// TCP segments sent again.
        tcp_resent,
        /// Console lines written.
        console_lines,
        /// [`checksum`] of the words before it.
        check,
    }
}

words! {
    /// The block at [`COUNTER_LBA`] (and, with its own magic, the one at [`FLUSH_LBA`]); the rest of the sector is zero.
    pub struct DiskRecord {
        /// [`DISK_MAGIC`] or [`FLUSH_MAGIC`].
        magic,
        /// The counter, or the number of flushes begun.
        counter,
        /// Grows by one with each write, over restarts too.
        seq,
        /// [`checksum`] of the words before it.
        check,
    }
}

impl DiskRecord {
    /// A record with its checksum.
    pub fn new(magic: u64, counter: u64, seq: u64) -> Self {
        let check = checksum(&[magic, counter, seq]);
        Self {
            magic,
            counter,
            seq,
            check,
        }
    }

    /// Whether it was written by pulse, whole.
    pub fn is_valid(&self, magic: u64) -> bool {
        self.magic == magic && self.check == checksum(&[self.magic, self.counter, self.seq])
    }
}

impl Reply {
    /// Fills in magic, kind and checksum.
    pub fn seal(mut self, kind: u32) -> Self {
        self.head = u64::from(REPLY_MAGIC) | u64::from(kind) << 32;
        let w = self.to_words();
        self.check = checksum(&w[..Self::WORDS - 1]);
        self
    }

    /// The kind of request it answers.
    pub fn kind(&self) -> u32 {
        (self.head >> 32) as u32
    }

    /// Whether magic and checksum are right.
    pub fn is_valid(&self) -> bool {
        let w = self.to_words();
        self.head as u32 == REPLY_MAGIC && self.check == checksum(&w[..Self::WORDS - 1])
    }
}

/// A question to the counter port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// One of [`kind`].
    pub kind: u32,
    /// Returned in the reply. A UDP request that repeats the last non-zero nonce of its sender is answered with the
    /// same reply and changes nothing, so a client may send it again until it is answered.
    pub nonce: u64,
}

impl Request {
    /// Little-endian bytes: magic, kind, nonce.
    pub fn to_bytes(&self) -> [u8; REQUEST_BYTES] {
        let head = u64::from(REQUEST_MAGIC) | u64::from(self.kind) << 32;
        let mut out = [0u8; REQUEST_BYTES];
        out[..8].copy_from_slice(&head.to_le_bytes());
        out[8..].copy_from_slice(&self.nonce.to_le_bytes());
        out
    }

    /// `None` if too short or not a request.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut head = [0u8; 8];
        let mut nonce = [0u8; 8];
        head.copy_from_slice(bytes.get(..8)?);
        nonce.copy_from_slice(bytes.get(8..16)?);
        let head = u64::from_le_bytes(head);
        if head as u32 != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            kind: (head >> 32) as u32,
            nonce: u64::from_le_bytes(nonce),
        })
    }
}

/// A 64-bit checksum of words (a multiplicative hash; it finds damage, it is no cryptography).
pub fn checksum(words: &[u64]) -> u64 {
    let mut h: u64 = 0x9E37_79B9_7F4A_7C15;
    for w in words {
        h = (h ^ w).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        h ^= h >> 32;
    }
    h
}

/// Where vCPU `cpu`'s page number `page` lies. `hole_at` is the first address that is moved up by `hole_bytes`
/// (so that ranges can continue above the hole for devices); 0 means no address is.
pub fn page_gpa(s: &Shared, cpu: u64, page: u64) -> u64 {
    let gpa = s
        .base
        .wrapping_add(cpu.wrapping_mul(s.span))
        .wrapping_add(page.wrapping_mul(s.stride));
    if s.hole_at != 0 && gpa >= s.hole_at {
        gpa.wrapping_add(s.hole_bytes)
    } else {
        gpa
    }
}

/// Where the pseudo-random content of a page in a loop starts.
pub fn page_seed(cpu: u64, page: u64, loops: u64) -> u64 {
    (cpu << 56 ^ page << 32 ^ loops).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

/// The next state of the page generator; the state is the word of `content=random`.
#[inline(always)]
pub fn page_next(x: u64) -> u64 {
    x.wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407)
}

/// The word of `content=text` for a generator state.
#[inline(always)]
pub fn page_text(x: u64) -> u64 {
    TEXT_WORDS[(x >> 59) as usize]
}

/// Word `i` (1 to 511) of every block of the verify ring is this of its sequence number.
#[inline(always)]
pub fn ring_word(seq: u64, i: u64) -> u64 {
    (seq ^ i << 48).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

const TEXT_WORDS: [u64; 32] = {
    const W: [&[u8; 8]; 32] = [
        b"the time",
        b" of the ",
        b"guest is",
        b" not the",
        b" host's,",
        b" and it ",
        b"goes on ",
        b"when the",
        b" machine",
        b" under i",
        b"t stops.",
        b" A page ",
        b"written ",
        b"to twice",
        b" is sent",
        b" once in",
        b" an epoc",
        b"h, and a",
        b" reply w",
        b"aits for",
        b" commit.",
        b"\nNothing",
        b" is lost",
        b", nothin",
        b"g is rep",
        b"eated, n",
        b"obody se",
        b"es the g",
        b"ap but a",
        b"s a wait",
        b" of a fe",
        b"w ticks.",
    ];
    let mut out = [0u64; 32];
    let mut i = 0;
    while i < 32 {
        out[i] = u64::from_le_bytes(*W[i]);
        i += 1;
    }
    out
};
