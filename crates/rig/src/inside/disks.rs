//! Disks inside a server: found by their virtio serial number, never by the order in which they appear.

use super::{MountConfig, sys};
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// The device of the disk with this serial number, waiting up to `bound` for it to appear.
pub fn by_serial(serial: &str, bound: Duration) -> io::Result<PathBuf> {
    let start = Instant::now();
    loop {
        for entry in std::fs::read_dir("/sys/block")?.flatten() {
            let found = std::fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            if found.trim_end_matches(['\0', '\n']) == serial {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        if start.elapsed() > bound {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no disk with serial {serial}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sets a disk up as its configuration says.
pub fn attach(config: &MountConfig) -> Result<(), String> {
    let bad = |what: &str, e: &dyn std::fmt::Display| format!("disk {}: {what}: {e}", config.serial);
    let device = by_serial(&config.serial, Duration::from_secs(10)).map_err(|e| bad("find", &e))?;
    std::fs::create_dir_all("/dev/rig").map_err(|e| bad("/dev/rig", &e))?;
    // A link left by nobody: /dev is fresh at each start.
    std::os::unix::fs::symlink(&device, format!("/dev/rig/{}", config.serial))
        .map_err(|e| bad("link", &e))?;
    let mut device = device.to_string_lossy().into_owned();
    if config.faulty {
        device = map(&config.serial, &device).map_err(|e| bad("device mapper", &e))?;
    }
    let Some(path) = &config.path else { return Ok(()) };
    let flags = if config.read_only { libc::MS_RDONLY } else { 0 };
    let options = if config.read_only { "noload" } else { "" };
    sys::mount(&device, path, "ext4", flags, options).map_err(|e| bad("mount", &e))
}

/// Puts a linear device-mapper device over a disk. The rig swaps its table to make the disk fail.
fn map(name: &str, device: &str) -> Result<String, String> {
    let sectors = std::fs::read_to_string(format!("/sys/block/{}/size", device.trim_start_matches("/dev/")))
        .map_err(|e| e.to_string())?;
    let table = format!("0 {} linear {device} 0", sectors.trim());
    let made = Command::new("dmsetup")
        .args(["create", name, "--table", &table])
        // There is no udev here: dmsetup makes the nodes itself.
        .env("DM_DISABLE_UDEV", "1")
        .output()
        .map_err(|e| format!("dmsetup: {e}"))?;
    if !made.status.success() {
        return Err(String::from_utf8_lossy(&made.stderr).trim().to_string());
    }
    Ok(format!("/dev/mapper/{name}"))
}
