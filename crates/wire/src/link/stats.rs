//! Counters of a link.

/// Of one path. Bytes are those of the connection's plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathStats {
    /// It carries frames.
    pub up: bool,
    /// It is silent and gets no new frames.
    pub suspect: bool,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes written.
    pub bytes_out: u64,
    /// Frames received, heartbeats included.
    pub frames_in: u64,
    /// Numbered frames given to it.
    pub frames_out: u64,
    /// Of these, such as another path had failed to deliver in time.
    pub frames_resent: u64,
    /// Connections that ended for a wrong checksum or header.
    pub corrupt: u64,
    /// Connections that were made.
    pub connects: u64,
    /// Smoothed round trip in microseconds.
    pub rtt_us: Option<u64>,
    /// Bytes waiting in this process.
    pub queued_bytes: usize,
    /// Bytes of frames given to it that wait for acknowledgement.
    pub unacked_bytes: usize,
}

/// Of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// One for each path, in the order of the settings.
    pub paths: Vec<PathStats>,
    /// Session number.
    pub session: u64,
    /// Features that both sides have; see [`crate::frame::hello::features`].
    pub features: u32,
    /// Bytes waiting for acknowledgement.
    pub unacked_bytes: usize,
    /// Bytes that the peer has not used yet.
    pub outstanding_bytes: u64,
    /// Frames that came more than once and were dropped.
    pub duplicates: u64,
    /// Sessions that were lost.
    pub resets: u64,
    /// Milliseconds since anything came.
    pub silent_ms: u64,
}
