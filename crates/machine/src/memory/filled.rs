//! Which parts of RAM were ever touched: the rest reads as zero, and reading it there would make the host give memory for it.

use super::Ram;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::ops::Range;
use steadfast_types::PAGE_SIZE;

impl Ram {
    /// Ranges of page numbers, rising, outside of which RAM is zero. Where the file under RAM cannot tell (huge pages, some file
    /// systems), that is all of RAM.
    #[must_use]
    pub fn filled(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for region in self.regions() {
            let end = region.file_offset + region.len;
            let page = |offset: u64| (region.start + (offset - region.file_offset)) / PAGE_SIZE;
            let mut at = region.file_offset;
            while at < end {
                let data = match seek(self.file(), SeekFrom::Data(at)) {
                    Ok(data) => data.clamp(at, end),
                    // No data from here on.
                    Err(Errno::NXIO) => break,
                    Err(_) => at,
                };
                let hole = match seek(self.file(), SeekFrom::Hole(data)) {
                    Ok(hole) if hole > data => hole.min(end),
                    _ => end,
                };
                if data < hole {
                    ranges.push(page(data)..page(hole.next_multiple_of(PAGE_SIZE)));
                }
                at = hole;
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamBacking;
    use steadfast_types::Gfn;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn what_was_touched_is_told_on_both_sides_of_the_hole() {
        let ram = Ram::new(5 << 30, &RamBacking::Memfd).unwrap();
        assert_eq!(ram.filled(), []);
        for page in [5u64, 6, 9, 0xB_FFFF, 0x10_0000, 0x10_0003] {
            ram.memory().write_slice(&[1], GuestAddress(page << 12)).unwrap();
        }
        let mut expected = vec![
            5..7,
            9..10,
            0xB_FFFF..0xC_0000,
            0x10_0000..0x10_0001,
            0x10_0003..0x10_0004,
        ];
        assert_eq!(ram.filled(), expected);
        ram.give_back(Gfn(9), 1);
        expected.remove(1);
        assert_eq!(ram.filled(), expected);
    }
}
