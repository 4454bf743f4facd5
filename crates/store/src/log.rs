//! The embedded store's log: one record for each commit, appended and fsynced.
//!
//! ```text
//! record   magic (8) | length of the body, LE (4) | CRC-32 of the body, LE (4) | body: JSON of `Written`
//! ```
//! A commit that was cut short can only be the last record: one that does not check is cut off if nothing valid follows it, and
//! is damage if something does. History of the format: 1, the first (the magic's last byte).

use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"SFSTORE\x01";
const HEADER: usize = 16;
/// Longest body. A commit of the largest allowed size stays below it (base64-free JSON bytes cost at most 4 times).
const BODY_MAX: usize = 640 << 20;

/// A commit as it is written; a first record also names the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// Identity of the store; only in the first record of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<u64>,
    /// Number of the commit.
    pub revision: u64,
    /// Key, value, and the commit that wrote it.
    pub put: Vec<(String, Bytes, u64)>,
    /// Keys that are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub delete: Vec<String>,
}

/// Bytes that are mostly text: written as a string where they are valid UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Bytes {
    /// Text.
    Text(String),
    /// Anything else.
    Raw(Vec<u8>),
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        std::str::from_utf8(bytes).map_or_else(|_| Self::Raw(bytes.into()), |t| Self::Text(t.into()))
    }
}

impl From<Bytes> for Vec<u8> {
    fn from(bytes: Bytes) -> Self {
        match bytes {
            Bytes::Text(text) => text.into_bytes(),
            Bytes::Raw(raw) => raw,
        }
    }
}

/// A record as bytes.
///
/// # Errors
/// Longer than a record may be.
pub fn encode(written: &Written) -> Result<Vec<u8>, String> {
    let body = serde_json::to_vec(written).map_err(|e| e.to_string())?;
    if body.len() > BODY_MAX {
        return Err(format!("a record of {} bytes; at most {BODY_MAX}", body.len()));
    }
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// What is at the front of `bytes`.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A record of this length.
    Record(Written, usize),
    /// Nothing more.
    End,
    /// The last commit was cut short: nothing valid follows.
    Torn,
    /// A record that does not check, with valid ones behind it.
    Damaged,
}

fn one(bytes: &[u8]) -> Option<(Written, usize)> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let body = rest.get(..word(8) as usize)?;
    let valid = header.starts_with(MAGIC) && word(12) == crc32fast::hash(body);
    valid
        .then(|| serde_json::from_slice(body).ok())?
        .map(|w| (w, HEADER + body.len()))
}

/// Looks at the front of `bytes`.
#[must_use]
pub fn next(bytes: &[u8]) -> Next {
    if bytes.is_empty() {
        return Next::End;
    }
    if let Some((written, length)) = one(bytes) {
        return Next::Record(written, length);
    }
    let starts = bytes.windows(MAGIC.len()).enumerate().skip(1);
    let mut valid = starts
        .filter(|(_, w)| *w == MAGIC)
        .map(|(at, _)| one(&bytes[at..]));
    match valid.any(|v| v.is_some()) {
        true => Next::Damaged,
        false => Next::Torn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_is_told_from_damaged() {
        let written = |revision| Written {
            revision,
            put: vec![("k".into(), Bytes::from(&[0xff, 0][..]), revision)],
            ..Written::default()
        };
        let (one, two) = (encode(&written(1)).unwrap(), encode(&written(2)).unwrap());
        let mut both = [one.clone(), two].concat();
        assert_eq!(next(&both), Next::Record(written(1), one.len()));
        for cut in 1..one.len() {
            assert_eq!(next(&one[..cut]), Next::Torn, "cut at {cut}");
        }
        both[HEADER + 3] ^= 1;
        assert_eq!(next(&both), Next::Damaged);
        assert_eq!(next(&[0; 100]), Next::Torn);
    }
}
