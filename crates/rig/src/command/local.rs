//! Verbs that need no running rig: `artifacts`, and `up` with what it prepares.

use super::UpOptions;
use super::protocol::control_folder;
use super::{remote, supervisor};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_rig::artifacts::{Cache, Kernel, cache::lock_file, debian::DebianGuest, mini::MiniGuest, root};
use steadfast_rig::error::IoContext;
use steadfast_rig::{Result, RigError, tools};

/// Makes all artefacts and prints their paths, `name path` a line.
pub fn artifacts(with_debian: bool) -> Result<()> {
    let cache = Cache::of_user()?;
    let show = |name: &str, path: &Path| println!("{name:<16} {}", path.display());
    show("cache", cache.root());
    let kernel = Kernel::of(&cache)?;
    show("kernel", &kernel.image);
    show("modules", &kernel.modules());
    show("server-root", &root::image(&cache, &kernel, &[])?);
    let mini = MiniGuest::of(&cache, &kernel)?;
    show("mini-kernel", &mini.kernel);
    show("mini-initrd", &mini.initramfs);
    show("mini-image", &mini.image);
    if with_debian {
        let debian = DebianGuest::of(&cache, &[])?;
        show("debian-kernel", &debian.kernel);
        show("debian-initrd", &debian.initramfs);
        show("debian-raw", &debian.raw);
        show("debian-qcow2", &debian.qcow2);
        show("debian-gpt", &debian.gpt);
        show("debian-image", &debian.image);
    }
    Ok(())
}

/// Starts a rig in the background and waits until it is up.
pub fn up(options: &UpOptions) -> Result<()> {
    let start = Instant::now();
    let folder = control_folder()?;
    std::fs::create_dir_all(&folder).what(|| format!("make {}", folder.display()))?;
    // One `up` at a time; it holds the lock until the supervisor listens.
    let _lock = lock_file(&folder.join("up.lock"), Duration::from_secs(1))?;
    if remote::connect().is_ok() {
        return Err(RigError::Unknown(
            "a rig is running already; `steadfast-rig down` ends it".to_string(),
        ));
    }
    // What takes long the first time happens here, where one can see it.
    let cache = Cache::of_user()?;
    tools::find("qemu-system-x86_64")?;
    let kernel = Kernel::of(&cache)?;
    println!("kernel {}", kernel.release);
    if !options.no_client && !supervisor::with_client(options) {
        println!("no client on the client switch: it takes root");
    }
    root::image(&cache, &kernel, &options.packages)?;
    MiniGuest::of(&cache, &kernel)?;
    if options.debian {
        DebianGuest::of(&cache, &[])?;
    }
    let text = serde_json::to_string(options).map_err(|e| RigError::Unknown(e.to_string()))?;
    let log_path = folder.join("supervisor.log");
    let log = std::fs::File::create(&log_path).what(|| format!("make {}", log_path.display()))?;
    let errors = log.try_clone().what(|| "share the log".to_string())?;
    let program = std::env::current_exe().what(|| "find this program".to_string())?;
    let mut command = Command::new(program);
    command
        .arg("supervise")
        .arg(text)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    // SAFETY: setsid is async-signal-safe and touches no memory: the supervisor outlives this terminal.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    let mut supervisor = command.spawn().what(|| "start the supervisor".to_string())?;
    let bound = Duration::from_secs(180);
    while remote::connect().is_err() {
        if let Some(status) = supervisor
            .try_wait()
            .what(|| "wait for the supervisor".to_string())?
        {
            let said = std::fs::read_to_string(&log_path).unwrap_or_default();
            return Err(RigError::Program {
                program: "the supervisor".to_string(),
                status: status.to_string(),
                detail: tools::tail(said.trim(), 3000).to_string(),
            });
        }
        if start.elapsed() > bound {
            // It must not come up later, behind the back of whoever was told that it failed.
            let _ = supervisor.kill();
            let _ = supervisor.wait();
            return Err(RigError::Timeout {
                what: "the start of the rig".to_string(),
                after_ms: bound.as_millis() as u64,
                detail: format!("; see {}", log_path.display()),
            });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!(
        "{} servers are up after {:.1} s",
        options.servers,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
