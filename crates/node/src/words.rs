//! What a process said last, for people: the end of a log or a console, as plain text.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// So much of it, in bytes.
const LAST: u64 = 400;

/// The end of a file, from a line's beginning where there is one; nothing if it cannot be read.
#[must_use]
pub fn last(path: &Path) -> String {
    end_of(path).map_or_else(|_| String::new(), |(bytes, whole)| plain(&bytes, whole))
}

fn end_of(path: &Path) -> io::Result<(Vec<u8>, bool)> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LAST)))?;
    let mut bytes = Vec::new();
    file.take(LAST).read_to_end(&mut bytes)?;
    Ok((bytes, len <= LAST))
}

/// Without colours and other control characters: a guest's console may hold anything.
fn plain(bytes: &[u8], whole: bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = match text.find('\n') {
        Some(at) if !whole && at + 1 < text.len() => &text[at + 1..],
        _ => &text,
    };
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => {
                // ESC [ numbers letter
                if chars.next() == Some('[') {
                    chars.by_ref().find(char::is_ascii_alphabetic);
                }
            }
            '\n' | '\t' => out.push(' '),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_plain_text() {
        assert_eq!(plain(b"a\x1b[2mb\x1b[0m\r\nc\x07", true), "ab c");
        assert_eq!(plain(b"half a line\nwhole\n", false), "whole");
        assert_eq!(plain(b"one long line\n", false), "one long line");
        assert_eq!(plain(b"\x1b", true), "");
        assert_eq!(last(Path::new("/nowhere/at/all")), "");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        std::fs::write(&file, [&[b'x'; 5000][..], b"\nthe end\n"].concat()).unwrap();
        assert_eq!(last(&file), "the end");
    }
}
