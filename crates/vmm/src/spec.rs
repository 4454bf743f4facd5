//! What a VM is made of, as JSON: the form in which the command line, a saved machine and a standby name the same VM.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use steadfast_machine::cpuid::Template;
use steadfast_types::VmId;

/// A VM. Unknown fields are refused: a setting that this version does not know must not be lost in silence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Name of the VM.
    pub name: VmId,
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Where RAM lives.
    #[serde(default)]
    pub memory: MemoryKind,
    /// Which CPU the guest sees.
    #[serde(default)]
    pub cpu: Template,
    /// What runs first.
    pub boot: Boot,
    /// Disks, in the order in which the guest sees them.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network cards, in the order in which the guest sees them.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// Entropy device.
    #[serde(default)]
    pub rng: bool,
    /// Virtio console beside the serial port, its output to a file.
    #[serde(default)]
    pub virtio_console: Option<PathBuf>,
    /// Memory balloon.
    #[serde(default)]
    pub balloon: bool,
    /// Host socket of the vsock device: with it the guest has one.
    #[serde(default)]
    pub vsock: Option<VsockSpec>,
    /// A watchdog that the guest may start (ACPI WDAT): it is reset when it does not feed it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub watchdog: bool,
    /// cloud-init user-data, given to the guest as a NoCloud seed on one more disk.
    #[serde(default)]
    pub cloud_init: Option<PathBuf>,
    /// How dirty pages are found; only tests and benchmarks choose.
    #[serde(default)]
    pub dirty: Dirty,
}

const fn is_false(b: &bool) -> bool {
    !*b
}

/// Where guest RAM lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// Anonymous memory.
    #[default]
    Anonymous,
    /// Anonymous memory on huge pages where the host gives them.
    Huge,
    /// A file.
    File(PathBuf),
}

/// How dirty pages are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Dirty {
    #[default]
    Auto,
    Log,
    LogManual,
    Ring,
}

/// What runs first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// A kernel from the host: bzImage or ELF, with an optional initrd.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The command line.
        cmdline: String,
    },
    /// The kernel, initrd and command line that the first disk holds, as the guest last left them.
    Disk {
        /// UUID or label of the boot file system where the disk has several.
        file_system: Option<String>,
        /// Added to the command line.
        cmdline_extra: String,
    },
    /// A flat 64-bit ELF of our own that starts on all vCPUs (`pulse`).
    Flat {
        /// The ELF file; none means the built-in `pulse`.
        elf: PathBuf,
        /// Its settings.
        cmdline: String,
    },
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Image file or block device.
    pub path: PathBuf,
    /// `raw` or `qcow2`; looked up in the image once, when the VM is made, and kept from then on.
    #[serde(default)]
    pub format: Option<String>,
    /// The guest cannot write.
    #[serde(default)]
    pub read_only: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Queues; zero means one per vCPU, at most 8.
    #[serde(default)]
    pub queues: u16,
    /// Serial number that the guest sees.
    #[serde(default)]
    pub serial: String,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// What the card is plugged into.
    pub to: NicTarget,
    /// Hardware address `xx:xx:xx:xx:xx:xx`; none: made from the VM's name and the card's number.
    #[serde(default)]
    pub mac: Option<String>,
    /// MTU that the guest is told.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// What a card is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicTarget {
    /// A new TAP on this bridge.
    Bridge(String),
    /// A TAP of this name, on no bridge of ours.
    Tap(String),
    /// A pair of unix datagram sockets, a frame per datagram: `own` is bound, frames go to `peer`.
    Socket {
        /// Path that this VM binds.
        own: PathBuf,
        /// Path that receives the guest's frames.
        peer: PathBuf,
    },
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// Context ID of the guest, 3 or more.
    pub cid: u64,
    /// Unix socket path of the host side.
    pub path: PathBuf,
}

/// Reads a hardware address.
///
/// # Errors
/// What would be right.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("{text:?} is no hardware address; write it as 52:54:00:12:34:56");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 != 0 {
        return Err(format!(
            "{text} is a multicast address; the lowest bit of the first byte must be 0"
        ));
    }
    Ok(mac)
}

/// A stable, locally administered address for card `index` of a VM (FNV-1a of name and index).
#[must_use]
pub fn made_mac(name: &VmId, index: usize) -> [u8; 6] {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for b in name.as_str().bytes().chain([0, index as u8]) {
        hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    }
    let h = hash.to_le_bytes();
    [0x52, 0x54, h[0], h[1], h[2], h[3]]
}

/// Reads a size such as `512MiB`, `1GiB`, `2G`, `1073741824`.
///
/// # Errors
/// What would be right.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let wrong = || format!("{text:?} is no size; write it as 512MiB or 2GiB");
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match unit {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_addresses() {
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert!(
            parse_size("1 GiB").is_err() && parse_size("GiB").is_err() && parse_size("99999999T").is_err()
        );
        assert_eq!(
            parse_mac("52:54:00:12:34:56"),
            Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56])
        );
        assert!(parse_mac("53:54:00:12:34:56").is_err() && parse_mac("52:54:00:12:34").is_err());
        let vm = VmId::new("db").unwrap();
        assert_ne!(made_mac(&vm, 0), made_mac(&vm, 1));
        assert_eq!(made_mac(&vm, 0)[0] & 3, 2);
    }

    #[test]
    fn unknown_settings_are_refused() {
        let text = r#"{"name":"a","vcpus":1,"memory_bytes":67108864,"boot":{"flat":{"elf":"x","cmdline":""}},"colour":1}"#;
        assert!(serde_json::from_str::<VmSpec>(text).is_err());
    }
}
