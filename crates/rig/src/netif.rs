//! Network devices by `ioctl` (netdevice(7)): no program needed, neither here nor in a guest.

use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

/// `struct ifreq` of the kernel: 40 bytes on this architecture.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    data: [u8; 24],
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

fn request(fd: i32, number: libc::c_ulong, name: &str, data: &[u8]) -> io::Result<()> {
    let mut request = InterfaceRequest {
        name: [0; 16],
        data: [0; 24],
    };
    // The last byte of the name stays zero.
    if name.len() > 15 || data.len() > 24 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request.data[..data.len()].copy_from_slice(data);
    // SAFETY: a whole `struct ifreq`, valid to read and write for the call.
    if unsafe { libc::ioctl(fd, number as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn device_request(number: libc::c_ulong, name: &str, data: &[u8]) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    request(socket.as_raw_fd(), number, name, data)
}

fn inet(address: Ipv4Addr) -> Vec<u8> {
    let mut data = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    data.extend_from_slice(&[0, 0]);
    data.extend_from_slice(&address.octets());
    data
}

/// Opens a new TAP device without extra headers. It goes when the descriptor does.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    request(tun.as_raw_fd(), TUNSETIFF, name, &flags.to_ne_bytes())?;
    Ok(tun.into())
}

/// Turns a device on.
pub fn up(name: &str) -> io::Result<()> {
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    device_request(libc::SIOCSIFFLAGS, name, &flags.to_ne_bytes())
}

/// Sets a device's hardware address.
pub fn set_mac(name: &str, mac: [u8; 6]) -> io::Result<()> {
    device_request(
        libc::SIOCSIFHWADDR,
        name,
        &[&libc::ARPHRD_ETHER.to_ne_bytes()[..], &mac[..]].concat(),
    )
}

/// Sets the largest packet of a device.
pub fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    device_request(libc::SIOCSIFMTU, name, &(mtu as i32).to_ne_bytes())
}

/// Gives a device its address.
pub fn set_address(name: &str, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0));
    device_request(libc::SIOCSIFADDR, name, &inet(address))?;
    device_request(libc::SIOCSIFNETMASK, name, &inet(mask))
}
