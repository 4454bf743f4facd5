//! Measuring from inside the mini guest, for benchmarks: reads of a disk, bytes over TCP. The clock is the guest's own.
//!
//! | where | line | answer |
//! |---|---|---|
//! | TCP 10 | `disk_bench random\|sequential DISK MS` | `ok OPS US`: reads of 4 KiB at random places, or of 1 MiB in order |
//! | TCP 11 | `take BYTES`, then so many bytes | `ok BYTES US`, from the first byte to the last |
//! | TCP 11 | `give BYTES` | so many bytes, then the end |

use crate::inside::mini::clock;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const MIB: usize = 1 << 20;
const SMALL: usize = 4096;
/// Longest measurement of a disk.
const MS_MAX: u64 = 60_000;
const LINE_BYTES_MAX: u64 = 256;

#[repr(C, align(4096))]
struct Buffer([u8; MIB]);

/// Does `random|sequential DISK MS`.
pub fn disk(words: &str) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    let [how @ ("random" | "sequential"), disk, ms] = words[..] else {
        return "error: disk_bench random|sequential DISK MS".to_string();
    };
    let Ok(ms) = ms.parse::<u64>() else {
        return format!("error: {ms} is no number");
    };
    match read(how == "random", disk, ms.min(MS_MAX)) {
        Ok((operations, us)) => format!("ok {operations} {us}"),
        Err(e) => format!("error: {disk}: {e}"),
    }
}

fn read(random: bool, disk: &str, ms: u64) -> io::Result<(u64, u64)> {
    let name = disk.trim_start_matches("/dev/");
    // Past the page cache: each read is one of the device.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/dev/{name}"))?;
    let sectors: u64 = std::fs::read_to_string(format!("/sys/block/{name}/size"))?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    let size = if random { SMALL } else { MIB };
    let places = (sectors * 512 / size as u64).max(1);
    // On the heap, aligned as direct reads want it.
    let mut buffer = Box::new(Buffer([0; MIB]));
    let start = clock::read(libc::CLOCK_MONOTONIC);
    let (mut operations, mut word) = (0u64, 1u64);
    loop {
        let us = (clock::read(libc::CLOCK_MONOTONIC) - start) / 1000;
        if us >= ms * 1000 {
            return Ok((operations, us));
        }
        word = word
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let place = if random {
            (word >> 16) % places
        } else {
            operations % places
        };
        file.read_exact_at(&mut buffer.0[..size], place * size as u64)?;
        operations += 1;
    }
}

/// Serves a connection of TCP port 11.
pub fn bulk(stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(MIB, stream.try_clone()?);
    let mut writer = stream;
    let mut line = String::new();
    (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line)?;
    let (word, bytes) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
    let bytes: u64 = bytes.parse().map_err(io::Error::other)?;
    match word {
        "take" => {
            let start = clock::read(libc::CLOCK_MONOTONIC);
            let taken = io::copy(&mut reader.take(bytes), &mut io::sink())?;
            let us = (clock::read(libc::CLOCK_MONOTONIC) - start) / 1000;
            writer.write_all(format!("ok {taken} {us}\n").as_bytes())
        }
        "give" => {
            let block = vec![0x5a; MIB];
            let mut left = bytes;
            while left > 0 {
                let now = left.min(MIB as u64);
                writer.write_all(&block[..now as usize])?;
                left -= now;
            }
            Ok(())
        }
        _ => writer.write_all(b"error: take BYTES or give BYTES\n"),
    }
}
