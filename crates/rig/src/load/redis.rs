//! A redis client that can tell whether a write was lost or done twice, and the audit afterwards.
//!
//! ```text
//! INCR n:0           the counter is our number
//! RPUSH log:0 17     the list is as long as our number
//! ```
//! Both are one message. Neither is ever tried again: redis' own count must stay ours, over every failover. RESP version 2, as
//! <https://redis.io/docs/latest/develop/reference/protocol-spec/> describes it; only what is needed here.

use super::OPERATION_BOUND;
use crate::artifacts::service::REDIS_PORT;
use crate::host::client::Client;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A read back after so many writes.
const READ_EVERY: u64 = 8;
/// Entries of a list per question of the audit.
const AUDIT_CHUNK: u64 = 2000;
/// Longest answer that is taken, in bytes and in elements.
const ANSWER_MAX: usize = 1 << 20;

/// An answer of redis.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// `+OK`
    Simple(String),
    /// `:7`
    Number(i64),
    /// `$3`
    Text(String),
    /// `*2`, of texts
    Texts(Vec<String>),
    /// A null.
    Nothing,
}

fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Writes a command.
fn put(out: &mut Vec<u8>, words: &[&str]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
}

fn line(from: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    from.take(4096).read_line(&mut line)?;
    match line.strip_suffix("\r\n") {
        Some(text) => Ok(text.to_string()),
        None if line.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
        None => Err(wrong(format!("redis answers {line:?}"))),
    }
}

fn answer(from: &mut impl BufRead) -> io::Result<Answer> {
    let head = line(from)?;
    let (kind, rest) = head.split_at(head.len().min(1));
    let size = |rest: &str| match rest.parse::<i64>() {
        Ok(-1) => Ok(None),
        Ok(n) if (0..=ANSWER_MAX as i64).contains(&n) => Ok(Some(n as usize)),
        _ => Err(wrong(format!("redis answers {head:?}"))),
    };
    match kind {
        "+" => Ok(Answer::Simple(rest.to_string())),
        ":" => rest
            .parse()
            .map(Answer::Number)
            .map_err(|_| wrong(format!("redis answers {head:?}"))),
        "$" => {
            let Some(bytes) = size(rest)? else {
                return Ok(Answer::Nothing);
            };
            let mut text = vec![0; bytes + 2];
            from.read_exact(&mut text)?;
            text.truncate(bytes);
            String::from_utf8(text)
                .map(Answer::Text)
                .map_err(|_| wrong("redis answers with bytes that are no text".to_string()))
        }
        "*" => {
            let mut texts = Vec::new();
            for _ in 0..size(rest)?.unwrap_or(0) {
                match answer(from)? {
                    Answer::Text(text) => texts.push(text),
                    other => return Err(wrong(format!("redis lists {other:?}"))),
                }
            }
            Ok(Answer::Texts(texts))
        }
        "-" => Err(wrong(format!("redis refuses: {rest}"))),
        _ => Err(wrong(format!("redis answers {head:?}"))),
    }
}

/// A connection.
pub struct Redis(BufReader<TcpStream>);

impl Redis {
    /// Connects, trying until redis takes the connection.
    pub fn connect(client: &Client, address: Ipv4Addr, bound: Duration) -> io::Result<Redis> {
        let stream = client.tcp_retry(SocketAddr::from((address, REDIS_PORT)), bound)?;
        stream.set_read_timeout(Some(OPERATION_BOUND))?;
        Ok(Redis(BufReader::new(stream)))
    }

    /// One command, one answer.
    pub fn ask(&mut self, words: &[&str]) -> io::Result<Answer> {
        let mut out = Vec::new();
        put(&mut out, words);
        self.0.get_mut().write_all(&out)?;
        answer(&mut self.0)
    }
}

/// Waits until redis has read its data: while it does, it answers that, and nothing else.
///
/// # Errors
/// It does not come up within the bound, or refuses for another reason.
pub fn wait_loaded(client: &Client, address: Ipv4Addr, bound: Duration) -> io::Result<()> {
    let began = Instant::now();
    loop {
        let left = bound.saturating_sub(began.elapsed());
        match Redis::connect(client, address, left).and_then(|mut redis| redis.ask(&["PING"])) {
            Ok(_) => return Ok(()),
            Err(error) if left.is_zero() || !error.to_string().contains("LOADING") => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// How far a writer is. The numbers are its own; redis must agree.
#[derive(Debug)]
pub struct Progress {
    number: u64,
    answered: AtomicU64,
    sent: AtomicU64,
}

impl Progress {
    /// Writes that were answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    fn keys(&self) -> (String, String) {
        (format!("n:{}", self.number), format!("log:{}", self.number))
    }
}

/// A client that writes.
pub struct Writer {
    redis: Redis,
    progress: Arc<Progress>,
    counter: String,
    log: String,
}

impl Writer {
    /// Connects, and begins at nothing.
    pub fn connect(client: &Client, address: Ipv4Addr, number: u64, bound: Duration) -> io::Result<Writer> {
        let mut redis = Redis::connect(client, address, bound)?;
        let progress = Arc::new(Progress {
            number,
            answered: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        });
        let (counter, log) = progress.keys();
        redis.ask(&["DEL", &counter, &log])?;
        Ok(Writer {
            redis,
            progress,
            counter,
            log,
        })
    }

    /// How far it is, also when it has ended.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// One write, answered.
    ///
    /// # Errors
    /// The connection's, and `InvalidData` for a write that was lost or done twice.
    pub fn write(&mut self) -> io::Result<()> {
        let n = self.progress.answered() + 1;
        let text = n.to_string();
        let mut out = Vec::new();
        put(&mut out, &["INCR", &self.counter]);
        put(&mut out, &["RPUSH", &self.log, &text]);
        self.progress.sent.store(n, Ordering::Release);
        self.redis.0.get_mut().write_all(&out)?;
        for what in ["INCR", "RPUSH"] {
            match answer(&mut self.redis.0)? {
                Answer::Number(is) if is == n as i64 => {}
                Answer::Number(is) if is < n as i64 => {
                    return Err(wrong(format!("{what} {n} is answered by {is}: writes were lost")));
                }
                other => {
                    return Err(wrong(format!(
                        "{what} {n} is answered by {other:?}: a write was done twice"
                    )));
                }
            }
        }
        self.progress.answered.store(n, Ordering::Release);
        if n.is_multiple_of(READ_EVERY) {
            let last = self.redis.ask(&["LINDEX", &self.log, "-1"])?;
            if last != Answer::Text(text) {
                return Err(wrong(format!("read back after write {n}: {last:?}")));
            }
        }
        Ok(())
    }
}

/// Reads all that a writer has written, over a new connection: each number once, in order. Gives their count.
///
/// # Errors
/// What is lost, there twice, or not his.
pub fn audit(client: &Client, address: Ipv4Addr, progress: &Progress) -> io::Result<u64> {
    let mut redis = Redis::connect(client, address, OPERATION_BOUND)?;
    let (counter, log) = progress.keys();
    let mut found = Vec::new();
    loop {
        let (first, last) = (found.len() as u64, found.len() as u64 + AUDIT_CHUNK - 1);
        match redis.ask(&["LRANGE", &log, &first.to_string(), &last.to_string()])? {
            Answer::Texts(texts) if texts.is_empty() => break,
            Answer::Texts(texts) => found.extend(texts),
            other => return Err(wrong(format!("{log} is {other:?}"))),
        }
    }
    let count = match redis.ask(&["GET", &counter])? {
        Answer::Text(text) => text,
        other => format!("{other:?}"),
    };
    let sent = progress.sent.load(Ordering::Acquire);
    check(&log, &found, &count, progress.answered(), sent).map_err(wrong)
}

/// Judges a log: `answered` writes must be there, up to `sent` may.
fn check(
    log: &str,
    found: &[String],
    counter: &str,
    answered: u64,
    sent: u64,
) -> std::result::Result<u64, String> {
    let mut seen = std::collections::HashSet::new();
    let repeated = found.iter().filter(|text| !seen.insert(text.as_str())).count();
    let lost = (1..=answered)
        .filter(|n| !seen.contains(n.to_string().as_str()))
        .count();
    let strange = seen
        .iter()
        .filter(|text| !text.parse::<u64>().is_ok_and(|n| (1..=sent).contains(&n)))
        .count();
    if lost + repeated + strange > 0 {
        return Err(format!(
            "{log}: of {answered} answered writes {lost} are lost, {repeated} are there twice, {strange} are not ours"
        ));
    }
    let in_order = found.iter().zip(1u64..).all(|(text, n)| *text == n.to_string());
    if !in_order || counter != found.len().to_string() {
        return Err(format!(
            "{log}: {} entries, in order: {in_order}, and the counter says {counter}",
            found.len()
        ));
    }
    Ok(found.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole() {
        let read = |text: &str| answer(&mut BufReader::new(text.as_bytes()));
        assert_eq!(read(":42\r\n").unwrap(), Answer::Number(42));
        assert_eq!(read("$3\r\na\nb\r\n").unwrap(), Answer::Text("a\nb".into()));
        assert_eq!(read("$-1\r\n").unwrap(), Answer::Nothing);
        let two = Answer::Texts(vec!["1".into(), "2".into()]);
        assert_eq!(read("*2\r\n$1\r\n1\r\n$1\r\n2\r\n").unwrap(), two);
        for bad in [
            "",
            ":1",
            ":x\r\n",
            "$9999999999\r\n",
            "*1\r\n:1\r\n",
            "-ERR no\r\n",
            "?\r\n",
            "\r\n",
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_audit_sees_what_is_lost_and_what_is_there_twice() {
        let log = |list: &[u64]| list.iter().map(u64::to_string).collect::<Vec<_>>();
        assert_eq!(check("log", &log(&[1, 2, 3]), "3", 3, 3), Ok(3));
        // Sent and not answered: it may be there or not.
        assert_eq!(check("log", &log(&[1, 2, 3]), "3", 2, 3), Ok(3));
        let says = |list: &[u64], counter: &str, answered| {
            check("log", &log(list), counter, answered, answered).unwrap_err()
        };
        assert!(says(&[1, 3], "2", 3).contains("1 are lost"));
        assert!(says(&[1, 2, 2, 3], "4", 3).contains("1 are there twice"));
        assert!(says(&[1, 2, 3, 9], "4", 3).contains("1 are not ours"));
        assert!(says(&[2, 1, 3], "3", 3).contains("in order: false"));
        assert!(says(&[1, 2, 3], "4", 3).contains("the counter says 4"));
    }
}
