//! The cloud-init NoCloud seed: a small volume labelled `CIDATA` with `user-data`, `meta-data` and perhaps
//! `network-config`, which a guest with cloud-init reads at its first boot (cloud-init documentation, "NoCloud").
//!
//! The volume is made in memory, from its contents alone: no clock, no random numbers. So the same VM gets the same
//! bytes on every host, which a standby relies on.

mod fat;

use crate::image::MemImage;

/// Bytes that all files of a seed may have together.
pub const SEED_BYTES_MAX: usize = 4 << 20;

/// What can be wrong with a seed.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The files are too large.
    #[error(
        "cloud-init data of {bytes} bytes is larger than {SEED_BYTES_MAX}; let user-data fetch it from elsewhere"
    )]
    TooLarge {
        /// Their size.
        bytes: usize,
    },
    /// Not a host name.
    #[error("{name:?} is not a host name: use up to 63 letters, digits and `-` between dots, 253 in all")]
    HostName {
        /// What was given.
        name: String,
    },
    /// Not an instance id.
    #[error("{id:?} is not an instance id: use up to 128 letters, digits, `-`, `_` and `.`")]
    InstanceId {
        /// What was given.
        id: String,
    },
    /// cloud-init would ignore this.
    #[error(
        "user-data begins with {start:?}, which cloud-init would ignore; begin it with `#cloud-config` or `#!/bin/sh`"
    )]
    UserData {
        /// The first line, or part of it.
        start: String,
    },
}

/// What a seed is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// The user's file, as it is: `#cloud-config`, a script, MIME, or gzip of these. Empty means none.
    pub user_data: Vec<u8>,
    /// The guest's name.
    pub local_hostname: String,
    /// cloud-init runs its once-per-instance parts again when this changes. `None` derives it from the contents.
    pub instance_id: Option<String>,
    /// Network configuration, version 1 or 2, as YAML. `None`: cloud-init's own default, DHCP on the first NIC.
    pub network_config: Option<Vec<u8>>,
}

/// FNV-1a: stable for all time, and nothing here is secret.
fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.iter().chain(&[0]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash
}

fn is_host_name(name: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn check_user_data(data: &[u8]) -> Result<(), SeedError> {
    // The prefixes of cloud-init's user-data formats.
    const KNOWN: [&[u8]; 11] = [
        b"#cloud-config",
        b"#!",
        b"#include",
        b"#cloud-boothook",
        b"#part-handler",
        b"## template: jinja",
        b"#upstart-job",
        b"Content-Type:",
        b"MIME-Version:",
        b"From nobody",
        b"\x1f\x8b",
    ];
    let lower = |b: &[u8]| b.to_ascii_lowercase();
    if data.is_empty()
        || KNOWN
            .iter()
            .any(|k| data.len() >= k.len() && lower(&data[..k.len()]) == lower(k))
    {
        return Ok(());
    }
    let line = data.split(|b| *b == b'\n').next().unwrap_or_default();
    Err(SeedError::UserData {
        start: String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned(),
    })
}

impl Seed {
    /// The volume's bytes.
    ///
    /// # Errors
    /// [`SeedError`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, SeedError> {
        let network = self.network_config.as_deref();
        let bytes = self.user_data.len() + network.map_or(0, <[u8]>::len);
        if bytes > SEED_BYTES_MAX {
            return Err(SeedError::TooLarge { bytes });
        }
        if !is_host_name(&self.local_hostname) {
            return Err(SeedError::HostName {
                name: self.local_hostname.clone(),
            });
        }
        check_user_data(&self.user_data)?;
        let hash = hash([
            self.user_data.as_slice(),
            self.local_hostname.as_bytes(),
            network.unwrap_or_default(),
        ]);
        let id = self
            .instance_id
            .clone()
            .unwrap_or_else(|| format!("iid-{hash:016x}"));
        let id_fine = (1..=128).contains(&id.len())
            && id
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'));
        if !id_fine {
            return Err(SeedError::InstanceId { id });
        }
        // Both values are plain words (checked above); quoted, so that YAML takes digits for a name.
        let meta = format!(
            "instance-id: \"{id}\"\nlocal-hostname: \"{}\"\n",
            self.local_hostname
        );
        let mut files: Vec<(&str, &[u8; 11], &[u8])> = vec![
            ("user-data", b"USER-D~1   ", &self.user_data),
            ("meta-data", b"META-D~1   ", meta.as_bytes()),
        ];
        if let Some(network) = network {
            files.push(("network-config", b"NETWOR~1   ", network));
        }
        Ok(fat::volume(b"CIDATA     ", hash as u32, &files))
    }

    /// The volume as a read-only image.
    ///
    /// # Errors
    /// [`SeedError`].
    pub fn to_image(&self) -> Result<MemImage, SeedError> {
        Ok(MemImage::new(self.to_bytes()?, true))
    }
}
