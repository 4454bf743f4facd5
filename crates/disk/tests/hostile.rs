//! The fuzz entry points on random and on mutated good input, and inputs made to hurt.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod fixtures;

use common::{have, run, s};
use fixtures::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use steadfast_disk::boot::{BootError, DiscoverOptions, discover};
use steadfast_disk::fuzz;
use steadfast_disk::image::{BlockIo, ImageInfo, MemImage};

static GPT: LazyLock<Vec<u8>> = LazyLock::new(|| gpt_raw(&[("a", 100, 200), ("b", 300, 400)], 1 << 18));
static MBR: LazyLock<Vec<u8>> =
    LazyLock::new(|| mbr(&[vec![1; 4096]], &[vec![2; 4096], vec![3; 4096], vec![4; 4096]]));

/// More by hand: `STEADFAST_FUZZ_FACTOR=100`.
fn cases(usual: u32) -> u32 {
    let factor = std::env::var("STEADFAST_FUZZ_FACTOR")
        .ok()
        .and_then(|f| f.parse().ok())
        .unwrap_or(1);
    usual.saturating_mul(factor)
}

fn mutate(good: &[u8], changes: &[(usize, u8)], span: usize) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for (at, value) in changes {
        let at = at % span.min(bytes.len());
        bytes[at] = *value;
    }
    bytes
}

/// Words that the interpreter knows, in any order.
fn grub_soup() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "if",
        "then",
        "else",
        "elif",
        "fi",
        "while",
        "until",
        "do",
        "done",
        "for",
        "in",
        "function",
        "menuentry",
        "submenu",
        "{",
        "}",
        ";",
        "\n",
        "'",
        "\"",
        "$",
        "${a}",
        "$a",
        "a=$a$a",
        "set a=b",
        "[ -f /vmlinuz ]",
        "true",
        "false",
        "linux /vmlinuz $a",
        "initrd /x",
        "search --set=root --label root",
        "source $prefix/custom.cfg",
        "f",
        "load_env",
        "set default=1>0",
        "\\",
        "#",
        "return",
        "break",
        "$1",
        "test ! a -o ( b",
        "]",
        "'t'",
        "--id x",
    ]);
    vec(word, 0..60).prop_map(|words| words.join(" "))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(600), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn partitions_random(data in vec(any::<u8>(), 0..4096)) {
        fuzz::fuzz_partitions(&data);
    }

    #[test]
    fn partitions_mutated(changes in vec((any::<usize>(), any::<u8>()), 0..12), gpt: bool) {
        let good: &[u8] = if gpt { &GPT } else { &MBR };
        fuzz::fuzz_partitions(&mutate(good, &changes, 20_000));
        // The table proper, where it matters.
        fuzz::fuzz_partitions(&mutate(good, &changes, 600));
    }

    #[test]
    fn grub_words(text in grub_soup()) {
        fuzz::fuzz_grub_cfg(text.as_bytes());
    }

    #[test]
    fn grub_mutated(changes in vec((any::<usize>(), any::<u8>()), 0..20), cut in any::<usize>()) {
        let bytes = mutate(DEBIAN_GRUB.as_bytes(), &changes, usize::MAX);
        fuzz::fuzz_grub_cfg(&bytes);
        fuzz::fuzz_grub_cfg(&bytes[..cut % bytes.len()]);
    }

    #[test]
    fn bls_any(text in "(title|version|linux|initrd|options|sort-key|#|default)?[ -~\n]{0,200}") {
        fuzz::fuzz_bls(text.as_bytes());
    }

    #[test]
    fn any_bytes(data in vec(any::<u8>(), 0..3000)) {
        fuzz::fuzz_grub_cfg(&data);
        fuzz::fuzz_bls(&data);
        fuzz::fuzz_ext4_boot(&data);
        fuzz::fuzz_qcow2_open(&data);
    }
}

#[test]
fn qcow2_mutated() {
    if !have("qemu-img", "qcow2_mutated") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            s(&path),
            "1M",
        ],
    );
    let good = std::fs::read(&path).unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: cases(500),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(
            &(vec((any::<usize>(), any::<u8>()), 0..8), any::<bool>()),
            |(changes, head)| {
                fuzz::fuzz_qcow2_open(&mutate(&good, &changes, if head { 112 } else { usize::MAX }));
                Ok(())
            },
        )
        .unwrap();
}

#[test]
fn scripts_that_never_end() {
    let started = Instant::now();
    for script in [
        "while true; do true; done",
        "until false; do set a=$a$a$a$a; done",
        "a=x; while true; do a=$a$a; done",
        "function f { f; f; }\nf",
        "source $prefix/custom.cfg; source $prefix/custom.cfg",
        "configfile $prefix/custom.cfg",
        "while true; do menuentry x { linux /vmlinuz; }; done",
        "while true; do load_env; done",
        "for i in 1 2 3 4 5 6 7 8 9; do for j in $i $i $i; do while true; do if [ -f /vmlinuz -a -f /a/b/c ]; then true; fi; done; done; done",
        &"submenu x { ".repeat(10_000),
        &"if ".repeat(100_000),
        &"[ ( ".repeat(100_000),
        &format!("test {}", "! ".repeat(100_000)),
        &format!("test {}", "( ".repeat(100_000)),
        &format!("a={}", "$a".repeat(1_000_000)),
        "submenu a { submenu b { submenu c { submenu d { submenu e { menuentry x { linux /vmlinuz; } } } } } }\nset default='0>0>0>0>0>0>0>0>0>0'",
        "menuentry x { while true; do true; done; }",
    ] {
        fuzz::fuzz_grub_cfg(script.as_bytes());
    }
    assert!(
        started.elapsed() < Duration::from_secs(30),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn absurd_ext4_sizes() {
    if !have("mke2fs", "absurd_ext4_sizes") {
        return;
    }
    let good = debian_root().ext4(ROOT_UUID, "root", &["-O", "^metadata_csum", "-b", "1024"]);
    // Superblock fields: inodes, blocks, block size, blocks and inodes per group, inode size, 64-bit block count.
    for (at, len) in [
        (0, 4),
        (4, 4),
        (24, 4),
        (32, 4),
        (40, 4),
        (88, 2),
        (254, 2),
        (336, 4),
        (96, 4),
    ] {
        for fill in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[1024 + at..1024 + at + len].fill(fill);
            fuzz::fuzz_ext4_boot(&bytes);
        }
    }
}

#[test]
fn ext4_mutated() {
    if !have("mke2fs", "ext4_mutated") {
        return;
    }
    let good = debian_root().ext4(ROOT_UUID, "root", &["-O", "^metadata_csum", "-b", "1024"]);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: cases(300),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(
            &(vec((any::<usize>(), any::<u8>()), 0..16), 0..3_usize),
            |(changes, span)| {
                fuzz::fuzz_ext4_boot(&mutate(&good, &changes, [3072, 100_000, usize::MAX][span]));
                Ok(())
            },
        )
        .unwrap();
}

/// A disk whose reads take forever.
struct Stuck(ImageInfo);

impl BlockIo for Stuck {
    fn info(&self) -> &ImageInfo {
        &self.0
    }
    fn read_at(&self, _: u64, buf: &mut [u8]) -> Result<(), steadfast_disk::DiskError> {
        std::thread::sleep(Duration::from_secs(3));
        buf.fill(0);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), steadfast_disk::DiskError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), steadfast_disk::DiskError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), steadfast_disk::DiskError> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), steadfast_disk::DiskError> {
        Ok(())
    }
    fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
    fn release(&self) -> Result<(), steadfast_disk::DiskError> {
        Ok(())
    }
    fn reacquire(&self) -> Result<(), steadfast_disk::DiskError> {
        Ok(())
    }
}

#[test]
fn deadline() {
    let io: Arc<dyn BlockIo> = Arc::new(Stuck(MemImage::new(vec![0; 1 << 20], true).info().clone()));
    let options = DiscoverOptions {
        deadline: Duration::from_millis(50),
        ..DiscoverOptions::default()
    };
    assert!(matches!(discover(&io, &options), Err(BootError::Deadline { .. })));
}
