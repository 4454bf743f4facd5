use super::limits::{parse_cpu_max, parse_io_max, parse_memory_max, parse_weight};
use super::*;

const HYBRID: &str = "\
25 1 0:24 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
27 25 0:26 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory
28 25 0:27 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio
29 25 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
30 25 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
garbage
";

fn limits() -> Limits {
    Limits {
        cpu_weight: Some(50),
        cpu_max: Some(parse_cpu_max("150%").unwrap()),
        memory_max: Some(parse_memory_max("1GiB").unwrap()),
        io_max: Some(parse_io_max("read=10MiB,write-ops=200").unwrap()),
    }
}

#[test]
fn what_operators_write() {
    assert_eq!(parse_cpu_max("max"), Ok(CpuMax::Unlimited));
    assert_eq!(parse_memory_max("max"), Ok(MemoryMax::Unlimited));
    assert_eq!(parse_io_max("max"), Ok(IoMax::default()));
    for wrong in ["", "150", "0%", "-1%", "99999999%", "max%"] {
        assert!(parse_cpu_max(wrong).is_err(), "{wrong}");
    }
    for wrong in ["", "0", "10001", "x"] {
        assert!(parse_weight(wrong).is_err(), "{wrong}");
    }
    for wrong in ["", "read", "read=0", "speed=1", "read=1MiB,", "write-ops=1K"] {
        assert!(parse_io_max(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_hybrid_host_uses_each_controller_where_it_is() {
    let all_v1 = hierarchies(HYBRID, |_| String::new());
    let names: Vec<_> = all_v1
        .iter()
        .map(|h| (h.version, h.controllers.clone()))
        .collect();
    assert_eq!(
        names,
        [
            (Version::V1, vec![Controller::Cpu]),
            (Version::V1, vec![Controller::Memory]),
            (Version::V1, vec![Controller::Io])
        ]
    );
    let mixed = hierarchies(HYBRID, |_| "memory io pids".into());
    let v2: Vec<_> = mixed.iter().filter(|h| h.version == Version::V2).collect();
    assert_eq!(v2.len(), 1);
    assert_eq!(v2[0].controllers, [Controller::Memory, Controller::Io]);
    assert_eq!(mixed.len(), 2, "{mixed:?}");
}

#[test]
fn v2_files_on_a_fake_hierarchy() {
    let dir = tempfile::tempdir().unwrap();
    let mountinfo = format!("30 25 0:29 / {} rw - cgroup2 cgroup2 rw\n", dir.path().display());
    let found = hierarchies(&mountinfo, |_| "cpu io memory".into());
    let name = VmId::new("db").unwrap();
    let group = Cgroup::enter_in(found.clone(), Path::new("a/b"), &name, "77").unwrap();
    let folder = dir.path().join("a/b/db");
    let text = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    assert_eq!(text("cgroup.procs"), "77");
    for above in ["", "a", "a/b"] {
        // A plain file keeps the last of three writes.
        let on = std::fs::read_to_string(dir.path().join(above).join("cgroup.subtree_control")).unwrap();
        assert_eq!(on, "+memory", "{above:?}");
    }
    group.set(&limits(), &[(8, 0)]).unwrap();
    assert_eq!(text("cpu.weight"), "50");
    assert_eq!(text("cpu.max"), "150000 100000");
    assert_eq!(text("memory.max"), "1073741824");
    assert_eq!(text("io.max"), "8:0 rbps=10485760 wbps=max riops=max wiops=200");
    let unlimited = Limits {
        cpu_max: Some(CpuMax::Unlimited),
        ..Limits::default()
    };
    group.set(&unlimited, &[]).unwrap();
    assert_eq!(text("cpu.max"), "max 100000");
    assert_eq!(text("cpu.weight"), "50", "what is not named stays");
    let again = Cgroup::found(found.clone(), "0::/a/b/db\n", &name);
    assert_eq!(again, Some(group));
    assert_eq!(Cgroup::found(found, "0::/user.slice/ssh\n", &name), None);
}

#[test]
fn v1_files_on_a_fake_hierarchy() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n).display().to_string();
    let mountinfo = format!(
        "1 1 0:1 / {} rw - cgroup cgroup rw,cpu,cpuacct\n2 1 0:2 / {} rw - cgroup cgroup rw,memory\n3 1 0:3 / {} rw - cgroup cgroup rw,blkio\n",
        at("cpu"),
        at("memory"),
        at("blkio")
    );
    let found = hierarchies(&mountinfo, |_| String::new());
    let name = VmId::new("db").unwrap();
    let group = Cgroup::enter_in(found.clone(), Path::new(PARENT), &name, "77").unwrap();
    group.set(&limits(), &[(8, 16)]).unwrap();
    let text = |c: &str, file: &str| {
        std::fs::read_to_string(dir.path().join(c).join("steadfast/db").join(file)).unwrap()
    };
    assert_eq!(text("memory", "cgroup.procs"), "77");
    assert_eq!(text("cpu", "cpu.shares"), "512");
    assert_eq!(text("cpu", "cpu.cfs_quota_us"), "150000");
    assert_eq!(text("memory", "memory.limit_in_bytes"), "1073741824");
    assert_eq!(text("blkio", "blkio.throttle.read_bps_device"), "8:16 10485760");
    assert_eq!(text("blkio", "blkio.throttle.write_bps_device"), "8:16 0");
    let of_process = "3:blkio:/steadfast/db\n2:memory:/steadfast/db\n1:cpu,cpuacct:/steadfast/db\n0::/\n";
    assert_eq!(Cgroup::found(found, of_process, &name), Some(group));
}

#[test]
fn a_parent_cannot_lead_out_and_nothing_mounted_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mountinfo = format!("30 25 0:29 / {} rw - cgroup2 cgroup2 rw\n", dir.path().display());
    let found = hierarchies(&mountinfo, |_| "cpu".into());
    let name = VmId::new("db").unwrap();
    for wrong in ["", "/abs", "..", "a/../../b"] {
        let refused = Cgroup::enter_in(found.clone(), Path::new(wrong), &name, "1");
        assert!(
            matches!(refused, Err(CgroupError::Parent(_))),
            "{wrong}: {refused:?}"
        );
    }
    assert!(Cgroup::enter_in(Vec::new(), Path::new(PARENT), &name, "1").is_err());
}

#[test]
fn limits_fall_on_the_disk_of_a_partition() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("devices/sda");
    std::fs::create_dir_all(disk.join("sda1")).unwrap();
    std::fs::write(disk.join("dev"), "8:0\n").unwrap();
    std::fs::write(disk.join("sda1/partition"), "1\n").unwrap();
    std::os::unix::fs::symlink(&disk, dir.path().join("8:0")).unwrap();
    std::os::unix::fs::symlink(disk.join("sda1"), dir.path().join("8:1")).unwrap();
    assert_eq!(whole_disk(dir.path(), (8, 1)), Some((8, 0)));
    assert_eq!(whole_disk(dir.path(), (8, 0)), Some((8, 0)));
    assert_eq!(whole_disk(dir.path(), (0, 42)), None);
}
