//! The guest that runs under both monitors: an endless loop that adds one to the first word of each of N pages from
//! 16 MiB on, and then writes one byte to port 0xe9.
//!
//! The loop's instructions mean the same in 32-bit and in 64-bit code, so its very bytes run under QEMU, behind a boot
//! sector that enters 32-bit mode, and under our monitor as a flat ELF.

const BOOT_GPA: u16 = 0x7c00;
const PAGES_GPA: u32 = 0x100_0000;
const ELF_GPA: u64 = 0x10_0000;

/// The loop.
fn code(pages: u32) -> Vec<u8> {
    let mut c = vec![0xbf]; // again: mov edi, PAGES_GPA
    c.extend(PAGES_GPA.to_le_bytes());
    c.push(0xb9); // mov ecx, pages
    c.extend(pages.to_le_bytes());
    let next = c.len();
    c.extend([0xff, 0x07]); // next: inc dword [edi]
    c.extend([0x81, 0xc7, 0, 0x10, 0, 0]); // add edi, 4096
    c.extend([0xff, 0xc9]); // dec ecx
    c.extend([0x75, back(c.len() + 2, next)]); // jnz next
    c.extend([0xe6, 0xe9]); // out 0xe9, al
    c.extend([0xeb, back(c.len() + 2, 0)]); // jmp again
    c
}

fn back(from: usize, to: usize) -> u8 {
    (to as isize - from as isize) as i8 as u8
}

/// A disk whose first sector enters 32-bit mode and runs the loop.
pub fn boot_sector(pages: u32) -> Vec<u8> {
    let at = |offset: usize| (BOOT_GPA + offset as u16).to_le_bytes();
    let mut s = vec![0xfa, 0x31, 0xc0, 0x8e, 0xd8]; // cli; xor ax, ax; mov ds, ax
    s.extend([0x0f, 0x01, 0x16, 0, 0]); // lgdt [pointer]
    let pointer = s.len() - 2;
    s.extend([0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 1, 0x0f, 0x22, 0xc0]); // cr0 |= 1
    s.extend([0xea, 0, 0, 8, 0]); // jmp 8:start
    let jump = s.len() - 4;
    let start = at(s.len());
    s[jump..jump + 2].copy_from_slice(&start);
    s.extend([0x66, 0xb8, 16, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); // ds = es = ss = 16
    s.extend(code(pages));
    let gdt = s.len();
    s.extend([0; 8]);
    s.extend([0xff, 0xff, 0, 0, 0, 0x9a, 0xcf, 0]);
    s.extend([0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0]);
    let gdt_pointer = at(s.len());
    s[pointer..pointer + 2].copy_from_slice(&gdt_pointer);
    s.extend(23u16.to_le_bytes());
    s.extend(at(gdt));
    s.extend([0, 0]);
    s.resize(510, 0);
    s.extend([0x55, 0xaa]);
    s.resize(1 << 20, 0);
    s
}

/// A static ELF-64 file of the loop alone, for the flat boot.
pub fn elf(pages: u32) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let code = code(pages);
    let size = HEADERS + code.len() as u64;
    let mut e = b"\x7fELF\x02\x01\x01".to_vec();
    e.resize(16, 0);
    e.extend([2, 0, 62, 0, 1, 0, 0, 0]); // an executable for x86-64
    e.extend((ELF_GPA + HEADERS).to_le_bytes());
    e.extend(64u64.to_le_bytes()); // program headers
    e.extend([0; 12]); // section headers, flags
    e.extend([64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    e.extend([1, 0, 0, 0, 5, 0, 0, 0]); // load, read and execute
    for word in [0, ELF_GPA, ELF_GPA, size, size, 4096] {
        e.extend(word.to_le_bytes());
    }
    e.extend(code);
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_jumps_are_right() {
        let (sector, elf) = (boot_sector(1000), elf(1000));
        assert_eq!((sector.len(), &sector[510..512]), (1 << 20, &[0x55, 0xaa][..]));
        let code = code(1000);
        assert_eq!(&elf[120..], &code[..]);
        assert!(
            sector.windows(code.len()).any(|w| w == code),
            "the very same bytes"
        );
        // `jnz next` goes back over the three instructions of the inner loop, `jmp again` to the first.
        assert_eq!(code[21] as i8, -12);
        assert_eq!(code[25] as i8, -26);
    }
}
