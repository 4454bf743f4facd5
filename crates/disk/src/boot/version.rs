//! Comparing versions: the UAPI Group's Version Format Specification (UAPI.10).

use std::cmp::Ordering;

fn is_part(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'~' | b'-' | b'^' | b'.')
}

fn skip(s: &[u8]) -> &[u8] {
    &s[s.iter().position(|c| is_part(*c)).unwrap_or(s.len())..]
}

fn take(s: &[u8], f: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    s.split_at(s.iter().position(|c| !f(*c)).unwrap_or(s.len()))
}

/// Compares two versions, for example of kernels: `6.1.0-9` is older than `6.1.0-10`, `6.2~rc1` older than `6.2`.
#[must_use]
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    // Each turn takes at least one byte from one of them.
    loop {
        (a, b) = (skip(a), skip(b));
        // A pre-release is older than anything that follows at the same place, also than the end.
        match (a.first() == Some(&b'~'), b.first() == Some(&b'~')) {
            (true, true) => {
                (a, b) = (&a[1..], &b[1..]);
                continue;
            }
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        match (a.is_empty(), b.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        let mut separated = false;
        for mark in [b'-', b'^', b'.'] {
            match (a[0] == mark, b[0] == mark) {
                (true, true) => {
                    (a, b) = (&a[1..], &b[1..]);
                    separated = true;
                    break;
                }
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => {}
            }
        }
        if separated {
            continue;
        }
        let digits = |c: u8| c.is_ascii_digit();
        if digits(a[0]) || digits(b[0]) {
            let ((x, rest_a), (y, rest_b)) = (take(a, digits), take(b, digits));
            // A number is newer than letters.
            if x.is_empty() || y.is_empty() {
                return x.len().cmp(&y.len());
            }
            let (x, y) = (trim(x), trim(y));
            let order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
            if order != Ordering::Equal {
                return order;
            }
            (a, b) = (rest_a, rest_b);
        } else {
            let letters = |c: u8| c.is_ascii_alphabetic();
            let ((x, rest_a), (y, rest_b)) = (take(a, letters), take(b, letters));
            let order = x.cmp(y);
            if order != Ordering::Equal {
                return order;
            }
            (a, b) = (rest_a, rest_b);
        }
    }
}

fn trim(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().take_while(|d| **d == b'0').count()..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order() {
        let rising = [
            "",
            "~rc1",
            "0-rescue",
            "5.10.0-28-amd64",
            "6.1.0-9-amd64",
            "6.1.0-10-amd64",
            "6.2~rc1",
            "6.2",
            "6.2-1",
            "6.2.1",
            "6.10.3-200.fc40.x86_64",
        ];
        // "~rc1" is older than the empty version; the rest rises.
        assert_eq!(compare("~rc1", ""), Ordering::Less);
        for (n, a) in rising.iter().enumerate().skip(2) {
            for b in &rising[n + 1..] {
                assert_eq!(compare(a, b), Ordering::Less, "{a} < {b}");
                assert_eq!(compare(b, a), Ordering::Greater, "{b} > {a}");
            }
            assert_eq!(compare(a, a), Ordering::Equal);
        }
        assert_eq!(compare("1.07", "1.7"), Ordering::Equal);
    }
}
