//! A frame that tells switches where an address is now: a reverse ARP request (RFC 903) from that address to everybody.
//!
//! It needs no knowledge of the guest's protocol addresses, and nobody answers it.

use crate::VNET_HEADER;

/// Shortest Ethernet frame, without its check sequence.
const FRAME_MIN: usize = 60;

/// The frame, with its virtio-net header.
#[must_use]
pub fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac);
    // Type; then Ethernet, IPv4, lengths of their addresses, "request reverse".
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _sender_then_target in 0..2 {
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&[0; 4]);
    }
    frame.resize(VNET_HEADER + FRAME_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_from_the_address_and_goes_to_everybody() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let frame = announcement(mac);
        let (header, frame) = frame.split_at(VNET_HEADER);
        assert!(header.iter().all(|b| *b == 0));
        assert_eq!(frame.len(), FRAME_MIN);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &mac[..]));
        assert_eq!(frame[22..28], mac);
        assert_eq!(frame[32..38], mac);
    }
}
