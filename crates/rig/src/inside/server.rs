//! Process 1 of a simulated server: the two stages of its start.

use super::{CONFIG_PATH, NicConfig, ServerConfig, agent, disks, modules, sys};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The serial number of the disk that holds the root file system.
pub const ROOT_SERIAL: &str = "rigroot";
/// Modules that stage 1 needs; they are in the initramfs.
pub const BOOT_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "overlay",
];
/// Modules that stage 2 loads from the root disk: KVM, what a VM's network needs, what faults need.
pub const SERVER_MODULES: &[&str] = &[
    "kvm_amd",
    "tun",
    "bridge",
    "veth",
    "macvtap",
    "vhost_net",
    "vhost_vsock",
    "dm_mod",
    "softdog",
];

const STAGE_2: &str = "steadfast-rig-stage-2";

/// True when the arguments are those of stage 2.
pub fn is_stage_2(argument: &str) -> bool {
    argument == STAGE_2
}

/// Says something on the console.
fn say(text: &str) {
    if let Ok(mut console) = std::fs::OpenOptions::new().write(true).open("/dev/console") {
        // The console is for people; nothing depends on it.
        let _ = writeln!(console, "rig: {text}");
    }
}

fn fatal(text: &str) -> ! {
    say(&format!("FATAL: {text}"));
    // Give the serial line time to carry the words out, then end the machine, so that the rig sees it at once.
    std::thread::sleep(Duration::from_millis(300));
    sys::power_off();
    std::process::exit(1)
}

/// Stage 1, in the initramfs. Never returns.
pub fn stage_1() -> ! {
    if let Err(e) = early_mounts() {
        fatal(&format!("early mounts: {e}"));
    }
    let config = std::fs::read_to_string(CONFIG_PATH).unwrap_or_default();
    let failures = modules::load(BOOT_MODULES);
    if let Err(e) = real_root() {
        fatal(&format!("root: {e} {failures:?}"));
    }
    use std::os::unix::process::CommandExt;
    let error = Command::new("/proc/self/exe")
        .arg(STAGE_2)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/root")
        .env("TERM", "linux")
        .env("LANG", "C.UTF-8")
        .env("DM_DISABLE_UDEV", "1")
        .env("RIG_CONFIG", config)
        .exec();
    fatal(&format!("stage 2: {error}"))
}

/// `/dev` and `/sys`; `/proc` is there already.
pub fn early_mounts() -> std::io::Result<()> {
    sys::mount("devtmpfs", "/dev", "devtmpfs", libc::MS_NOSUID, "")?;
    sys::mount("sysfs", "/sys", "sysfs", 0, "")
}

fn real_root() -> std::io::Result<()> {
    let device = disks::by_serial(ROOT_SERIAL, Duration::from_secs(10))?;
    sys::mount(
        &device.to_string_lossy(),
        "/lower",
        "ext4",
        libc::MS_RDONLY,
        "noload",
    )?;
    sys::mount("tmpfs", "/upper", "tmpfs", 0, "mode=755,size=50%")?;
    std::fs::create_dir_all("/upper/data")?;
    std::fs::create_dir_all("/upper/work")?;
    let layers = "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work";
    sys::mount("overlay", "/newroot", "overlay", 0, layers)?;
    sys::switch_root("/newroot")
}

/// Stage 2, in the real root. Never returns.
pub fn stage_2() -> ! {
    name_process("rig-init");
    let mut failures = Vec::new();
    let config: ServerConfig = match std::env::var("RIG_CONFIG").map(|text| serde_json::from_str(&text)) {
        Ok(Ok(config)) => config,
        other => {
            failures.push(format!("configuration: {other:?}"));
            ServerConfig::default()
        }
    };
    let mut note = |what: &str, result: Result<(), String>| {
        if let Err(e) = result {
            failures.push(format!("{what}: {e}"));
        }
    };
    note("mounts", late_mounts().map_err(|e| e.to_string()));
    note("names", names(&config).map_err(|e| e.to_string()));
    failures.extend(modules::load(SERVER_MODULES));
    let mut note = |what: &str, result: Result<(), String>| {
        if let Err(e) = result {
            failures.push(format!("{what}: {e}"));
        }
    };
    note("network", network(&config.nics));
    for mount in &config.mounts {
        note("disks", disks::attach(mount));
    }
    for failure in &failures {
        say(failure);
    }
    match sys::fork_single_threaded() {
        Ok(None) => {
            name_process("rig-agent");
            let error = agent::serve(&config.name, failures);
            say(&format!("agent ended: {error}"));
            std::process::exit(1)
        }
        Ok(Some(agent)) => {
            sys::reap_until(agent);
            fatal("the agent is gone")
        }
        Err(e) => fatal(&format!("fork: {e}")),
    }
}

/// What `ps` shows; without it every process of this program is called `exe`.
fn name_process(name: &str) {
    // Only for people.
    let _ = std::fs::write("/proc/self/comm", name);
}

fn late_mounts() -> std::io::Result<()> {
    sys::mount(
        "devpts",
        "/dev/pts",
        "devpts",
        libc::MS_NOSUID | libc::MS_NOEXEC,
        "mode=620,ptmxmode=666",
    )?;
    sys::mount("tmpfs", "/dev/shm", "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "")?;
    sys::mount(
        "tmpfs",
        "/run",
        "tmpfs",
        libc::MS_NOSUID | libc::MS_NODEV,
        "mode=755",
    )?;
    sys::mount("tmpfs", "/tmp", "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "")?;
    sys::mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")?;
    // All controllers for the children of the root, as systemd leaves a host.
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in controllers.split_whitespace() {
        // A controller that cannot be delegated is no reason not to come up.
        let _ = std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}"));
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, format!("/dev/{link}"));
    }
    Ok(())
}

fn names(config: &ServerConfig) -> std::io::Result<()> {
    sys::set_hostname(&config.name)?;
    std::fs::write("/etc/hostname", format!("{}\n", config.name))?;
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    for (address, name) in &config.hosts {
        let _ = writeln!(hosts, "{address} {name}");
    }
    std::fs::write("/etc/hosts", hosts)
}

/// Names of the NICs by MAC address; those of the kernel are in no order that can be relied on.
fn nics_by_mac() -> std::io::Result<HashMap<String, String>> {
    let mut found = HashMap::new();
    for entry in std::fs::read_dir("/sys/class/net")?.flatten() {
        let mac = std::fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        found.insert(
            mac.trim().to_string(),
            entry.file_name().to_string_lossy().into_owned(),
        );
    }
    Ok(found)
}

fn network(nics: &[NicConfig]) -> Result<(), String> {
    let found = nics_by_mac().map_err(|e| e.to_string())?;
    let mut batch = String::from("link set lo up\n");
    let mut missing = Vec::new();
    for nic in nics {
        let Some(kernel_name) = found.get(&nic.mac) else {
            missing.push(format!("no NIC with MAC {} for {}", nic.mac, nic.name));
            continue;
        };
        let NicConfig {
            name,
            address,
            mtu,
            mac,
            ..
        } = nic;
        let _ = writeln!(batch, "link set {kernel_name} name {name} mtu {mtu}");
        if let Some(bridge) = &nic.bridge {
            // Forward delay 0: a port forwards at once. The bridge has the NIC's MAC, so its address never changes.
            let _ = writeln!(
                batch,
                "link add {bridge} address {mac} type bridge forward_delay 0 stp_state 0"
            );
            let _ = writeln!(batch, "link set {name} master {bridge} up");
            let _ = writeln!(
                batch,
                "link set {bridge} mtu {mtu} up\naddress add {address} dev {bridge}"
            );
        } else {
            let _ = writeln!(batch, "link set {name} up\naddress add {address} dev {name}");
        }
    }
    let said = ip_batch(&batch)?;
    if !said.is_empty() {
        missing.push(said);
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(missing.join("; "))
    }
}

/// One `ip` for all: each start of a program costs tens of milliseconds under software emulation.
fn ip_batch(batch: &str) -> Result<String, String> {
    let mut ip = Command::new("ip")
        .args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("ip: {e}"))?;
    if let Some(mut stdin) = ip.stdin.take() {
        stdin
            .write_all(batch.as_bytes())
            .map_err(|e| format!("ip: {e}"))?;
    }
    let done = ip.wait_with_output().map_err(|e| format!("ip: {e}"))?;
    Ok(String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; "))
}
