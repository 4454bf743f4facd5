//! The memory checker: every word of its pages is known, and each page is checked before it gets new contents.

use super::Guest;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 512;

/// What word `word` of page `page` is in its `generation`.
fn expected(page: u64, generation: u32, word: u64) -> u64 {
    (page << 32 | u64::from(generation))
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left((word & 63) as u32)
        ^ word
}

/// Checks and rewrites pages, for ever.
pub fn check(guest: &Guest, mib: u64) {
    let pages = (mib << 20) / 4096;
    let mut memory = vec![0u64; pages as usize * PAGE_WORDS];
    let mut generations = vec![0u32; pages as usize];
    for page in 0..pages {
        fill(&mut memory, page, 0);
    }
    guest.memory_pages.store(pages, Ordering::Relaxed);
    guest.say(&format!("MEMORY {pages} pages under check"));
    let (mut turn, mut since, mut done) = (0u64, Instant::now(), 0u64);
    loop {
        // A fixed odd stride visits every page, in an order that does not look like a sweep.
        let page = turn.wrapping_mul(0x9e37_79b1) % pages;
        turn += 1;
        let generation = generations[page as usize];
        let words = &memory[page as usize * PAGE_WORDS..][..PAGE_WORDS];
        if let Some((word, found)) = words
            .iter()
            .enumerate()
            .find(|(word, found)| **found != expected(page, generation, *word as u64))
        {
            guest.fault(format!(
                "CORRUPT memory page {page} word {word} generation {generation}: {found:#x}, not {:#x}",
                expected(page, generation, word as u64)
            ));
        }
        guest.memory_checked.fetch_add(1, Ordering::Relaxed);
        generations[page as usize] = generation.wrapping_add(1);
        fill(&mut memory, page, generation.wrapping_add(1));
        done += 1;
        pace(guest.memory_rate.load(Ordering::Relaxed), &mut done, &mut since);
    }
}

/// Sleeps so that no more than `rate` steps a second are done (0: no limit). Slices of 10 ms.
pub(super) fn pace(rate: u64, done: &mut u64, since: &mut Instant) {
    let slice = Duration::from_millis(10);
    if rate > 0 && *done * 100 >= rate {
        // At low rates a slice holds less than one step; then the slice is longer.
        let due = slice.max(Duration::from_micros(*done * 1_000_000 / rate));
        std::thread::sleep(due.saturating_sub(since.elapsed()));
        (*done, *since) = (0, Instant::now());
    }
}

fn fill(memory: &mut [u64], page: u64, generation: u32) {
    for (word, place) in memory[page as usize * PAGE_WORDS..][..PAGE_WORDS]
        .iter_mut()
        .enumerate()
    {
        *place = expected(page, generation, word as u64);
    }
}
