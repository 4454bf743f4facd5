//! LEB128 integers: seven bits a byte, least significant first, at most ten bytes.

/// Longest encoding of a `u64` in bytes.
pub const VARINT_BYTES_MAX: usize = 10;

/// Writes `value` at `out[at..]` and returns the position behind it. The caller has left room.
pub fn put(out: &mut [u8], mut at: usize, mut value: u64) -> usize {
    while value >= 0x80 {
        out[at] = (value as u8) | 0x80;
        value >>= 7;
        at += 1;
    }
    out[at] = value as u8;
    at + 1
}

/// Reads one integer from the front of `input` and moves it on; `None` if it is cut short or does not fit.
pub fn get(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for (i, &byte) in input.iter().take(VARINT_BYTES_MAX).enumerate() {
        let bits = u64::from(byte & 0x7f);
        if i == 9 && byte > 1 {
            return None;
        }
        value |= bits << (7 * i);
        if byte < 0x80 {
            *input = &input[i + 1..];
            return Some(value);
        }
    }
    None
}

/// Maps a signed difference to an unsigned number that is small for small differences.
pub const fn zigzag(v: i64) -> u64 {
    ((v << 1) ^ (v >> 63)) as u64
}

/// Undoes [`zigzag`].
pub const fn unzigzag(v: u64) -> i64 {
    (v >> 1) as i64 ^ -((v & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_round_trip() {
        for v in [
            0,
            1,
            127,
            128,
            16_383,
            16_384,
            u64::from(u32::MAX),
            u64::MAX - 1,
            u64::MAX,
        ] {
            let mut out = [0; VARINT_BYTES_MAX];
            let n = put(&mut out, 0, v);
            let mut rest = &out[..n];
            assert_eq!(get(&mut rest), Some(v));
            assert!(rest.is_empty());
        }
        for v in [0, 1, -1, i64::MIN, i64::MAX] {
            assert_eq!(unzigzag(zigzag(v)), v);
        }
    }

    #[test]
    fn cut_short_or_too_large_is_refused() {
        assert_eq!(get(&mut [0x80u8; 3].as_slice()), None);
        assert_eq!(get(&mut [0xffu8; 12].as_slice()), None);
        assert_eq!(get(&mut [].as_slice()), None);
    }
}
