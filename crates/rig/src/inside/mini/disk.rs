//! The disk checker: blocks with a number, a sequence and a checksum, written and compared past the page cache.
//!
//! ```text
//! block of 4 KiB: u64 MAGIC | u64 block | u64 sequence | u32 crc32 of all the rest | u32 0 | filler from (block, sequence)
//! ```
//! A block that was never written is all zero. After a restart the table of sequences is read back from the disk, so a disk that
//! went with the guest (or stayed behind) is noticed.

use super::Guest;
use super::memory::pace;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::time::Instant;

const BLOCK: usize = 4096;
const MAGIC: u64 = 0x5346_4d49_4e49_0001;
/// A flush after so many writes.
const FLUSH_EVERY: u64 = 32;

#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

fn contents(block: u64, sequence: u64, into: &mut [u8; BLOCK]) {
    into[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    into[8..16].copy_from_slice(&block.to_le_bytes());
    into[16..24].copy_from_slice(&sequence.to_le_bytes());
    into[24..32].fill(0);
    let mut word = (block << 32 ^ sequence).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for place in into[32..].chunks_exact_mut(8) {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        place.copy_from_slice(&word.to_le_bytes());
    }
    let crc = crc32fast::hash(&into[..]);
    into[24..28].copy_from_slice(&crc.to_le_bytes());
}

/// The sequence of a block as it was read; an error in words when it is not what it should be.
fn sequence_of(block: u64, bytes: &[u8; BLOCK]) -> Result<u64, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    if word(0) != MAGIC {
        return Err(format!("block {block} begins with {:#x}", word(0)));
    }
    if word(8) != block {
        return Err(format!("block {block} says that it is block {}", word(8)));
    }
    let mut should = [0; BLOCK];
    contents(block, word(16), &mut should);
    if should == *bytes {
        Ok(word(16))
    } else {
        Err(format!("block {block} sequence {} fails its checksum", word(16)))
    }
}

/// Reads, writes, compares, for ever.
pub fn check(guest: &Guest, disk: &str, mib: u64) {
    if let Err(e) = check_until_error(guest, disk, mib) {
        guest.fault(format!("CORRUPT disk {disk}: {e}"));
    }
}

fn check_until_error(guest: &Guest, disk: &str, mib: u64) -> io::Result<()> {
    let path = format!("/dev/{}", disk.trim_start_matches("/dev/"));
    // Past the page cache: what is compared is what the disk has. Not in a test on a file system without it.
    let open = |flags: i32| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&path)
    };
    let file = open(libc::O_DIRECT)?;
    let blocks = ((mib << 20) / BLOCK as u64).max(1);
    let mut table = read_table(guest, &file, blocks);
    guest.say(&format!(
        "DISK {blocks} blocks under check, {} used before",
        table.iter().filter(|s| **s > 0).count()
    ));
    let mut buffer = Box::new(Block([0; BLOCK]));
    let (mut turn, mut since, mut done) = (0u64, Instant::now(), 0u64);
    let mut sequence = table.iter().copied().max().unwrap_or(0);
    loop {
        turn += 1;
        let random = turn
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9)
            >> 16;
        let block = random % blocks;
        if turn % 2 == 0 {
            file.read_exact_at(&mut buffer.0, block * BLOCK as u64)?;
            match sequence_of(block, &buffer.0) {
                Ok(found) if found == table[block as usize] => {}
                Ok(found) => guest.fault(format!(
                    "CORRUPT disk block {block} has sequence {found}, not {}",
                    table[block as usize]
                )),
                Err(why) => guest.fault(format!("CORRUPT disk {why}")),
            }
            guest.disk_reads.fetch_add(1, Ordering::Relaxed);
        } else {
            sequence += 1;
            contents(block, sequence, &mut buffer.0);
            file.write_all_at(&buffer.0, block * BLOCK as u64)?;
            table[block as usize] = sequence;
            if guest.disk_writes.fetch_add(1, Ordering::Relaxed) % FLUSH_EVERY == FLUSH_EVERY - 1 {
                file.sync_data()?;
                guest.disk_flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        done += 1;
        pace(guest.disk_rate.load(Ordering::Relaxed), &mut done, &mut since);
    }
}

fn read_table(guest: &Guest, file: &File, blocks: u64) -> Vec<u64> {
    // Many blocks a read: a read costs milliseconds in an emulated machine.
    const AT_ONCE: u64 = 64;
    let mut buffer: Vec<Block> = (0..AT_ONCE).map(|_| Block([0; BLOCK])).collect();
    let mut table = Vec::with_capacity(blocks as usize);
    while (table.len() as u64) < blocks {
        let first = table.len() as u64;
        let count = AT_ONCE.min(blocks - first) as usize;
        // SAFETY: `count` blocks of plain bytes, one behind the other (size and alignment of Block are 4096).
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<u8>(), count * BLOCK) };
        if let Err(e) = file.read_exact_at(bytes, first * BLOCK as u64) {
            guest.fault(format!("CORRUPT disk at start: blocks from {first}: {e}"));
        }
        for (block, number) in buffer[..count].iter().zip(first..) {
            table.push(sequence_of(number, &block.0).unwrap_or_else(|why| {
                guest.fault(format!("CORRUPT disk at start: {why}"));
                0
            }));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_knows_itself_and_notices_a_bit() {
        let mut bytes = [0; BLOCK];
        assert_eq!(sequence_of(7, &bytes), Ok(0));
        contents(7, 99, &mut bytes);
        assert_eq!(sequence_of(7, &bytes), Ok(99));
        assert!(
            sequence_of(8, &bytes).is_err(),
            "a misdirected block went unnoticed"
        );
        bytes[3000] ^= 4;
        assert!(sequence_of(7, &bytes).is_err(), "a flipped bit went unnoticed");
    }
}
