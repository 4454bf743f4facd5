//! The cloud-init seed, read back by another implementation of FAT.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{have, pattern};
use std::io::{Cursor, Read};
use steadfast_disk::image::BlockIo;
use steadfast_disk::seed::{SEED_BYTES_MAX, Seed, SeedError};

fn seed(user_data: Vec<u8>) -> Seed {
    Seed {
        user_data,
        local_hostname: "web-1.example".to_owned(),
        ..Seed::default()
    }
}

fn read(bytes: &[u8], name: &str) -> Vec<u8> {
    let fs = fatfs::FileSystem::new(Cursor::new(bytes.to_vec()), fatfs::FsOptions::new()).unwrap();
    assert_eq!(fs.volume_label(), "CIDATA");
    assert_eq!(
        fs.read_volume_label_from_root_dir().unwrap().as_deref(),
        Some("CIDATA")
    );
    assert_eq!(fs.fat_type(), fatfs::FatType::Fat12);
    let mut data = Vec::new();
    fs.root_dir()
        .open_file(name)
        .unwrap()
        .read_to_end(&mut data)
        .unwrap();
    data
}

#[test]
fn files_come_back() {
    for len in [0, 1, 2047, 2048, 2049, 100_000, SEED_BYTES_MAX - 100] {
        let mut user = b"#cloud-config\n".to_vec();
        user.extend(pattern(len as u64, len));
        user.truncate(len.max(14));
        let network = b"version: 2\nethernets: {}\n".to_vec();
        let mut seed = seed(user.clone());
        seed.network_config = Some(network.clone());
        if user.len() + network.len() > SEED_BYTES_MAX {
            continue;
        }
        let bytes = seed.to_bytes().unwrap();
        assert_eq!(bytes, seed.to_bytes().unwrap(), "the same on every host");
        assert!(read(&bytes, "user-data") == user);
        assert_eq!(read(&bytes, "network-config"), network);
        let meta = String::from_utf8(read(&bytes, "meta-data")).unwrap();
        assert!(
            meta.starts_with("instance-id: \"iid-") && meta.ends_with("local-hostname: \"web-1.example\"\n"),
            "{meta}"
        );
        let image = seed.to_image().unwrap();
        assert!(image.info().read_only && image.info().capacity_bytes == bytes.len() as u64);
        assert_eq!(bytes.len() % 512, 0);
    }
    let empty = seed(Vec::new()).to_bytes().unwrap();
    assert_eq!(read(&empty, "user-data"), b"");
}

#[test]
fn other_tools_agree() {
    if !have("blkid", "other_tools_agree") {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), seed(b"#!/bin/sh\n".to_vec()).to_bytes().unwrap()).unwrap();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out = std::process::Command::new("blkid")
        .args(["-p", "-o", "export"])
        .arg(file.path())
        .env("PATH", path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        text.contains("\nLABEL=CIDATA\n") && text.contains("TYPE=vfat"),
        "{text}"
    );
}

#[test]
fn refusals() {
    let bad = seed(b"packages: [redis]\n".to_vec()).to_bytes().unwrap_err();
    assert!(
        bad.to_string().contains("packages: [redis]") && bad.to_string().contains("#cloud-config"),
        "{bad}"
    );
    for name in ["", "-a", "a_b", "a\"\nevil: x", "a..b", &"a".repeat(64)] {
        let seed = Seed {
            local_hostname: name.to_owned(),
            ..Seed::default()
        };
        assert!(
            matches!(seed.to_bytes(), Err(SeedError::HostName { .. })),
            "{name}"
        );
    }
    let mut with_id = seed(Vec::new());
    with_id.instance_id = Some("a\nb: c".to_owned());
    assert!(matches!(with_id.to_bytes(), Err(SeedError::InstanceId { .. })));
    assert!(matches!(
        seed(vec![b'#'; SEED_BYTES_MAX + 1]).to_bytes(),
        Err(SeedError::TooLarge { .. })
    ));
    // A change of user-data makes a new instance, unless the id is given.
    let id = |s: &Seed| read(&s.to_bytes().unwrap(), "meta-data");
    assert_ne!(id(&seed(b"#!a".to_vec())), id(&seed(b"#!b".to_vec())));
    with_id.instance_id = Some("i-1".to_owned());
    assert_eq!(
        id(&with_id),
        b"instance-id: \"i-1\"\nlocal-hostname: \"web-1.example\"\n"
    );
}
