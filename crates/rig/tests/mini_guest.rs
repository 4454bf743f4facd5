//! The mini guest, on plain software emulation (no KVM, no server): its services answer, its checkers work, and they notice what
//! is done to it.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_rig::artifacts::{Cache, Kernel, mini::MiniGuest};
use steadfast_rig::host::{client::Client, spawn::spawn_bound};
use steadfast_rig::inside::mini::Status;
use steadfast_rig::switch::plane::Cable;
use steadfast_rig::{CLIENT_ADDRESS, Switch, tools};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 101);
const BOUND: Duration = Duration::from_secs(60);

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(client: &Client, port: u16, line: &str) -> String {
    let mut stream = client.tcp_retry(SocketAddr::from((GUEST, port)), BOUND).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    // The status service closes at once and may not read the line.
    let _ = stream.write_all(format!("{line}\n").as_bytes());
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim_end().to_string()
}

fn status(client: &Client) -> Status {
    serde_json::from_str(&ask(client, 9, "")).unwrap()
}

fn wait_until(client: &Client, what: &str, is: impl Fn(&Status) -> bool) -> Status {
    let start = Instant::now();
    loop {
        let status = status(client);
        if is(&status) {
            return status;
        }
        assert!(start.elapsed() < BOUND, "{what} did not happen: {status:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn mini_guest() {
    if !tools::qemu_present() {
        println!("SKIPPED: mini_guest: qemu-system-x86_64 is not installed; run `steadfast-rig setup`");
        return;
    }
    let switch = Switch::start("client0", 1).unwrap();
    let (client, tap) = match Client::start(CLIENT_ADDRESS, 24, [2, 0, 0, 0, 0, 1], 1500) {
        Ok(client) => client,
        Err(e) => {
            println!("SKIPPED: mini_guest: {e}");
            return;
        }
    };
    switch.plug_cable(switch.add_port("client"), Cable::Tap(tap));
    let cache = Cache::of_user().unwrap();
    let guest = MiniGuest::of(&cache, &Kernel::of(&cache).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (disk, console) = (folder.path().join("disk"), folder.path().join("console"));
    let image = std::fs::OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    image.set_len(4 << 20).unwrap();

    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut qemu = Command::new(tools::find("qemu-system-x86_64").unwrap());
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "q35",
        "-m",
        "192",
    ]);
    qemu.arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs);
    let words = format!(
        "{} tsc=reliable no_timer_check mini.ip={GUEST}/24 mini.mem=8 mini.disk=vda mini.disk_mib=4 mini.tick_ms=50",
        guest.command_line
    );
    qemu.args(["-append", &words])
        .arg("-serial")
        .arg(format!("file:{}", console.display()));
    qemu.arg("-drive")
        .arg(format!("if=none,id=d,format=raw,file={}", disk.display()));
    qemu.args([
        "-device",
        "virtio-blk-pci,drive=d",
        "-device",
        "virtio-net-pci,netdev=n,romfile=",
    ]);
    qemu.args([
        "-netdev",
        &format!(
            "stream,id=n,server=off,addr.type=fd,addr.str={}",
            theirs.as_raw_fd()
        ),
    ]);
    qemu.stdin(Stdio::null()).stdout(Stdio::null());
    let mut qemu = Killed(spawn_bound(qemu, vec![theirs.as_raw_fd()]).unwrap());
    drop(theirs);
    switch.plug_cable(switch.add_port("guest"), Cable::Stream(ours.into()));

    // The services.
    assert_eq!(ask(&client, 7, "echo"), "echo");
    assert_eq!(ask(&client, 8, "x"), "COUNT 1 1");
    assert_eq!(ask(&client, 8, "x"), "COUNT 2 1");
    assert_eq!(ask(&client, 10, "mem_rate 500"), "ok");
    assert!(ask(&client, 10, "what").starts_with("error"));
    let udp = client.udp().unwrap();
    udp.set_read_timeout(Some(BOUND)).unwrap();
    udp.send_to(b"datagram", (GUEST, 7)).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(udp.recv(&mut buffer).unwrap(), 8);
    assert!(client.ping(GUEST, BOUND).is_ok());

    // The checkers check, and are content.
    let fine = wait_until(&client, "all checkers at work", |status| {
        status.memory_checked > status.memory_pages && status.disk_reads > 50 && status.disk_flushes > 1
    });
    assert_eq!((fine.faults.as_slice(), fine.memory_pages), (&[][..], 2048));

    // The console counts without a gap.
    let said = std::fs::read_to_string(&console).unwrap();
    let numbers: Vec<u64> = said
        .lines()
        .filter_map(|line| line.strip_prefix("TICK ")?.split(' ').next()?.parse().ok())
        .collect();
    assert!(
        numbers.len() > 5
            && numbers
                .iter()
                .enumerate()
                .all(|(at, number)| *number == at as u64 + 1),
        "{said}"
    );

    // A bit rots on the disk: it is noticed.
    let mut block = [0; 4096];
    let at = (0..1024u64)
        .map(|block| block * 4096)
        .find(|at| image.read_exact_at(&mut block, *at).is_ok() && block.iter().any(|byte| *byte != 0))
        .unwrap();
    for at in (at..4 << 20).step_by(4096) {
        image.read_exact_at(&mut block, at).unwrap();
        if block.iter().any(|byte| *byte != 0) {
            image.write_all_at(&[block[2000] ^ 1], at + 2000).unwrap();
        }
    }
    let found = wait_until(&client, "noticing the rot", |status| !status.faults.is_empty());
    assert!(found.faults[0].starts_with("CORRUPT disk"), "{:?}", found.faults);

    // It goes off when told.
    let mut control = client.tcp_retry(SocketAddr::from((GUEST, 10)), BOUND).unwrap();
    control.write_all(b"poweroff\n").unwrap();
    let ended = tools::wait_bounded(&mut qemu.0, "the guest", BOUND).unwrap();
    assert!(ended.success());
}
