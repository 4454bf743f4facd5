//! Writes a FAT12 volume with a few files in its root (Microsoft, "FAT General Overview of On-Disk Format", 1.03).
//!
//! ```text
//! sector 0      boot sector with the BIOS parameter block
//! 1 ..          FAT, FAT again
//! ..            root directory, 64 entries: label, then for each file its long name and its short name
//! ..            clusters of 2 KiB, files one after the other
//! ```

const SECTOR: usize = 512;
const CLUSTER_SECTORS: usize = 4;
const CLUSTER: usize = SECTOR * CLUSTER_SECTORS;
const ROOT_ENTRIES: usize = 64;
/// From this number of clusters on, it would be read as FAT16. 8 MiB of data.
const CLUSTERS_MAX: usize = 4084;
/// 1980-01-01, the first day there is.
const DATE: u16 = 0x0021;

/// Makes the volume. Each file has a long name (ASCII, up to 26 characters), a short name and its contents. The caller
/// bounds the files: up to ten of them, and 7 MiB in all.
pub(super) fn volume(label: &[u8; 11], serial: u32, files: &[(&str, &[u8; 11], &[u8])]) -> Vec<u8> {
    let used: usize = files
        .iter()
        .map(|(_, _, data)| data.len().div_ceil(CLUSTER))
        .sum();
    // Not too small: some tools are wary of tiny volumes.
    let clusters = (used + 8).clamp(504, CLUSTERS_MAX);
    assert!(
        used <= clusters && files.len() <= 10,
        "seed files are bounded by the caller"
    );
    // Two reserved entries, 12 bits each.
    let fat_sectors = ((clusters + 2) * 3).div_ceil(2).div_ceil(SECTOR);
    let root_at = SECTOR * (1 + 2 * fat_sectors);
    let data_at = root_at + ROOT_ENTRIES * 32;
    let total = data_at + clusters * CLUSTER;
    let mut out = vec![0_u8; total];
    boot_sector(
        &mut out,
        label,
        serial,
        (total / SECTOR) as u16,
        fat_sectors as u16,
    );

    let mut fat = vec![0_u8; fat_sectors * SECTOR];
    set12(&mut fat, 0, 0xff8);
    set12(&mut fat, 1, 0xfff);
    let mut root: Vec<u8> = entry(label, 0x08, 0, 0).to_vec();
    let mut next = 2;
    for (name, short, data) in files {
        let count = data.len().div_ceil(CLUSTER);
        let first = if count == 0 { 0 } else { next };
        for n in next..next + count {
            let link = if n + 1 == next + count {
                0xfff
            } else {
                n as u16 + 1
            };
            set12(&mut fat, n, link);
        }
        let at = data_at + (next - 2) * CLUSTER;
        out[at..at + data.len()].copy_from_slice(data);
        next += count;
        long_name(&mut root, name, short);
        root.extend(entry(short, 0x20, first as u16, data.len() as u32));
    }
    out[root_at..root_at + root.len()].copy_from_slice(&root);
    for copy in 0..2 {
        let at = SECTOR * (1 + copy * fat_sectors);
        out[at..at + fat.len()].copy_from_slice(&fat);
    }
    out
}

fn boot_sector(out: &mut [u8], label: &[u8; 11], serial: u32, sectors: u16, fat_sectors: u16) {
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"MSWIN4.1");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[CLUSTER_SECTORS as u8]);
    put(14, &1_u16.to_le_bytes());
    put(16, &[2]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(19, &sectors.to_le_bytes());
    put(21, &[0xf8]);
    put(22, &fat_sectors.to_le_bytes());
    put(24, &32_u16.to_le_bytes());
    put(26, &64_u16.to_le_bytes());
    put(36, &[0x80, 0, 0x29]);
    put(39, &serial.to_le_bytes());
    put(43, label);
    put(54, b"FAT12   ");
    // Code for whoever boots it: halt.
    put(62, &[0xf4, 0xeb, 0xfd]);
    put(510, &[0x55, 0xaa]);
}

fn set12(fat: &mut [u8], n: usize, value: u16) {
    let at = n * 3 / 2;
    if n.is_multiple_of(2) {
        fat[at] = value as u8;
        fat[at + 1] = (fat[at + 1] & 0xf0) | (value >> 8) as u8;
    } else {
        fat[at] = (fat[at] & 0x0f) | ((value & 0x0f) << 4) as u8;
        fat[at + 1] = (value >> 4) as u8;
    }
}

fn entry(name: &[u8; 11], attributes: u8, cluster: u16, len: u32) -> [u8; 32] {
    let mut e = [0_u8; 32];
    e[..11].copy_from_slice(name);
    e[11] = attributes;
    for at in [16, 18, 24] {
        e[at..at + 2].copy_from_slice(&DATE.to_le_bytes());
    }
    e[26..28].copy_from_slice(&cluster.to_le_bytes());
    e[28..32].copy_from_slice(&len.to_le_bytes());
    e
}

/// The entries of a long name, last part first, 13 characters each.
fn long_name(root: &mut Vec<u8>, name: &str, short: &[u8; 11]) {
    let sum = short
        .iter()
        .fold(0_u8, |sum, c| sum.rotate_right(1).wrapping_add(*c));
    let units: Vec<u16> = name.encode_utf16().collect();
    let parts: Vec<&[u16]> = units.chunks(13).collect();
    for (n, part) in parts.iter().enumerate().rev() {
        let mut e = [0xff_u8; 32];
        let last = if n + 1 == parts.len() { 0x40 } else { 0 };
        e[0] = (n as u8 + 1) | last;
        e[11] = 0x0f;
        e[12] = 0;
        e[13] = sum;
        e[26..28].fill(0);
        // After the name one zero, then 0xffff.
        let places = (1..11)
            .step_by(2)
            .chain((14..26).step_by(2))
            .chain((28..32).step_by(2));
        for (unit, at) in part.iter().copied().chain([0]).zip(places) {
            e[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        root.extend(e);
    }
}
