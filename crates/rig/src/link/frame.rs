//! The frame of every link of the rig.
//!
//! ```text
//! offset 0: u32 little-endian  length of the payload, at most PAYLOAD_MAX
//! offset 4: u8                 kind
//! offset 5: u32 little-endian  channel
//! offset 9: payload
//! ```
//! A frame with an unknown kind or a length above the bound ends the link: there is no way to find the next frame.

use std::io::{self, Read, Write};

/// The largest payload in bytes.
pub const PAYLOAD_MAX: usize = 64 * 1024;
/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 9;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON of [`super::messages::Hello`], agent to rig, channel 0.
    Hello = 1,
    /// JSON of [`super::messages::Request`]: opens a channel.
    Open = 2,
    /// Bytes to standard input, or of a file that is put.
    Input = 3,
    /// No more input.
    InputEnd = 4,
    /// Bytes from standard output, or of a file that is fetched.
    Output = 5,
    /// Bytes from standard error.
    ErrorOutput = 6,
    /// JSON of [`super::messages::Outcome`]: the channel is over.
    End = 7,
    /// u32 little-endian: that many bytes were consumed; the peer may send as many more.
    Credit = 8,
    /// JSON of [`super::messages::Control`]: a signal or a new window size.
    Control = 9,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Hello,
            2 => Kind::Open,
            3 => Kind::Input,
            4 => Kind::InputEnd,
            5 => Kind::Output,
            6 => Kind::ErrorOutput,
            7 => Kind::End,
            8 => Kind::Credit,
            9 => Kind::Control,
            _ => return None,
        })
    }

    /// True for the kinds whose payload counts against the channel's credit.
    pub fn is_bulk(self) -> bool {
        matches!(self, Kind::Input | Kind::Output | Kind::ErrorOutput)
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The channel it belongs to.
    pub channel: u32,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// Reads one frame. `Ok(None)` is a clean end between two frames.
///
/// # Errors
/// `InvalidData` for an unknown kind or a length above [`PAYLOAD_MAX`]; `UnexpectedEof` inside a frame.
pub fn read(stream: &mut dyn Read) -> io::Result<Option<Frame>> {
    let mut header = [0u8; HEADER_BYTES];
    let mut have = 0;
    while have < HEADER_BYTES {
        match stream.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let channel = u32::from_le_bytes([header[5], header[6], header[7], header[8]]);
    let bad = |detail: String| io::Error::new(io::ErrorKind::InvalidData, detail);
    let kind = Kind::from_byte(header[4]).ok_or_else(|| bad(format!("unknown frame kind {}", header[4])))?;
    if length > PAYLOAD_MAX {
        return Err(bad(format!("frame of {length} bytes, the most is {PAYLOAD_MAX}")));
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok(Some(Frame {
        kind,
        channel,
        payload,
    }))
}

/// Writes one frame in a single write call.
///
/// # Errors
/// `InvalidInput` when the payload is above [`PAYLOAD_MAX`]; else the stream's own.
pub fn write(stream: &mut dyn Write, kind: Kind, channel: u32, payload: &[u8]) -> io::Result<()> {
    if payload.len() > PAYLOAD_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "frame payload above its bound",
        ));
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.push(kind as u8);
    bytes.extend_from_slice(&channel.to_le_bytes());
    bytes.extend_from_slice(payload);
    stream.write_all(&bytes)?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::Output, 7, b"hello").unwrap();
        write(&mut bytes, Kind::End, u32::MAX, b"").unwrap();
        let mut stream = bytes.as_slice();
        let first = read(&mut stream).unwrap().unwrap();
        assert_eq!(
            (first.kind, first.channel, first.payload.as_slice()),
            (Kind::Output, 7, &b"hello"[..])
        );
        assert_eq!(read(&mut stream).unwrap().unwrap().channel, u32::MAX);
        assert!(read(&mut stream).unwrap().is_none());
    }

    #[test]
    fn a_bad_frame_is_an_error_and_not_a_large_allocation() {
        let mut huge = vec![0xff, 0xff, 0xff, 0xff, 5, 0, 0, 0, 0];
        assert_eq!(
            read(&mut huge.as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        huge[0..4].copy_from_slice(&1u32.to_le_bytes());
        huge[4] = 99;
        assert_eq!(
            read(&mut huge.as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            read(&mut &huge[..5]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
