//! `steadfast vm` and `steadfast vmm`.

use crate::console::{self, Current, Terminal};
use crate::pool;
use clap::{Args, Subcommand};
use serde_json::Value;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Once;
use std::time::Duration;
use steadfast_machine::machine::ThreadHooks;
use steadfast_protect::ProtectSpec;
use steadfast_types::{HostId, VmId};
use steadfast_vmm::control::{self, Request, Then, ask};
use steadfast_vmm::isolation::Isolation;
use steadfast_vmm::isolation::cgroup::{self, Cgroup, CpuMax, IoMax, Limits, MemoryMax, limits};
use steadfast_vmm::isolation::seccomp::SeccompMode;
use steadfast_vmm::isolation::user::UserChoice;
use steadfast_vmm::last_words::{self, At};
use steadfast_vmm::process::{Ended, Options, ProcessError, Start, run};
use steadfast_vmm::resident;
use steadfast_vmm::spec::{
    Boot, Dirty, DiskSpec, MemoryKind, NicSpec, NicTarget, VmSpec, VsockSpec, parse_mac, parse_size,
};

type Done = Result<(), Box<dyn Error>>;

/// How long a verb waits for the VM's answer; a save of much memory to a slow disk takes its time.
const ANSWER_BOUND: Duration = Duration::from_secs(600);

#[derive(Subcommand)]
pub enum VmVerb {
    /// Boot a VM with its console on this terminal.
    Run(Box<RunArgs>),
    /// Write a running VM to a file; it ends, unless --then says otherwise.
    Save {
        name: VmId,
        /// The file; it appears only when all is on disk.
        file: PathBuf,
        /// stop, pause (until `vm resume`: the restore failed, or `vm stop`) or resume (keep a copy).
        #[arg(long, default_value = "stop", value_parser = ["stop", "pause", "resume"])]
        then: String,
    },
    /// Go on with a saved VM in a new process, its console on this terminal.
    Restore {
        file: PathBuf,
        #[command(flatten)]
        process: ProcessArgs,
    },
    /// What a running VM is doing.
    Status { name: VmId },
    /// Stop all vCPUs and devices of a VM.
    Pause { name: VmId },
    /// Let a paused VM go on.
    Resume { name: VmId },
    /// Ask the guest to give this much memory away in all, e.g. 128MiB; 0 gives everything back.
    Balloon {
        name: VmId,
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Press the power button: the guest shuts itself down.
    Shutdown { name: VmId },
    /// Press the reset button: the guest starts anew at once.
    Reset { name: VmId },
    /// Hand a protected VM over to a standby in sync (planned promote, live migration).
    HandOver { name: VmId, to: HostId },
    /// Stop a VM of the pool: its guest is asked to shut down. A single VM is ended at once, as if its power failed.
    Stop {
        name: VmId,
        /// A VM of the pool too is ended at once.
        #[arg(long)]
        now: bool,
        #[command(flatten)]
        on: pool::OnVm,
    },
    /// Make a VM of the pool, with the settings of `vm run`, and start it where it fits best.
    Create {
        #[command(flatten)]
        machine: Box<RunArgs>,
        #[command(flatten)]
        pool: pool::CreateArgs,
    },
    /// Start a VM of the pool that is off.
    Start {
        name: VmId,
        #[command(flatten)]
        on: pool::OnVm,
    },
    /// Forget a VM of the pool that is off; its disks stay.
    Delete {
        name: VmId,
        #[command(flatten)]
        on: pool::OnVm,
    },
    /// Look after the service in a VM of the pool: how it is checked, and what is done when it fails.
    Health {
        name: VmId,
        #[command(flatten)]
        health: pool::settings::HealthArgs,
        #[command(flatten)]
        on: pool::OnVm,
    },
    /// Limit what a VM of the pool may use of its host, wherever it runs. (`limits` is for a single VM.)
    Limit {
        name: VmId,
        #[command(flatten)]
        limits: pool::settings::LimitArgs,
        #[command(flatten)]
        on: pool::OnVm,
    },
    /// Change a VM's place in the pool: priority, standbys, dependencies, groups, application.
    Set {
        name: VmId,
        #[command(flatten)]
        set: pool::settings::SetArgs,
        #[command(flatten)]
        on: pool::OnVm,
    },
    /// All VMs of the pool.
    List {
        #[command(flatten)]
        folders: pool::FolderArgs,
    },
    /// All that is known of a VM of the pool.
    Show {
        name: VmId,
        #[command(flatten)]
        folders: pool::FolderArgs,
    },
    /// The end of what a VM of the pool has written to its console.
    Console {
        name: VmId,
        #[command(flatten)]
        folders: pool::FolderArgs,
    },
    /// Show a running VM's limits, or change those that are given.
    Limits {
        name: VmId,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// Type text into a VM's serial port.
    Type { name: VmId, text: String },
}

#[derive(Args)]
pub struct ProcessArgs {
    /// Append the serial port's output to this file instead of the terminal.
    #[arg(long)]
    console: Option<PathBuf>,
    /// Append debug console output (port 0xe9) to this file.
    #[arg(long)]
    debugcon: Option<PathBuf>,
    /// Start paused; `vm resume` lets it go.
    #[arg(long)]
    paused: bool,
    /// Reset a guest whose kernel panicked and that has not started itself anew within 10 s (with a crash kernel: 10 minutes).
    #[arg(long)]
    reset_panicked: bool,
    /// User that the VM's process becomes if started as root: NAME, UID or UID:GID; by default one of the VM's own.
    #[arg(long, value_parser = UserChoice::parse)]
    user: Option<UserChoice>,
    /// Parent of the VM's cgroup, below the hierarchy's root; `off`: none, and no limits.
    #[arg(long, default_value = steadfast_vmm::isolation::cgroup::PARENT)]
    cgroup: PathBuf,
    #[command(flatten)]
    limits: LimitArgs,
}

/// What a VM may use of its host.
#[derive(Args, Clone, Copy)]
pub struct LimitArgs {
    /// Share when CPUs are short: 1 to 10000, 100 is normal.
    #[arg(long, value_parser = limits::parse_weight)]
    cpu_weight: Option<u32>,
    /// Most CPU time, in percent of one core, e.g. 150%; or max.
    #[arg(long, value_parser = limits::parse_cpu_max)]
    cpu_max: Option<CpuMax>,
    /// Most memory of guest and monitor together, e.g. 2GiB, or max; beyond it the VM is ended. By default RAM and a margin.
    #[arg(long, value_parser = limits::parse_memory_max)]
    memory_max: Option<MemoryMax>,
    /// Most I/O per second on each of its disks: read=SIZE,write=SIZE,read-ops=N,write-ops=N, each optional; or max.
    #[arg(long, value_parser = limits::parse_io_max)]
    io_max: Option<IoMax>,
}

impl LimitArgs {
    fn limits(self) -> Limits {
        Limits {
            cpu_weight: self.cpu_weight,
            cpu_max: self.cpu_max,
            memory_max: self.memory_max,
            io_max: self.io_max,
        }
    }
}

impl ProcessArgs {
    fn isolation(&self) -> Result<Isolation, String> {
        Ok(Isolation {
            user: self.user.clone().unwrap_or_default(),
            seccomp: SeccompMode::from_env()?,
            cgroup: (self.cgroup.as_os_str() != "off").then(|| self.cgroup.clone()),
            limits: self.limits.limits(),
        })
    }
}

#[derive(Args)]
pub struct RunArgs {
    /// Disk image to boot from, raw or qcow2: the guest's own kernel and command line are used.
    image: Option<PathBuf>,
    /// Kernel to boot instead: bzImage or ELF.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel.
    #[arg(long, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line; added to the image's own when booting from an image.
    #[arg(long)]
    cmdline: Option<String>,
    /// Flat 64-bit test guest (ELF) that starts on all vCPUs.
    #[arg(long, conflicts_with_all = ["kernel", "image"])]
    flat: Option<PathBuf>,
    /// Name of the VM.
    #[arg(long, default_value = "vm")]
    name: VmId,
    /// Number of vCPUs, 1 to 64.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// RAM, e.g. 512MiB or 4GiB.
    #[arg(long, default_value = "512MiB", value_parser = parse_size)]
    memory: u64,
    /// RAM on huge pages where the host gives them.
    #[arg(long, conflicts_with = "memory_file")]
    huge_pages: bool,
    /// RAM in this file.
    #[arg(long)]
    memory_file: Option<PathBuf>,
    /// CPU that the guest sees: host, x86-64-v2 or x86-64-v3.
    #[arg(long, default_value = "host")]
    cpu: String,
    /// One more disk: PATH[,format=raw|qcow2][,ro][,direct][,queues=N][,serial=TEXT]. May be repeated.
    #[arg(long, value_parser = parse_disk)]
    disk: Vec<DiskSpec>,
    /// Network card: BRIDGE, tap:NAME or socket:OWN:PEER, each with [,mac=..][,mtu=..]. May be repeated.
    #[arg(long, value_parser = parse_nic)]
    nic: Vec<NicSpec>,
    /// cloud-init user-data, given as a NoCloud seed.
    #[arg(long)]
    cloud_init: Option<PathBuf>,
    /// Entropy device.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    rng: bool,
    /// Memory balloon.
    #[arg(long)]
    balloon: bool,
    /// vsock device: CID:PATH of the host's unix socket.
    #[arg(long, value_parser = parse_vsock)]
    vsock: Option<VsockSpec>,
    /// A vsock device for the guest's agent (qemu-ga) and for heartbeats of its application; the guest has CID 3.
    #[arg(long, conflicts_with = "vsock")]
    agent: bool,
    /// A watchdog that the guest may start (ACPI WDAT; Linux: wdat_wdt): it is reset when it hangs.
    #[arg(long)]
    watchdog: bool,
    /// Virtio console beside the serial port, its output appended to this file.
    #[arg(long)]
    virtio_console: Option<PathBuf>,
    /// UUID or label of the boot file system, where an image has several.
    #[arg(long)]
    boot_fs: Option<String>,
    #[command(flatten)]
    process: ProcessArgs,
    /// Print the specification as JSON and exit.
    #[arg(long)]
    print_spec: bool,
}

#[derive(Args)]
pub struct VmmArgs {
    /// Specification of the VM, JSON; `-` is stdin.
    #[arg(long, required_unless_present = "restore")]
    spec: Option<PathBuf>,
    /// Saved VM to go on with.
    #[arg(long, conflicts_with = "spec")]
    restore: Option<PathBuf>,
    /// How the VM is protected (JSON): this host's name, its peers, the store.
    #[arg(long, requires = "spec")]
    protect: Option<PathBuf>,
    /// For tests: features of the guest's CPU that this host is to lack. May be repeated.
    #[arg(long, hide = true)]
    cpu_without: Vec<String>,
    /// File name of the control socket instead of the VM's name, where one host runs several instances of a VM.
    #[arg(long)]
    instance: Option<VmId>,
    /// Ends when this process, which started it, does, however that happens. For a VM that is nobody's but its starter's.
    #[arg(long, value_name = "PID")]
    end_with: Option<i32>,
    #[command(flatten)]
    process: ProcessArgs,
}

fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let mut parts = text.split(',');
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("a disk needs a path")?;
    let mut disk = DiskSpec {
        path: path.into(),
        format: None,
        read_only: false,
        direct: false,
        queues: 0,
        serial: String::new(),
    };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => disk.read_only = true,
            None if part == "direct" => disk.direct = true,
            Some(("format", v @ ("raw" | "qcow2"))) => disk.format = Some(v.into()),
            Some(("queues", v)) => disk.queues = v.parse().map_err(|_| format!("queues={v} is no number"))?,
            Some(("serial", v)) => disk.serial = v.into(),
            _ => {
                return Err(format!(
                    "{part:?} is no disk setting; known: format=raw|qcow2, ro, direct, queues=N, serial=TEXT"
                ));
            }
        }
    }
    Ok(disk)
}

fn parse_nic(text: &str) -> Result<NicSpec, String> {
    let mut parts = text.split(',');
    let target = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("a card needs a bridge")?;
    let to = match target.split_once(':') {
        None => NicTarget::Bridge(target.into()),
        Some(("bridge", name)) => NicTarget::Bridge(name.into()),
        Some(("tap", name)) => NicTarget::Tap(name.into()),
        Some(("socket", paths)) => {
            let (own, peer) = paths.split_once(':').ok_or("write socket:OWN:PEER")?;
            NicTarget::Socket {
                own: own.into(),
                peer: peer.into(),
            }
        }
        Some((kind, _)) => {
            return Err(format!(
                "{kind:?} is nothing to plug a card into; use BRIDGE, tap:NAME or socket:OWN:PEER"
            ));
        }
    };
    let mut nic = NicSpec {
        to,
        mac: None,
        mtu: None,
    };
    for part in parts {
        match part.split_once('=') {
            Some(("mac", v)) => nic.mac = Some(parse_mac(v).map(|_| v.to_owned())?),
            Some(("mtu", v)) => nic.mtu = Some(v.parse().map_err(|_| format!("mtu={v} is no number"))?),
            _ => {
                return Err(format!(
                    "{part:?} is no card setting; known: mac=XX:XX:XX:XX:XX:XX, mtu=N"
                ));
            }
        }
    }
    Ok(nic)
}

/// What the guest of `--agent` is called on its vsock.
const AGENT_CID: u64 = 3;

fn parse_vsock(text: &str) -> Result<VsockSpec, String> {
    let (cid, path) = text.split_once(':').ok_or("write CID:PATH")?;
    let cid = cid
        .parse()
        .ok()
        .filter(|c| (3..u64::from(u32::MAX)).contains(c))
        .ok_or("the CID is a number from 3")?;
    Ok(VsockSpec {
        cid,
        path: path.into(),
    })
}

/// The specification. `sockets`: the folder of sockets that nobody named.
fn spec_of(args: &RunArgs, sockets: &Path) -> Result<VmSpec, Box<dyn Error>> {
    let mut disks = args.disk.clone();
    let boot = match (&args.flat, &args.kernel, &args.image) {
        (Some(elf), ..) => Boot::Flat {
            elf: elf.clone(),
            cmdline: args.cmdline.clone().unwrap_or_default(),
        },
        (None, Some(kernel), image) => {
            if let Some(image) = image {
                disks.insert(0, parse_disk(&image.to_string_lossy())?);
            }
            Boot::Kernel {
                kernel: kernel.clone(),
                initrd: args.initrd.clone(),
                cmdline: args.cmdline.clone().unwrap_or_else(|| "console=ttyS0".into()),
            }
        }
        (None, None, Some(image)) => {
            disks.insert(0, parse_disk(&image.to_string_lossy())?);
            Boot::Disk {
                file_system: args.boot_fs.clone(),
                cmdline_extra: args.cmdline.clone().unwrap_or_default(),
            }
        }
        (None, None, None) => return Err("nothing to boot: give a disk image, or --kernel".into()),
    };
    Ok(VmSpec {
        name: args.name.clone(),
        vcpus: args.cpus,
        memory_bytes: args.memory,
        memory: match &args.memory_file {
            Some(path) => MemoryKind::File(path.clone()),
            None if args.huge_pages => MemoryKind::Huge,
            None => MemoryKind::Anonymous,
        },
        cpu: args.cpu.parse()?,
        boot,
        disks,
        nics: args.nic.clone(),
        rng: args.rng,
        virtio_console: args.virtio_console.clone(),
        balloon: args.balloon,
        watchdog: args.watchdog,
        vsock: args.vsock.clone().or_else(|| {
            args.agent.then(|| VsockSpec {
                cid: AGENT_CID,
                path: sockets.join(format!("{}.vsock", args.name)),
            })
        }),
        cloud_init: args.cloud_init.clone(),
        dirty: Dirty::default(),
    })
}

/// Where control sockets are: `$STEADFAST_RUN_DIR`, or `/run/steadfast`.
fn run_dir() -> PathBuf {
    std::env::var_os("STEADFAST_RUN_DIR").map_or_else(|| PathBuf::from("/run/steadfast"), PathBuf::from)
}

fn control_path(name: &VmId) -> PathBuf {
    run_dir().join(format!("{name}.sock"))
}

fn start(name: &VmId, start: Start, args: &ProcessArgs) -> Done {
    last_words::of_requests(At::MainLoop);
    with_options(name, args, |options| run(start, options))
}

fn with_options(
    name: &VmId,
    args: &ProcessArgs,
    run: impl FnOnce(Options) -> Result<Ended, ProcessError>,
) -> Done {
    let dir = run_dir();
    std::fs::create_dir_all(&dir).map_err(|e| {
        format!(
            "{}: {e}; set STEADFAST_RUN_DIR to a folder of yours",
            dir.display()
        )
    })?;
    let current = Current::default();
    let escape_to = control_path(name);
    let log = console::open(args.console.as_deref())?;
    let debugcon = args
        .debugcon
        .as_deref()
        .map(|p| console::open(Some(p)))
        .transpose()?;
    last_words::of_faults();
    let terminal = args.console.is_none().then(Terminal::raw);
    let feeds = args.console.is_none().then(Once::new);
    let options = Options {
        control: Some(control_path(name)),
        serial: Box::new(move || console::sink(&log)),
        debugcon: Box::new(move || debugcon.as_ref().map(console::sink)),
        on_serial: Box::new(move |port| {
            *current.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(port.clone());
            if let Some(feeds) = &feeds {
                // Not earlier: the process gives up its privileges while it has one thread.
                feeds.call_once(|| {
                    let escape_to = escape_to.clone();
                    console::feed(current.clone(), move || {
                        let _ = ask(&escape_to, &Request::Stop, Duration::from_secs(10));
                    });
                });
            }
        }),
        paused: args.paused,
        reset_panicked: args.reset_panicked,
        hooks: ThreadHooks::default(),
        isolation: Some(args.isolation()?),
    };
    let ended = run(options);
    drop(terminal);
    eprintln!("steadfast: VM {name} ended: {}", ended?);
    Ok(())
}

fn saved_name(file: &Path) -> Result<VmId, Box<dyn Error>> {
    let saved = steadfast_machine::state::SaveReader::open(file)?;
    let spec: VmSpec = serde_json::from_slice(&saved.spec)?;
    Ok(spec.name)
}

/// Runs `steadfast vmm`.
pub fn run_vmm(args: VmmArgs) -> Done {
    resident::stay(resident::VM);
    if let Some(starter) = args.end_with {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // It may have ended before that.
        if rustix::process::getppid() != rustix::process::Pid::from_raw(starter) {
            return Err(format!("process {starter}, which this VM shall end with, has ended").into());
        }
    }
    if let Some(file) = args.restore {
        return start(&saved_name(&file)?, Start::Restore(file), &args.process);
    }
    let path = args.spec.ok_or("give --spec or --restore")?;
    let text = match path.as_os_str().as_encoded_bytes() {
        b"-" => std::io::read_to_string(std::io::stdin())?,
        _ => std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?,
    };
    let spec: VmSpec = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let name = args.instance.clone().unwrap_or_else(|| spec.name.clone());
    let Some(protect) = args.protect else {
        return start(&name, Start::Boot(Box::new(spec)), &args.process);
    };
    let text = std::fs::read_to_string(&protect).map_err(|e| format!("{}: {e}", protect.display()))?;
    let mut protect: ProtectSpec =
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", protect.display()))?;
    protect.cpu_without.extend(args.cpu_without);
    last_words::of_requests(At::Once);
    if let Err(error) = Cgroup::enter_of_pool(&name) {
        tracing::warn!(%error, "limits of this VM cannot be set");
    }
    with_options(&name, &args.process, |options| {
        steadfast_protect::run(spec, protect, options)
    })
}

/// Runs `steadfast vm VERB`.
pub fn run_verb(verb: VmVerb, json: bool) -> Result<ExitCode, Box<dyn Error>> {
    match verb {
        VmVerb::Create {
            machine,
            pool: settings,
        } => pool::create(spec_of(&machine, Path::new("{run}"))?, settings, json),
        VmVerb::Start { name, on } => pool::start(&name, &on, json),
        VmVerb::Delete { name, on } => pool::delete(&name, &on, json),
        VmVerb::Health { name, health, on } => pool::settings::health(&name, health, &on, json),
        VmVerb::Limit { name, limits, on } => pool::settings::limit(&name, limits, &on, json),
        VmVerb::Set { name, set, on } => pool::settings::set_vm(&name, set, &on, json),
        VmVerb::List { folders } => pool::list(&folders, json),
        VmVerb::Show { name, folders } => pool::show(&name, &folders, json),
        VmVerb::Console { name, folders } => pool::console(&name, &folders, json),
        VmVerb::Stop { name, now, on } => {
            if let Some(done) = pool::stop(&name, now, &on, json) {
                return done;
            }
            run_single(VmVerb::Stop { name, now, on }, json).map(|()| ExitCode::SUCCESS)
        }
        single => run_single(single, json).map(|()| ExitCode::SUCCESS),
    }
}

fn run_single(verb: VmVerb, json: bool) -> Done {
    let (name, request) = match verb {
        VmVerb::Run(args) => {
            let spec = spec_of(&args, &run_dir())?;
            if args.print_spec {
                println!("{}", serde_json::to_string_pretty(&spec)?);
                return Ok(());
            }
            return start(&spec.name.clone(), Start::Boot(Box::new(spec)), &args.process);
        }
        VmVerb::Restore { file, process } => {
            return start(&saved_name(&file)?, Start::Restore(file), &process);
        }
        VmVerb::Save { name, file, then } => {
            let then = match then.as_str() {
                "pause" => Then::Pause,
                "resume" => Then::Resume,
                _ => Then::Stop,
            };
            let answer = control::save(
                &control_path(&name),
                &std::path::absolute(file)?,
                then,
                ANSWER_BOUND,
            )?;
            print_answer(&answer, json);
            return Ok(());
        }
        VmVerb::Limits { name, limits } => return limit(&name, limits.limits(), json),
        VmVerb::Status { name } => (name, Request::Status),
        VmVerb::Pause { name } => (name, Request::Pause),
        VmVerb::Resume { name } => (name, Request::Resume),
        VmVerb::Balloon { name, size } => (name, Request::Balloon { bytes: size }),
        VmVerb::Shutdown { name } => (name, Request::PowerButton),
        VmVerb::Reset { name } => (name, Request::Reset),
        VmVerb::HandOver { name, to } => (name, Request::HandOver { to }),
        VmVerb::Stop { name, .. } => (name, Request::Stop),
        VmVerb::Create { .. }
        | VmVerb::Start { .. }
        | VmVerb::Delete { .. }
        | VmVerb::Health { .. }
        | VmVerb::Limit { .. }
        | VmVerb::Set { .. }
        | VmVerb::List { .. }
        | VmVerb::Show { .. }
        | VmVerb::Console { .. } => return Err("this is a verb of the pool".into()),
        VmVerb::Type { name, text } => (name, Request::Type { text }),
    };
    let answer = ask(&control_path(&name), &request, ANSWER_BOUND)?;
    print_answer(&answer, json);
    Ok(())
}

/// Changes limits from outside: a VM's process cannot raise its own.
fn limit(name: &VmId, wanted: Limits, json: bool) -> Done {
    let pid = control::served_by(&control_path(name))?;
    let group = Cgroup::of_process(pid, name)?;
    if !wanted.is_empty() {
        let disks = cgroup::disks_of_process(pid);
        if wanted.io_max.is_some() && disks.is_empty() {
            return Err(
                "no disk of this VM can be limited: its images are on no block device of this host".into(),
            );
        }
        group.set(&wanted, &disks)?;
    }
    let mut shown = serde_json::Map::new();
    for (file, text) in group.show() {
        shown.insert(file, text.into());
    }
    print_answer(&Value::Object(shown), json);
    Ok(())
}

fn print_answer(answer: &Value, json: bool) {
    if json {
        println!("{answer}");
    } else if let Some(map) = answer.as_object() {
        for (key, value) in map.iter().filter(|(k, _)| *k != "ok") {
            match value {
                Value::String(text) => println!("{key}: {text}"),
                other => println!("{key}: {other}"),
            }
        }
    }
}
