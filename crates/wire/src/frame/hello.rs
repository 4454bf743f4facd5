//! Hello and Welcome: the first frame in each direction of a connection. They agree on version and features, prove
//! that the right VM and hosts were reached, and name the session that the connection belongs to.
//!
//! ```text
//!  connecting side                               listening side
//!  Hello { versions, names, session,      --->
//!          peer instance, received }
//!          <---  Welcome { status, version, instance, received }
//!  both resend what the other has not received; frames flow
//! ```

use super::{VERSION_MAX, VERSION_MIN};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Feature bits that both sides must have for a feature to be used.
pub mod features {
    /// Pages and disk data compressed with LZ4.
    pub const LZ4: u32 = 1;
    /// Pages as differences against what was last sent.
    pub const DELTA: u32 = 1 << 1;
    /// All that this code knows.
    pub const ALL: u32 = LZ4 | DELTA;
}

/// Longest host name in bytes.
const NAME_BYTES_MAX: usize = 63;

/// Answer to a Hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The connection joins the session.
    Accepted = 0,
    /// No version in common.
    Version = 1,
    /// Another VM is served here.
    WrongVm = 2,
    /// This is not the host that was meant, or the caller is not the host that is expected.
    WrongHost = 3,
    /// A newer generation holds the session.
    Stale = 4,
    /// The session is unknown here (restarted): open a new one.
    Reset = 5,
    /// No such path.
    WrongPath = 6,
}

impl Status {
    const fn from_wire(v: u8) -> Option<Self> {
        Some(match v {
            0 => Self::Accepted,
            1 => Self::Version,
            2 => Self::WrongVm,
            3 => Self::WrongHost,
            4 => Self::Stale,
            5 => Self::Reset,
            6 => Self::WrongPath,
            _ => return None,
        })
    }
}

/// Content of a Hello or Welcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version spoken; in a Welcome the version chosen.
    pub version_min: u16,
    /// Newest version spoken; in a Welcome the version chosen.
    pub version_max: u16,
    /// Feature bits; in a Welcome those in common.
    pub features: u32,
    /// Session that the connection belongs to.
    pub session: u64,
    /// Number of the sender's process instance, random.
    pub instance: u64,
    /// Instance that the sender believes to talk to; 0 if it has not met it yet.
    pub peer_instance: u64,
    /// Order of sessions between two hosts: a lower generation than the one known is refused.
    pub generation: u64,
    /// Every numbered frame before this one has arrived at the sender.
    pub received: u64,
    /// Bytes of this session that the sender has taken and used.
    pub consumed: u64,
    /// Bytes that the sender is ready to hold beyond `consumed`.
    pub window: u64,
    /// Largest payload that the sender accepts.
    pub payload_max: u32,
    /// Number of the path.
    pub path: u8,
    /// Answer; [`Status::Accepted`] in a Hello.
    pub status: Status,
    /// Name of the sending host.
    pub host: String,
    /// Name of the host that it wants to talk to.
    pub peer: String,
}

/// Why a payload is not a Hello.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Too short or too long.
    #[error("a Hello of {0} bytes has the wrong length")]
    Length(usize),
    /// A name that is no name.
    #[error("a Hello with a host name that is not valid")]
    Name,
    /// An unknown status.
    #[error("a Welcome with unknown status {0}: the peer is newer than this host")]
    Status(u8),
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    version_min: U16,
    version_max: U16,
    features: U32,
    session: U64,
    instance: U64,
    peer_instance: U64,
    generation: U64,
    received: U64,
    consumed: U64,
    window: U64,
    payload_max: U32,
    path: u8,
    status: u8,
    host_len: u8,
    peer_len: u8,
}

impl Hello {
    /// The payload's bytes. Names longer than 63 bytes cannot occur (`HostId` is checked) and are cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let host = &self.host.as_bytes()[..self.host.len().min(NAME_BYTES_MAX)];
        let peer = &self.peer.as_bytes()[..self.peer.len().min(NAME_BYTES_MAX)];
        let raw = Raw {
            version_min: self.version_min.into(),
            version_max: self.version_max.into(),
            features: self.features.into(),
            session: self.session.into(),
            instance: self.instance.into(),
            peer_instance: self.peer_instance.into(),
            generation: self.generation.into(),
            received: self.received.into(),
            consumed: self.consumed.into(),
            window: self.window.into(),
            payload_max: self.payload_max.into(),
            path: self.path,
            status: self.status as u8,
            host_len: host.len() as u8,
            peer_len: peer.len() as u8,
        };
        [raw.as_bytes(), host, peer].concat()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`HelloError`] for anything that [`Hello::encode`] cannot have made.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        let (raw, rest) = Raw::ref_from_prefix(bytes).map_err(|_| HelloError::Length(bytes.len()))?;
        let (host_len, peer_len) = (raw.host_len as usize, raw.peer_len as usize);
        if rest.len() != host_len + peer_len {
            return Err(HelloError::Length(bytes.len()));
        }
        let name = |b: &[u8]| -> Result<String, HelloError> {
            if b.is_empty() || b.len() > NAME_BYTES_MAX || !b.iter().all(u8::is_ascii_graphic) {
                return Err(HelloError::Name);
            }
            String::from_utf8(b.to_vec()).map_err(|_| HelloError::Name)
        };
        Ok(Self {
            version_min: raw.version_min.get(),
            version_max: raw.version_max.get(),
            features: raw.features.get(),
            session: raw.session.get(),
            instance: raw.instance.get(),
            peer_instance: raw.peer_instance.get(),
            generation: raw.generation.get(),
            received: raw.received.get(),
            consumed: raw.consumed.get(),
            window: raw.window.get(),
            payload_max: raw.payload_max.get(),
            path: raw.path,
            status: Status::from_wire(raw.status).ok_or(HelloError::Status(raw.status))?,
            host: name(&rest[..host_len])?,
            peer: name(&rest[host_len..])?,
        })
    }
}

/// The newest version that both sides speak.
#[must_use]
pub fn common_version(peer_min: u16, peer_max: u16) -> Option<u16> {
    let newest = peer_max.min(VERSION_MAX);
    (newest >= peer_min.max(VERSION_MIN)).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Hello {
        Hello {
            version_min: 1,
            version_max: 4,
            features: features::ALL,
            session: 9,
            instance: 8,
            peer_instance: 0,
            generation: 2,
            received: 1,
            consumed: 77,
            window: 1 << 20,
            payload_max: 1 << 20,
            path: 1,
            status: Status::Accepted,
            host: "alpha".into(),
            peer: "beta".into(),
        }
    }

    #[test]
    fn round_trip_and_cut_short() {
        let bytes = sample().encode();
        assert_eq!(Hello::decode(&bytes), Ok(sample()));
        for n in 0..bytes.len() {
            assert!(Hello::decode(&bytes[..n]).is_err());
        }
    }

    #[test]
    fn versions_are_negotiated() {
        assert_eq!(common_version(1, 1), Some(1));
        assert_eq!(common_version(1, 9), Some(VERSION_MAX));
        assert_eq!(common_version(VERSION_MAX + 1, 9), None);
        assert_eq!(common_version(0, 0), None);
        assert_eq!(common_version(5, 1), None);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(h) = Hello::decode(&bytes) {
                prop_assert_eq!(Hello::decode(&h.encode()), Ok(h));
            }
        }
    }
}
