//! Entry points for fuzzing. Each takes any bytes and must return; a panic or a hang is a finding.
//!
//! [`fuzz_qcow2_open`] and [`fuzz_ext4_boot`] reach third-party code that may panic inside [`crate::guard::no_panic`];
//! that is by design. A harness whose panic hook aborts (libFuzzer's) must put the default hook back first
//! (`std::panic::take_hook`), or it reports those.

use crate::boot::grub;
use crate::boot::{self, DiscoverOptions, FileTree, MemTree};
use crate::image::{self, BlockIo, ImageFormat, ImageOptions, MemImage};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

/// Larger inputs are cut: they find nothing new.
const INPUT_MAX: usize = 8 << 20;

fn cut(data: &[u8]) -> &[u8] {
    &data[..data.len().min(INPUT_MAX)]
}

/// Partition tables. The input is the start of the disk and, from the end backwards, its last sectors.
pub fn fuzz_partitions(data: &[u8]) {
    let io = MemImage::new(cut(data).to_vec(), true);
    if let Ok(table) = boot::partition::read(&io) {
        // What is handed out lies inside the disk and apart.
        for p in &table.partitions {
            assert!(
                p.start
                    .checked_add(p.len)
                    .is_some_and(|end| end <= io.info().capacity_bytes)
            );
        }
    }
}

/// `grub.cfg`, run on a small file system.
pub fn fuzz_grub_cfg(data: &[u8]) {
    let text = String::from_utf8_lossy(cut(data));
    let mut tree = MemTree {
        label: "root".to_owned(),
        uuid: "12-34".to_owned(),
        ..MemTree::default()
    };
    tree.files.insert("/vmlinuz".to_owned(), vec![0; 16]);
    tree.files
        .insert("/boot/grub/grubenv".to_owned(), b"saved_entry=1>0\n".to_vec());
    // So that scripts can include themselves.
    tree.files.insert(
        "/boot/grub/custom.cfg".to_owned(),
        data.iter().copied().take(64 << 10).collect(),
    );
    let trees: [&dyn FileTree; 1] = [&tree];
    let _ = grub::choices(&trees, 0, "/boot/grub", "/boot/grub/grub.cfg", &text);
    let _ = grub::parse_grubenv(data);
}

/// A Boot Loader Specification entry.
pub fn fuzz_bls(data: &[u8]) {
    let text = String::from_utf8_lossy(cut(data)).into_owned();
    let (name, rest) = text.split_once('\n').unwrap_or(("x.conf", &text));
    let entry = boot::parse_bls_entry(name, rest);
    let _ = boot::compare_versions(&entry.id, &entry.version);
    let mut tree = MemTree::default();
    for (n, name) in ["a", "b+3-0", "c+0-3"].iter().enumerate() {
        let part: String = text.lines().skip(n).step_by(1 + n).collect::<Vec<_>>().join("\n");
        tree.files
            .insert(format!("/loader/entries/{name}.conf"), part.into_bytes());
    }
    tree.files
        .insert("/extlinux/extlinux.conf".to_owned(), data.to_vec());
    tree.files.insert(
        "/loader/loader.conf".to_owned(),
        format!("default {name}").into_bytes(),
    );
    let trees: [&dyn FileTree; 1] = [&tree];
    let _ = boot::plan_of(&trees, &DiscoverOptions::default());
}

/// A qcow2 file: opened, read, written, discarded.
pub fn fuzz_qcow2_open(data: &[u8]) {
    let mut bytes = cut(data).to_vec();
    // Past the magic at once.
    if let Some(magic) = bytes.get_mut(..4) {
        magic.copy_from_slice(b"QFI\xfb");
    }
    for read_only in [true, false] {
        with_qcow2(&bytes, read_only, |image| {
            let capacity = image.info().capacity_bytes;
            let mut buf = vec![0; 70_000];
            for at in [
                0,
                1 << 16,
                capacity / 2,
                capacity.saturating_sub(buf.len() as u64),
            ] {
                let len = capacity.saturating_sub(at).min(buf.len() as u64) as usize;
                let _ = image.read_at(at, &mut buf[..len]);
                let _ = image.write_at(at, &buf[..len.min(5000)]);
                let _ = image.discard(at, len as u64);
                let _ = image.write_zeroes(at, len as u64 / 2);
            }
            let _ = image.flush();
        });
    }
}

/// Opens `bytes` as a qcow2 file that exists in memory only.
fn with_qcow2<T>(bytes: &[u8], read_only: bool, f: impl FnOnce(&dyn BlockIo) -> T) -> Option<T> {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes).ok()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let options = ImageOptions {
        format: Some(ImageFormat::Qcow2),
        read_only,
        lock: false,
        ..ImageOptions::default()
    };
    let image = image::open(&path, &options).ok()?;
    Some(f(image.as_ref()))
}

/// A whole disk, usually an ext4 file system: discovery on it.
pub fn fuzz_ext4_boot(data: &[u8]) {
    let mut bytes = cut(data).to_vec();
    if let Some(magic) = bytes.get_mut(1080..1082) {
        magic.copy_from_slice(&[0x53, 0xef]);
    }
    let io: Arc<dyn BlockIo> = Arc::new(MemImage::new(bytes, true));
    let _ = boot::discover_here(&io, &DiscoverOptions::default());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fuzzer must reach the driver, not just the header check.
    #[test]
    fn a_good_image_opens() {
        // Clusters of 512 bytes: header, reference table, one reference block, first level table. 32 KiB of disk.
        let mut bytes = vec![0_u8; 4 * 512];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb\0\0\0\x02");
        put(20, &9_u32.to_be_bytes());
        put(24, &(32_u64 << 10).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &1536_u64.to_be_bytes());
        put(48, &512_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(512, &1024_u64.to_be_bytes());
        put(1024, &[0, 1, 0, 1, 0, 1, 0, 1]);
        for read_only in [true, false] {
            let wrote = with_qcow2(&bytes, read_only, |image| image.write_at(100, &[7; 3000]).is_ok());
            assert_eq!(wrote, Some(!read_only));
        }
        fuzz_qcow2_open(&bytes);
    }

    /// Found by fuzzing: the driver recursed without end when the header's cluster had no reference count.
    #[test]
    fn an_uncounted_header_is_refused_for_writing() {
        let mut bytes = vec![0_u8; 4 * 512];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb\0\0\0\x02");
        put(20, &9_u32.to_be_bytes());
        put(24, &(32_u64 << 10).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &1536_u64.to_be_bytes());
        put(48, &512_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(524, &4_u32.to_be_bytes());
        assert_eq!(with_qcow2(&bytes, true, |_| ()), Some(()));
        assert_eq!(
            with_qcow2(&bytes, false, |_| ()),
            None,
            "no block of reference counts"
        );
        bytes[518] = 4;
        assert_eq!(with_qcow2(&bytes, false, |_| ()), None, "a count of zero");
        bytes[1025] = 1;
        // The second block's address is no cluster: an image that is otherwise right.
        bytes[527] = 0;
        assert_eq!(with_qcow2(&bytes, false, |_| ()), Some(()));
    }
}
