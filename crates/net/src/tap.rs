//! TAP devices (Linux `Documentation/networking/tuntap.rst`): opening, offloads, and joining a bridge.
//!
//! A TAP made here lives as long as its descriptor. An unprivileged monitor gets the descriptor from the daemon
//! ([`Tap::from_fd`]). Only ioctls are used, no netlink.

use crate::{NetBackend, Offloads, Sent, VNET_HEADER};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
/// Longest interface name.
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// A TAP device could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No `/dev/net/tun`.
    #[error(
        "this host has no /dev/net/tun; load the kernel module with `modprobe tun`, or give the container the device"
    )]
    NoTun,
    /// Not allowed.
    #[error(
        "not allowed to {what}; it needs root or CAP_NET_ADMIN (the Steadfast daemon does it for its VMs)"
    )]
    Permission {
        /// What was tried.
        what: String,
    },
    /// A name the kernel cannot take.
    #[error("{0:?} is not a network interface name; use 1 to 15 characters without '/' or spaces")]
    Name(String),
    /// Another process has it.
    #[error("TAP device {0} is in use by another process; stop that VM or choose another name")]
    Busy(String),
    /// The bridge does not exist.
    #[error(
        "there is no bridge {0} on this host; create it with `ip link add {0} type bridge && ip link set {0} up`, or name an existing one"
    )]
    NoBridge(String),
    /// The interface named as bridge is something else.
    #[error("{0} is not a bridge; name a bridge for the VM's NIC")]
    NotABridge(String),
    /// A descriptor that was handed over is not a TAP.
    #[error("descriptor {0} is not a TAP device with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    NotATap(RawFd),
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How to make a TAP.
#[derive(Clone, Debug, Default)]
pub struct TapOptions {
    /// Interface name; `%d` is replaced by a number. Empty: `tap%d`.
    pub name: String,
    /// Bridge to join.
    pub bridge: Option<String>,
    /// MTU; the kernel's default (1500) if not given.
    pub mtu: Option<u16>,
}

/// An open TAP.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let bad = name.is_empty()
        || name.len() > NAME_MAX
        || matches!(name, "." | "..")
        || name
            .bytes()
            .any(|b| b == b'/' || b == 0 || b == b':' || b.is_ascii_whitespace());
    if bad {
        return Err(TapError::Name(name.to_owned()));
    }
    // SAFETY: ifreq is plain old data of a C union; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl_ifreq(fd: RawFd, call: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every call used here takes a pointer to a whole ifreq, which lives across the call.
    let result = unsafe { libc::ioctl(fd, call as _, std::ptr::from_mut(request)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn failed(what: String) -> impl FnOnce(io::Error) -> TapError {
    move |source| match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { what },
        _ => TapError::System { what, source },
    }
}

fn name_of(request: &libc::ifreq) -> String {
    request
        .ifr_name
        .iter()
        .map(|c| *c as u8)
        .take_while(|b| *b != 0)
        .map(char::from)
        .collect()
}

impl Tap {
    /// Makes a TAP, sets its MTU, joins the bridge, and brings it up.
    ///
    /// # Errors
    /// [`TapError`] names cause and way out.
    pub fn open(options: &TapOptions) -> Result<Self, TapError> {
        let wanted = if options.name.is_empty() {
            "tap%d"
        } else {
            &options.name
        };
        let mut ifreq = request(wanted)?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun,
                _ => failed("open /dev/net/tun".to_owned())(source),
            })?;
        ifreq.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        ioctl_ifreq(file.as_raw_fd(), TUNSETIFF, &mut ifreq).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy(wanted.to_owned()),
                _ => failed(format!("create the TAP device {wanted}"))(source),
            }
        })?;
        let tap = Self {
            name: name_of(&ifreq),
            file,
        };
        tap.prepare()?;
        let control = control_socket()?;
        if let Some(mtu) = options.mtu {
            let mut ifreq = request(&tap.name)?;
            ifreq.ifr_ifru.ifru_mtu = mtu.into();
            ioctl_ifreq(control.as_raw_fd(), libc::SIOCSIFMTU, &mut ifreq)
                .map_err(failed(format!("set the MTU of {} to {mtu}", tap.name)))?;
        }
        if let Some(bridge) = &options.bridge {
            join(&control, bridge, &tap.name)?;
        }
        up(&control, &tap.name)?;
        Ok(tap)
    }

    /// Takes a TAP that another process opened.
    ///
    /// # Errors
    /// [`TapError::NotATap`], or what the kernel said.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        // SAFETY: as in `request`.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        let refused = TapError::NotATap(file.as_raw_fd());
        if ioctl_ifreq(file.as_raw_fd(), TUNGETIFF, &mut ifreq).is_err() {
            return Err(refused);
        }
        // SAFETY: TUNGETIFF fills the flags.
        let flags = i32::from(unsafe { ifreq.ifr_ifru.ifru_flags });
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & needed != needed {
            return Err(refused);
        }
        rustix::io::ioctl_fionbio(&file, true)
            .map_err(|e| failed("set the TAP non-blocking".to_owned())(e.into()))?;
        let tap = Self {
            name: name_of(&ifreq),
            file,
        };
        tap.prepare()?;
        Ok(tap)
    }

    fn prepare(&self) -> Result<(), TapError> {
        let size = VNET_HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int through the pointer.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) };
        if result < 0 {
            let what = format!("set the header size of {}", self.name);
            return Err(failed(what)(io::Error::last_os_error()));
        }
        self.set_offloads(Offloads::default())
            .map_err(failed(format!("set the offloads of {}", self.name)))
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        if offloads.checksum {
            flags |= TUN_F_CSUM;
            // The kernel refuses segmentation without checksums, and ECN without segmentation.
            if offloads.tso4 {
                flags |= TUN_F_TSO4;
            }
            if offloads.tso6 {
                flags |= TUN_F_TSO6;
            }
            if offloads.ecn && (offloads.tso4 || offloads.tso6) {
                flags |= TUN_F_TSO_ECN;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD as _, flags) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// A second handle on the same TAP, with fresh offloads: for the machine that follows this one after a reset.
    ///
    /// # Errors
    /// As [`Tap::from_fd`].
    pub fn try_clone(&self) -> Result<Self, TapError> {
        let file = self
            .file
            .try_clone()
            .map_err(failed(format!("duplicate the descriptor of {}", self.name)))?;
        Self::from_fd(file.into())
    }

    /// Name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn control_socket() -> Result<OwnedFd, TapError> {
    rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| failed("open a control socket".to_owned())(e.into()))
}

fn join(control: &OwnedFd, bridge: &str, tap: &str) -> Result<(), TapError> {
    let mut ifreq = request(tap)?;
    ioctl_ifreq(control.as_raw_fd(), libc::SIOCGIFINDEX, &mut ifreq)
        .map_err(failed(format!("look up {tap}")))?;
    // SAFETY: SIOCGIFINDEX fills the index.
    let index = unsafe { ifreq.ifr_ifru.ifru_ifindex };
    let mut ifreq = request(bridge)?;
    ifreq.ifr_ifru.ifru_ifindex = index;
    ioctl_ifreq(control.as_raw_fd(), SIOCBRADDIF, &mut ifreq).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV) => TapError::NoBridge(bridge.to_owned()),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY) => TapError::NotABridge(bridge.to_owned()),
        _ => failed(format!("add {tap} to the bridge {bridge}"))(source),
    })
}

fn up(control: &OwnedFd, tap: &str) -> Result<(), TapError> {
    let mut ifreq = request(tap)?;
    let what = || failed(format!("bring {tap} up"));
    ioctl_ifreq(control.as_raw_fd(), libc::SIOCGIFFLAGS, &mut ifreq).map_err(what())?;
    // SAFETY: SIOCGIFFLAGS fills the flags.
    let flags = unsafe { ifreq.ifr_ifru.ifru_flags };
    ifreq.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl_ifreq(control.as_raw_fd(), libc::SIOCSIFFLAGS, &mut ifreq).map_err(what())
}

/// Frames over a TAP.
pub struct TapBackend(Tap);

impl TapBackend {
    /// Uses `tap`.
    #[must_use]
    pub fn new(tap: Tap) -> Self {
        Self(tap)
    }

    /// The TAP.
    #[must_use]
    pub fn tap(&self) -> &Tap {
        &self.0
    }
}

impl NetBackend for TapBackend {
    fn fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }

    fn can_offload(&self) -> bool {
        true
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.0.set_offloads(offloads)
    }

    fn send(&mut self, frame: &[u8]) -> Sent {
        loop {
            match self.0.file.write(frame) {
                Ok(_) => return Sent::Done,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Sent::WouldBlock,
                // Malformed (EINVAL), interface down (EIO), no memory: a wire loses such frames, too.
                Err(_) => return Sent::Dropped,
            }
        }
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.0.file.read(buf) {
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests;
