use super::*;
use std::process::Command;

/// Puts this thread into a network of its own; says so when it cannot.
fn own_network() -> bool {
    // SAFETY: a new network namespace affects only this thread's sockets and interfaces.
    let result = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    match result {
        Ok(()) if std::path::Path::new("/dev/net/tun").exists() => true,
        Ok(()) => {
            println!("SKIPPED: this host has no /dev/net/tun");
            false
        }
        Err(e) => {
            println!("SKIPPED: no network namespace without root: {e}");
            false
        }
    }
}

fn ip(arguments: &str) -> bool {
    match Command::new("ip").args(arguments.split(' ')).status() {
        Ok(status) => status.success(),
        Err(e) => {
            println!("SKIPPED: no `ip` command: {e}");
            false
        }
    }
}

/// A packet socket on the interface: the host's side of the wire.
fn wire(name: &str) -> File {
    use std::os::fd::FromRawFd;
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: socket and bind with a whole sockaddr_ll; the descriptor is owned by the File from here on.
    unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(all),
        );
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let file = File::from_raw_fd(fd);
        let name = std::ffi::CString::new(name).unwrap();
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let size = std::mem::size_of_val(&address) as u32;
        let result = libc::bind(fd, (&raw const address).cast(), size);
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        let timeout = libc::timeval {
            tv_sec: 10,
            tv_usec: 0,
        };
        let result = libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            std::mem::size_of_val(&timeout) as u32,
        );
        assert_eq!(result, 0);
        file
    }
}

fn frame(tag: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, tag, 0x88, 0xb5]);
    frame.extend([tag; 50]);
    frame
}

#[test]
fn frames_pass_both_ways() {
    if !own_network() {
        return;
    }
    let tap = Tap::open(&TapOptions {
        name: "sf%d".to_owned(),
        bridge: None,
        mtu: Some(9000),
    })
    .unwrap();
    assert_eq!(tap.name(), "sf0");
    assert!(matches!(
        Tap::open(&TapOptions {
            name: "sf0".to_owned(),
            ..TapOptions::default()
        }),
        Err(TapError::Busy(_))
    ));
    let mut wire = wire("sf0");
    let mut backend = TapBackend::new(tap);
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };
    backend.set_offloads(all).unwrap();
    let mut out = vec![0; VNET_HEADER];
    out.extend(frame(1));
    assert_eq!(backend.send(&out), Sent::Done);
    let mut got = vec![0; 2000];
    loop {
        // The host's own stack may speak first.
        let n = wire.read(&mut got).unwrap();
        if got[..n] == frame(1) {
            break;
        }
    }
    wire.write_all(&frame(2)).unwrap();
    let mut buf = vec![0; crate::FRAME_MAX];
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        assert!(std::time::Instant::now() < end);
        if let Some(n) = backend.receive(&mut buf).unwrap()
            && buf[VNET_HEADER..n] == frame(2)
        {
            break;
        }
    }
    // A header that asks for nonsense is refused by the kernel, not by us.
    out[1] = 0x77;
    assert_eq!(backend.send(&out), Sent::Dropped);
    assert_eq!(backend.send(&[0; 3]), Sent::Dropped);
    let fd = OwnedFd::from(backend.0.file);
    assert_eq!(Tap::from_fd(fd).unwrap().name(), "sf0");
}

#[test]
fn bridges_are_joined_or_the_error_says_why_not() {
    if !own_network() || !ip("link add sfbr type bridge") {
        return;
    }
    let options = |bridge: &str| TapOptions {
        name: "sft%d".to_owned(),
        bridge: Some(bridge.to_owned()),
        mtu: None,
    };
    let tap = Tap::open(&options("sfbr")).unwrap();
    let shown = Command::new("ip")
        .args(["link", "show", "master", "sfbr"])
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains(tap.name()) && shown.contains("UP"), "{shown}");
    let e = Tap::open(&options("nobridge")).unwrap_err();
    assert!(matches!(&e, TapError::NoBridge(b) if b == "nobridge"), "{e}");
    assert!(e.to_string().contains("ip link add nobridge type bridge"));
    let e = Tap::open(&options("lo")).unwrap_err();
    assert!(matches!(e, TapError::NotABridge(_)), "{e:?}");
}

#[test]
fn bad_names_and_descriptors_are_refused() {
    for name in ["a/b", "sixteen-charactr", "a b", ".."] {
        let options = TapOptions {
            name: name.to_owned(),
            ..TapOptions::default()
        };
        assert!(matches!(Tap::open(&options), Err(TapError::Name(_))), "{name}");
    }
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Tap::from_fd(null.into()), Err(TapError::NotATap(_))));
}
