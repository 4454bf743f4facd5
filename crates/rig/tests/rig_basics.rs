//! The rig itself, end to end: two servers, three switches, the client, the axe, and etcd.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};
use steadfast_rig::{DiskFault, Exec, Outcome, Rig, RigError, etcd, tools};

const SHORT: Duration = Duration::from_secs(5);

fn pings(rig: &Rig, from: usize, to: &str) -> bool {
    rig.server(from)
        .shell(&format!("ping -c 1 -W 1 {to}"), SHORT)
        .unwrap()
        .success()
}

#[test]
fn rig_basics() {
    if !tools::qemu_present() {
        println!("SKIPPED: rig_basics: qemu-system-x86_64 is not installed; run `steadfast-rig setup`");
        return;
    }
    let rig = Rig::builder().servers(2).memory_mib(768).start().unwrap();

    // A server is a machine with a KVM of its own.
    for server in rig.servers() {
        assert_eq!(
            server.exec("test -c /dev/kvm && hostname").unwrap(),
            server.name()
        );
        assert_eq!(
            server.exec("stat -f -c %T /data /sys/fs/cgroup").unwrap(),
            "ext2/ext3\ncgroup2fs"
        );
    }
    commands(&rig);

    // Every switch, both ways.
    for name in ["s2", "s2-b", "s2-client", "client"] {
        assert!(pings(&rig, 0, name), "s1 does not reach {name}");
    }
    for name in ["s1", "s1-b", "s1-client"] {
        assert!(pings(&rig, 1, name), "s2 does not reach {name}");
    }
    client(&rig);
    partitions(&rig);
    cables(&rig);
    disks(&rig);
    starved(&rig);
    axe(&rig);

    let pids: Vec<i32> = rig
        .servers()
        .iter()
        .filter_map(|server| server.qemu_pid())
        .collect();
    let folder = rig.folder().to_path_buf();
    assert_eq!(pids.len(), 2);
    drop(rig);
    for pid in pids {
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "QEMU {pid} outlived its rig"
        );
    }
    assert!(!folder.exists(), "the run's files outlived the rig");
}

fn commands(rig: &Rig) {
    let server = rig.server(0);
    // Exit codes, both streams, input, limits.
    let output = server.shell("echo out; echo err >&2; exit 3", SHORT).unwrap();
    assert_eq!(
        (output.outcome.clone(), output.text(), output.error_text()),
        (Outcome::Exited(3), "out".into(), "err".into())
    );
    assert!(matches!(
        server.exec("false"),
        Err(RigError::CommandFailed { .. })
    ));
    let request = Exec {
        argv: vec!["md5sum".into()],
        ..Exec::default()
    };
    let big = vec![b'x'; 3 << 20];
    assert_eq!(
        server.run(request, &big).unwrap().text(),
        "c1887f0c970afa48194adf7f5c504696  -"
    );
    let slow = server
        .shell("sleep 30 & wait", Duration::from_millis(300))
        .unwrap();
    assert_eq!(slow.outcome, Outcome::TimedOut);
    assert!(matches!(
        server.exec("no-such-program-at-all"),
        Err(RigError::CommandFailed { .. })
    ));
    // Files, there and back.
    server.put_bytes(&big, "/data/big", 0o640).unwrap();
    assert_eq!(
        server.exec("stat -c '%s %a' /data/big").unwrap(),
        format!("{} 640", big.len())
    );
    assert_eq!(server.get_bytes("/data/big").unwrap(), big);
    assert!(matches!(
        server.get_bytes("/no/such/file"),
        Err(RigError::Agent { .. })
    ));
    server.exec("rm /data/big").unwrap();
    // The wall clock alone jumps.
    let before: i64 = server.exec("date +%s").unwrap().parse().unwrap();
    server.clock_jump(3_600_000).unwrap();
    let after: i64 = server.exec("date +%s").unwrap().parse().unwrap();
    assert!(
        (3600..3660).contains(&(after - before)),
        "the clock went from {before} to {after}"
    );
    server.clock_jump(-3_600_000).unwrap();
}

fn client(rig: &Rig) {
    let client = rig.client().unwrap();
    let server = rig.server(1);
    server
        .spawn("socat TCP-LISTEN:7000,fork,reuseaddr EXEC:cat", "/tmp/socat.log")
        .unwrap();
    let to: SocketAddr = format!("{}:7000", server.address("client0").unwrap())
        .parse()
        .unwrap();
    let mut stream = client.tcp_retry(to, Duration::from_secs(10)).unwrap();
    stream.set_read_timeout(Some(SHORT)).unwrap();
    std::io::Write::write_all(&mut stream, b"hello\n").unwrap();
    let mut answer = [0; 6];
    std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
    assert_eq!(&answer, b"hello\n");
    // The device is in the client's namespace, not in that of this machine.
    assert!(!std::path::Path::new("/sys/class/net/client0").exists());
    assert!(client.ping("10.90.0.12".parse().unwrap(), SHORT).is_ok());
    assert!(
        client
            .ping("10.90.0.99".parse().unwrap(), Duration::from_millis(300))
            .is_err()
    );
}

fn partitions(rig: &Rig) {
    let switch = rig.switch("repl0").unwrap();
    switch.partition("s1", "s2").unwrap();
    assert!(
        !pings(rig, 0, "s2") && !pings(rig, 1, "s1"),
        "a partitioned path carries frames"
    );
    assert!(pings(rig, 0, "s2-b"), "the other switch is whole");
    switch.heal();
    assert!(
        pings(rig, 0, "s2") && pings(rig, 1, "s1"),
        "a healed path carries none"
    );
    // One way: what s1 sends is lost, so neither gets an echo; but s2's frames arrive at s1.
    switch.partition_one_way("s1", "s2").unwrap();
    let before: u64 = rig
        .server(0)
        .exec("cat /sys/class/net/repl0/statistics/rx_packets")
        .unwrap()
        .parse()
        .unwrap();
    assert!(!pings(rig, 1, "s1"));
    let after: u64 = rig
        .server(0)
        .exec("cat /sys/class/net/repl0/statistics/rx_packets")
        .unwrap()
        .parse()
        .unwrap();
    assert!(after > before, "a one-way partition cut both ways");
    rig.switch("repl1").unwrap().set_down(true);
    assert!(!pings(rig, 0, "s2-b"), "a switch that is off carries frames");
    rig.heal_network().unwrap();
    assert!(pings(rig, 0, "s2") && pings(rig, 0, "s2-b"));
}

fn cables(rig: &Rig) {
    rig.unplug("s1", "repl1").unwrap();
    rig.server(0)
        .wait_for("test $(cat /sys/class/net/repl1/carrier) = 0", SHORT)
        .unwrap();
    assert!(!pings(rig, 0, "s2-b"), "a pulled cable carries frames");
    rig.plug("s1", "repl1").unwrap();
    rig.server(0)
        .wait_for("ping -c 1 -W 1 s2-b", Duration::from_secs(10))
        .unwrap();
}

fn disks(rig: &Rig) {
    let server = rig.server(0);
    let write = "dd if=/dev/zero of=/data/probe bs=4k count=1 conv=fsync 2>/dev/null";
    let timed = || {
        let start = Instant::now();
        let done = server.shell(write, Duration::from_secs(20)).unwrap();
        (done.success(), start.elapsed())
    };
    let (fine, whole) = timed();
    assert!(fine);
    server.disk_fault(DiskFault::Slow(400)).unwrap();
    let (fine, slow) = timed();
    assert!(
        fine && slow >= Duration::from_millis(400),
        "a slow disk took {slow:?}, a whole one {whole:?}"
    );
    server.disk_heal().unwrap();
    server.disk_fault(DiskFault::Full(1)).unwrap();
    let big = server
        .shell("dd if=/dev/zero of=/data/big bs=1M count=8", SHORT)
        .unwrap();
    assert!(!big.success() && big.error_text().contains("No space"), "{big:?}");
    server.disk_heal().unwrap();
    server
        .exec("dd if=/dev/zero of=/data/big bs=1M count=8 && rm /data/big")
        .unwrap();
    // Reads and writes fail, past the page cache. The kernel may turn the file system read-only for it; a restart cures that.
    server.disk_fault(DiskFault::Fail).unwrap();
    let read = server
        .shell(
            "dd if=/dev/mapper/data of=/dev/null iflag=direct bs=4k count=1",
            SHORT,
        )
        .unwrap();
    assert!(
        !read.success() && read.error_text().contains("Input/output error"),
        "{read:?}"
    );
    server.disk_heal().unwrap();
    server
        .exec("dd if=/dev/mapper/data of=/dev/null iflag=direct bs=4k count=1")
        .unwrap();
    server.reboot().unwrap();
    server.exec("touch /data/writable").unwrap();
    // A fault that was healed stays so over a power loss.
    let left: u64 = server
        .exec("df --output=avail -BM /data | tail -n 1 | tr -dc 0-9")
        .unwrap()
        .parse()
        .unwrap();
    assert!(left > 1024, "the data disk is full again: {left} MiB are left");
}

fn starved(rig: &Rig) {
    let server = rig.server(1);
    let work = || {
        let start = Instant::now();
        let count = "i=0; while [ $i -lt 6000 ]; do i=$((i+1)); done";
        // A tenth of a simulated server on a busy machine is very little.
        server.exec_within(count, Duration::from_secs(240)).unwrap();
        start.elapsed()
    };
    let before = work();
    server.starve(10).unwrap();
    let starved = work();
    // Frozen, it gets no turns at all.
    server.freeze().unwrap();
    assert!(!pings(rig, 0, "s2"), "a starved server that is frozen answers");
    server.thaw().unwrap();
    server.starve(100).unwrap();
    rig.server(0)
        .wait_for("ping -c 1 -W 1 s2", Duration::from_secs(10))
        .unwrap();
    // This machine has other work, which may have come in the way of one of the two.
    let free = before.min(work());
    assert!(
        starved > free * 2,
        "a starved server took {starved:?}, a free one {free:?}"
    );
}

fn axe(rig: &Rig) {
    let members = rig.servers();
    etcd::start(members).unwrap();
    let put = "ETCDCTL_API=3 etcdctl --command-timeout=20s put written before >/dev/null";
    rig.server(0).exec(put).unwrap();
    rig.server(1).exec("echo kept > /data/kept && sync").unwrap();

    // A frozen server is silent; thawed, it goes on from there.
    rig.server(1).freeze().unwrap();
    assert!(!pings(rig, 0, "s2"), "a frozen server answers");
    rig.server(1).thaw().unwrap();
    rig.server(0)
        .wait_for("ping -c 1 -W 1 s2", Duration::from_secs(10))
        .unwrap();

    rig.server(1).kill().unwrap();
    assert!(!rig.server(1).is_on());
    assert!(matches!(
        rig.server(1).exec("true"),
        Err(RigError::ServerOff { .. })
    ));
    assert!(!pings(rig, 0, "s2"), "a dead server answers");
    rig.server(1).start().unwrap();
    assert_eq!(
        rig.server(1).exec("cat /data/kept").unwrap(),
        "kept",
        "the data disk did not survive"
    );
    etcd::start_member(rig.server(1), members).unwrap();
    etcd::wait_ready(rig.server(1), Duration::from_secs(60)).unwrap();
    let got = rig
        .server(1)
        .exec("ETCDCTL_API=3 etcdctl --command-timeout=20s get --print-value-only written");
    assert_eq!(got.unwrap(), "before");

    // A server that panics restarts by itself.
    let starts = rig.server(1).starts();
    rig.server(1)
        .spawn("sh -c 'sleep 0.2; echo c > /proc/sysrq-trigger'", "/tmp/log")
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while rig.server(1).starts() == starts {
        assert!(
            Instant::now() < deadline,
            "it did not restart: {}",
            rig.server(1).console(800)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    rig.server(1).wait_ready(Duration::from_secs(60)).unwrap();
}
