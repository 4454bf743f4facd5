//! Writes a GUID partition table (UEFI specification 2.10, chapter 5) into an image, without loop devices or tools.

use crate::error::{IoContext, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Type of a Linux file system's partition, 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as bytes on disk.
pub const LINUX: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];
/// Type of an EFI system partition, C12A7328-F81F-11D2-BA4B-00A0C93EC93B.
pub const EFI_SYSTEM: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];

const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY_BYTES) as u64 / SECTOR;

/// A partition to write.
#[derive(Debug, Clone)]
pub struct Partition {
    /// Its type.
    pub kind: [u8; 16],
    /// Its first byte in the image, a multiple of [`SECTOR`].
    pub start: u64,
    /// Its length in bytes, a multiple of [`SECTOR`].
    pub bytes: u64,
    /// Its name, at most 36 characters.
    pub name: &'static str,
}

/// Writes the protective MBR and both copies of the table into an image of its final size.
pub fn write(image: &Path, partitions: &[Partition]) -> Result<()> {
    let context = || format!("partition table of {}", image.display());
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(image)
        .what(context)?;
    let sectors = file.metadata().what(context)?.len() / SECTOR;
    let mut table = vec![0u8; ENTRIES * ENTRY_BYTES];
    for (number, (partition, entry)) in partitions
        .iter()
        .zip(table.chunks_exact_mut(ENTRY_BYTES))
        .enumerate()
    {
        entry[0..16].copy_from_slice(&partition.kind);
        entry[16..32].copy_from_slice(&identity(number as u8 + 1));
        entry[32..40].copy_from_slice(&(partition.start / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&((partition.start + partition.bytes) / SECTOR - 1).to_le_bytes());
        for (place, unit) in entry[56..].chunks_exact_mut(2).zip(partition.name.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }
    let put =
        |file: &File, sector: u64, bytes: &[u8]| file.write_all_at(bytes, sector * SECTOR).what(context);
    put(&file, 0, &protective_mbr(sectors))?;
    put(&file, 1, &header(1, sectors - 1, 2, sectors, &table))?;
    put(&file, 2, &table)?;
    put(&file, sectors - 1 - TABLE_SECTORS, &table)?;
    put(
        &file,
        sectors - 1,
        &header(sectors - 1, 1, sectors - 1 - TABLE_SECTORS, sectors, &table),
    )
}

/// Fixed identities: the image is the same each time it is made.
fn identity(number: u8) -> [u8; 16] {
    let mut bytes = *b"steadfast-rig\x00\x00\x00";
    bytes[15] = number;
    bytes
}

fn protective_mbr(sectors: u64) -> [u8; 512] {
    let mut mbr = [0u8; 512];
    mbr[446 + 1..446 + 8].copy_from_slice(&[0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff]);
    mbr[454..458].copy_from_slice(&1u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes());
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

fn header(own: u64, other: u64, table_at: u64, sectors: u64, table: &[u8]) -> [u8; 512] {
    let mut sector = [0u8; 512];
    sector[0..8].copy_from_slice(b"EFI PART");
    sector[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    sector[12..16].copy_from_slice(&92u32.to_le_bytes());
    sector[24..32].copy_from_slice(&own.to_le_bytes());
    sector[32..40].copy_from_slice(&other.to_le_bytes());
    sector[40..48].copy_from_slice(&(2 + TABLE_SECTORS).to_le_bytes());
    sector[48..56].copy_from_slice(&(sectors - 2 - TABLE_SECTORS).to_le_bytes());
    sector[56..72].copy_from_slice(&identity(0));
    sector[72..80].copy_from_slice(&table_at.to_le_bytes());
    sector[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
    sector[84..88].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
    sector[88..92].copy_from_slice(&crc32fast::hash(table).to_le_bytes());
    let crc = crc32fast::hash(&sector[..92]);
    sector[16..20].copy_from_slice(&crc.to_le_bytes());
    sector
}
