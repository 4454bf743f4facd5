//! The QEMU machine of a simulated server: software emulation with AMD SVM, so that the Debian kernel in it has a real
//! `/dev/kvm`. Every connection is a socket pair that QEMU inherits: there is no path to collide on and nothing to clean up.

use crate::error::{IoContext, Result};
use crate::tools;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// How the writes of a disk reach the machine under the rig.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskCache {
    /// Through this machine's page cache; a flush is an fsync. Writes survive the kill of a server.
    Writeback,
    /// Every write is synced.
    Writethrough,
    /// Past the page cache (needs a file system with O_DIRECT).
    None,
    /// Flushes are ignored: fastest, and enough where only QEMU is killed, never this machine.
    Unsafe,
}

impl DiskCache {
    fn word(self) -> &'static str {
        match self {
            DiskCache::Writeback => "writeback",
            DiskCache::Writethrough => "writethrough",
            DiskCache::None => "none",
            DiskCache::Unsafe => "unsafe",
        }
    }
}

/// A disk of a server.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The serial number by which the server finds it.
    pub serial: String,
    /// The image.
    pub image: PathBuf,
    /// True for images that servers share.
    pub read_only: bool,
    /// True for a qcow2 image, false for a raw one.
    pub qcow2: bool,
    /// How its writes go.
    pub cache: DiskCache,
}

/// A NIC of a server.
#[derive(Debug, Clone)]
pub struct Nic {
    /// Name in the server, and QEMU's identifier of the device.
    pub name: String,
    /// Its address.
    pub mac: String,
    /// Largest IP packet in bytes.
    pub mtu: u32,
}

/// What a server's machine is made of.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// The server's name.
    pub name: String,
    /// Megabytes of memory.
    pub memory_mib: u32,
    /// CPUs.
    pub cpus: u32,
    /// The kernel's bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Words added to the kernel's command line.
    pub kernel_words: String,
    /// The file for what the server says on its serial console (kept over starts).
    pub console: PathBuf,
    /// The file for QEMU's own complaints.
    pub complaints: PathBuf,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its NICs.
    pub nics: Vec<Nic>,
}

/// A QEMU that was just started, and our ends of its connections.
pub struct Started {
    /// The process.
    pub child: Child,
    /// To the agent's virtio-serial port.
    pub agent: UnixStream,
    /// To QMP.
    pub qmp: UnixStream,
    /// To the NICs, in order.
    pub nics: Vec<OwnedFd>,
}

/// Starts the machine.
///
/// # Errors
/// When QEMU is missing, or the machine gives no process or descriptors. What QEMU itself complains about is in the file.
pub fn start(hardware: &Hardware) -> Result<Started> {
    let mut command = Command::new(tools::find("qemu-system-x86_64")?);
    let mut inherit = Vec::new();
    let mut theirs = Vec::new();
    let mut socket = |what: &str| -> Result<(UnixStream, i32)> {
        let (ours, other) =
            UnixStream::pair().what(|| format!("server {}: socket for {what}", hardware.name))?;
        let number = other.as_raw_fd();
        inherit.push(number);
        theirs.push(other);
        Ok((ours, number))
    };
    let (qmp, qmp_fd) = socket("qmp")?;
    let (agent, agent_fd) = socket("the agent")?;
    let mut add = |words: &[&str]| {
        command.args(words);
    };
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    add(&["-name", &hardware.name]);
    add(&[
        "-machine",
        "q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off,dump-guest-core=off",
    ]);
    add(&["-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max,+svm"]);
    add(&[
        "-smp",
        &hardware.cpus.to_string(),
        "-m",
        &hardware.memory_mib.to_string(),
    ]);
    add(&[
        "-kernel",
        &hardware.kernel.to_string_lossy(),
        "-initrd",
        &hardware.initramfs.to_string_lossy(),
    ]);
    // tsc=reliable: with two CPUs the TSC was marked unstable. panic=-1: a panicked host restarts, as hosts do.
    // no_timer_check: on a busy machine the emulated timer is late, and Linux panics ("IO-APIC + timer doesn't work").
    let words = format!(
        "console=ttyS0 quiet loglevel=4 tsc=reliable mitigations=off panic=-1 net.ifnames=0 nowatchdog \
         no_timer_check {}",
        hardware.kernel_words
    );
    add(&["-append", words.trim()]);
    let console = hardware.console.to_string_lossy();
    add(&[
        "-chardev",
        &format!("file,id=console,path={console},append=on"),
        "-serial",
        "chardev:console",
    ]);
    add(&[
        "-chardev",
        &format!("socket,id=qmp,fd={qmp_fd}"),
        "-mon",
        "chardev=qmp,mode=control",
    ]);
    add(&["-chardev", &format!("socket,id=agent,fd={agent_fd}")]);
    add(&["-device", "virtio-serial-pci,id=serial"]);
    add(&[
        "-device",
        &format!("virtserialport,chardev=agent,name={}", crate::inside::AGENT_PORT),
    ]);
    add(&["-device", "virtio-rng-pci"]);
    for (index, disk) in hardware.disks.iter().enumerate() {
        let read_only = if disk.read_only { ",readonly=on" } else { "" };
        let cache = disk.cache.word();
        let format = if disk.qcow2 { "qcow2" } else { "raw" };
        let image = disk.image.to_string_lossy().replace(',', ",,");
        add(&[
            "-drive",
            &format!(
                "if=none,id=disk{index},format={format},discard=unmap,cache={cache}{read_only},file={image}"
            ),
        ]);
        add(&[
            "-device",
            &format!(
                "virtio-blk-pci,id=blk-{},drive=disk{index},serial={}",
                disk.serial, disk.serial
            ),
        ]);
    }
    let mut nics = Vec::new();
    for nic in &hardware.nics {
        let (ours, fd) = socket(&nic.name)?;
        nics.push(OwnedFd::from(ours));
        let name = &nic.name;
        command.args([
            "-netdev",
            &format!("stream,id=net-{name},server=off,addr.type=fd,addr.str={fd}"),
        ]);
        let device = format!(
            "virtio-net-pci,id={name},netdev=net-{name},mac={},host_mtu={},romfile=",
            nic.mac, nic.mtu
        );
        command.args(["-device", &device]);
    }
    let complaints = std::fs::File::create(&hardware.complaints)
        .what(|| format!("make {}", hardware.complaints.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaints);
    let child =
        super::spawn::spawn_bound(command, inherit).what(|| format!("start QEMU for {}", hardware.name))?;
    // Their ends are QEMU's now; ours would keep its connections from ending when it dies.
    drop(theirs);
    Ok(Started {
        child,
        agent,
        qmp,
        nics,
    })
}
